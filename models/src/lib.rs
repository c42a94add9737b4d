//! ONNX files, the catalogue of diffusion architectures, and LinFusion checkpoints.
pub mod catalogue;
pub mod checkpoint;
pub mod onnx;
