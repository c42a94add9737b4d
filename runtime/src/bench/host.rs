//! The process that starts workers, gives them turns, and gathers what they measure.

use std::io::{BufRead, BufReader, Lines, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use super::worker::Answer;
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
    let mut turns: Vec<Result<Turn, BenchError>> = plan
        .models
        .iter()
        .map(|model| {
            progress(&format!("{pixels} × {pixels}: loading {}", model.display()));
            let worker = Worker::start(plan, model, latent)?;
            Ok(Turn {
                worker,
                runs_ms: Vec::new(),
            })
        })
        .collect();
    for repeat in 1..=plan.repeats {
        progress(&format!(
            "{pixels} × {pixels}: run {repeat} of {}",
            plan.repeats
        ));
        for turn in &mut turns {
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
    for (i, turn) in turns.into_iter().enumerate() {
        match turn.and_then(Turn::finish) {
            Ok((runs_ms, peak_rss_bytes)) => {
                let median_ms = median(&runs_ms);
                if i == 0 {
                    first_median = median_ms;
                }
                results.push(Measurement {
                    speedup: first_median
                        .zip(median_ms)
                        .map(|(first, this)| first / this),
                    runs_ms,
                    median_ms,
                    peak_rss_bytes,
                    failure: None,
                });
            }
            Err(failure) => {
                results.push(Measurement::failed(&failure));
                failures.push(failure);
            }
        }
    }
    let size = SizeReport {
        latent,
        pixels,
        results,
    };
    (size, failures)
}

/// A worker and what it has measured.
struct Turn {
    worker: Worker,
    runs_ms: Vec<f64>,
}

impl Turn {
    fn take(&mut self) -> Result<(), BenchError> {
        self.runs_ms.push(self.worker.run()?);
        Ok(())
    }

    fn finish(self) -> Result<(Vec<f64>, Option<u64>), BenchError> {
        Ok((self.runs_ms, self.worker.finish()?))
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
        let mut worker = Self {
            model: model.to_owned(),
            latent,
            process,
            requests: Some(requests),
            answers: BufReader::new(answers).lines(),
        };
        match worker.answer()? {
            Answer::Ready => Ok(worker),
            other => Err(worker.unexpected(&other)),
        }
    }

    fn run(&mut self) -> Result<f64, BenchError> {
        let sent = match &mut self.requests {
            Some(requests) => requests.write_all(b"\n").and_then(|()| requests.flush()),
            None => Err(std::io::Error::other("it was told to finish")),
        };
        match (self.answer()?, sent) {
            (Answer::Ran(ms), Ok(())) => Ok(ms),
            // Where the process is gone, its answer has said how it ended.
            (_, Err(e)) => Err(self.died(e)),
            (other, Ok(())) => Err(self.unexpected(&other)),
        }
    }

    fn finish(mut self) -> Result<Option<u64>, BenchError> {
        self.requests = None;
        let peak = match self.answer()? {
            Answer::Done(peak) => peak,
            other => return Err(self.unexpected(&other)),
        };
        self.process.0.wait().map_err(|e| self.died(e))?;
        Ok(peak)
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
