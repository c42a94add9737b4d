//! What a measuring process is asked for, and what it answers: all that travels between processes, as JSON.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::pipeline::Images;
use super::profile::Profile;
use super::size::Pixels;
use crate::engine::{Device, Engine, Operators, SessionOptions};

/// What a worker measures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The model, or a pipeline's folder.
    pub model: PathBuf,
    /// What runs it.
    pub engine: EngineName,
    /// Threads; `None` leaves it to the engine.
    pub threads: Option<NonZeroUsize>,
    /// Where the operators come from.
    pub operators: OperatorsFrom,
    /// ONNX Runtime's library.
    pub library: Option<PathBuf>,
    /// Where it runs.
    pub device: Device,
    /// Bytes that may be taken of a GPU's memory.
    pub device_memory: Option<usize>,
    /// Side of the square image in pixels; `None`: what the graph or `shapes` say.
    pub side: Option<usize>,
    /// Pixels along an edge for a row or column of the image input; `None`: see [`super::ImageInput::of`].
    pub scale: Option<usize>,
    /// Batch size.
    pub batch: usize,
    /// Text tokens.
    pub sequence: usize,
    /// Whole shapes of named inputs.
    pub shapes: Vec<(String, Vec<usize>)>,
    /// Seed of the inputs.
    pub seed: u64,
    /// What a pipeline makes.
    pub images: Images,
    /// Whether a model is run again, to see where its time goes.
    pub profiling: Profiling,
}

/// Whether a model is run again under ONNX Runtime's profiler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Profiling {
    /// It is, twice, after the runs that count.
    On,
    /// It is not.
    Off,
}

impl Job {
    /// A job of which nothing is said but what runs it, with the operators in the process, one image and 77 text tokens.
    #[must_use]
    pub fn on(engine: EngineName) -> Self {
        Self {
            model: PathBuf::new(),
            engine,
            threads: None,
            operators: OperatorsFrom::InProcess,
            library: None,
            device: Device::Cpu,
            device_memory: None,
            side: None,
            scale: None,
            batch: 1,
            sequence: 77,
            shapes: Vec::new(),
            seed: 0,
            images: Images::default(),
            profiling: Profiling::Off,
        }
    }

    pub(super) fn options(&self) -> SessionOptions {
        SessionOptions {
            operators: self.operators.clone().into(),
            threads: self.threads,
            library: self.library.clone(),
            device: self.device,
            device_memory: self.device_memory,
            ..SessionOptions::default()
        }
    }
}

/// Who has to change something so that there is something to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// Whoever asked for it.
    Usage,
    /// The model, or the machine.
    Model,
}

/// What a run should take, by counting.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Expected {
    /// Floating-point operations; a multiply-add is two.
    pub operations: f64,
    /// Bytes of weights and of values, where they are most.
    pub bytes: u64,
}

/// What one run took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunTime {
    /// All of it, in milliseconds.
    pub ms: f64,
    /// One step of a pipeline's denoising model, the median.
    pub step_ms: Option<f64>,
    /// A pipeline's stages.
    pub stages: Vec<StageTime>,
}

/// What a stage of a pipeline took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageTime {
    /// As `denoise 512x512`.
    pub stage: String,
    /// Milliseconds, loading of models included.
    pub ms: f64,
}

/// What is known at the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Finished {
    /// Peak resident memory in bytes, if the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// What was taken of a GPU's memory.
    pub device_bytes: Option<u64>,
    /// Where the time went, if the engine tells.
    pub profile: Option<Profile>,
    /// Why the engine that tells did not.
    pub unprofiled: Option<String>,
}

/// [`Engine`] as it travels between processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineName {
    /// [`Engine::Ort`].
    Ort,
    /// [`Engine::Tract`].
    Tract,
}

/// [`Operators`] as they travel between processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OperatorsFrom {
    /// [`Operators::None`].
    None,
    /// [`Operators::InProcess`].
    InProcess,
    /// [`Operators::Library`].
    Library(PathBuf),
}

impl EngineName {
    pub(super) fn name(self) -> &'static str {
        Engine::from(self).name()
    }
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Self {
        match name {
            EngineName::Ort => Self::Ort,
            EngineName::Tract => Self::Tract,
        }
    }
}

impl From<OperatorsFrom> for Operators {
    fn from(from: OperatorsFrom) -> Self {
        match from {
            OperatorsFrom::None => Self::None,
            OperatorsFrom::InProcess => Self::InProcess,
            OperatorsFrom::Library(path) => Self::Library(path),
        }
    }
}

/// One line from a worker.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Answer {
    /// What a run should take, and the size of the image.
    Counted(Expected, Option<Pixels>),
    /// The model is loaded and has run once.
    Ready,
    /// What a run took.
    Ran(RunTime),
    /// There were no more requests.
    Done(Finished),
    /// Why there is nothing to measure, and whose fault it is.
    Failed(String, Fault),
}
