//! The two products, for any instruction set and element type.
//!
//! Phase 1 ([`Accumulate`]) takes some rows of k and v of one head and adds up φ(k)ᵀv and φ(k).
//! Phase 2 ([`Apply`]) takes some rows of q and multiplies φ(q) with the finished sums.
//!
//! Both run one micro-kernel: a register tile of R rows times a few vectors, updated once per
//! step of the inner dimension by R broadcasts and those vectors. φ is taken once per element into
//! a scratch block that stays in the first-level cache, and q, k and v are read straight from
//! their layout, converted on the way.
//!
//! In the packed layout the heads lie side by side in each row, so a task takes the same rows of
//! several heads in turn: read head by head, every page would be walked once per head, and
//! address translation would cost more than the arithmetic.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use std::marker::PhantomData;

use super::panels::Panel;
use super::simd::{Accumulator, Convert, Kernel, Simd, Vector};

/// Rows of k and v that are transformed before they are multiplied. Also the length of the inner
/// sums: partial results of this many rows are added up, which keeps the rounding error of the
/// whole sum near that of a pairwise one.
pub(super) const KEY_BLOCK: usize = 64;
/// Rows of q that are transformed before they are multiplied; a multiple of most tile heights.
pub(super) const QUERY_BLOCK: usize = 48;

/// How one head is cut up.
#[derive(Clone, Copy)]
pub(super) struct HeadShape<'a> {
    /// D.
    pub(super) head_dim: usize,
    /// Dv.
    pub(super) value_dim: usize,
    /// D rounded up to whole vectors.
    pub(super) padded_dim: usize,
    /// The value columns.
    pub(super) panels: &'a [Panel],
    /// Sum of the panels' widths.
    pub(super) width: usize,
}

impl HeadShape<'_> {
    /// Numbers in φ(k)ᵀv as it is stored: panel by panel, D rows each.
    pub(super) fn sums_len(&self) -> usize {
        self.head_dim * self.width
    }

    /// Numbers in the sums of one head: φ(k)ᵀv, then φ(k).
    pub(super) fn part_len(&self) -> usize {
        self.sums_len() + self.padded_dim
    }

    /// Scratch numbers that phase 1 needs.
    pub(super) fn accumulate_scratch(&self) -> usize {
        KEY_BLOCK * (self.padded_dim + self.width) + self.padded_dim
    }

    /// Scratch numbers that phase 2 needs.
    pub(super) fn apply_scratch(&self) -> usize {
        QUERY_BLOCK * (self.padded_dim + 1)
    }
}

/// Rows of one head of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<P> {
    /// The first element of the first row.
    pub(super) first: P,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Elements from one head to the next.
    pub(super) head_step: usize,
}

impl<T> Rows<*mut T> {
    fn read(self) -> Rows<*const T> {
        Rows {
            first: self.first.cast_const(),
            stride: self.stride,
            head_step: self.head_step,
        }
    }
}

/// Phase 1 for some rows of some heads.
///
/// Safety of [`Kernel::run`]: `k` and `v` must have `rows` readable rows of D and Dv elements for
/// each of `heads` heads, `sums` room for `shape.part_len()` numbers at each of `heads` multiples
/// of `sums_step`, and `scratch` for `shape.accumulate_scratch()`; nobody else may use those
/// meanwhile.
pub(super) struct Accumulate<'a, T, A> {
    pub(super) shape: HeadShape<'a>,
    pub(super) heads: usize,
    pub(super) k: Rows<*const T>,
    pub(super) v: Rows<*const T>,
    pub(super) rows: usize,
    /// Out, per head: Σ φ(k)ᵀv, then Σ φ(k), whose padding holds nothing meaningful.
    pub(super) sums: *mut A,
    /// Numbers from one head's sums to the next's.
    pub(super) sums_step: usize,
    pub(super) scratch: *mut A,
}

/// Phase 2 for some rows of some heads.
///
/// Safety of [`Kernel::run`]: `q` must have `rows` readable rows of D elements for each of `heads`
/// heads, `out` as many writable ones of Dv that nobody else uses meanwhile, `sums` must hold what
/// its comment says, and `scratch` must be room for `shape.apply_scratch()` numbers of its own.
pub(super) struct Apply<'a, T, A> {
    pub(super) shape: HeadShape<'a>,
    pub(super) heads: usize,
    pub(super) q: Rows<*const T>,
    pub(super) out: Rows<*mut T>,
    pub(super) rows: usize,
    /// Per head: mean of φ(k)ᵀv, panel by panel, then mean of φ(k), whose padding is zero.
    pub(super) sums: *const A,
    /// Numbers from one head's sums to the next's.
    pub(super) sums_step: usize,
    pub(super) eps: A,
    pub(super) scratch: *mut A,
}

