//! The process that starts workers, gives them turns, and gathers what they measure.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::worker::{Answer, Expected, Finished, RunTime, StageTime};
use super::{BenchReport, Measurement, ModelSummary, Plan, SizeReport, median};
use crate::inputs::PIXELS_PER_LATENT;
use crate::provenance;

/// Why a measurement did not come about.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// There is nothing to measure.
    #[error("give at least one model, one size and one repeat")]
    Nothing,
    /// A worker cannot be started or spoken to.
    #[error("the measuring process for {} at latent {latent}: {source}", model.display())]
    Worker {
        /// The model.
        model: PathBuf,
        /// Height and width of the latent.
        latent: usize,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The model does not run.
    #[error("{} at latent {latent}: {message}", model.display())]
    Failed {
        /// The model.
        model: PathBuf,
        /// Height and width of the latent.
        latent: usize,
        /// What the worker said.
        message: String,
    },
}

/// Measures everything in the plan, telling `progress` what is being done.
///
/// # Errors
/// A model does not run at the smallest size. At a larger one that is a finding, noted in its
/// [`Measurement`].
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<BenchReport, BenchError> {
    if plan.models.is_empty() || plan.latents.is_empty() || plan.repeats == 0 {
        return Err(BenchError::Nothing);
    }
    let mut latents = plan.latents.clone();
    latents.sort_unstable();
    latents.dedup();
    let mut sizes = Vec::with_capacity(latents.len());
    for (i, &latent) in latents.iter().enumerate() {
        let (size, failures) = measure(plan, latent, &mut progress);
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

/// All models at one size, and why some did not get through.
fn measure(
    plan: &Plan,
    latent: usize,
    progress: &mut impl FnMut(&str),
) -> (SizeReport, Vec<BenchError>) {
    let pixels = latent.saturating_mul(PIXELS_PER_LATENT);
    let mut counted = vec![None; plan.models.len()];
    let mut turns: Vec<Result<Turn, BenchError>> = plan
        .models
        .iter()
        .zip(&mut counted)
        .map(|(model, counted)| {
            progress(&format!("{pixels} × {pixels}: loading {}", model.display()));
            let mut worker = Worker::start(plan, model, latent)?;
            *counted = Some(worker.counted()?);
            worker.ready()?;
            Ok(Turn {
                worker,
                runs: Vec::new(),
            })
        })
        .collect();
    for repeat in 1..=plan.repeats {
        progress(&format!(
            "{pixels} × {pixels}: run {repeat} of {}",
            plan.repeats
        ));
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
    let mut first_median = None;
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
            first_median = measurement.median_ms;
        }
        measurement.expected = expected;
        measurement.speedup = first_median
            .zip(measurement.median_ms)
            .map(|(first, this)| first / this);
        results.push(measurement);
    }
    let size = SizeReport {
        latent,
        pixels,
        results,
    };
    (size, failures)
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
    latent: usize,
    process: Process,
    /// `None` once the worker was told to finish.
    requests: Option<ChildStdin>,
    answers: Lines<BufReader<ChildStdout>>,
}

/// Ends the process when it is dropped, however that comes.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if the process is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Worker {
    fn start(plan: &Plan, model: &Path, latent: usize) -> Result<Self, BenchError> {
        let died = |source| BenchError::Worker {
            model: model.to_owned(),
            latent,
            source,
        };
        let mut job = plan.template.clone();
        job.model = model.to_owned();
        job.latent = latent;
        let job = serde_json::to_string(&job).map_err(|e| died(e.into()))?;
        let mut child = Command::new(&plan.worker.program)
            .args(&plan.worker.arguments)
            .arg(job)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(died)?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let process = Process(child);
        let (requests, answers) =
            pipes.ok_or_else(|| died(std::io::Error::other("it has no pipes")))?;
        Ok(Self {
            model: model.to_owned(),
            latent,
            process,
            requests: Some(requests),
            answers: BufReader::new(answers).lines(),
        })
    }

    fn counted(&mut self) -> Result<Expected, BenchError> {
        match self.answer()? {
            Answer::Counted(expected) => Ok(expected),
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
            Ok(Answer::Failed(message)) => Err(BenchError::Failed {
                model: self.model.clone(),
                latent: self.latent,
                message,
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
            latent: self.latent,
            source,
        }
    }
}
