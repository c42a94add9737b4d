//! The element types the kernels read and write.

use half::{bf16, f16};

use super::isa::Isa;
use super::task::{Accumulate, Apply};
use super::window::WindowTask;
use crate::schema::ElementType;

/// An element type that the CPU kernels run on: `f32`, `f16`, `bf16` and `f64`.
#[allow(
    private_bounds,
    reason = "sealed: only this crate knows how to run an element type"
)]
pub trait Element: Dispatch {
    /// The element type's name in the schema.
    const TYPE: ElementType;
}

/// Which instruction set's kernels serve an element type.
pub(super) trait Dispatch: Copy + Send + Sync + 'static {
    /// The number that sums are taken in.
    type Number: super::simd::Accumulator;
    /// The register tiles of the instruction set for this type.
    fn tile(isa: Isa) -> super::panels::TileShape;
    /// Runs phase 1.
    ///
    /// # Safety
    /// As for [`Accumulate`]; the machine must have `isa`.
    unsafe fn accumulate(isa: Isa, task: Accumulate<'_, Self, Self::Number>);
    /// Runs phase 2.
    ///
    /// # Safety
    /// As for [`Apply`]; the machine must have `isa`.
    unsafe fn apply(isa: Isa, task: Apply<'_, Self, Self::Number>);
    /// Runs a tile of window attention.
    ///
    /// # Safety
    /// As for [`WindowTask`]; the machine must have `isa`.
    unsafe fn window(isa: Isa, task: WindowTask<'_, Self, Self::Number>);
}

impl Element for f32 {
    const TYPE: ElementType = ElementType::F32;
}
impl Element for f16 {
    const TYPE: ElementType = ElementType::F16;
}
impl Element for bf16 {
    const TYPE: ElementType = ElementType::Bf16;
}
impl Element for f64 {
    const TYPE: ElementType = ElementType::F64;
}
