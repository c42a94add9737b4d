//! One tile of queries: scores, running softmax, weighted values.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use super::super::simd::{Accumulator, Convert, Kernel, Simd, Vector};
use super::super::task::On;
use super::{HeadRows, KEYS, QUERIES, Reach, Tile};
use crate::schema::{TextSide, WindowDims};

/// One tile of queries of one head.
pub(in super::super) struct WindowTask<'a, T, A> {
    pub(super) dims: &'a WindowDims,
    pub(super) text: TextSide,
    pub(super) tile: &'a Tile,
    pub(super) q: HeadRows<*const T>,
    pub(super) k: HeadRows<*const T>,
    pub(super) v: HeadRows<*const T>,
    pub(super) out: HeadRows<*mut T>,
    pub(super) scale: A,
    /// [`WindowTask::scratch`] numbers.
    pub(super) scratch: *mut A,
}

/// Rows are padded to this many numbers: a multiple of every vector and of every register tile's
/// rows would be 48; what is padded is computed, so the least that serves is taken per use.
const LINE: usize = 16;
/// Most rows of a register tile.
const MOST_ROWS: usize = 6;
/// Subtracted from scores outside the window, per unit outside: far below every score, and finite,
/// so that a block without any key of a query makes no NaN.
const OUTSIDE: f64 = 1e30;

/// Places in the scratch memory.
struct Layout {
    /// Numbers of a padded row of k.
    key_width: usize,
    /// Numbers of a padded row of v.
    value_width: usize,
}

impl Layout {
    fn of(dims: &WindowDims) -> Self {
        Self {
            key_width: dims.head_dim.next_multiple_of(LINE),
            // Read in whole register tiles.
            value_width: dims
                .value_dim
                .next_multiple_of(MOST_ROWS)
                .next_multiple_of(LINE),
        }
    }

    fn queries(&self) -> usize {
        self.key_width * QUERIES
    }

    fn outputs(&self) -> usize {
        self.value_width * QUERIES
    }

    fn keys(&self) -> usize {
        KEYS * self.key_width
    }

    fn values(&self) -> usize {
        KEYS * self.value_width
    }
}

impl<T, A> WindowTask<'_, T, A> {
    /// Scratch numbers that a task needs.
    pub(super) fn scratch(dims: &WindowDims) -> usize {
        let layout = Layout::of(dims);
        // Queries, outputs, keys, values, scores, largest, sum, and a row to write.
        layout.queries()
            + layout.outputs()
            + layout.keys()
            + layout.values()
            + KEYS * QUERIES
            + 2 * QUERIES
            + layout.key_width.max(layout.value_width)
    }
}

/// The scratch memory, cut up.
struct Scratch<A> {
    /// Scaled queries, `[D][QUERIES]`.
    queries: *mut A,
    /// Weighted values, `[Dv][QUERIES]`.
    outputs: *mut A,
    /// Keys, `[KEYS][key_width]`.
    keys: *mut A,
    /// Values, `[KEYS][value_width]`.
    values: *mut A,
    /// Scores and weights, `[KEYS][QUERIES]`.
    scores: *mut A,
    /// The largest score so far, by query.
    largest: *mut A,
    /// The sum of weights so far, by query.
    sums: *mut A,
    /// One row.
    row: *mut A,
}

impl<S, T> Kernel for On<S, WindowTask<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let layout = Layout::of(task.dims);
        // SAFETY: `scratch` counts what is cut off here; tokens lie below N.
        unsafe {
            let mut at = task.scratch;
            let mut take = |count: usize| {
                let here = at;
                at = at.add(count);
                here
            };
            let scratch = Scratch {
                queries: take(layout.queries()),
                outputs: take(layout.outputs()),
                keys: take(layout.keys()),
                values: take(layout.values()),
                scores: take(KEYS * QUERIES),
                largest: take(QUERIES),
                sums: take(QUERIES),
                row: take(layout.key_width.max(layout.value_width)),
            };
            start::<S, T>(&task, &layout, &scratch);
            match &task.tile.reach {
                None => {
                    let tokens = task.dims.tokens();
                    all_keys::<S, T>(&task, &layout, &scratch, 0..tokens);
                }
                Some(reach) => {
                    image_keys::<S, T>(&task, &layout, &scratch, reach);
                    let first = task.dims.text_start(task.text);
                    all_keys::<S, T>(&task, &layout, &scratch, first..first + task.dims.text);
                }
            }
            finish::<S, T>(&task, &scratch);
        }
    }
}

