//! What can go wrong between a pipeline's folder and a model repository.

use std::io;
use std::path::{Path, PathBuf};

use linfusion_models::onnx::ReadError;
use linfusion_models::onnx::write::WriteError;

use crate::pipeline::PipelineError;

/// Why no repository was written. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum TritonError {
    /// The pipeline's folder cannot be read.
    #[error(transparent)]
    Pipeline(Box<PipelineError>),
    /// A pipeline without one of its models.
    #[error("{} has no folder {missing}; a pipeline is the folder that `optimum-cli export onnx --task text-to-image` writes", path.display())]
    Missing {
        /// The pipeline's folder.
        path: PathBuf,
        /// What was looked for.
        missing: &'static str,
    },
    /// A model cannot be read.
    #[error("{model}: {source}")]
    Read {
        /// The model's name in the pipeline.
        model: String,
        /// What is wrong.
        r#source: ReadError,
    },
    /// An input or output that Triton cannot serve.
    #[error("{}: `{tensor}` {problem}", path.display())]
    Tensor {
        /// The model file.
        path: PathBuf,
        /// The input or output.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of weights that a model names cannot be used.
    #[error("{}: {problem}", path.display())]
    Weights {
        /// The model file.
        path: PathBuf,
        /// Which file, and why.
        problem: String,
    },
    /// The model has operators without their definition, and no library was given.
    #[error(
        "{} has operators of LinFusion without their definition; give the library with --op-library (`make lib` builds it), or convert the model with --emit function",
        path.display()
    )]
    NeedsLibrary {
        /// The model file.
        path: PathBuf,
    },
    /// What was given as operator library is none.
    #[error("--op-library: {} {problem}", path.display())]
    Library {
        /// The file.
        path: PathBuf,
        /// Expected and found.
        problem: String,
    },
    /// There is something already.
    #[error("{} exists already; choose another folder, or replace it with --force", path.display())]
    Exists {
        /// The repository's folder.
        path: PathBuf,
    },
    /// What is there is no model repository, and is not replaced.
    #[error("{} is no model repository, so --force does not replace it: {found}", path.display())]
    NotARepository {
        /// The folder.
        path: PathBuf,
        /// What a repository doesn't have.
        found: String,
    },
    /// The repository would lie in the pipeline, or the other way round.
    #[error("the repository {} and the pipeline {} lie in each other", repository.display(), pipeline.display())]
    Nested {
        /// The repository's folder.
        repository: PathBuf,
        /// The pipeline's folder.
        pipeline: PathBuf,
    },
    /// The operating system's answer.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// The answer.
        r#source: io::Error,
    },
    /// A model cannot be copied.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The user stopped it.
    #[error("stopped; nothing was written")]
    Stopped,
}

impl From<PipelineError> for TritonError {
    fn from(error: PipelineError) -> Self {
        Self::Pipeline(Box::new(error))
    }
}

impl TritonError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
