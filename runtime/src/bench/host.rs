//! The process that starts workers, gives them turns, and gathers what they measure.

use std::fmt;
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use linfusion_models::onnx::OnnxFile;
use rustix::process::{Pid, Signal, kill_process};

use super::size::{ImageInput, NotDivisible, Pixels};
use super::verdict::speedup;
use super::worker::{Answer, Expected, Fault, Finished, RunTime, StageTime};
use super::{BenchReport, Measurement, ModelSummary, Plan, SizeReport, Sizes, median};
use crate::provenance;

/// Why a measurement did not come about.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is nothing to measure.
    #[error("give at least one model, one size and one repeat")]
    Nothing,
    /// A worker cannot be started or spoken to.
    #[error("the measuring process for {} at {size}: {source}", model.display())]
    Worker {
        /// The model.
        model: PathBuf,
        /// What it was to run at.
        size: Asked,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// The model does not run.
    #[error("{} at {size}: {message}", model.display())]
    Failed {
        /// The model.
        model: PathBuf,
        /// What it was to run at.
        size: Asked,
        /// What the worker said.
        message: String,
        /// Whose fault it is.
        fault: Fault,
    },
    /// A model has no such size.
    #[error("{}: {source}", model.display())]
    Size {
        /// The model.
        model: PathBuf,
        /// Why.
        r#source: NotDivisible,
    },
    /// The sizes are in a shape already.
    #[error("the shape of `{input}` gives the size: leave out the sizes in pixels, or the shape")]
    SizedTwice {
        /// The image input.
        input: String,
    },
    /// The graphs take one size each, and another.
    #[error(
        "{} takes images of {first} only and {} {second}, so there is no size to compare them at \
         (hint: `linfusion-convert MODEL --resize dynamic --attention keep` makes a model for any size)",
        models[0].display(), models[1].display()
    )]
    NoCommonSize {
        /// Two of the models.
        models: [PathBuf; 2],
        /// What the first takes.
        first: Pixels,
        /// What the second takes.
        second: String,
    },
}

impl BenchError {
    /// Whether what was asked for is at fault, rather than a model or the machine.
    pub fn is_usage(&self) -> bool {
        match self {
            Self::Nothing | Self::Size { .. } | Self::SizedTwice { .. } => true,
            Self::Failed { fault, .. } => *fault == Fault::Usage,
            Self::Worker { .. } | Self::NoCommonSize { .. } => false,
        }
    }
}

/// A size that is asked of a model: the side of a square image in pixels, or none but its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked(Option<usize>);

impl fmt::Display for Asked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(side) => Pixels::square(side).fmt(f),
            None => f.write_str("its own size"),
        }
    }
}

/// Measures everything in the plan, telling `progress` what is being done.
///
/// # Errors
/// A model does not run at the smallest size. At a larger one that is a finding, noted in its
/// [`Measurement`].
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<BenchReport, BenchError> {
    if plan.models.is_empty() || plan.repeats == 0 {
        return Err(BenchError::Nothing);
    }
    let asked = sizes(plan)?;
    if asked.is_empty() {
        return Err(BenchError::Nothing);
    }
    let mut sizes = Vec::with_capacity(asked.len());
    for (i, size) in asked.into_iter().enumerate() {
        let (size, failures) = measure(plan, size, &mut progress);
        if let Some(failure) = failures.into_iter().next().filter(|_| i == 0) {
            return Err(failure);
        }
        sizes.push(size);
    }
    let models = plan
        .models
        .iter()
        .map(|path| ModelSummary {
            path: path.clone(),
            untrained: provenance::is_untrained(path),
        })
        .collect();
    Ok(BenchReport::new(plan, models, sizes))
}

