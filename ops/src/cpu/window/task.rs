//! One tile of queries: scores, running softmax, weighted values.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use std::ops::Range;

use super::super::simd::{Accumulator, Convert, Kernel, Simd, Vector};
use super::super::task::On;
use super::HeadRows;
use super::product::{Part, score_rows, value_columns, value_width};
use super::tile::{Group, QUERIES, RowReach, Tile};
use crate::schema::{TextSide, WindowDims};

/// Keys that are read at once at most.
const KEYS: usize = 128;
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
        let value = value_width(dims.value_dim).next_multiple_of(LINE);
        Self {
            key: dims.head_dim.next_multiple_of(LINE),
            value,
            queries: dims.head_dim * QUERIES,
            outputs: value * QUERIES,
        }
    }
}

/// Scratch numbers that a task with so many groups needs.
pub(super) fn scratch_len(dims: &WindowDims, groups: usize) -> usize {
    let l = Lengths::of(dims);
    // A group's queries, outputs, largest scores and sums; keys and values; scores; a row.
    groups * (l.queries + l.outputs + 2 * QUERIES)
        + KEYS * (l.key + l.value)
        + KEYS * QUERIES
        + l.key.max(l.value)
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
    /// One row of k or v.
    row: *mut A,
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
            row: take(lengths.key.max(lengths.value)),
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

/// Neighbouring keys of a block.
struct Segment {
    /// Place of the first in the block.
    first: usize,
    count: usize,
    /// Row and first column in the grid; `None` where every query attends to them.
    place: Option<[usize; 2]>,
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
        // SAFETY: the scratch memory was made for the most groups of a tile; tokens lie below N.
        unsafe {
            let scratch = Scratch::cut(task.scratch, task.dims, groups.len());
            for (i, group) in groups.iter().enumerate() {
                start::<S, T>(&task, &scratch.of_group(i), group);
            }
            let mut block = Block {
                task: &task,
                scratch,
                segments: Vec::with_capacity(KEYS),
                parts: Vec::with_capacity(KEYS),
                keys: 0,
            };
            match &task.tile.reach {
                None => block.tokens::<S>(0..task.dims.tokens()),
                Some([rows, cols]) => {
                    block.image::<S>(rows.clone(), cols.clone());
                    let first = task.dims.text_start(task.text);
                    block.tokens::<S>(first..first + task.dims.text);
                }
            }
            for (i, group) in groups.iter().enumerate() {
                finish::<S, T>(&task, &scratch.of_group(i), group);
            }
        }
    }
}

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
    let zero = S::Number::ZERO;
    // SAFETY: rows of queries exist.
    unsafe {
        for (lane, token) in group.tokens.into_iter().enumerate() {
            let from = task.q.first.add(token * task.q.stride);
            read_row::<S, T>(from, task.dims.head_dim, scratch.row);
            for d in 0..task.dims.head_dim {
                *scratch.queries.add(d * QUERIES + lane) = (*scratch.row.add(d)).mul(task.scale);
            }
            *scratch.largest.add(lane) = S::Number::from_f64(f64::NEG_INFINITY);
            *scratch.sums.add(lane) = zero;
        }
        for i in 0..scratch.lengths.outputs {
            *scratch.outputs.add(i) = zero;
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

/// Keys that are read once for all groups of the tile.
struct Block<'a, T, A> {
    task: &'a WindowTask<'a, T, A>,
    scratch: Scratch<A>,
    segments: Vec<Segment>,
    /// Of one group.
    parts: Vec<Part>,
    /// Keys in it.
    keys: usize,
}

impl<T: Copy, A: Accumulator> Block<'_, T, A> {
    /// Goes over tokens that every query attends to.
    #[inline(always)]
    unsafe fn tokens<S: Convert<T, Number = A>>(&mut self, tokens: Range<usize>) {
        let mut first = tokens.start;
        while first < tokens.end {
            let count = KEYS.min(tokens.end - first);
            // SAFETY: tokens lie below N.
            unsafe {
                self.read::<S>(first, count, None);
                self.use_up::<S>();
            }
            first += count;
        }
    }

    /// Goes over rows and columns of the grid, in blocks of about one size.
    #[inline(always)]
    unsafe fn image<S: Convert<T, Number = A>>(&mut self, rows: Range<usize>, cols: Range<usize>) {
        let dims = self.task.dims;
        let image = dims.image_start(self.task.text);
        let at_once = (KEYS / cols.len().max(1)).clamp(1, rows.len().max(1));
        let blocks = rows.len().div_ceil(at_once);
        let at_once = rows.len().div_ceil(blocks.max(1)).max(1);
        for first in rows.clone().step_by(at_once) {
            for column in cols.clone().step_by(KEYS) {
                let count = KEYS.min(cols.end - column);
                // SAFETY: the tile's reach lies in the image; `at_once` rows fit.
                unsafe {
                    for row in first..(first + at_once).min(rows.end) {
                        let token = image + row * dims.cols + column;
                        self.read::<S>(token, count, Some([row, column]));
                    }
                    self.use_up::<S>();
                }
            }
        }
    }

    /// Reads keys and values into the block, which has room for them.
    #[inline(always)]
    unsafe fn read<S: Convert<T, Number = A>>(
        &mut self,
        token: usize,
        count: usize,
        place: Option<[usize; 2]>,
    ) {
        let (task, scratch) = (self.task, &self.scratch);
        let lengths = scratch.lengths;
        for i in 0..count {
            // SAFETY: tokens lie below N and the block's keys below KEYS.
            unsafe {
                let key = task.k.first.add((token + i) * task.k.stride);
                let to = scratch.keys.add((self.keys + i) * lengths.key);
                read_row::<S, T>(key, task.dims.head_dim, to);
                let value = task.v.first.add((token + i) * task.v.stride);
                let to = scratch.values.add((self.keys + i) * lengths.value);
                read_row::<S, T>(value, task.dims.value_dim, to);
            }
        }
        self.segments.push(Segment {
            first: self.keys,
            count,
            place,
        });
        self.keys += count;
    }

    /// Takes the block's keys into account for every group, and empties it.
    #[inline(always)]
    unsafe fn use_up<S: Convert<T, Number = A>>(&mut self) {
        for (i, group) in self.task.tile.groups.iter().enumerate() {
            // SAFETY: scratch memory was cut for these groups.
            unsafe {
                let scratch = self.scratch.of_group(i);
                let keys = self.scores::<S>(&scratch, group);
                if keys > 0 {
                    let keep = weights::<S>(&scratch, keys);
                    value_columns::<S>(
                        &self.parts,
                        (scratch.values, scratch.lengths.value),
                        scratch.scores,
                        keep.as_ptr(),
                        scratch.outputs,
                        self.task.dims.value_dim,
                    );
                }
            }
        }
        self.segments.clear();
        self.keys = 0;
    }

    /// Scores of the keys that a group reaches, and how many they are.
    #[inline(always)]
    unsafe fn scores<S: Simd<Number = A>>(&mut self, scratch: &Scratch<A>, group: &Group) -> usize {
        self.parts.clear();
        let mut keys = 0;
        for segment in &self.segments {
            let columns = |start: usize| start..start + segment.count;
            let (columns, reach) = match segment.place {
                None => (columns(0), RowReach::whole(columns(0))),
                Some([row, _]) if !group.all_rows.contains(&row) => continue,
                Some([row, column]) => (columns(column), group.reach(row, self.task.halves)),
            };
            let from = reach.any.start.max(columns.start);
            let to = reach.any.end.min(columns.end);
            if from >= to {
                continue;
            }
            let part = Part {
                first: segment.first + from - columns.start,
                count: to - from,
            };
            // SAFETY: a part lies in the block; scores have room for all its keys.
            unsafe {
                let scores = scratch.scores.add(keys * QUERIES);
                score_rows::<S>(
                    part.count,
                    (
                        scratch.keys.add(part.first * scratch.lengths.key),
                        scratch.lengths.key,
                    ),
                    (scratch.queries, self.task.dims.head_dim),
                    scores,
                );
                mask::<S>(scores, from..to, &reach);
            }
            keys += part.count;
            self.parts.push(part);
        }
        keys
    }
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
    // SAFETY: rows of the output exist and belong to this task.
    unsafe {
        for (lane, &token) in group.tokens.iter().enumerate().take(group.count) {
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
