//! The measuring process: loads one model, or opens one pipeline, runs it on request, and tells its peak memory at the end.
//!
//! It says what the run should take ([`Answer::Counted`]), gets ready ([`Answer::Ready`]), then reads one line for each run and
//! answers with one JSON line; at the end of its input it answers with [`Answer::Done`] and ends.

use std::io::{BufRead, Write};
use std::path::Path;
use std::time::Instant;

use linfusion_models::leftovers::TemporaryFolder;
use linfusion_models::onnx::{OnnxFile, ReadError};
use linfusion_models::shapes::{Footprint, Runner, operations};

use super::job::{Answer, Expected, Fault, Finished, Job, OperatorsFrom, Profiling, RunTime};
use super::pipeline::Pipeline;
use super::profile::{self, Profile, ProfileError};
use super::size::{ImageInput, NotDivisible, Pixels};
use crate::engine::{Device, Engine, EngineError, Session, SessionOptions, halves, memory_of};
use crate::inputs::{self, InputsError, Request};
use crate::memory;
use crate::pipeline::PipelineError;
use crate::subgraph;
use crate::tensor::Tensor;

/// All that a measuring process does: `arguments` are those that were put behind [`super::WorkerCommand::arguments`], requests and
/// answers go by standard input and output.
///
/// # Errors
/// The arguments are others, whoever started the process is gone, or an answer cannot be written.
pub fn work(arguments: &[String]) -> std::io::Result<()> {
    let wrong = || std::io::Error::other("a worker is started with a process's number and a job");
    let [parent, job] = arguments else {
        return Err(wrong());
    };
    end_with_parent(parent.parse().map_err(|_| wrong())?)?;
    serve(job, std::io::stdin().lock(), std::io::stdout())
}

/// From here on this process gets SIGTERM when the thread that started it ends, in a process of number `parent`, however that
/// comes.
///
/// # Errors
/// The operating system refuses, or the parent is gone already.
fn end_with_parent(parent: u32) -> std::io::Result<()> {
    use rustix::process::{Signal, getppid, set_parent_process_death_signal};
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // What ended before that sends no signal.
    let now = getppid().map(|pid| pid.as_raw_nonzero().get());
    match now.and_then(|now| u32::try_from(now).ok()) == Some(parent) {
        true => Ok(()),
        false => Err(std::io::Error::other(
            "whoever started the measurement is gone",
        )),
    }
}

impl Answer {
    fn failed(error: &WorkerError) -> Self {
        Self::Failed(error.to_string(), error.fault())
    }
}

/// Serves one job until `requests` ends.
///
/// # Errors
/// An answer cannot be written; that a model does not run is an answer.
fn serve(job: &str, requests: impl BufRead, mut answers: impl Write) -> Result<(), std::io::Error> {
    let mut answer = |answer: &Answer| -> Result<(), std::io::Error> {
        let line = serde_json::to_string(answer)?;
        writeln!(answers, "{line}")?;
        answers.flush()
    };
    let job: Job = match serde_json::from_str(job) {
        Ok(job) => job,
        Err(error) => return answer(&Answer::Failed(error.to_string(), Fault::Model)),
    };
    let free = gpu_memory(job.device);
    let mut work = match Work::open(&job) {
        Ok(work) => work,
        Err(error) => return answer(&Answer::failed(&error)),
    };
    answer(&Answer::Counted(work.expected(), work.pixels()))?;
    if let Err(error) = work.warm_up(&job) {
        return answer(&Answer::failed(&error));
    }
    answer(&Answer::Ready)?;
    for line in requests.lines() {
        line?;
        match work.run() {
            Ok(run) => answer(&Answer::Ran(run))?,
            Err(error) => return answer(&Answer::failed(&error)),
        }
    }
    let finished = Finished {
        peak_rss_bytes: work.peak(),
        // ONNX Runtime's arena gives nothing back while its session lives.
        device_bytes: free
            .zip(gpu_memory(job.device))
            .map(|(b, a)| b.saturating_sub(a)),
        profile: None,
        unprofiled: None,
    };
    // What was measured stays measured.
    let (profile, unprofiled) = match work.profile(&job) {
        Ok(profile) => (profile, None),
        Err(error) => (None, Some(error.to_string())),
    };
    answer(&Answer::Done(Finished {
        profile,
        unprofiled,
        ..finished
    }))
}