/// A task together with the instruction set that runs it.
pub(super) struct On<S, K>(pub(super) K, pub(super) PhantomData<S>);

impl<S, T> Kernel for On<S, Accumulate<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let shape = task.shape;
        // SAFETY: the pointers stay inside the ranges that `Accumulate` asks for: block rows
        // start + block <= rows; features, values and block_sum partition `scratch`; panels lie
        // one after another in `sums`.
        unsafe {
            let features = task.scratch;
            let values = features.add(KEY_BLOCK * shape.padded_dim);
            let block_sum = values.add(KEY_BLOCK * shape.width);
            for head in 0..task.heads {
                let sums = task.sums.add(head * task.sums_step);
                sums.write_bytes(0, shape.part_len());
            }
            let mut start = 0;
            while start < task.rows {
                let block = KEY_BLOCK.min(task.rows - start);
                for head in 0..task.heads {
                    let k = task.k.first.add(head * task.k.head_step);
                    let v = task.v.first.add(head * task.v.head_step);
                    let sums = task.sums.add(head * task.sums_step);
                    let (here, end) = ([start, head], [task.rows, task.heads]);
                    let mut next_k = Ahead::after(task.k, here, end, KEY_BLOCK, shape.head_dim);
                    let mut next_v = Ahead::after(task.v, here, end, KEY_BLOCK, shape.value_dim);
                    key_features::<S, T>(
                        k.add(start * task.k.stride),
                        task.k.stride,
                        block,
                        shape,
                        features,
                        block_sum,
                    );
                    let key_sum = sums.add(shape.sums_len());
                    let mut i = 0;
                    while i < shape.padded_dim {
                        let sum = S::Full::load(key_sum.add(i));
                        sum.add(S::Full::load(block_sum.add(i)))
                            .store(key_sum.add(i));
                        i += S::Full::LANES;
                    }
                    for panel in shape.panels {
                        let packed = values.add(panel.offset * KEY_BLOCK);
                        pack_values::<S, T>(
                            v.add(start * task.v.stride + panel.first),
                            task.v.stride,
                            block,
                            panel,
                            packed,
                        );
                        let tile = AddTile::<S> {
                            depth: block,
                            a: features,
                            a_step: shape.padded_dim,
                            b: packed,
                            width: panel.width,
                            c: sums.add(panel.offset * shape.head_dim),
                        };
                        tile.all_rows(shape.head_dim, panel, |rows| {
                            let share = (rows * KEY_BLOCK).div_ceil(shape.head_dim);
                            next_k.fetch(share);
                            next_v.fetch(share);
                        });
                    }
                }
                start += block;
            }
        }
    }
}

impl<S, T> Kernel for On<S, Apply<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let shape = task.shape;
        // SAFETY: as for phase 1; features and inverse partition `scratch`.
        unsafe {
            let features = task.scratch;
            let inverse = features.add(QUERY_BLOCK * shape.padded_dim);
            let mut start = 0;
            while start < task.rows {
                let block = QUERY_BLOCK.min(task.rows - start);
                for head in 0..task.heads {
                    let q = task.q.first.add(head * task.q.head_step);
                    let out = task.out.first.add(head * task.out.head_step);
                    let sums = task.sums.add(head * task.sums_step);
                    let (here, end) = ([start, head], [task.rows, task.heads]);
                    let mut next_q = Ahead::after(task.q, here, end, QUERY_BLOCK, shape.head_dim);
                    let mut next_out =
                        Ahead::after(task.out.read(), here, end, QUERY_BLOCK, shape.value_dim);
                    for row in 0..block {
                        let overlap = query_features::<S, T>(
                            q.add((start + row) * task.q.stride),
                            shape,
                            features.add(row * shape.padded_dim),
                            sums.add(shape.sums_len()),
                        );
                        let normaliser = overlap.add(task.eps);
                        inverse
                            .add(row)
                            .write(S::Number::from_f64(1.0).div(normaliser));
                    }
                    for panel in shape.panels {
                        let tile = WriteTile::<S, T> {
                            depth: shape.head_dim,
                            a: features,
                            a_row: shape.padded_dim,
                            b: sums.add(panel.offset * shape.head_dim),
                            width: panel.width,
                            inverse,
                            out: out.add(start * task.out.stride + panel.first),
                            out_stride: task.out.stride,
                            columns: panel.columns,
                        };
                        tile.all_rows(block, panel, |rows| {
                            next_q.fetch(rows);
                            next_out.fetch(rows);
                        });
                    }
                }
                start += block;
            }
        }
    }
}

