//! Model repositories for Triton Inference Server, of pipelines.
//!
//! Each model of a pipeline becomes a model of the repository, under the name of its folder, for Triton's backend of ONNX
//! Runtime. Pipelines with two text encoders also get the ensemble `text`, which runs both in one request. The loop over
//! sampling steps stays with the client: an ensemble has no loops.
//!
//! Facts about Triton are from its sources: `model_config.proto` of triton-inference-server/common and `onnxruntime.cc` of
//! triton-inference-server/onnxruntime_backend (2026).

mod config;
mod ensemble;
mod error;
mod export;
mod repository;
mod signature;
mod text_format;

pub use config::{
    DataType, DynamicBatching, InstanceGroup, InstanceKind, ModelConfig, Platform, Port, Step,
};
pub use error::TritonError;
pub use export::{Exported, ExportedModel, Note, Placing, Request, export};
pub use repository::Existing;
