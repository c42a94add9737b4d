//! Everything that can stand in the way.

use std::path::PathBuf;

use linfusion_models::checkpoint::CheckpointError;
use linfusion_models::onnx::ReadError;
use linfusion_runtime::engine::EngineError;
use linfusion_runtime::npz::NpzError;
use linfusion_runtime::pipeline::PipelineError;
use linfusion_runtime::subgraph::PartError;

use super::graph::GraphError;
use crate::convert::ConvertError;
use crate::patterns::UnmatchedPattern;

/// Why nothing was learned. What an earlier run wrote is as it was.
#[derive(Debug, thiserror::Error)]
pub enum DistillError {
    /// The model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The model was converted before.
    #[error("'{model}' was converted already; distil from the original model")]
    AlreadyConverted {
        /// The model.
        model: String,
    },
    /// There is nothing to learn.
    #[error(
        "'{model}' has no attention whose weights could be learned\n{reasons}\nhint: `linfusion-convert inspect` shows every attention and what stands in the way"
    )]
    NoSites {
        /// The model.
        model: String,
        /// Reasons, a line each.
        reasons: String,
    },
    /// A pattern matches nothing.
    #[error(transparent)]
    Pattern(#[from] UnmatchedPattern),
    /// Teacher inputs are not as they should be.
    #[error("{place}: {problem}")]
    Inputs {
        /// A file, an option, or how a sample was made.
        place: String,
        /// What is wrong, and a hint.
        problem: String,
    },
    /// An archive of inputs cannot be read.
    #[error(transparent)]
    Npz(#[from] NpzError),
    /// The pipeline makes no inputs.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// A setting is impossible.
    #[error("{option} {problem}")]
    Setting {
        /// The option.
        option: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The teacher does not run.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A part of the teacher does not run.
    #[error(transparent)]
    Part(#[from] PartError),
    /// A value of the teacher is not as the analysis says.
    #[error("{module}: value '{value}' {problem}")]
    Value {
        /// The site.
        module: String,
        /// The value.
        value: String,
        /// Expected and found.
        problem: String,
    },
    /// The teacher makes infinite or NaN activations.
    #[error(
        "{module}: the model's own value '{value}' has infinities or NaN for {sample}; is that an input that the model was made for?"
    )]
    NotFinite {
        /// The site.
        module: String,
        /// The value.
        value: String,
        /// The sample.
        sample: String,
    },
    /// Activations do not fit.
    #[error(
        "{module}: its activations for {samples} samples take {needed}, more than --disk-budget {budget}; take fewer samples or allow more"
    )]
    Budget {
        /// The site.
        module: String,
        /// Samples.
        samples: usize,
        /// Bytes, for people.
        needed: String,
        /// Bytes, for people.
        budget: String,
    },
    /// Activations cannot be stored or read back.
    #[error("activations cannot be kept in {}: {source} (hint: --scratch names another folder)", folder.display())]
    Scratch {
        /// The folder.
        folder: PathBuf,
        /// What the operating system said: usually the disk is full.
        r#source: std::io::Error,
    },
    /// The output is there.
    #[error("{} exists; --force replaces it", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// Another process learns the same weights.
    #[error("another process learns the weights {}: it holds {} (hint: wait for it, or name another output)", output.display(), folder.display())]
    Busy {
        /// The checkpoint that both are to write.
        output: PathBuf,
        /// Where what is learned is kept.
        folder: PathBuf,
    },
    /// The output or a finished site cannot be written.
    #[error("{} cannot be written: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// The weights cannot be written as a checkpoint, or read back.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The GPU that this program was built to learn on is not there.
    #[error(
        "this program learns on a GPU, and CUDA device 0 cannot be used: {source}\nhint: nvidia-smi shows which there are; built without the feature `distill-cuda` it learns on the processor"
    )]
    Device {
        /// What the driver said.
        r#source: Box<candle_core::Error>,
    },
    /// Learning fails in the library that differentiates.
    #[error("{module}: {source}")]
    Learning {
        /// The site.
        module: String,
        /// What it said.
        r#source: Box<candle_core::Error>,
    },
    /// The graph cannot be differentiated.
    #[error(
        "{0}\nhint: without --end-to-end each attention is learned alone, which needs no gradient of the graph"
    )]
    Graph(Box<GraphError>),
    /// No threads.
    #[error("cannot start threads: {0}")]
    Threads(String),
    /// The learned weights do not go back into the model.
    #[error("the learned weights cannot be put into the model: {0}")]
    Convert(Box<ConvertError>),
}

impl From<GraphError> for DistillError {
    fn from(error: GraphError) -> Self {
        Self::Graph(Box::new(error))
    }
}

impl From<ConvertError> for DistillError {
    fn from(error: ConvertError) -> Self {
        Self::Convert(Box::new(error))
    }
}

/// Names the site in errors of the learning library.
pub(super) fn learning(module: &str) -> impl Fn(candle_core::Error) -> DistillError + '_ {
    move |source| DistillError::Learning {
        module: module.to_owned(),
        source: Box::new(source),
    }
}
