//! Cuts one call into tasks and runs them in two phases.

use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::Buffer;
use super::element::{Dispatch, Element};
use super::kernel::{Accumulate, Apply, HeadShape, KEY_BLOCK, Rows};
use super::panels::{self, Panel};
use super::simd::Accumulator;
use super::{Execution, KernelError, Tensors};
use crate::schema::{Dims, Layout};

/// Phase 1 is cut into about this many tasks, so that a single head still feeds many cores. A
/// constant, so that the order of summation doesn't depend on the machine.
const KEY_TASKS: usize = 128;
/// Fewest rows of k that are worth a partial sum of their own.
const MIN_KEY_ROWS: usize = 8 * KEY_BLOCK;
/// Rows of q of one task of phase 2.
const QUERY_ROWS: usize = 480;

/// What all tasks of one call share.
struct Plan<'a> {
    dims: &'a Dims,
    execution: Execution<'a>,
    panels: &'a [Panel],
    width: usize,
    padded_dim: usize,
    splits: usize,
    rows_per_split: usize,
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
    let wanted = KEY_TASKS.div_ceil(heads);
    let splits = wanted.min(dims.keys.div_ceil(MIN_KEY_ROWS)).max(1);
    // Whole blocks, so that no split ends in a short one but the last.
    let rows_per_split = dims.keys.div_ceil(splits).next_multiple_of(KEY_BLOCK);
    let plan = Plan {
        dims,
        execution,
        panels: &panels,
        width,
        padded_dim: dims.head_dim.next_multiple_of(tile.lanes),
        splits,
        rows_per_split,
    };
    let too_large = || KernelError::OutOfMemory {
        elements: usize::MAX,
    };
    let per_part = plan.part_len().ok_or_else(too_large)?;
    let parts = heads
        .checked_mul(splits)
        .and_then(|n| n.checked_mul(per_part))
        .ok_or_else(too_large)?;
    let parts = Buffer::<T::Number>::new(parts)?;

    plan.accumulate(&tensors, &parts, per_part)?;
    plan.finish(&parts, per_part);
    plan.apply(eps, tensors, &parts, per_part)
}

