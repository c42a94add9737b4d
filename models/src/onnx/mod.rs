//! Reading and writing ONNX files without copying their weights.

/// The ONNX messages, generated from `proto/onnx.proto`.
#[allow(missing_docs, clippy::all, clippy::undocumented_unsafe_blocks)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/onnx_include.rs"));
    pub use self::onnx::*;
}
