//! ONNX files, the catalogue of diffusion architectures, and LinFusion checkpoints.
pub mod catalogue;
pub mod checkpoint;
#[cfg(feature = "fixtures")]
pub mod fixtures;
pub mod graph;
pub mod json;
pub mod leftovers;
pub mod onnx;
pub mod random;
pub mod sentencepiece;
pub mod shapes;
pub mod signals;
pub mod staged;
pub mod terminal;
