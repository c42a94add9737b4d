//! LinFusion attention operators: what they mean, and how they are run on a CPU.
//!
//! - [`schema`]: names, attributes, element types and the shape rule of
//!   `ai.linfusion::LinFusionAttention`, version 1;
//! - [`mod@reference`]: the meaning, in plain `f64` arithmetic over `ndarray`;
//! - [`body`]: the same meaning as a function body in standard ONNX operators;
//! - [`cpu`]: the CPU kernels;
//! - [`cuda`]: the CUDA kernels and their launches;
//! - [`ort`]: the custom-op library for ONNX Runtime (`RegisterCustomOps`);
//! - `tract` (feature `tract`): the operator for tract.

pub mod body;
pub mod cpu;
pub mod cuda;
pub mod ort;
pub mod reference;
pub mod schema;
#[cfg(feature = "tract")]
pub mod tract;

pub use schema::{Dims, ElementType, Layout, LinFusionAttentionAttrs, ShapeError};