/// φ of `rows` rows of k into `features` (row length `shape.padded_dim`) and their sum.
#[inline(always)]
unsafe fn key_features<S, T>(
    k: *const T,
    stride: usize,
    rows: usize,
    shape: HeadShape<'_>,
    features: *mut S::Number,
    block_sum: *mut S::Number,
) where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `rows` rows of D elements and room for padded rows.
    unsafe {
        block_sum.write_bytes(0, shape.padded_dim);
        let mut row = 0;
        // Four rows share one update of the running sum, whose store-to-load latency would
        // otherwise be the bottleneck.
        while row + 4 <= rows {
            let from = k.add(row * stride);
            let to = features.add(row * shape.padded_dim);
            let mut i = 0;
            while i < shape.head_dim {
                let left = shape.head_dim - i;
                let f0 = S::feature_map(read::<S, T>(from.add(i), left));
                let f1 = S::feature_map(read::<S, T>(from.add(stride + i), left));
                let f2 = S::feature_map(read::<S, T>(from.add(2 * stride + i), left));
                let f3 = S::feature_map(read::<S, T>(from.add(3 * stride + i), left));
                f0.store(to.add(i));
                f1.store(to.add(shape.padded_dim + i));
                f2.store(to.add(2 * shape.padded_dim + i));
                f3.store(to.add(3 * shape.padded_dim + i));
                let sum = f0.add(f1).add(f2.add(f3));
                S::Full::load(block_sum.add(i))
                    .add(sum)
                    .store(block_sum.add(i));
                i += lanes;
            }
            row += 4;
        }
        while row < rows {
            let from = k.add(row * stride);
            let to = features.add(row * shape.padded_dim);
            let mut i = 0;
            while i < shape.head_dim {
                let f = S::feature_map(read::<S, T>(from.add(i), shape.head_dim - i));
                f.store(to.add(i));
                S::Full::load(block_sum.add(i))
                    .add(f)
                    .store(block_sum.add(i));
                i += lanes;
            }
            row += 1;
        }
    }
}

/// φ of one row of q into `features`; returns φ(q)·mean φ(k).
#[inline(always)]
unsafe fn query_features<S, T>(
    q: *const T,
    shape: HeadShape<'_>,
    features: *mut S::Number,
    mean_key: *const S::Number,
) -> S::Number
where
    S: Convert<T>,
    T: Copy,
{
    // SAFETY: the caller gives D elements and room for a padded row; padding of `mean_key` is
    // zero, so φ(0) = 1 in the padding adds nothing.
    unsafe {
        let mut overlap = S::Full::splat(S::Number::ZERO);
        let mut i = 0;
        while i < shape.head_dim {
            let f = S::feature_map(read::<S, T>(q.add(i), shape.head_dim - i));
            f.store(features.add(i));
            overlap = f.mul_add(S::Full::load(mean_key.add(i)), overlap);
            i += S::Full::LANES;
        }
        S::sum(overlap)
    }
}

/// One panel's columns of `rows` rows of v, widened and zero-padded.
#[inline(always)]
unsafe fn pack_values<S, T>(
    v: *const T,
    stride: usize,
    rows: usize,
    panel: &Panel,
    packed: *mut S::Number,
) where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `rows` rows of `panel.columns` elements and room for `rows` rows of
    // `panel.width` numbers.
    unsafe {
        for row in 0..rows {
            let from = v.add(row * stride);
            let to = packed.add(row * panel.width);
            let mut c = 0;
            while c < panel.full * lanes {
                read::<S, T>(from.add(c), panel.columns - c).store(to.add(c));
                c += lanes;
            }
            if panel.half {
                let rest = S::read_part(from.add(c), panel.columns - c);
                S::lower_half(rest).store(to.add(c));
            }
        }
    }
}

/// Where a task reads or writes next, fetched a little at a time while tiles are computed: rows of
/// one head are short and far apart, which the hardware does not foresee.
#[derive(Clone, Copy)]
struct Ahead<T> {
    rows: Rows<*const T>,
    /// Rows that are left to fetch.
    count: usize,
    /// Elements of each row.
    width: usize,
}

