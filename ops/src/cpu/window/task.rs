//! One tile of queries: scores, running softmax, weighted values.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use std::ops::Range;

use super::super::ahead::prefetch;
use super::super::simd::{Accumulator, Convert, Kernel, Simd, Vector};
use super::super::task::On;
use super::HeadRows;
use super::blocks::{Blocks, KEYS, Segment, share};
use super::product::{Part, score_rows, value_columns, value_width};
use super::tile::{Group, QUERIES, RowReach, Tile};
use crate::schema::{TextSide, WindowDims};

/// Rows are padded to this many numbers, a multiple of every vector.
const LINE: usize = 16;
/// Subtracted from scores outside the window, per column outside: far below every score, and
/// finite, so that a group of keys without any of a query's makes no NaN.
const OUTSIDE: f64 = 1e30;

/// One tile of queries of one head.
pub(in super::super) struct WindowTask<'a, T, A> {
    pub(super) dims: &'a WindowDims,
    pub(super) text: TextSide,
    pub(super) tile: &'a Tile,
    /// Of a circle: how far a row reaches to each side, by its distance; else empty.
    pub(super) halves: &'a [i32],
    pub(super) q: HeadRows<*const T>,
    pub(super) k: HeadRows<*const T>,
    pub(super) v: HeadRows<*const T>,
    pub(super) out: HeadRows<*mut T>,
    pub(super) scale: A,
    /// [`scratch_len`] numbers.
    pub(super) scratch: *mut A,
}

/// Lengths of the parts of the scratch memory.
#[derive(Clone, Copy)]
struct Lengths {
    /// Of a padded row of k.
    key: usize,
    /// Of a padded row of v.
    value: usize,
    /// Of a group's queries.
    queries: usize,
    /// Of a group's outputs.
    outputs: usize,
}

impl Lengths {
    fn of(dims: &WindowDims) -> Self {
        let key = dims.head_dim.next_multiple_of(LINE);
        let value = value_width(dims.value_dim).next_multiple_of(LINE);
        Self {
            key,
            value,
            queries: key * QUERIES,
            outputs: value * QUERIES,
        }
    }
}

/// Scratch numbers that a task with so many groups needs.
pub(super) fn scratch_len(dims: &WindowDims, groups: usize) -> usize {
    let l = Lengths::of(dims);
    // A group's queries, outputs, largest scores and sums; keys and values; scores.
    groups * (l.queries + l.outputs + 2 * QUERIES) + KEYS * (l.key + l.value) + KEYS * QUERIES
}

/// The scratch memory, cut up.
#[derive(Clone, Copy)]
struct Scratch<A> {
    lengths: Lengths,
    /// Scaled queries, `[groups][D][QUERIES]`.
    queries: *mut A,
    /// Weighted values, `[groups][Dv][QUERIES]`.
    outputs: *mut A,
    /// The largest score so far, `[groups][QUERIES]`.
    largest: *mut A,
    /// The sum of weights so far, `[groups][QUERIES]`.
    sums: *mut A,
    /// `[KEYS][key]`.
    keys: *mut A,
    /// `[KEYS][value]`.
    values: *mut A,
    /// Scores and weights of a group, `[KEYS][QUERIES]`.
    scores: *mut A,
}

impl<A> Scratch<A> {
    /// # Safety
    /// `at` must have [`scratch_len`] numbers.
    unsafe fn cut(at: *mut A, dims: &WindowDims, groups: usize) -> Self {
        let lengths = Lengths::of(dims);
        let mut at = at;
        let mut take = |count: usize| {
            let here = at;
            // SAFETY: the caller's memory is as long as all that is taken.
            at = unsafe { at.add(count) };
            here
        };
        Self {
            lengths,
            queries: take(groups * lengths.queries),
            outputs: take(groups * lengths.outputs),
            largest: take(groups * QUERIES),
            sums: take(groups * QUERIES),
            keys: take(KEYS * lengths.key),
            values: take(KEYS * lengths.value),
            scores: take(KEYS * QUERIES),
        }
    }