/// Reads and scales the queries, clears the sums.
#[inline(always)]
unsafe fn start<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
) where
    S: Convert<T>,
    T: Copy,
{
    let zero = S::Number::ZERO;
    // SAFETY: rows of queries exist; lanes beyond the last query repeat it.
    unsafe {
        let last = task.tile.queries.len() - 1;
        for lane in 0..QUERIES {
            let token = task.tile.queries[lane.min(last)];
            let from = task.q.first.add(token * task.q.stride);
            read_row::<S, T>(from, task.dims.head_dim, scratch.row);
            for d in 0..task.dims.head_dim {
                *scratch.queries.add(d * QUERIES + lane) = (*scratch.row.add(d)).mul(task.scale);
            }
            *scratch.largest.add(lane) = S::Number::from_f64(f64::NEG_INFINITY);
            *scratch.sums.add(lane) = zero;
        }
        for i in 0..layout.outputs() {
            *scratch.outputs.add(i) = zero;
        }
        // What is padded is multiplied too.
        for i in 0..layout.values() {
            *scratch.values.add(i) = zero;
        }
        for i in 0..layout.keys() {
            *scratch.keys.add(i) = zero;
        }
    }
}

/// Reads `count` elements as numbers, zeros up to a whole vector.
#[inline(always)]
unsafe fn read_row<S, T>(from: *const T, count: usize, to: *mut S::Number)
where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `count` elements and room for them in whole vectors.
    unsafe {
        let mut at = 0;
        while at + lanes <= count {
            S::read(from.add(at)).store(to.add(at));
            at += lanes;
        }
        if at < count {
            S::read_part(from.add(at), count - at).store(to.add(at));
        }
    }
}

/// Goes over keys that every query attends to.
#[inline(always)]
unsafe fn all_keys<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
    tokens: std::ops::Range<usize>,
) where
    S: Convert<T>,
    T: Copy,
{
    let mut first = tokens.start;
    while first < tokens.end {
        let count = KEYS.min(tokens.end - first);
        // SAFETY: tokens lie below N.
        unsafe {
            for i in 0..count {
                read_key::<S, T>(task, layout, scratch, i, first + i);
            }
            scores::<S, T>(task, layout, scratch, count);
            accumulate::<S, T>(task, layout, scratch, count);
        }
        first += count;
    }
}

/// Goes over the image keys that the tile's windows reach.
#[inline(always)]
unsafe fn image_keys<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
    reach: &Reach,
) where
    S: Convert<T>,
    T: Copy,
{
    let image = task.dims.image_start(task.text);
    let columns = reach.columns.len();
    let total = reach.rows.len() * columns;
    let mut first = 0;
    while first < total {
        let count = KEYS.min(total - first);
        // SAFETY: keys of the reach lie in the image.
        unsafe {
            for i in 0..count {
                let (row, column) = ((first + i) / columns, (first + i) % columns);
                let at = (reach.first_row + row) * task.dims.cols + reach.first_column + column;
                read_key::<S, T>(task, layout, scratch, i, image + at);
            }
            scores::<S, T>(task, layout, scratch, count);
            for i in 0..count {
                let (row, column) = ((first + i) / columns, (first + i) % columns);
                mask::<S>(
                    scratch.scores.add(i * QUERIES),
                    &reach.rows[row],
                    &reach.columns[column],
                    reach.limit,
                );
            }
            accumulate::<S, T>(task, layout, scratch, count);
        }
        first += count;
    }
}

