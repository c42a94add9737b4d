//! The register tile that both phases spend most of their time in: R rows times a few vectors,
//! updated once per step of the inner dimension by R broadcasts and those vectors.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use super::ahead::Ahead;
use super::panels::Panel;
use super::simd::{Accumulator, Convert, Kernel, Simd, Vector};

/// Σ over `depth` steps of a (R numbers, `a_row` apart, `a_step` per step) times b (one row of C
/// whole vectors and, if H is 1, half a one, `b_step` per step).
#[inline(always)]
unsafe fn product<S: Simd, const R: usize, const C: usize, const H: usize>(
    depth: usize,
    mut a: *const S::Number,
    a_row: usize,
    a_step: usize,
    mut b: *const S::Number,
    b_step: usize,
    ahead: &mut Ahead,
) -> TileSums<S, R, C, H> {
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `depth` steps of R readable numbers and of a row of readable ones.
    unsafe {
        let mut full = [[S::Full::splat(S::Number::ZERO); C]; R];
        let mut half = [[S::Half::splat(S::Number::ZERO); H]; R];
        for _ in 0..depth {
            ahead.fetch();
            let mut row_full = [S::Full::splat(S::Number::ZERO); C];
            let mut row_half = [S::Half::splat(S::Number::ZERO); H];
            for c in 0..C {
                row_full[c] = S::Full::load(b.add(c * lanes));
            }
            for h in 0..H {
                row_half[h] = S::Half::load(b.add(C * lanes));
            }
            for r in 0..R {
                let number = *a.add(r * a_row);
                let factor = S::Full::splat(number);
                for c in 0..C {
                    full[r][c] = factor.mul_add(row_full[c], full[r][c]);
                }
                let factor = S::Half::splat(number);
                for h in 0..H {
                    half[r][h] = factor.mul_add(row_half[h], half[r][h]);
                }
            }
            a = a.add(a_step);
            b = b.add(b_step);
        }
        (full, half)
    }
}

/// R rows of C whole vectors, and R rows of at most one half vector.
type TileSums<S, const R: usize, const C: usize, const H: usize> =
    ([[<S as Simd>::Full; C]; R], [[<S as Simd>::Half; H]; R]);

/// Adds φ(k)ᵀv of one block to R rows of one panel of the sums.
#[derive(Clone, Copy)]
pub(super) struct AddTile<S: Simd> {
    /// Rows of the block.
    pub(super) depth: usize,
    /// φ(k) and the numbers from one of its rows to the next.
    pub(super) a: *const S::Number,
    pub(super) a_step: usize,
    /// The panel's columns of v, likewise.
    pub(super) b: *const S::Number,
    pub(super) b_step: usize,
    /// The panel of the sums and the length of its rows.
    pub(super) c: *mut S::Number,
    pub(super) width: usize,
    pub(super) ahead: *mut Ahead,
}

struct AddTileOf<S: Simd, const R: usize, const C: usize, const H: usize>(AddTile<S>);

impl<S: Simd, const R: usize, const C: usize, const H: usize> Kernel for AddTileOf<S, R, C, H> {
    #[inline(always)]
    unsafe fn run(self) {
        let t = self.0;
        let lanes = S::Full::LANES;
        // SAFETY: `AddTile::all_rows` keeps R rows of a and c inside their panels; nobody else uses
        // `ahead`.
        unsafe {
            let (full, half) =
                product::<S, R, C, H>(t.depth, t.a, 1, t.a_step, t.b, t.b_step, &mut *t.ahead);
            for r in 0..R {
                let to = t.c.add(r * t.width);
                for c in 0..C {
                    let at = to.add(c * lanes);
                    S::Full::load(at).add(full[r][c]).store(at);
                }
                for h in 0..H {
                    let at = to.add(C * lanes);
                    S::Half::load(at).add(half[r][h]).store(at);
                }
            }
        }
    }
}

/// Writes R rows of one panel of the output.
#[derive(Clone, Copy)]
pub(super) struct WriteTile<S: Simd, T> {
    /// D.
    pub(super) depth: usize,
    /// φ(q) and the numbers from one of its rows to the next.
    pub(super) a: *const S::Number,
    pub(super) a_row: usize,
    /// The panel of the sums and the length of its rows.
    pub(super) b: *const S::Number,
    pub(super) width: usize,
    /// One over the normaliser, per row.
    pub(super) inverse: *const S::Number,
    /// The panel's columns of the output that exist, and the elements from one row to the next.
    pub(super) out: *mut T,
    pub(super) out_stride: usize,
    pub(super) columns: usize,
    pub(super) ahead: *mut Ahead,
}