fn gpu_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => None,
        Device::Cuda(number) => linfusion_ops::cuda::driver::free_memory(number).ok(),
    }
}

#[derive(Debug, thiserror::Error)]
pub(super) enum WorkerError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Inputs(#[from] InputsError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("on {inputs}: {source}")]
    Run {
        /// And what may be wrong with them.
        inputs: String,
        r#source: EngineError,
    },
    #[error("a scratch folder: {0}")]
    Scratch(std::io::Error),
    #[error("needs about {needed} of memory, and {free} are free")]
    Memory { needed: String, free: String },
    #[error(transparent)]
    Size(#[from] NotDivisible),
}

impl WorkerError {
    fn fault(&self) -> Fault {
        match self {
            Self::Inputs(_) | Self::Size(_) => Fault::Usage,
            Self::Pipeline(error) if error.is_usage() => Fault::Usage,
            _ => Fault::Model,
        }
    }
}

enum Work {
    Model(Box<Model>),
    Pipeline(Box<Pipeline>),
}

impl Work {
    fn open(job: &Job) -> Result<Self, WorkerError> {
        Ok(match job.model.is_dir() {
            true => Self::Pipeline(Box::new(Pipeline::open(job)?)),
            false => Self::Model(Box::new(Model::load(job)?)),
        })
    }

    fn expected(&self) -> Expected {
        match self {
            Self::Model(model) => model.expected,
            Self::Pipeline(pipeline) => pipeline.expected,
        }
    }

    /// Height and width of what it makes.
    fn pixels(&self) -> Option<Pixels> {
        match self {
            Self::Model(model) => model.pixels,
            Self::Pipeline(pipeline) => pipeline.pixels,
        }
    }

    fn warm_up(&mut self, job: &Job) -> Result<(), WorkerError> {
        // A process that takes more than there is ends without a word, and maybe others with it. Weights are loaded by now.
        let needed = match self {
            Self::Model(model) => model.values,
            Self::Pipeline(pipeline) => pipeline.expected.bytes,
        };
        if let Some(free) = memory_of(job.device).filter(|free| *free < needed) {
            return Err(WorkerError::Memory {
                needed: memory::shown(needed),
                free: memory::shown(free),
            });
        }
        match self {
            // The first run plans memory and packs weights.
            Self::Model(model) => model.run().map(|_| ()),
            // A pipeline loads its models anew for each image.
            Self::Pipeline(_) => Ok(()),
        }
    }

    fn run(&mut self) -> Result<RunTime, WorkerError> {
        match self {
            Self::Model(model) => model.run(),
            Self::Pipeline(pipeline) => pipeline.run(),
        }
    }

    fn peak(&self) -> Option<u64> {
        match self {
            Self::Model(_) => memory::peak(),
            Self::Pipeline(pipeline) => pipeline.peak,
        }
    }

    fn profile(self, job: &Job) -> Result<Option<Profile>, WorkerError> {
        match self {
            Self::Model(model)
                if Engine::from(job.engine) == Engine::Ort && job.profiling == Profiling::On =>
            {
                let Model {
                    session, inputs, ..
                } = *model;
                drop(session);
                profiled(&job.model, &inputs, &job.options()).map(Some)
            }
            _ => Ok(None),
        }
    }
}

struct Model {
    session: Session,
    inputs: Vec<(String, Tensor)>,
    expected: Expected,
    /// Bytes of values, where they are most.
    values: u64,
    pixels: Option<Pixels>,
}

impl Model {
    fn load(job: &Job) -> Result<Self, WorkerError> {
        let session = Session::from_file(job.engine.into(), &job.model, &job.options())?;
        let file = OnnxFile::open(&job.model)?;
        let image = ImageInput::of(&file, job.scale);
        let latent = match (job.side, &image) {
            (Some(side), Some(image)) => Some(image.elements(side)?),
            (side, _) => side,
        };
        let request = Request {
            latent,
            batch: job.batch,
            sequence: job.sequence,
            shapes: job.shapes.clone(),
            seed: job.seed,
        };
        let inputs = inputs::make(session.inputs(), &request)?;
        let shapes = subgraph::shapes(&file, &inputs);
        let rows_and_columns = |image: &ImageInput| {
            let (_, tensor) = inputs.iter().find(|(name, _)| *name == image.name)?;
            image.pixels_at(tensor.shape())
        };
        let pixels = image.as_ref().and_then(rows_and_columns);
        let runner = Runner {
            kernels: job.operators != OperatorsFrom::None,
            halves: halves(job.engine.into(), job.device),
        };
        let footprint = Footprint::of(&file.model, &shapes, runner);
        Ok(Self {
            session,
            inputs,
            expected: Expected {
                operations: operations(&file.model, &shapes),
                bytes: footprint.total(),
            },
            values: footprint.values,
            pixels,
        })
    }

    fn run(&mut self) -> Result<RunTime, WorkerError> {
        let start = Instant::now();
        let ran = self.session.run(&self.inputs);
        ran.map_err(|source| {
            let mut inputs = inputs::described(&self.inputs);
            if let Some(hint) = inputs::ids_hint(self.session.inputs(), &self.inputs) {
                inputs += &format!("; {hint}");
            }
            WorkerError::Run { inputs, source }
        })?;
        Ok(RunTime {
            ms: start.elapsed().as_secs_f64() * 1e3,
            step_ms: None,
            stages: Vec::new(),
        })
    }
}

/// Loads a model once more and runs it twice, with ONNX Runtime's profiler on; the second run is what [`profile::read`] looks at.
fn profiled(
    path: &Path,
    inputs: &[(String, Tensor)],
    options: &SessionOptions,
) -> Result<Profile, WorkerError> {
    let scratch = TemporaryFolder::new().map_err(WorkerError::Scratch)?;
    let options = SessionOptions {
        profile: Some(scratch.path().join("profile")),
        ..options.clone()
    };
    let attention = profile::attention_nodes(&OnnxFile::open(path)?);
    let mut session = Session::from_file(Engine::Ort, path, &options)?;
    for _ in 0..2 {
        session.run(inputs)?;
    }
    let written = session.end_profiling()?.unwrap_or_default();
    Ok(profile::read(&written, &attention)?)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::bench::EngineName;

    #[test]
    fn an_orphan_does_not_begin() {
        // No parent of anything: its number is this process's own.
        assert!(end_with_parent(std::process::id()).is_err());
        rustix::process::set_parent_process_death_signal(None).unwrap();
    }

    fn serve_lines(job: &str, requests: &str) -> Vec<String> {
        let mut answers = Vec::new();
        serve(job, requests.as_bytes(), &mut answers).unwrap();
        let text = String::from_utf8(answers).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    fn fixture(name: &str) -> PathBuf {
        linfusion_models::fixtures::path(name)
    }

    fn job(model: &str, side: usize) -> String {
        let job = Job {
            model: fixture(model),
            side: Some(side),
            sequence: 7,
            profiling: Profiling::On,
            ..Job::on(EngineName::Tract)
        };
        serde_json::to_string(&job).unwrap()
    }

    #[test]
    fn a_worker_answers_every_request_and_tells_its_memory() {
        let answers = serve_lines(&job("sd15-tiny/unet.onnx", 64), "\n\n");
        let answers: Vec<Answer> = answers
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        match answers.as_slice() {
            [
                Answer::Counted(expected, Some(pixels)),
                Answer::Ready,
                Answer::Ran(first),
                Answer::Ran(_),
                Answer::Done(finished),
            ] => {
                assert!(first.ms > 0.0);
                assert_eq!(*pixels, Pixels::square(64));
                // Every number that is stored takes its place, and is used at least once.
                let file = OnnxFile::open(fixture("sd15-tiny/unet.onnx")).unwrap();
                let stored = file.model.graph.initializer.iter();
                let stored: i64 = stored.map(|t| t.dims.iter().product::<i64>()).sum();
                assert!(expected.bytes as i64 > 4 * stored, "{stored} {expected:?}");
                assert!(expected.operations as i64 > stored, "{stored} {expected:?}");
                let peak = finished.peak_rss_bytes;
                assert!(peak.is_some_and(|b| b > 1 << 20) || !cfg!(target_os = "linux"));
            }
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
