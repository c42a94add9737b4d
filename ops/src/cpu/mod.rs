//! The CPU kernels: one call computes the operator for any element type and layout.
//!
//! The work is cut into tasks by the sizes alone, and partial sums are added in a fixed order, so
//! the result has the same bits for any number of threads. It differs between instruction sets
//! and between element types by rounding only.

mod accumulate;
mod ahead;
mod apply;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
mod columns;
mod element;
mod isa;
mod lanes;
mod panels;
mod plan;
mod pool;
mod simd;
mod task;
mod tile;
#[cfg(target_arch = "x86_64")]
mod wide64;
mod window;

use std::mem::MaybeUninit;

use thiserror::Error;

pub use element::Element;
pub use isa::Isa;
pub use pool::{Pool, Serial, Threads};
pub use window::window_attention;

use crate::schema::{AttrError, Dims};

/// Why a kernel did not run.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum KernelError {
    /// A tensor's length disagrees with its shape.
    #[error("tensor `{tensor}`: expected {expected} elements for its shape, found {found}")]
    Length {
        /// Which tensor.
        tensor: &'static str,
        /// Elements by the shape.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// An attribute is out of range.
    #[error(transparent)]
    Attr(#[from] AttrError),
    /// Scratch memory could not be had.
    #[error("no memory for {elements} numbers of scratch space")]
    OutOfMemory {
        /// Numbers asked for.
        elements: usize,
    },
    /// The instruction set asked for is not there.
    #[error("this machine has no `{isa}` instructions")]
    Isa {
        /// The instruction set asked for.
        isa: Isa,
    },
}

/// The tensors of one call, contiguous and row-major, with the shapes that [`Dims`] gives.
pub struct Tensors<'a, T> {
    /// Queries.
    pub q: &'a [T],
    /// Keys.
    pub k: &'a [T],
    /// Values.
    pub v: &'a [T],
    /// The output; every element is written.
    pub out: &'a mut [MaybeUninit<T>],
}

/// How a call is run.
#[derive(Clone, Copy)]
pub struct Execution<'a> {
    /// The instruction set.
    pub isa: Isa,
    /// The threads.
    pub pool: &'a dyn Pool,
}

impl Default for Execution<'_> {
    /// The fastest instruction set, on the calling thread.
    fn default() -> Self {
        Self {
            isa: Isa::best(),
            pool: &Serial,
        }
    }
}

/// Computes the operator of [`crate::schema`].
///
/// # Errors
/// [`KernelError`] when a length disagrees with `dims`, `eps` is not positive and finite, the
/// instruction set is missing, or scratch memory can't be had; the output is then unspecified.
pub fn linfusion_attention<T: Element>(
    dims: &Dims,
    eps: f32,
    tensors: Tensors<'_, T>,
    execution: Execution<'_>,
) -> Result<(), KernelError> {
    if !(eps.is_finite() && eps > 0.0) {
        return Err(AttrError::Eps(eps).into());
    }
    if !Isa::available().contains(&execution.isa) {
        return Err(KernelError::Isa { isa: execution.isa });
    }
    for (tensor, shape, found) in [
        ("q", dims.q_shape(), tensors.q.len()),
        ("k", dims.k_shape(), tensors.k.len()),
        ("v", dims.v_shape(), tensors.v.len()),
        ("out", dims.out_shape(), tensors.out.len()),
    ] {
        // `Dims` can be built field by field, so its products are not yet known to fit.
        let expected = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        if expected != Some(found) {
            return Err(KernelError::Length {
                tensor,
                expected: expected.unwrap_or(usize::MAX),
                found,
            });
        }
    }
    plan::run(dims, eps, tensors, execution)
}

/// An initialised slice as the output of a call.
pub fn as_output<T: Element>(out: &mut [T]) -> &mut [MaybeUninit<T>] {
    // SAFETY: `MaybeUninit<T>` has T's layout, and the kernels only ever write whole elements.
    unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast(), out.len()) }
}