/// What the models are asked to run at, smallest first.
fn sizes(plan: &Plan) -> Result<Vec<Asked>, BenchError> {
    // What cannot be read is told by the worker that tries to.
    let inputs: Vec<(&PathBuf, ImageInput)> = plan
        .models
        .iter()
        .filter(|path| path.is_file())
        .filter_map(|path| {
            let file = OnnxFile::open(path).ok()?;
            Some((path, ImageInput::of(&file, plan.template.scale)?))
        })
        .collect();
    let shaped = inputs
        .iter()
        .find(|(_, i)| plan.template.shapes.iter().any(|(name, _)| *name == i.name));
    let fixed: Vec<(&PathBuf, Pixels)> = inputs
        .iter()
        .filter_map(|(path, i)| Some((*path, i.pixels(i.fixed?))))
        .collect();
    let sides = match (&plan.sizes, shaped, fixed.first()) {
        (Sizes::Sides(_), Some((_, input)), _) => {
            return Err(BenchError::SizedTwice {
                input: input.name.clone(),
            });
        }
        (Sizes::Fixed { .. }, Some(_), _) => return Ok(vec![Asked(None)]),
        (Sizes::Fixed { .. }, None, Some((path, first))) => {
            let differs = |other: &PathBuf, second: String| BenchError::NoCommonSize {
                models: [(*path).clone(), other.clone()],
                first: *first,
                second,
            };
            if let Some((other, second)) = fixed.iter().find(|(_, size)| size != first) {
                return Err(differs(other, format!("of {second}")));
            }
            // Models that take any size are asked for this one.
            return match inputs.iter().find(|(_, input)| input.fixed.is_none()) {
                None => Ok(vec![Asked(None)]),
                Some(_) if first.height == first.width => Ok(vec![Asked(Some(first.height))]),
                Some((other, _)) => Err(differs(other, "is measured at square ones".to_owned())),
            };
        }
        (Sizes::Sides(sides) | Sizes::Fixed { otherwise: sides }, _, _) => sides,
    };
    for (path, input) in &inputs {
        for side in sides {
            input.elements(*side).map_err(|source| BenchError::Size {
                model: (*path).clone(),
                source,
            })?;
        }
    }
    let mut sides = sides.clone();
    sides.sort_unstable();
    sides.dedup();
    Ok(sides.into_iter().map(|side| Asked(Some(side))).collect())
}

/// All models at one size, and why some did not get through.
fn measure(
    plan: &Plan,
    size: Asked,
    progress: &mut impl FnMut(&str),
) -> (SizeReport, Vec<BenchError>) {
    let mut counted = vec![None; plan.models.len()];
    let mut pixels = size.0.map(Pixels::square);
    let mut turns: Vec<Result<Turn, BenchError>> = plan
        .models
        .iter()
        .zip(&mut counted)
        .map(|(model, counted)| {
            progress(&format!("{size}: loading {}", model.display()));
            let mut worker = Worker::start(plan, model, size)?;
            let (expected, found) = worker.counted()?;
            *counted = Some(expected);
            pixels = pixels.or(found);
            worker.ready()?;
            Ok(Turn {
                worker,
                runs: Vec::new(),
            })
        })
        .collect();
    for repeat in 1..=plan.repeats {
        progress(&format!("{size}: run {repeat} of {}", plan.repeats));
        // Each goes first in its turn.
        let first = repeat % turns.len().max(1);
        let (before, from) = turns.split_at_mut(first);
        for turn in from.iter_mut().chain(before) {
            if let Ok(going) = turn
                && let Err(failure) = going.take()
            {
                // Its process is ended here, and its memory free for the others.
                *turn = Err(failure);
            }
        }
    }
    let (mut results, mut failures) = (Vec::new(), Vec::new());
    let mut first: Option<(f64, Vec<f64>)> = None;
    for (i, (turn, expected)) in turns.into_iter().zip(counted).enumerate() {
        let mut measurement = match turn.and_then(Turn::finish) {
            Ok((runs, finished)) => measurement(&runs, finished),
            Err(failure) => {
                let failed = Measurement::failed(&failure);
                failures.push(failure);
                failed
            }
        };
        if i == 0 {
            first = measurement
                .median_ms
                .map(|ms| (ms, measurement.runs_ms.clone()));
        } else if let (Some((ms, runs)), Some(this)) = (&first, measurement.median_ms) {
            measurement.speedup = Some(speedup(ms / this, runs, &measurement.runs_ms));
        }
        measurement.expected = expected;
        results.push(measurement);
    }
    (SizeReport { pixels, results }, failures)
}

fn measurement(runs: &[RunTime], finished: Finished) -> Measurement {
    let runs_ms: Vec<f64> = runs.iter().map(|r| r.ms).collect();
    let steps: Vec<f64> = runs.iter().filter_map(|r| r.step_ms).collect();
    // The stages of every run are the same.
    let stages = runs.first().map_or(&[][..], |r| &r.stages);
    let stages = stages.iter().enumerate().filter_map(|(i, first)| {
        let times: Vec<f64> = runs
            .iter()
            .filter_map(|r| Some(r.stages.get(i)?.ms))
            .collect();
        Some(StageTime {
            stage: first.stage.clone(),
            ms: median(&times)?,
        })
    });
    Measurement {
        median_ms: median(&runs_ms),
        step_ms: median(&steps),
        stages: stages.collect(),
        runs_ms,
        peak_rss_bytes: finished.peak_rss_bytes,
        device_bytes: finished.device_bytes,
        profile: finished.profile,
        unprofiled: finished.unprofiled,
        ..Measurement::default()
    }
}