impl Plan<'_> {
    fn head_shape(&self) -> HeadShape<'_> {
        HeadShape {
            head_dim: self.dims.head_dim,
            padded_dim: self.padded_dim,
            panels: self.panels,
            width: self.width,
        }
    }

    /// Numbers of one partial result, padded to whole cache lines so that tasks don't share one.
    fn part_len(&self) -> Option<usize> {
        self.dims
            .head_dim
            .checked_mul(self.width)?
            .checked_add(self.padded_dim)?
            .checked_next_multiple_of(16)
    }

    /// Phase 1: a partial φ(k)ᵀv and Σ φ(k) per head and split.
    fn accumulate<T: Element>(
        &self,
        tensors: &Tensors<'_, T>,
        parts: &Buffer<T::Number>,
        per_part: usize,
    ) -> Result<(), KernelError> {
        let shape = self.head_shape();
        let scratch_len = shape.accumulate_scratch();
        let out_of_memory = AtomicBool::new(false);
        let task = |index: usize| {
            let (head, split) = (index / self.splits, index % self.splits);
            let Ok(scratch) = Buffer::new(scratch_len) else {
                out_of_memory.store(true, Ordering::Relaxed);
                return;
            };
            let start = (split * self.rows_per_split).min(self.dims.keys);
            let end = (start + self.rows_per_split).min(self.dims.keys);
            // SAFETY: every offset lies inside its tensor, whose length the caller of `run`
            // checked against the dims; every task has its own part and scratch.
            unsafe {
                let sums = parts.as_ptr().add(index * per_part);
                let task = Accumulate {
                    shape,
                    k: self.rows(
                        tensors.k.as_ptr(),
                        head,
                        self.dims.keys,
                        start,
                        self.dims.head_dim,
                    ),
                    v: self.rows(
                        tensors.v.as_ptr(),
                        head,
                        self.dims.keys,
                        start,
                        self.dims.value_dim,
                    ),
                    rows: end - start,
                    sums,
                    key_sum: sums.add(shape.sums_len()),
                    scratch: scratch.as_ptr(),
                };
                <T as Dispatch>::accumulate(self.execution.isa, task);
            }
        };
        let tasks = self.dims.batch * self.dims.heads * self.splits;
        self.execution.pool.run(tasks, &task);
        if out_of_memory.into_inner() {
            return Err(KernelError::OutOfMemory {
                elements: scratch_len,
            });
        }
        Ok(())
    }

    /// Adds a head's partial results into its first one, in order, and divides by M.
    fn finish<A: Accumulator>(&self, parts: &Buffer<A>, per_part: usize) {
        let used = self.dims.head_dim * self.width + self.padded_dim;
        let scale = A::from_f64(1.0 / self.dims.keys.max(1) as f64);
        let task = |head: usize| {
            // SAFETY: parts of one head are consecutive and belong to this task; phase 1 wrote
            // all `used` numbers of each.
            unsafe {
                let first = parts.as_ptr().add(head * self.splits * per_part);
                for split in 1..self.splits {
                    let other = first.add(split * per_part);
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
                let mean_key = first.add(self.dims.head_dim * self.width);
                for i in self.dims.head_dim..self.padded_dim {
                    *mean_key.add(i) = A::ZERO;
                }
            }
        };
        self.execution
            .pool
            .run(self.dims.batch * self.dims.heads, &task);
    }

    /// Phase 2: the output, some rows of one head per task.
    fn apply<T: Element>(
        &self,
        eps: f32,
        tensors: Tensors<'_, T>,
        parts: &Buffer<T::Number>,
        per_part: usize,
    ) -> Result<(), KernelError> {
        let shape = self.head_shape();
        let scratch_len = shape.apply_scratch();
        let blocks = self.dims.queries.div_ceil(QUERY_ROWS);
        let out = SendPtr(tensors.out.as_mut_ptr().cast::<T>());
        let q = tensors.q;
        let out_of_memory = AtomicBool::new(false);
        let task = |index: usize| {
            let (head, block) = (index / blocks, index % blocks);
            let Ok(scratch) = Buffer::new(scratch_len) else {
                out_of_memory.store(true, Ordering::Relaxed);
                return;
            };
            let start = block * QUERY_ROWS;
            // SAFETY: as in phase 1; tasks write disjoint rows of the output.
            unsafe {
                let sums = parts.as_ptr().add(head * self.splits * per_part);
                let from = self.rows(
                    q.as_ptr(),
                    head,
                    self.dims.queries,
                    start,
                    self.dims.head_dim,
                );
                let to = self.rows(
                    out.get(),
                    head,
                    self.dims.queries,
                    start,
                    self.dims.value_dim,
                );
                let task = Apply {
                    shape,
                    q: from,
                    out: Rows {
                        first: to.first.cast_mut(),
                        stride: to.stride,
                    },
                    rows: QUERY_ROWS.min(self.dims.queries - start),
                    sums,
                    mean_key: sums.add(shape.sums_len()),
                    eps: T::Number::from_f64(f64::from(eps)),
                    scratch: scratch.as_ptr(),
                };
                <T as Dispatch>::apply(self.execution.isa, task);
            }
        };
        let tasks = self.dims.batch * self.dims.heads * blocks;
        self.execution.pool.run(tasks, &task);
        if out_of_memory.into_inner() {
            return Err(KernelError::OutOfMemory {
                elements: scratch_len,
            });
        }
        Ok(())
    }

    /// Rows from `start` on of one of the B·H heads of a tensor with `count` rows of `width`.
    ///
    /// # Safety
    /// The tensor must have the shape that the dims say, and `start <= count`.
    unsafe fn rows<T>(
        &self,
        tensor: *const T,
        head: usize,
        count: usize,
        start: usize,
        width: usize,
    ) -> Rows<*const T> {
        let heads = self.dims.heads;
        let (offset, stride) = match self.dims.layout {
            Layout::Packed => {
                let stride = heads * width;
                let row = head / heads * count + start;
                (row * stride + head % heads * width, stride)
            }
            Layout::Heads => ((head * count + start) * width, width),
        };
        Rows {
            // An empty range of rows may start behind the end; it is never read.
            first: tensor.wrapping_add(offset),
            stride,
        }
    }
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