    /// The same for one group.
    ///
    /// # Safety
    /// `group` must be one of those it was cut for.
    unsafe fn of_group(self, group: usize) -> Self {
        // SAFETY: by the contract above.
        unsafe {
            Self {
                queries: self.queries.add(group * self.lengths.queries),
                outputs: self.outputs.add(group * self.lengths.outputs),
                largest: self.largest.add(group * QUERIES),
                sums: self.sums.add(group * QUERIES),
                ..self
            }
        }
    }
}

impl<S, T> Kernel for On<S, WindowTask<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let groups = &task.tile.groups;
        let blocks = Blocks::of(task.tile, task.dims, task.text);
        let mut parts = Vec::with_capacity(KEYS);
        // SAFETY: the scratch memory was made for the most groups of a tile; tokens lie below N,
        // and blocks have KEYS keys at most.
        unsafe {
            let scratch = Scratch::cut(task.scratch, task.dims, groups.len());
            for (i, group) in groups.iter().enumerate() {
                for &token in groups.get(i + 1).iter().flat_map(|next| &next.tokens) {
                    fetch(task.q, token, task.dims.head_dim);
                }
                start::<S, T>(&task, &scratch.of_group(i), group);
            }
            let key_copy = (scratch.keys, scratch.lengths.key);
            let value_copy = (scratch.values, scratch.lengths.value);
            let keys = Source::new(task.k, S::in_place(task.k.first), key_copy);
            // What is padded must not be read from the tensor.
            let padded = value_width(task.dims.value_dim) != task.dims.value_dim;
            let in_place = S::in_place(task.v.first).filter(|_| !padded);
            let values = Source::new(task.v, in_place, value_copy);
            for number in 0..blocks.count() {
                let block = blocks.block(number);
                if !keys.in_place {
                    copy::<S, T>(task.k, task.dims.head_dim, key_copy, block);
                }
                if !values.in_place {
                    copy::<S, T>(task.v, task.dims.value_dim, value_copy, block);
                }
                let next = blocks.block(number + 1);
                for (i, group) in groups.iter().enumerate() {
                    for token in share(next, i, groups.len()).flatten() {
                        fetch(task.k, token, task.dims.head_dim);
                        fetch(task.v, token, task.dims.value_dim);
                    }
                    let scratch = scratch.of_group(i);
                    let sources = [keys, values];
                    let count = scores::<S, T>(&task, &scratch, group, block, sources, &mut parts);
                    if count > 0 {
                        let keep = weights::<S>(&scratch, count);
                        value_columns::<S>(
                            &parts,
                            (values.first, values.step),
                            scratch.scores,
                            keep.as_ptr(),
                            scratch.outputs,
                            task.dims.value_dim,
                        );
                    }
                }
            }
            for (i, group) in groups.iter().enumerate() {
                finish::<S, T>(&task, &scratch.of_group(i), group);
            }
        }
    }
}

/// Asks for the memory of a row that will be read.
#[inline(always)]
fn fetch<T>(rows: HeadRows<*const T>, token: usize, width: usize) {
    let row = rows.first.wrapping_add(token * rows.stride).cast::<u8>();
    let bytes = width * size_of::<T>();
    for at in (0..bytes).step_by(CACHE_LINE).chain([bytes - 1]) {
        prefetch(row.wrapping_add(at));
    }
}

/// Bytes that memory is read in.
const CACHE_LINE: usize = 64;

