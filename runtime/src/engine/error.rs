//! Why a graph cannot be loaded or run.

use std::path::PathBuf;

use linfusion_models::onnx::TensorError;

use super::{Device, Engine, library};
use crate::tensor::DType;

/// Why a graph cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no ONNX Runtime library, or it does not load.
    #[error(transparent)]
    Library(#[from] library::LibraryError),
    /// The device that was asked for doesn't work.
    #[error("{device} cannot be used: {problem}; {hint}")]
    Device {
        /// The device.
        device: Device,
        /// What is missing.
        problem: String,
        /// What to do.
        hint: &'static str,
    },
    /// The operators of this program cannot be registered.
    #[error("cannot register this program's LinFusion operators: {0}")]
    Operators(linfusion_ops::ort::OrtError),
    /// The model file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The model.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// The engine refuses the model.
    #[error("{engine} cannot load {model}: {message}")]
    Load {
        /// The engine.
        engine: Engine,
        /// The model's path, or a word for one in memory.
        model: String,
        /// What the engine said.
        message: String,
    },
    /// A data file of the model is missing, or damaged.
    #[error("{model}: {source}")]
    Data {
        /// The model's path.
        model: String,
        /// Which tensor, and what of its file.
        r#source: Box<TensorError>,
    },
    /// The engine fails while running.
    #[error("{engine} failed while running: {message}")]
    Run {
        /// The engine.
        engine: Engine,
        /// What the engine said.
        message: String,
    },
    /// An input or output has a type that is no [`DType`].
    #[error("`{name}` has element type {found}, which is not supported")]
    ElementType {
        /// The port.
        name: String,
        /// Its type.
        found: String,
    },
    /// A tensor is where the engine cannot reach it.
    #[error("{engine} cannot take `{name}`, which ONNX Runtime holds")]
    Unreachable {
        /// The engine.
        engine: Engine,
        /// The input.
        name: String,
    },
    /// Tensors do not go together.
    #[error("cannot {operation} {operands}")]
    Operands {
        /// What was to be done with them.
        operation: &'static str,
        /// Their types and shapes.
        operands: String,
    },
    /// A graph input was not given.
    #[error("the graph's input `{name}` was not given (given: {given:?})")]
    MissingInput {
        /// The input.
        name: String,
        /// The names that were given.
        given: Vec<String>,
    },
    /// A given tensor is no input of the graph.
    #[error("`{name}` is no input of the graph, whose inputs are {inputs:?}")]
    UnknownInput {
        /// The name that was given.
        name: String,
        /// The graph's inputs.
        inputs: Vec<String>,
    },
    /// A given tensor does not fit the graph's input.
    #[error("input `{name}` is {found_dtype}{found:?}, but the graph takes {expected}")]
    InputMismatch {
        /// The input.
        name: String,
        /// Type that was given.
        found_dtype: DType,
        /// Shape that was given.
        found: Vec<usize>,
        /// What the graph declares.
        expected: String,
    },
}

impl From<linfusion_ops::ort::OrtError> for EngineError {
    fn from(error: linfusion_ops::ort::OrtError) -> Self {
        Self::Operators(error)
    }
}
