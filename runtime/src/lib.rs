//! Runs original and converted diffusion graphs on ONNX Runtime or tract, compares and measures them.
pub mod engine;
pub mod npz;
pub mod tensor;
