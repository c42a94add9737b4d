//! `WindowAttention` on the CPU: one task for each tile of queries of each head.
//!
//! A tile's queries meet the keys that their windows reach, block by block, with a running maximum
//! and sum (online softmax): memory does not depend on the window or the image. Queries lie in the
//! lanes of the vectors, so that neither maximum nor sum crosses lanes and keys and values are
//! read as they are, one number at a time.
//!
//! Tiles are cut by the sizes alone and each is computed by one thread: the result has the same bits
//! for any number of threads.

mod task;

use std::sync::atomic::{AtomicBool, Ordering};

use super::buffer::Buffer;
use super::element::{Dispatch, Element};
use super::simd::Accumulator;
use super::{Execution, Isa, KernelError, Tensors};
use crate::schema::{GridAxis, Layout, Window, WindowAttentionAttrs, WindowDims};

pub(super) use task::WindowTask;

/// Queries of a tile: lanes of the scores.
pub(super) const QUERIES: usize = 64;
/// Rows and columns of a tile of image queries: larger ones reach more keys that most of their
/// queries don't.
const TILE: usize = 8;
/// Keys of a block; a multiple of every register tile's rows.
pub(super) const KEYS: usize = 60;

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
        tile: [TILE.min(dims.rows), TILE.min(dims.cols)],
    };
    plan.run(tensors, execution)
}

struct Plan<'a> {
    dims: &'a WindowDims,
    attrs: &'a WindowAttentionAttrs,
    /// Rows and columns of a tile of image queries.
    tile: [usize; 2],
}

/// The queries of one task and the keys they may attend to.
pub(super) struct Tile {
    /// Tokens of the queries, [`QUERIES`] at most.
    pub(super) queries: Vec<usize>,
    /// Rows and columns of the keys, `None` for text queries, which attend to all tokens.
    pub(super) reach: Option<Reach>,
}

/// The image keys that a tile's windows reach, and which query reaches which.
///
/// The key at (row, column) is outside the window of query `lane` by
/// `rows[row][lane] + columns[column][lane] - limit`, where that is above zero.
pub(super) struct Reach {
    pub(super) first_row: usize,
    pub(super) first_column: usize,
    /// By row of keys, a number a lane.
    pub(super) rows: Vec<[f32; QUERIES]>,
    /// By column of keys.
    pub(super) columns: Vec<[f32; QUERIES]>,
    /// Where a circle ends; 0 for a rectangle, whose numbers are 0 or 1.
    pub(super) limit: f32,
}

impl Plan<'_> {
    fn run<T: Element>(
        &self,
        tensors: Tensors<'_, T>,
        execution: Execution<'_>,
    ) -> Result<(), KernelError> {
        let dims = self.dims;
        let [tile_rows, tile_cols] = self.tile;
        let across = dims.cols.div_ceil(tile_cols);
        let image_tiles = dims.rows.div_ceil(tile_rows) * across;
        let text_tiles = dims.text.div_ceil(QUERIES);
        let tiles = image_tiles + text_tiles;
        let heads = dims.batch * dims.heads;
        let scratch_len = WindowTask::<T, T::Number>::scratch(dims);
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
            // Neighbouring tasks are neighbouring tiles of one head: they share keys.
            let (head, tile) = (index / tiles, index % tiles);
            let tile = if tile < image_tiles {
                self.image_tile(tile / across, tile % across)
            } else {
                self.text_tile(tile - image_tiles)
            };
            let (batch, head) = (head / dims.heads, head % dims.heads);
            let task = WindowTask {
                dims,
                text: self.attrs.text,
                tile: &tile,
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

    fn image_tile(&self, row: usize, column: usize) -> Tile {
        let dims = self.dims;
        let image = dims.image_start(self.attrs.text);
        let [tile_rows, tile_cols] = self.tile;
        let rows = row * tile_rows..((row + 1) * tile_rows).min(dims.rows);
        let cols = column * tile_cols..((column + 1) * tile_cols).min(dims.cols);
        let places: Vec<(usize, usize)> = rows
            .clone()
            .flat_map(|y| cols.clone().map(move |x| (y, x)))
            .collect();
        let union = |axis: GridAxis, range: &std::ops::Range<usize>, size: usize| {
            let first = self.attrs.key_range(axis, range.start, size).start;
            let end = self.attrs.key_range(axis, range.end - 1, size).end;
            first..end
        };
        let key_rows = union(GridAxis::Rows, &rows, dims.rows);
        let key_cols = union(GridAxis::Cols, &cols, dims.cols);
        let outside = |axis: GridAxis, key: usize, at: usize, size: usize| match self.attrs.window {
            Window::Circle { .. } => {
                let apart = key.abs_diff(at) as f32;
                apart * apart
            }
            Window::Rect { .. } => f32::from(!self.attrs.key_range(axis, at, size).contains(&key)),
        };
        let lanes = |of: &dyn Fn((usize, usize)) -> f32| {
            let mut lanes = [0.0; QUERIES];
            for (lane, place) in lanes.iter_mut().zip(&places) {
                *lane = of(*place);
            }
            lanes
        };
        Tile {
            queries: places
                .iter()
                .map(|(y, x)| image + y * dims.cols + x)
                .collect(),
            reach: Some(Reach {
                first_row: key_rows.start,
                first_column: key_cols.start,
                rows: key_rows
                    .map(|key| lanes(&|(y, _)| outside(GridAxis::Rows, key, y, dims.rows)))
                    .collect(),
                columns: key_cols
                    .map(|key| lanes(&|(_, x)| outside(GridAxis::Cols, key, x, dims.cols)))
                    .collect(),
                limit: match self.attrs.window {
                    // d² < r² for whole numbers.
                    Window::Circle { radius } => (radius * radius) as f32 - 0.5,
                    Window::Rect { .. } => 0.0,
                },
            }),
        }
    }

    fn text_tile(&self, index: usize) -> Tile {
        let start = self.dims.text_start(self.attrs.text);
        let first = index * QUERIES;
        let end = (first + QUERIES).min(self.dims.text);
        Tile {
            queries: (start + first..start + end).collect(),
            reach: None,
        }
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
