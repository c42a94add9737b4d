//! The process that starts workers, gives them turns, and gathers what they measure.

use std::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use linfusion_models::onnx::OnnxFile;
use rustix::process::{Pid, Signal, kill_process};

use super::size::{ImageInput, NotDivisible, Pixels};
use super::verdict::speedup;
use super::worker::{Answer, Expected, Fault, Finished, RunTime, StageTime};
use super::{BenchReport, Measurement, ModelSummary, Observer, Plan, SizeReport, Sizes, median};
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
    /// The observer stopped it.
    #[error("stopped")]
    Stopped,
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
            Self::Worker { .. } | Self::NoCommonSize { .. } | Self::Stopped => false,
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

/// Measures everything in the plan. Worker processes end with the thread that calls this: it should live as long as the program.
///
/// # Errors
/// What was asked for cannot be, a model does not load, or none gets through the smallest size. What else a model does not get
/// through is a finding, noted in its [`Measurement`].
pub fn run(plan: &Plan, observer: &dyn Observer) -> Result<BenchReport, BenchError> {
    if plan.models.is_empty() || plan.repeats == 0 {
        return Err(BenchError::Nothing);
    }
    let asked = sizes(plan)?;
    if asked.is_empty() {
        return Err(BenchError::Nothing);
    }
    let mut sizes = Vec::with_capacity(asked.len());
    let mut stopped_at = None;
    for (i, size) in asked.into_iter().enumerate() {
        let (measured, mut failures) = measure(plan, size, observer);
        if failures
            .iter()
            .any(|f| matches!(f.error, BenchError::Stopped))
        {
            stopped_at = Some(size.to_string());
            break;
        }
        let none = measured.results.iter().all(|r| r.median_ms.is_none());
        let is_fatal = |f: &Failure| none || !f.loaded || f.error.is_usage();
        if let Some(fatal) = failures.iter().position(is_fatal).filter(|_| i == 0) {
            return Err(failures.swap_remove(fatal).error);
        }
        sizes.push(measured);
    }
    let models = plan
        .models
        .iter()
        .map(|path| ModelSummary {
            path: path.clone(),
            untrained: provenance::is_untrained(path),
        })
        .collect();
    Ok(BenchReport::new(plan, models, sizes, stopped_at))
}

/// Why a model did not get through a size.
struct Failure {
    error: BenchError,
    /// Whether it was loaded: then it may get through another.
    loaded: bool,
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
fn measure(plan: &Plan, size: Asked, observer: &dyn Observer) -> (SizeReport, Vec<Failure>) {
    let mut counted = vec![None; plan.models.len()];
    let mut pixels = size.0.map(Pixels::square);
    let mut turns: Vec<Result<Turn<'_>, BenchError>> = plan
        .models
        .iter()
        .zip(&mut counted)
        .map(|(model, counted)| {
            observer.progress(&format!("{size}: loading {}", model.display()));
            let mut worker = Worker::start(plan, model, size, observer)?;
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
        observer.progress(&format!("{size}: run {repeat} of {}", plan.repeats));
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
                failures.push(Failure {
                    error: failure,
                    loaded: expected.is_some(),
                });
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
struct Turn<'a> {
    worker: Worker<'a>,
    runs: Vec<RunTime>,
}

impl Turn<'_> {
    fn take(&mut self) -> Result<(), BenchError> {
        self.runs.push(self.worker.run()?);
        Ok(())
    }

    fn finish(self) -> Result<(Vec<RunTime>, Finished), BenchError> {
        Ok((self.runs, self.worker.finish()?))
    }
}

struct Worker<'a> {
    model: PathBuf,
    size: Asked,
    process: Process,
    /// `None` once the worker was told to finish.
    requests: Option<ChildStdin>,
    answers: Receiver<io::Result<String>>,
    observer: &'a dyn Observer,
}

/// Ends the process when it is dropped, however that comes.
struct Process(Child);

/// How long a process may take to remove its temporary files.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often somebody looks whether a process has ended, or is to be.
const LOOK: Duration = Duration::from_millis(20);

impl Drop for Process {
    fn drop(&mut self) {
        // Signals fail only if the process is gone already.
        let is_there = |child: &mut Child| matches!(child.try_wait(), Ok(None));
        if is_there(&mut self.0) {
            let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
            let asked = Instant::now();
            while is_there(&mut self.0) && asked.elapsed() < PATIENCE {
                thread::sleep(LOOK);
            }
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

/// The lines of a process, as they come, so that whoever waits for one can look up meanwhile.
fn lines(from: ChildStdout) -> io::Result<Receiver<io::Result<String>>> {
    let (sender, lines) = channel();
    thread::Builder::new()
        .name("answers".to_owned())
        .spawn(move || {
            for line in BufReader::new(from).lines() {
                if sender.send(line).is_err() {
                    break;
                }
            }
        })?;
    Ok(lines)
}

impl<'a> Worker<'a> {
    fn start(
        plan: &Plan,
        model: &Path,
        size: Asked,
        observer: &'a dyn Observer,
    ) -> Result<Self, BenchError> {
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
            .args([std::process::id().to_string(), job])
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
        let answers = lines(answers).map_err(died)?;
        Ok(Self {
            model: model.to_owned(),
            size,
            process,
            requests: Some(requests),
            answers,
            observer,
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
        if self.observer.stopped() {
            return Err(BenchError::Stopped);
        }
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
        let line = match self.line()? {
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

    /// The next line; `None` after the last.
    fn line(&self) -> Result<Option<io::Result<String>>, BenchError> {
        loop {
            match self.answers.recv_timeout(LOOK) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if self.observer.stopped() => {
                    return Err(BenchError::Stopped);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_will_not_end_is_ended() {
        let mut child = Command::new("sh")
            .args(["-c", "trap '' TERM; echo deaf; exec sleep 1000000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines(child.stdout.take().unwrap()).unwrap();
        assert_eq!(lines.recv().unwrap().unwrap(), "deaf");
        drop(Process(child));
        // Its end of the pipe is closed.
        assert!(lines.recv().is_err());
    }
}