/// Reads and scales a group's queries, clears its sums.
#[inline(always)]
unsafe fn start<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    scratch: &Scratch<S::Number>,
    group: &Group,
) where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    let step = scratch.lengths.key;
    // SAFETY: rows of queries exist; the block's keys, which are not there yet, have room for
    // them.
    unsafe {
        for (lane, token) in group.tokens.into_iter().enumerate() {
            let from = task.q.first.add(token * task.q.stride);
            read_row::<S, T>(from, task.dims.head_dim, scratch.keys.add(lane * step));
        }
        let scale = S::Full::splat(task.scale);
        let zero = S::Full::splat(S::Number::ZERO);
        let lowest = S::Full::splat(S::Number::from_f64(f64::NEG_INFINITY));
        for at in (0..QUERIES).step_by(lanes) {
            let queries = scratch.queries.add(at);
            for d in (0..task.dims.head_dim).step_by(lanes) {
                let to = queries.add(d * QUERIES);
                S::transpose(scratch.keys.add(at * step + d), step, to, QUERIES);
            }
            for d in 0..task.dims.head_dim {
                let place = queries.add(d * QUERIES);
                S::Full::load(place).mul(scale).store(place);
            }
            for j in 0..scratch.lengths.value {
                zero.store(scratch.outputs.add(j * QUERIES + at));
            }
            lowest.store(scratch.largest.add(at));
            zero.store(scratch.sums.add(at));
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

/// Where keys or values are taken from: the tensor itself where its elements are the numbers that
/// are summed, or a copy of the block.
#[derive(Clone, Copy)]
struct Source<A> {
    first: *const A,
    /// Numbers from one token to the next.
    step: usize,
    in_place: bool,
}

impl<A> Source<A> {
    #[inline(always)]
    fn new<T>(
        tensor: HeadRows<*const T>,
        in_place: Option<*const A>,
        copy: (*mut A, usize),
    ) -> Self {
        match in_place {
            Some(first) => Self {
                first,
                step: tensor.stride,
                in_place: true,
            },
            None => Self {
                first: copy.0,
                step: copy.1,
                in_place: false,
            },
        }
    }

    /// Number of the key or value that is so far behind a segment's first.
    #[inline(always)]
    fn place(&self, segment: &Segment, behind: usize) -> usize {
        behind
            + if self.in_place {
                segment.token
            } else {
                segment.first
            }
    }
}

/// Copies keys or values of a block.
#[inline(always)]
unsafe fn copy<S, T>(
    tensor: HeadRows<*const T>,
    width: usize,
    to: (*mut S::Number, usize),
    block: &[Segment],
) where
    S: Convert<T>,
    T: Copy,
{
    for segment in block {
        for i in 0..segment.count {
            // SAFETY: tokens lie below N and the block's keys below KEYS.
            unsafe {
                let from = tensor.first.add((segment.token + i) * tensor.stride);
                read_row::<S, T>(from, width, to.0.add((segment.first + i) * to.1));
            }
        }
    }
}

/// Scores of a block's keys that a group reaches: which these are, and how many.
#[inline(always)]
unsafe fn scores<S: Simd, T>(
    task: &WindowTask<'_, T, S::Number>,
    scratch: &Scratch<S::Number>,
    group: &Group,
    block: &[Segment],
    [source, values]: [Source<S::Number>; 2],
    parts: &mut Vec<Part>,
) -> usize {
    parts.clear();
    let mut keys = 0;
    for segment in block {
        let columns = |start: usize| start..start + segment.count;
        let (columns, reach) = match segment.place {
            None => (columns(0), RowReach::whole(columns(0))),
            Some([row, _]) if !group.all_rows.contains(&row) => continue,
            Some([row, column]) => (columns(column), group.reach(row, task.halves)),
        };
        let from = reach.any.start.max(columns.start);
        let to = reach.any.end.min(columns.end);
        if from >= to {
            continue;
        }
        let behind = from - columns.start;
        let part = Part {
            first: values.place(segment, behind),
            count: to - from,
        };
        // SAFETY: a part lies in the block; scores have room for all its keys.
        unsafe {
            let scores = scratch.scores.add(keys * QUERIES);
            let first = source.place(segment, behind);
            score_rows::<S>(
                part.count,
                (source.first.add(first * source.step), source.step),
                (scratch.queries, task.dims.head_dim),
                scores,
            );
            mask::<S>(scores, from..to, &reach);
        }
        keys += part.count;
        parts.push(part);
    }
    keys
}

/// Lowers the scores of one row's keys for the queries that don't reach them.
#[inline(always)]
unsafe fn mask<S: Simd>(scores: *mut S::Number, columns: Range<usize>, reach: &RowReach) {
    if reach.all.start <= columns.start && columns.end <= reach.all.end {
        return;
    }
    let number = |value: i32| S::Number::from_f64(f64::from(value));
    let first = reach.first.map(number);
    let negative_last = reach.last.map(|last| number(-last));
    let outside = columns.clone().filter(|c| !reach.all.contains(c));
    for column in outside {
        // SAFETY: the caller gives a row of scores for each column.
        unsafe {
            let row = scores.add((column - columns.start) * QUERIES);
            let here = S::Full::splat(number(column as i32));
            let negative_here = S::Full::splat(number(-(column as i32)));
            let zero = S::Full::splat(S::Number::ZERO);
            let factor = S::Full::splat(S::Number::from_f64(-OUTSIDE));
            let mut at = 0;
            while at < QUERIES {
                let before = S::Full::load(first.as_ptr().add(at)).add(negative_here);
                let after = S::Full::load(negative_last.as_ptr().add(at)).add(here);
                let by = before.max(after).max(zero);
                let to = row.add(at);
                by.mul_add(factor, S::Full::load(to)).store(to);
                at += S::Full::LANES;
            }
        }
    }
}

/// The running softmax: scores become weights. Returns the factors of what was summed before.
#[inline(always)]
unsafe fn weights<S: Simd>(scratch: &Scratch<S::Number>, keys: usize) -> [S::Number; QUERIES] {
    let mut factors = [S::Number::ZERO; QUERIES];
    let minus_one = S::Number::from_f64(-1.0);
    let mut at = 0;
    while at < QUERIES {
        // SAFETY: every row has QUERIES numbers, a multiple of the lanes.
        unsafe {
            let column = scratch.scores.add(at);
            let before = S::Full::load(scratch.largest.add(at));
            let mut largest = before;
            for i in 0..keys {
                largest = largest.max(S::Full::load(column.add(i * QUERIES)));
            }
            largest.store(scratch.largest.add(at));
            let lower = largest.mul(S::Full::splat(minus_one));
            // φ of what is not above zero is exp.
            let keep = S::feature_map(before.add(lower));
            keep.store(factors.as_mut_ptr().add(at));
            let mut sum = S::Full::load(scratch.sums.add(at)).mul(keep);
            for i in 0..keys {
                let place = column.add(i * QUERIES);
                let weight = S::feature_map(S::Full::load(place).add(lower));
                weight.store(place);
                sum = sum.add(weight);
            }
            sum.store(scratch.sums.add(at));
        }
        at += S::Full::LANES;
    }
    factors
}

/// Divides by the sums and writes a group's output.
#[inline(always)]
unsafe fn finish<S, T>(
    task: &WindowTask<'_, T, S::Number>,
    scratch: &Scratch<S::Number>,
    group: &Group,
) where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    let width = task.dims.value_dim;
    let step = scratch.lengths.value;
    // SAFETY: rows of the output exist and belong to this task; the block's values, which are no
    // longer needed, have room for them.
    unsafe {
        let one = S::Number::from_f64(1.0);
        for lane in 0..QUERIES {
            let sum = scratch.sums.add(lane);
            *sum = one.div(*sum);
        }
        for at in (0..QUERIES).step_by(lanes) {
            let outputs = scratch.outputs.add(at);
            let inverse = S::Full::load(scratch.sums.add(at));
            for j in 0..width {
                let place = outputs.add(j * QUERIES);
                S::Full::load(place).mul(inverse).store(place);
            }
            for j in (0..width).step_by(lanes) {
                let from = outputs.add(j * QUERIES);
                S::transpose(from, QUERIES, scratch.values.add(at * step + j), step);
            }
        }
        for (lane, &token) in group.tokens.iter().enumerate() {
            let row = scratch.values.add(lane * step);
            let to = task.out.first.add(token * task.out.stride);
            let mut at = 0;
            while at + lanes <= width {
                S::write(S::Full::load(row.add(at)), to.add(at));
                at += lanes;
            }
            if at < width {
                S::write_part(S::Full::load(row.add(at)), to.add(at), width - at);
            }
        }
    }
}
