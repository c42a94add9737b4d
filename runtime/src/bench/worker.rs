//! The measuring process: loads one model, runs it on request, and tells its peak memory at the end.
//!
//! It reads one line for each run and answers with one JSON line; at the end of its input it answers with
//! [`Answer::Done`] and ends.

use std::io::{BufRead, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::engine::{Device, Engine, EngineError, Operators, Session, SessionOptions};
use crate::inputs::{self, InputsError, Request};
use crate::memory;

/// What a worker measures.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Job {
    /// The model.
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
    /// Height and width of the latent.
    pub latent: usize,
    /// Batch size.
    pub batch: usize,
    /// Text tokens.
    pub sequence: usize,
    /// Whole shapes of named inputs.
    pub shapes: Vec<(String, Vec<usize>)>,
    /// Seed of the inputs.
    pub seed: u64,
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
    /// The model is loaded and has run once.
    Ready,
    /// Milliseconds of a run.
    Ran(f64),
    /// Peak resident memory in bytes, if the system tells.
    Done(Option<u64>),
    /// Why there is nothing to measure.
    Failed(String),
}

/// Serves one job until `requests` ends.
///
/// # Errors
/// An answer cannot be written; that a model does not run is an answer.
pub fn serve(
    job: &str,
    requests: impl BufRead,
    mut answers: impl Write,
) -> Result<(), std::io::Error> {
    let mut answer = |answer: &Answer| -> Result<(), std::io::Error> {
        let line = serde_json::to_string(answer)?;
        writeln!(answers, "{line}")?;
        answers.flush()
    };
    let mut prepared = match serde_json::from_str(job)
        .map_err(|e| e.to_string())
        .and_then(|job| Prepared::new(job).map_err(|e| e.to_string()))
    {
        Ok(prepared) => prepared,
        Err(message) => return answer(&Answer::Failed(message)),
    };
    answer(&Answer::Ready)?;
    for line in requests.lines() {
        line?;
        match prepared.run() {
            Ok(ms) => answer(&Answer::Ran(ms))?,
            Err(error) => return answer(&Answer::Failed(error.to_string())),
        }
    }
    answer(&Answer::Done(memory::peak()))
}

#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Inputs(#[from] InputsError),
}

struct Prepared {
    session: Session,
    inputs: Vec<(String, crate::tensor::Tensor)>,
}

impl Prepared {
    fn new(job: Job) -> Result<Self, WorkerError> {
        let options = SessionOptions {
            operators: job.operators.into(),
            threads: job.threads,
            library: job.library,
            device: job.device,
            ..SessionOptions::default()
        };
        let mut session = Session::from_file(job.engine.into(), &job.model, &options)?;
        let request = Request {
            latent: Some(job.latent),
            batch: job.batch,
            sequence: job.sequence,
            shapes: job.shapes,
            seed: job.seed,
        };
        let inputs = inputs::make(session.inputs(), &request)?;
        // The first run plans memory and packs weights.
        session.run(&inputs)?;
        Ok(Self { session, inputs })
    }

    fn run(&mut self) -> Result<f64, EngineError> {
        let start = Instant::now();
        self.session.run(&self.inputs)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serve_lines(job: &str, requests: &str) -> Vec<String> {
        let mut answers = Vec::new();
        serve(job, requests.as_bytes(), &mut answers).unwrap();
        let text = String::from_utf8(answers).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn job(model: &str, latent: usize) -> String {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/fixtures/");
        let job = Job {
            model: PathBuf::from(format!("{folder}{model}")),
            engine: EngineName::Tract,
            threads: None,
            operators: OperatorsFrom::InProcess,
            library: None,
            device: Device::Cpu,
            latent,
            batch: 1,
            sequence: 7,
            shapes: Vec::new(),
            seed: 0,
        };
        serde_json::to_string(&job).unwrap()
    }

    #[test]
    fn a_worker_answers_every_request_and_tells_its_memory() {
        let answers = serve_lines(&job("sd15-tiny/unet.onnx", 8), "\n\n");
        assert_eq!(answers.len(), 4, "{answers:?}");
        assert_eq!(answers[0], "\"ready\"");
        assert!(answers[1].starts_with("{\"ran\":") && answers[2].starts_with("{\"ran\":"));
        match serde_json::from_str(&answers[3]).unwrap() {
            Answer::Done(Some(bytes)) => assert!(bytes > 1 << 20),
            Answer::Done(None) if !cfg!(target_os = "linux") => {}
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_does_not_run_is_an_answer() {
        for job in ["no job".to_owned(), job("absent.onnx", 8)] {
            let answers = serve_lines(&job, "\n");
            assert_eq!(answers.len(), 1);
            assert!(answers[0].starts_with("{\"failed\":"), "{answers:?}");
        }
    }
}