/// A worker and what it has measured.
struct Turn {
    worker: Worker,
    runs: Vec<RunTime>,
}

impl Turn {
    fn take(&mut self) -> Result<(), BenchError> {
        self.runs.push(self.worker.run()?);
        Ok(())
    }

    fn finish(self) -> Result<(Vec<RunTime>, Finished), BenchError> {
        Ok((self.runs, self.worker.finish()?))
    }
}

struct Worker {
    model: PathBuf,
    size: Asked,
    process: Process,
    /// `None` once the worker was told to finish.
    requests: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
}

/// Ends the process when it is dropped, however that comes.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // SIGTERM leaves it the time to remove its temporary files. Both fail only if the process is gone already.
        if let Ok(None) = self.0.try_wait() {
            let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

impl Worker {
    fn start(plan: &Plan, model: &Path, size: Asked) -> Result<Self, BenchError> {
        let died = |source| BenchError::Worker {
            model: model.to_owned(),
            size,
            source,
        };
        let mut job = plan.template.clone();
        job.model = model.to_owned();
        job.side = size.0;
        let job = serde_json::to_string(&job).map_err(|e| died(e.into()))?;
        let mut child = Command::new(&plan.worker.program)
            .args(&plan.worker.arguments)
            .arg(job)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C is for this process, which ends its workers; they have nothing to say of it.
            .process_group(0)
            .spawn()
            .map_err(died)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let process = Process(child);
        let (requests, answers) =
            pipes.ok_or_else(|| died(std::io::Error::other("it has no pipes")))?;
        Ok(Self {
            model: model.to_owned(),
            size,
            process,
            requests: Some(requests),
            answers: BufReader::new(answers).lines(),
        })
    }

    fn counted(&mut self) -> Result<(Expected, Option<Pixels>), BenchError> {
        match self.answer()? {
            Answer::Counted(expected, pixels) => Ok((expected, pixels)),
            other => Err(self.unexpected(&other)),
        }
    }

    fn ready(&mut self) -> Result<(), BenchError> {
        match self.answer()? {
            Answer::Ready => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn run(&mut self) -> Result<RunTime, BenchError> {
        let sent = match &mut self.requests {
            Some(requests) => requests.write_all(b"\n").and_then(|()| requests.flush()),
            None => Err(std::io::Error::other("it was told to finish")),
        };
        match (self.answer()?, sent) {
            (Answer::Ran(run), Ok(())) => Ok(run),
            // Where the process is gone, its answer has said how it ended.
            (_, Err(e)) => Err(self.died(e)),
            (other, Ok(())) => Err(self.unexpected(&other)),
        }
    }

    fn finish(mut self) -> Result<Finished, BenchError> {
        self.requests = None;
        let finished = match self.answer()? {
            Answer::Done(finished) => finished,
            other => return Err(self.unexpected(&other)),
        };
        self.process.0.wait().map_err(|e| self.died(e))?;
        Ok(finished)
    }

    fn answer(&mut self) -> Result<Answer, BenchError> {
        let line = match self.answers.next() {
            Some(line) => line.map_err(|e| self.died(e))?,
            None => {
                let status = self.process.0.wait().map_err(|e| self.died(e))?;
                let why = match std::os::unix::process::ExitStatusExt::signal(&status) {
                    Some(9) => {
                        "it was killed, which is how a system short of memory ends a process"
                            .to_owned()
                    }
                    _ => format!("it ended with {status}"),
                };
                return Err(self.died(std::io::Error::other(why)));
            }
        };
        match serde_json::from_str(&line) {
            Ok(Answer::Failed(message, fault)) => Err(BenchError::Failed {
                model: self.model.clone(),
                size: self.size,
                message,
                fault,
            }),
            Ok(answer) => Ok(answer),
            Err(e) => Err(self.died(e.into())),
        }
    }

    fn unexpected(&self, answer: &Answer) -> BenchError {
        self.died(std::io::Error::other(format!("it answered {answer:?}")))
    }

    fn died(&self, source: std::io::Error) -> BenchError {
        BenchError::Worker {
            model: self.model.clone(),
            size: self.size,
            source,
        }
    }
}