/// Key and value of a token as row `i` of the block.
#[inline(always)]
unsafe fn read_key<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
    i: usize,
    token: usize,
) where
    S: Convert<T>,
    T: Copy,
{
    // SAFETY: the caller's token lies below N and i below KEYS.
    unsafe {
        let key = task.k.first.add(token * task.k.stride);
        read_row::<S, T>(
            key,
            task.dims.head_dim,
            scratch.keys.add(i * layout.key_width),
        );
        let value = task.v.first.add(token * task.v.stride);
        let to = scratch.values.add(i * layout.value_width);
        read_row::<S, T>(value, task.dims.value_dim, to);
    }
}

/// Lowers the scores of one key for the queries whose windows it is outside of.
#[inline(always)]
unsafe fn mask<S: Simd>(
    scores: *mut S::Number,
    row: &[f32; QUERIES],
    column: &[f32; QUERIES],
    limit: f32,
) {
    let mut outside = [S::Number::ZERO; QUERIES];
    let mut any = false;
    for lane in 0..QUERIES {
        let by = (row[lane] + column[lane] - limit).max(0.0);
        any |= by > 0.0;
        outside[lane] = S::Number::from_f64(-f64::from(by) * OUTSIDE);
    }
    if !any {
        return;
    }
    // SAFETY: the caller gives one row of scores.
    unsafe {
        let mut at = 0;
        while at < QUERIES {
            let to = scores.add(at);
            S::Full::load(to)
                .add(S::Full::load(outside.as_ptr().add(at)))
                .store(to);
            at += S::Full::LANES;
        }
    }
}

/// k·q for `count` keys of the block.
#[inline(always)]
unsafe fn scores<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
    count: usize,
) where
    S: Convert<T>,
    T: Copy,
{
    let product = Product {
        depth: task.dims.head_dim,
        a: scratch.keys,
        a_row: layout.key_width,
        a_step: 1,
        b: scratch.queries,
        c: scratch.scores,
    };
    // SAFETY: KEYS rows of keys and of scores exist, a multiple of the register tile's.
    unsafe { product.rows::<S, Fresh>(count) };
}

/// The running softmax: weights of the block's scores, sums, and weighted values.
#[inline(always)]
unsafe fn accumulate<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    layout: &Layout,
    scratch: &Scratch<S::Number>,
    count: usize,
) where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    // SAFETY: every row has QUERIES numbers, a multiple of the lanes.
    unsafe {
        let minus_one = S::Full::splat(S::Number::from_f64(-1.0));
        let mut at = 0;
        while at < QUERIES {
            let column = scratch.scores.add(at);
            let before = S::Full::load(scratch.largest.add(at));
            let mut largest = before;
            for i in 0..count {
                largest = largest.max(S::Full::load(column.add(i * QUERIES)));
            }
            largest.store(scratch.largest.add(at));
            let lower = largest.mul(minus_one);
            // φ of what is not above zero is exp.
            let keep = S::feature_map(before.add(lower));
            let mut sum = S::Full::load(scratch.sums.add(at)).mul(keep);
            for i in 0..count {
                let place = column.add(i * QUERIES);
                let weight = S::feature_map(S::Full::load(place).add(lower));
                weight.store(place);
                sum = sum.add(weight);
            }
            sum.store(scratch.sums.add(at));
            for j in 0..task.dims.value_dim {
                let place = scratch.outputs.add(j * QUERIES + at);
                S::Full::load(place).mul(keep).store(place);
            }
            at += lanes;
        }
    }
    let product = Product {
        depth: count,
        a: scratch.values,
        a_row: 1,
        a_step: layout.value_width,
        b: scratch.scores,
        c: scratch.outputs,
    };
    // SAFETY: columns of values and rows of outputs are padded to whole register tiles.
    unsafe { product.rows::<S, Add>(task.dims.value_dim) };
}