struct WriteTileOf<S: Simd, T, const R: usize, const C: usize, const H: usize>(WriteTile<S, T>);

impl<S, T, const R: usize, const C: usize, const H: usize> Kernel for WriteTileOf<S, T, R, C, H>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let t = self.0;
        let lanes = S::Full::LANES;
        // SAFETY: `WriteTile::all_rows` keeps R rows inside the block; `columns` of each row of
        // the output exist.
        unsafe {
            let (full, half) =
                product::<S, R, C, H>(t.depth, t.a, t.a_row, 1, t.b, t.width, &mut *t.ahead);
            for r in 0..R {
                let to = t.out.add(r * t.out_stride);
                let inverse = *t.inverse.add(r);
                let factor = S::Full::splat(inverse);
                for c in 0..C {
                    let value = full[r][c].mul(factor);
                    let left = t.columns - c * lanes;
                    if left >= lanes {
                        S::write(value, to.add(c * lanes));
                    } else {
                        S::write_part(value, to.add(c * lanes), left);
                    }
                }
                let factor = S::Half::splat(inverse);
                for h in 0..H {
                    let value = half[r][h].mul(factor);
                    S::write_half(value, to.add(C * lanes), t.columns - C * lanes);
                }
            }
        }
    }
}

/// Calls the tile of R rows compiled for the panel's columns. Combinations that the instruction
/// set never asks for are not compiled.
macro_rules! call_tile {
    ($kind:tt, $task:expr, $panel:expr, $rows:expr) => {
        call_tile!(@columns $kind, $task, $panel, $rows,
            (0, 1) (1, 0) (1, 1) (2, 0) (2, 1) (3, 0) (3, 1) (4, 0) (4, 1) (5, 0))
    };
    (@columns $kind:tt, $task:expr, $panel:expr, $rows:expr, $(($c:literal, $h:literal))*) => {
        match ($panel.full, usize::from($panel.half)) {
            $(($c, $h) => {
                if const { S::TILE.has_tile($c, $h) } {
                    call_tile!(@rows $kind, $task, $rows, $c, $h, 8 6 5 4 2 1)
                }
            })*
            _ => unreachable!("panels are cut to the tile shape"),
        }
    };
    (@rows $kind:tt, $task:expr, $rows:expr, $c:literal, $h:literal, $($r:literal)*) => {
        match $rows {
            $($r => {
                if const { $r <= 4 || S::TILE.rows[$c + $h] == $r } {
                    S::vectorize(call_tile!(@make $kind, $task, $r, $c, $h))
                }
            })*
            _ => unreachable!("tile_rows gives one of these"),
        }
    };
    (@make add, $task:expr, $r:literal, $c:literal, $h:literal) => {
        AddTileOf::<S, $r, $c, $h>($task)
    };
    (@make write, $task:expr, $r:literal, $c:literal, $h:literal) => {
        WriteTileOf::<S, T, $r, $c, $h>($task)
    };
}

/// Rows of the next tile where `left` are left.
fn tile_rows<S: Simd>(panel: &Panel, left: usize) -> usize {
    let most = S::TILE.rows[panel.register_columns()];
    match left {
        n if n >= most => most,
        n if n >= 4 => 4,
        n if n >= 2 => 2,
        _ => 1,
    }
}

impl<S: Simd> AddTile<S> {
    #[inline(always)]
    pub(super) unsafe fn all_rows(mut self, rows: usize, panel: &Panel) {
        let mut left = rows;
        while left > 0 {
            let take = tile_rows::<S>(panel, left);
            // SAFETY: `take` rows are left in a and c.
            unsafe {
                call_tile!(add, self, panel, take);
                self.a = self.a.add(take);
                self.c = self.c.add(take * self.width);
            }
            left -= take;
        }
    }
}

impl<S: Convert<T>, T: Copy> WriteTile<S, T> {
    #[inline(always)]
    pub(super) unsafe fn all_rows(mut self, rows: usize, panel: &Panel) {
        let mut left = rows;
        while left > 0 {
            let take = tile_rows::<S>(panel, left);
            // SAFETY: `take` rows are left in a, inverse and out.
            unsafe {
                call_tile!(write, self, panel, take);
                self.a = self.a.add(take * self.a_row);
                self.inverse = self.inverse.add(take);
                self.out = self.out.add(take * self.out_stride);
            }
            left -= take;
        }
    }
}
