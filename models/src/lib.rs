//! ONNX files, the catalogue of diffusion architectures, and LinFusion checkpoints.
pub mod onnx;
