//! Reading and writing ONNX files without copying their weights.
//!
//! [`OnnxFile::open`] maps a file and decodes its structure; the weights stay in
//! the map as [`bytes::Bytes`] slices, or in the data files that the model names.

pub mod check;
pub mod make;
pub mod text;
pub mod write;

mod attrs;
mod element;
mod external;
mod folder;
mod limits;
mod map;
mod open;
mod sniff;
mod tensor;
mod walk;

#[cfg(test)]
mod malformed_tests;
#[cfg(test)]
mod read_tests;

pub use attrs::{
    AttributeKind, attr, attr_f, attr_floats, attr_g, attr_i, attr_ints, attr_s, attr_t,
};
pub use element::{ElementType, ShapeError, element_count};
pub use external::{ExternalRef, ExternalRefError, is_external};
pub use folder::DataFileError;
pub use limits::Limits;
pub use open::{MAX_MODEL_BYTES, OnnxFile, ReadError};
pub use tensor::{TensorData, TensorError, TensorFault};
pub use walk::{TensorRole, for_each_tensor, for_each_tensor_mut};

/// The ONNX messages, generated from `proto/onnx.proto`.
#[allow(missing_docs, clippy::all, clippy::undocumented_unsafe_blocks)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/onnx_include.rs"));
    pub use self::onnx::*;
}