/// Divides by the sums and writes the output.
#[inline(always)]
unsafe fn finish<S, T>(task: &WindowTask<'_, T, S::Number>, scratch: &Scratch<S::Number>)
where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    let width = task.dims.value_dim;
    // SAFETY: rows of the output exist and belong to this task.
    unsafe {
        for (lane, &token) in task.tile.queries.iter().enumerate() {
            let sum = *scratch.sums.add(lane);
            for j in 0..width {
                *scratch.row.add(j) = (*scratch.outputs.add(j * QUERIES + lane)).div(sum);
            }
            let to = task.out.first.add(token * task.out.stride);
            let mut at = 0;
            while at + lanes <= width {
                S::write(S::Full::load(scratch.row.add(at)), to.add(at));
                at += lanes;
            }
            if at < width {
                S::write_part(S::Full::load(scratch.row.add(at)), to.add(at), width - at);
            }
        }
    }
}

/// `c = a·b` or `c += a·b` for rows of QUERIES numbers.
#[derive(Clone, Copy)]
struct Product<A> {
    /// Length of the sums.
    depth: usize,
    a: *const A,
    /// Numbers of a from one row of c to the next.
    a_row: usize,
    /// Numbers of a from one term to the next.
    a_step: usize,
    /// One row of QUERIES numbers a term.
    b: *const A,
    /// One row of QUERIES numbers a row.
    c: *mut A,
}

/// Whether c is overwritten.
struct Fresh;
/// Whether c is added to.
struct Add;

trait Before<S: Simd> {
    unsafe fn value(at: *const S::Number) -> S::Full;
}

impl<S: Simd> Before<S> for Fresh {
    #[inline(always)]
    unsafe fn value(_at: *const S::Number) -> S::Full {
        // SAFETY: as for the trait.
        unsafe { S::Full::splat(S::Number::ZERO) }
    }
}

impl<S: Simd> Before<S> for Add {
    #[inline(always)]
    unsafe fn value(at: *const S::Number) -> S::Full {
        // SAFETY: the caller gives a vector's numbers.
        unsafe { S::Full::load(at) }
    }
}

impl<A: Accumulator> Product<A> {
    /// All rows, in register tiles; rows of the last tile beyond `rows` are computed as well.
    ///
    /// # Safety
    /// `depth` terms of a for all rows of whole tiles, of b and of c must exist.
    #[inline(always)]
    unsafe fn rows<S: Simd<Number = A>, B: Before<S>>(self, rows: usize) {
        // SAFETY: as for the caller.
        unsafe {
            if S::TILE.max_columns >= 4 {
                self.tiles::<S, B, 6, 4>(rows);
            } else if S::TILE.rows[2] >= 6 {
                self.tiles::<S, B, 6, 2>(rows);
            } else {
                self.tiles::<S, B, 4, 2>(rows);
            }
        }
    }

    #[inline(always)]
    unsafe fn tiles<S, B, const R: usize, const C: usize>(self, rows: usize)
    where
        S: Simd<Number = A>,
        B: Before<S>,
    {
        let mut row = 0;
        while row < rows {
            let mut column = 0;
            while column < QUERIES {
                // SAFETY: rows row..row + R and columns column..column + C vectors exist.
                unsafe { self.tile::<S, B, R, C>(row, column) };
                column += C * S::Full::LANES;
            }
            row += R;
        }
    }

    #[inline(always)]
    unsafe fn tile<S, B, const R: usize, const C: usize>(self, row: usize, column: usize)
    where
        S: Simd<Number = A>,
        B: Before<S>,
    {
        let lanes = S::Full::LANES;
        // SAFETY: as for the caller.
        unsafe {
            let mut sums = [[S::Full::splat(A::ZERO); C]; R];
            let mut a = self.a.add(row * self.a_row);
            let mut b = self.b.add(column);
            for _ in 0..self.depth {
                let mut terms = [S::Full::splat(A::ZERO); C];
                for c in 0..C {
                    terms[c] = S::Full::load(b.add(c * lanes));
                }
                for r in 0..R {
                    let factor = S::Full::splat(*a.add(r * self.a_row));
                    for c in 0..C {
                        sums[r][c] = factor.mul_add(terms[c], sums[r][c]);
                    }
                }
                a = a.add(self.a_step);
                b = b.add(QUERIES);
            }
            for r in 0..R {
                for c in 0..C {
                    let at = self.c.add((row + r) * QUERIES + column + c * lanes);
                    B::value(at).add(sums[r][c]).store(at);
                }
            }
        }
    }
}