impl<T> Ahead<T> {
    /// The block after (`start`, `head`), in the order of work: the next head's same rows, else
    /// the first head's next rows.
    #[inline(always)]
    fn after(
        rows: Rows<*const T>,
        [start, head]: [usize; 2],
        [count, heads]: [usize; 2],
        block: usize,
        width: usize,
    ) -> Self {
        let (start, head) = if head + 1 < heads {
            (start, head + 1)
        } else {
            (start + block, 0)
        };
        let at = start * rows.stride + head * rows.head_step;
        Self {
            rows: Rows {
                first: rows.first.wrapping_add(at),
                ..rows
            },
            count: block.min(count.saturating_sub(start)),
            width,
        }
    }

    /// Fetches up to `rows` more rows.
    #[inline(always)]
    fn fetch(&mut self, rows: usize) {
        for _ in 0..rows.min(self.count) {
            let mut at = 0;
            while at < self.width {
                prefetch(self.rows.first.wrapping_add(at));
                at += 64 / size_of::<T>();
            }
            prefetch(self.rows.first.wrapping_add(self.width - 1));
            self.rows.first = self.rows.first.wrapping_add(self.rows.stride);
        }
        self.count = self.count.saturating_sub(rows);
    }
}

/// Brings a cache line into the second level. Harmless for any address.
#[inline(always)]
fn prefetch<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// A vector of which `left` elements exist.
#[inline(always)]
unsafe fn read<S, T>(from: *const T, left: usize) -> S::Full
where
    S: Convert<T>,
    T: Copy,
{
    // SAFETY: at least min(left, LANES) elements are readable.
    unsafe {
        if left >= S::Full::LANES {
            S::read(from)
        } else {
            S::read_part(from, left)
        }
    }
}

/// Σ over `depth` steps of a (R numbers, `a_row` apart, `a_step` per step) times b (one row of C
/// whole vectors and, if H is 1, half a one per step).
#[inline(always)]
unsafe fn product<S: Simd, const R: usize, const C: usize, const H: usize>(
    depth: usize,
    mut a: *const S::Number,
    a_row: usize,
    a_step: usize,
    mut b: *const S::Number,
    width: usize,
) -> TileSums<S, R, C, H> {
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `depth` steps of R readable numbers and of `width` readable ones.
    unsafe {
        let mut full = [[S::Full::splat(S::Number::ZERO); C]; R];
        let mut half = [[S::Half::splat(S::Number::ZERO); H]; R];
        for _ in 0..depth {
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
            b = b.add(width);
        }
        (full, half)
    }
}

/// R rows of C whole vectors, and R rows of at most one half vector.
type TileSums<S, const R: usize, const C: usize, const H: usize> =
    ([[<S as Simd>::Full; C]; R], [[<S as Simd>::Half; H]; R]);

/// Adds φ(k)ᵀv of one block to R rows of one panel of the sums.
#[derive(Clone, Copy)]
struct AddTile<S: Simd> {
    depth: usize,
    a: *const S::Number,
    a_step: usize,
    b: *const S::Number,
    width: usize,
    c: *mut S::Number,
}

struct AddTileOf<S: Simd, const R: usize, const C: usize, const H: usize>(AddTile<S>);

impl<S: Simd, const R: usize, const C: usize, const H: usize> Kernel for AddTileOf<S, R, C, H> {
    #[inline(always)]
    unsafe fn run(self) {
        let t = self.0;
        let lanes = S::Full::LANES;
        // SAFETY: `AddTile::all_rows` keeps R rows of a and c inside their panels.
        unsafe {
            let (full, half) = product::<S, R, C, H>(t.depth, t.a, 1, t.a_step, t.b, t.width);
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
struct WriteTile<S: Simd, T> {
    depth: usize,
    a: *const S::Number,
    a_row: usize,
    b: *const S::Number,
    width: usize,
    inverse: *const S::Number,
    out: *mut T,
    out_stride: usize,
    columns: usize,
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
            let (full, half) = product::<S, R, C, H>(t.depth, t.a, t.a_row, 1, t.b, t.width);
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
    unsafe fn all_rows(mut self, rows: usize, panel: &Panel, mut meanwhile: impl FnMut(usize)) {
        let mut left = rows;
        while left > 0 {
            let take = tile_rows::<S>(panel, left);
            meanwhile(take);
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
    unsafe fn all_rows(mut self, rows: usize, panel: &Panel, mut meanwhile: impl FnMut(usize)) {
        let mut left = rows;
        while left > 0 {
            let take = tile_rows::<S>(panel, left);
            meanwhile(take);
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
