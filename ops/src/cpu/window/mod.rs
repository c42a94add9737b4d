//! `WindowAttention` on the CPU: one task for each tile of queries of each head.
//!
//! A tile is cut into groups of neighbouring queries, which lie in the lanes of the vectors: neither
//! maximum nor sum crosses lanes, and keys and values are read as they are, one number at a time.
//! The keys that the tile's windows reach are read block by block, once for all groups; of a block
//! each group meets the keys that its own windows reach, with a running maximum and sum (online
//! softmax): memory does not depend on the window or the image.
//!
//! Tiles are cut by the sizes alone and each is computed by one thread: the result has the same bits
//! for any number of threads.

mod blocks;
mod product;
mod task;
mod tile;

use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::Buffer;
use super::element::{Dispatch, Element};
use super::simd::Accumulator;
use super::{Execution, Isa, KernelError, Tensors};
use crate::schema::{Layout, WindowAttentionAttrs, WindowDims};

pub(super) use task::WindowTask;
use task::scratch_len;
use tile::Tiles;

/// Computes the operator of [`crate::schema`], `WindowAttention`.
///
/// # Errors
/// [`KernelError`] when a length disagrees with `dims`, an attribute is out of range, the
/// instruction set is missing, or scratch memory can't be had; the output is then unspecified.
pub fn window_attention<T: Element>(
    dims: &WindowDims,
    attrs: &WindowAttentionAttrs,
    tensors: Tensors<'_, T>,
    execution: Execution<'_>,
) -> Result<(), KernelError> {
    attrs.check()?;
    if !Isa::available().contains(&execution.isa) {
        return Err(KernelError::Isa { isa: execution.isa });
    }
    let rows = dims.batch.checked_mul(dims.tokens());
    let numbers = |width: usize| rows?.checked_mul(dims.heads)?.checked_mul(width);
    for (tensor, expected, found) in [
        ("q", numbers(dims.head_dim), tensors.q.len()),
        ("k", numbers(dims.head_dim), tensors.k.len()),
        ("v", numbers(dims.value_dim), tensors.v.len()),
        ("out", numbers(dims.value_dim), tensors.out.len()),
    ] {
        if expected != Some(found) {
            return Err(KernelError::Length {
                tensor,
                expected: expected.unwrap_or(usize::MAX),
                found,
            });
        }
    }
    let plan = Plan {
        dims,
        attrs,
        tiles: Tiles::new(dims, attrs),
    };
    plan.run(tensors, execution)
}

struct Plan<'a> {
    dims: &'a WindowDims,
    attrs: &'a WindowAttentionAttrs,
    tiles: Tiles<'a>,
}

impl Plan<'_> {
    fn run<T: Element>(
        &self,
        tensors: Tensors<'_, T>,
        execution: Execution<'_>,
    ) -> Result<(), KernelError> {
        let dims = self.dims;
        let tiles = self.tiles.count();
        let heads = dims.batch * dims.heads;
        let scratch_len = scratch_len(dims, self.tiles.most_groups());
        let out = SendPtr(tensors.out.as_mut_ptr().cast::<T>());
        let (q, k, v) = (tensors.q, tensors.k, tensors.v);
        let scale = match self.attrs.scale.filter(|s| *s != 0.0) {
            Some(scale) => f64::from(scale),
            None => 1.0 / (dims.head_dim as f64).sqrt(),
        };
        let out_of_memory = AtomicBool::new(false);
        let task = |index: usize| {
            let Ok(scratch) = Buffer::new(scratch_len) else {
                out_of_memory.store(true, Ordering::Relaxed);
                return;
            };
            // Neighbouring tasks are close in memory: heads of the same tokens, or tokens of the
            // same head.
            let (head, tile) = match dims.layout {
                Layout::Packed => (index % heads, index / heads),
                Layout::Heads => (index / tiles, index % tiles),
            };
            let tile = self.tiles.tile(tile);
            let (batch, head) = (head / dims.heads, head % dims.heads);
            let task = WindowTask {
                dims,
                text: self.attrs.text,
                tile: &tile,
                halves: &self.tiles.halves,
                q: self.rows(q.as_ptr(), batch, head, dims.head_dim),
                k: self.rows(k.as_ptr(), batch, head, dims.head_dim),
                v: self.rows(v.as_ptr(), batch, head, dims.value_dim),
                out: {
                    let rows = self.rows(out.get(), batch, head, dims.value_dim);
                    HeadRows {
                        first: rows.first.cast_mut(),
                        stride: rows.stride,
                    }
                },
                scale: T::Number::from_f64(scale),
                scratch: scratch.as_ptr(),
            };
            // SAFETY: lengths were checked against the dims; tokens of a tile lie below N; every
            // query belongs to one task, so outputs are disjoint; the instruction set is there.
            unsafe { <T as Dispatch>::window(execution.isa, task) };
        };
        execution.pool.run(heads * tiles, &task);
        if out_of_memory.into_inner() {
            return Err(KernelError::OutOfMemory {
                elements: scratch_len,
            });
        }
        Ok(())
    }

    /// The rows of one head of a tensor.
    fn rows<T>(
        &self,
        tensor: *const T,
        batch: usize,
        head: usize,
        width: usize,
    ) -> HeadRows<*const T> {
        let (dims, tokens) = (self.dims, self.dims.tokens());
        let (offset, stride) = match dims.layout {
            Layout::Packed => {
                let stride = dims.heads * width;
                (batch * tokens * stride + head * width, stride)
            }
            Layout::Heads => ((batch * dims.heads + head) * tokens * width, width),
        };
        HeadRows {
            first: tensor.wrapping_add(offset),
            stride,
        }
    }
}

/// Rows of one head.
#[derive(Clone, Copy)]
pub(super) struct HeadRows<P> {
    /// The first element of token 0.
    pub(super) first: P,
    /// Elements from one token to the next.
    pub(super) stride: usize,
}

/// A pointer that tasks share; they write disjoint elements.
#[derive(Clone, Copy)]
struct SendPtr<T>(*mut T);

// SAFETY: see above.
unsafe impl<T: Send> Send for SendPtr<T> {}
// SAFETY: see above.
unsafe impl<T: Send> Sync for SendPtr<T> {}

impl<T> SendPtr<T> {
    fn get(self) -> *const T {
        self.0
    }
}
