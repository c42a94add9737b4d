//! ONNX graphs on tensors that can be differentiated.
//!
//! A [`Program`] is the part of a graph that some values need, at fixed sizes: whatever follows from the sizes is
//! computed when it is made ([`linfusion_models::shapes`]), and so are layers of constants; what is left are the
//! operations on floating-point values. Attentions can be replaced by functions with weights to learn.
//! [`Program::gradient`] differentiates a loss of the wanted values by those weights; it keeps only the values between
//! segments of the graph and computes the inside of a segment again when it is its turn (`backward`).
//!
//! All floating-point types are computed in float32, integers in int64. (candle-onnx would do part of this; it needs
//! `protoc` to build, copies every weight, folds no shapes and keeps every value.)

mod backward;
mod conv;
mod einsum;
mod lower;
mod op;
mod program;
#[cfg(test)]
mod tests;
mod window;

pub use self::backward::Gradient;
pub(super) use self::lower::shape;
pub use self::program::{NO_SITES, Program, Replaced, Sites};

use linfusion_models::onnx::TensorError;

/// Why a graph cannot be computed or differentiated.
#[derive(Debug, thiserror::Error)]
pub enum GraphError {
    /// An operator is not among those that can be differentiated, or not in this form.
    #[error("{op} '{node}' cannot be differentiated: {problem}")]
    Operator {
        /// The node.
        node: String,
        /// Its operator.
        op: String,
        /// What is in the way.
        problem: String,
    },
    /// A value is missing or of another type or size.
    #[error("value '{value}' {problem}")]
    Value {
        /// The value.
        value: String,
        /// Expected and found.
        problem: String,
    },
    /// A stored tensor cannot be read.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// The library that differentiates fails at a node.
    #[error("at '{node}': {source}")]
    Compute {
        /// The node.
        node: String,
        /// What it said.
        r#source: Box<candle_core::Error>,
    },
}

impl GraphError {
    fn at(node: &str) -> impl Fn(candle_core::Error) -> Self + '_ {
        move |source| Self::Compute {
            node: node.to_owned(),
            source: Box::new(source),
        }
    }

    fn value(value: &str, problem: impl Into<String>) -> Self {
        Self::Value {
            value: value.to_owned(),
            problem: problem.into(),
        }
    }
}
