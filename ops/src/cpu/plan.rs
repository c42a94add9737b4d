//! Cuts one call into tasks and runs them in two phases.

use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::Buffer;
use super::element::{Dispatch, Element};
use super::panels;
use super::simd::Accumulator;
use super::task::{Accumulate, Apply, HeadShape, KEY_BLOCK, QUERY_BLOCK, Rows};
use super::{Execution, KernelError, Tensors};
use crate::schema::{Dims, Layout};

/// Most partial results of phase 1 where there are fewer heads than that. A constant, as all
/// here, so that the order of summation doesn't depend on the machine.
const MAX_PARTS: usize = 128;
/// Fewest rows of k that are worth a partial result of their own, and the same per row of that
/// result: clearing and adding one up costs as much as a few rows of k.
const MIN_KEY_ROWS: usize = 2 * KEY_BLOCK;
const MIN_KEY_ROWS_PER_DIM: usize = 4;
/// Most rows of q of one task of phase 2.
const QUERY_ROWS: usize = 10 * QUERY_BLOCK;
/// Fewest rows of q that are worth a task of their own where heads could be taken together.
const MIN_QUERY_ROWS: usize = 2 * QUERY_BLOCK;
/// Tasks that a phase is cut into at least, if it can be.
const MIN_TASKS: usize = 8;
/// Bytes of sums that a task keeps in use: about half of a second-level cache.
const GROUP_BYTES: usize = 448 << 10;

/// What all tasks of one call share.
struct Plan<'a> {
    dims: &'a Dims,
    execution: Execution<'a>,
    shape: HeadShape<'a>,
    /// Partial results per head.
    splits: usize,
    rows_per_split: usize,
    /// Numbers of one partial result, padded to whole cache lines so that tasks don't share one.
    per_part: usize,
}

pub(super) fn run<T: Element>(
    dims: &Dims,
    eps: f32,
    tensors: Tensors<'_, T>,
    execution: Execution<'_>,
) -> Result<(), KernelError> {
    let heads = dims.batch * dims.heads;
    if heads == 0 || dims.queries == 0 {
        return Ok(());
    }
    let tile = T::tile(execution.isa);
    let (panels, width) = panels::cut(dims.value_dim, tile);
    let min_rows = dims
        .head_dim
        .saturating_mul(MIN_KEY_ROWS_PER_DIM)
        .max(MIN_KEY_ROWS);
    let splits = MAX_PARTS
        .div_ceil(heads)
        .min(dims.keys.div_ceil(min_rows))
        .max(1);
    let padded_dim = dims.head_dim.next_multiple_of(tile.lanes);
    let too_large = || KernelError::OutOfMemory {
        elements: usize::MAX,
    };
    let per_part = dims
        .head_dim
        .checked_mul(width)
        .and_then(|n| n.checked_add(padded_dim))
        .and_then(|n| n.checked_next_multiple_of(16))
        .ok_or_else(too_large)?;
    let parts = heads
        .checked_mul(splits)
        .and_then(|n| n.checked_mul(per_part))
        .ok_or_else(too_large)?;
    let parts = Buffer::<T::Number>::new(parts)?;
    let plan = Plan {
        dims,
        execution,
        shape: HeadShape {
            head_dim: dims.head_dim,
            value_dim: dims.value_dim,
            lanes: tile.lanes,
            padded_dim,
            panels: &panels,
            width,
        },
        splits,
        // Whole blocks, so that no split ends in a short one but the last.
        rows_per_split: dims.keys.div_ceil(splits).next_multiple_of(KEY_BLOCK),
        per_part,
    };
    plan.accumulate(&tensors, &parts)?;
    plan.finish(&parts);
    plan.apply(eps, tensors, &parts)
}

