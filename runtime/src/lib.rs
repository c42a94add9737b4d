//! Runs original and converted diffusion graphs on ONNX Runtime or tract, compares and measures them.
pub mod arithmetic;
pub mod bench;
pub mod compare;
pub mod doctor;
pub mod engine;
pub mod image;
pub mod inputs;
pub mod memory;
pub mod npz;
pub mod packed;
pub mod pipeline;
pub mod plot;
pub mod provenance;
pub mod scheduler;
pub mod subgraph;
pub mod table;
pub mod tensor;
pub mod torch_random;
pub mod triton;
pub mod whole;

#[cfg(test)]
#[path = "../tests/support/device.rs"]
mod test_device;
