//! What can go wrong between a folder and an image.

use std::path::PathBuf;

use crate::engine::EngineError;
use crate::scheduler::SchedulerError;

/// Why a pipeline cannot be read or run.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A file or folder of the pipeline is missing or unreadable.
    #[error("cannot read {}: {source}; {hint}", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
        /// Where it should come from.
        hint: &'static str,
    },
    /// A JSON file is damaged.
    #[error("{}: {problem}", path.display())]
    Json {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        problem: String,
    },
    /// A field says something that cannot be done.
    #[error("{}: field `{field}` is {found}, expected {expected}", path.display())]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would do.
        expected: String,
    },
    /// A folder has no model file, or several.
    #[error("{} has {found}, expected model.onnx", path.display())]
    ModelFile {
        /// The component's folder.
        path: PathBuf,
        /// What is there.
        found: String,
    },
    /// A model's inputs or outputs are not those of its kind.
    #[error("{}: {problem}", path.display())]
    Ports {
        /// The model.
        path: PathBuf,
        /// What is missing or odd, with the names that are there.
        problem: String,
    },
    /// A tokenizer cannot be built from its files.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// What was asked for is not possible with this pipeline.
    #[error("{option}: {problem}")]
    Request {
        /// The option, as on the command line.
        option: &'static str,
        /// Expected and found.
        problem: String,
    },
    /// An engine refused a model or failed.
    #[error("{stage}: {source}")]
    Engine {
        /// Which stage of the generation.
        stage: String,
        /// What the engine said.
        r#source: EngineError,
    },
    /// Values are infinite or NaN.
    #[error("{stage}: {count} of {total} values are infinite or not a number{place}")]
    NotFinite {
        /// Which stage, and which step of it.
        stage: String,
        /// How many values.
        count: usize,
        /// Of how many.
        total: usize,
        /// The first node that made such a value, or a hint.
        place: String,
    },
    /// The estimate exceeds the machine.
    #[error("{stage} needs about {needed} of memory, and {available}; {hint}")]
    Memory {
        /// Which stage.
        stage: String,
        /// Estimate, with its unit.
        needed: String,
        /// What is there, in words.
        available: String,
        /// What to change.
        hint: String,
    },
    /// The user stopped it.
    #[error("stopped{}", kept.as_ref().map(|p| format!("; the last finished stage is in {}", p.display())).unwrap_or_default())]
    Stopped {
        /// The image of the last finished stage.
        kept: Option<PathBuf>,
    },
    /// The scheduler's configuration cannot be followed.
    #[error("{}: {source}", path.display())]
    Scheduler {
        /// scheduler_config.json
        path: PathBuf,
        /// What is wrong.
        r#source: SchedulerError,
    },
    /// An image cannot be read or written.
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
}

impl PipelineError {
    /// Whether the user wanted it.
    pub fn is_stop(&self) -> bool {
        matches!(self, Self::Stopped { .. })
    }

    /// Whether an option says what cannot be, rather than a file or the machine.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Request { .. } => true,
            Self::Scheduler { source, .. } => match source {
                SchedulerError::Steps { .. } => true,
                // No configuration has it.
                SchedulerError::Field { field, .. } => field == "eta",
                _ => false,
            },
            Self::Image(error) => error.is_usage(),
            _ => false,
        }
    }

    /// The same, with the stage that it happened in before the model's name.
    pub(super) fn within(mut self, place: &str) -> Self {
        if let Self::NotFinite { stage, .. } | Self::Engine { stage, .. } = &mut self {
            *stage = format!("{place}: {stage}");
        }
        self
    }
}