impl Plan<'_> {
    /// Heads that one task takes together, where a phase has `pieces` independent row ranges.
    ///
    /// Heads that lie side by side share pages and cache lines; their sums must fit in the
    /// cache, and there should be tasks for several threads. No sum depends on the grouping.
    fn group<T: Element>(&self, pieces: usize) -> usize {
        if self.dims.layout == Layout::Heads {
            return 1;
        }
        let heads = self.dims.heads;
        let by_cache = GROUP_BYTES / (self.per_part * size_of::<T::Number>());
        let by_tasks = self.dims.batch * heads * pieces / MIN_TASKS;
        let most = by_cache.min(by_tasks).clamp(1, heads);
        heads.div_ceil(heads.div_ceil(most))
    }

    /// Runs `task(batch, first head, heads, piece)` for every row range of every group.
    fn for_groups<T: Element>(&self, pieces: usize, task: &(dyn Fn(Group, usize) + Sync)) {
        let size = self.group::<T>(pieces);
        let groups = self.dims.heads.div_ceil(size);
        let each = |index: usize| {
            let (group, piece) = (index / pieces, index % pieces);
            let first = group % groups * size;
            let group = Group {
                batch: group / groups,
                first,
                heads: size.min(self.dims.heads - first),
            };
            task(group, piece);
        };
        let tasks = self.dims.batch * groups * pieces;
        self.execution.pool.run(tasks, &each);
    }

    /// Phase 1: a partial φ(k)ᵀv and Σ φ(k) per head and split.
    fn accumulate<T: Element>(
        &self,
        tensors: &Tensors<'_, T>,
        parts: &Buffer<T::Number>,
    ) -> Result<(), KernelError> {
        let scratch_len = self.shape.accumulate_scratch();
        let keys = self.dims.keys;
        let out_of_memory = AtomicBool::new(false);
        let task = |group: Group, split: usize| {
            let Ok(scratch) = Buffer::new(scratch_len) else {
                out_of_memory.store(true, Ordering::Relaxed);
                return;
            };
            let start = (split * self.rows_per_split).min(keys);
            let end = (start + self.rows_per_split).min(keys);
            let (k, v) = (tensors.k.as_ptr(), tensors.v.as_ptr());
            let first = self.dims.heads * group.batch + group.first;
            // SAFETY: every offset lies inside its tensor, whose length the caller of `run`
            // checked against the dims; every task has its own parts and scratch.
            unsafe {
                let task = Accumulate {
                    shape: self.shape,
                    heads: group.heads,
                    k: self.rows(k, group, keys, start, self.dims.head_dim),
                    v: self.rows(v, group, keys, start, self.dims.value_dim),
                    rows: end - start,
                    rows_before: start,
                    rows_ahead: keys - start,
                    sums: parts
                        .as_ptr()
                        .add((first * self.splits + split) * self.per_part),
                    sums_step: self.splits * self.per_part,
                    scratch: scratch.as_ptr(),
                };
                <T as Dispatch>::accumulate(self.execution.isa, task);
            }
        };
        self.for_groups::<T>(self.splits, &task);
        if out_of_memory.into_inner() {
            return Err(KernelError::OutOfMemory {
                elements: scratch_len,
            });
        }
        Ok(())
    }

    /// Adds a head's partial results into its first one, in order, and divides by M.
    fn finish<A: Accumulator>(&self, parts: &Buffer<A>) {
        let used = self.shape.part_len();
        let scale = A::from_f64(1.0 / self.dims.keys.max(1) as f64);
        let task = |head: usize| {
            // SAFETY: parts of one head are consecutive and belong to this task; phase 1 wrote
            // all `used` numbers of each.
            unsafe {
                let first = parts.as_ptr().add(head * self.splits * self.per_part);
                for split in 1..self.splits {
                    let other = first.add(split * self.per_part);
                    for i in 0..used {
                        let at = first.add(i);
                        *at = (*at).add(*other.add(i));
                    }
                }
                for i in 0..used {
                    let at = first.add(i);
                    *at = (*at).mul(scale);
                }
                // φ(0) = 1 was summed up in the padding; phase 2 wants zeros there.
                let mean_key = first.add(self.shape.sums_len());
                for i in self.dims.head_dim..self.shape.padded_dim {
                    *mean_key.add(i) = A::ZERO;
                }
            }
        };
        self.execution
            .pool
            .run(self.dims.batch * self.dims.heads, &task);
    }

    /// Phase 2: the output, some rows of some heads per task.
    fn apply<T: Element>(
        &self,
        eps: f32,
        tensors: Tensors<'_, T>,
        parts: &Buffer<T::Number>,
    ) -> Result<(), KernelError> {
        let scratch_len = self.shape.apply_scratch();
        let queries = self.dims.queries;
        let out = SendPtr(tensors.out.as_mut_ptr().cast::<T>());
        let q = tensors.q;
        let out_of_memory = AtomicBool::new(false);
        let pieces = MIN_TASKS
            .div_ceil(self.dims.batch)
            .min(queries.div_ceil(MIN_QUERY_ROWS))
            .max(queries.div_ceil(QUERY_ROWS));
        let piece_rows = queries.div_ceil(pieces).next_multiple_of(QUERY_BLOCK);
        let task = |group: Group, piece: usize| {
            let Ok(scratch) = Buffer::new(scratch_len) else {
                out_of_memory.store(true, Ordering::Relaxed);
                return;
            };
            let start = (piece * piece_rows).min(queries);
            let first = self.dims.heads * group.batch + group.first;
            // SAFETY: as in phase 1; tasks write disjoint rows of the output.
            unsafe {
                let to = self.rows(out.get(), group, queries, start, self.dims.value_dim);
                let task = Apply {
                    shape: self.shape,
                    heads: group.heads,
                    q: self.rows(q.as_ptr(), group, queries, start, self.dims.head_dim),
                    out: Rows {
                        first: to.first.cast_mut(),
                        stride: to.stride,
                        head_step: to.head_step,
                    },
                    rows: piece_rows.min(queries - start),
                    rows_before: start,
                    rows_ahead: queries - start,
                    sums: parts.as_ptr().add(first * self.splits * self.per_part),
                    sums_step: self.splits * self.per_part,
                    eps: T::Number::from_f64(f64::from(eps)),
                    scratch: scratch.as_ptr(),
                };
                <T as Dispatch>::apply(self.execution.isa, task);
            }
        };
        self.for_groups::<T>(pieces, &task);
        if out_of_memory.into_inner() {
            return Err(KernelError::OutOfMemory {
                elements: scratch_len,
            });
        }
        Ok(())
    }

    /// Rows from `start` on of a group's heads, of a tensor with `count` rows of `width` per head.
    ///
    /// # Safety
    /// The tensor must have the shape that the dims say, and `start <= count`.
    unsafe fn rows<T>(
        &self,
        tensor: *const T,
        group: Group,
        count: usize,
        start: usize,
        width: usize,
    ) -> Rows<*const T> {
        let heads = self.dims.heads;
        let (offset, stride, head_step) = match self.dims.layout {
            Layout::Packed => {
                let stride = heads * width;
                let row = group.batch * count + start;
                (row * stride + group.first * width, stride, width)
            }
            Layout::Heads => {
                let head = group.batch * heads + group.first;
                ((head * count + start) * width, width, count * width)
            }
        };
        Rows {
            // An empty range of rows may start behind the end; it is never read.
            first: tensor.wrapping_add(offset),
            stride,
            head_step,
        }
    }
}

/// Neighbouring heads of one batch element.
#[derive(Clone, Copy)]
struct Group {
    batch: usize,
    /// The first head.
    first: usize,
    heads: usize,
}

/// A pointer that tasks share; they write disjoint elements.
#[derive(Clone, Copy)]
struct SendPtr<T>(*mut T);

// SAFETY: see above.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: see above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    fn get(self) -> *mut T {
        self.0
    }
}
