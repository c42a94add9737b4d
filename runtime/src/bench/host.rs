//! Gives workers turns, and gathers what they measure.

use std::fmt;
use std::path::PathBuf;

use linfusion_models::onnx::OnnxFile;

use super::job::{Fault, Finished, RunTime, StageTime};
use super::process::Worker;
use super::size::{ImageInput, NotDivisible, Pixels};
use super::verdict::speedup;
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
pub struct Asked(pub(super) Option<usize>);

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
        let need = match i {
            0 => Need::All,
            _ => Need::Any,
        };
        let (measured, mut failures) = measure(plan, size, need, observer);
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

/// Which models must load, or nothing is measured.
#[derive(PartialEq)]
enum Need {
    All,
    Any,
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
    let shapes = &plan.template.shapes;
    let shaped = inputs.iter().find_map(|(_, input)| {
        let mut names = shapes.iter().map(|(name, _)| name);
        names.find(|name| input.is_told_by(name))
    });
    let fixed: Vec<(&PathBuf, Pixels)> = inputs
        .iter()
        .filter_map(|(path, i)| Some((*path, i.pixels(i.fixed?))))
        .collect();
    let sides = match (&plan.sizes, shaped, fixed.first()) {
        (Sizes::Sides(_), Some(input), _) => {
            return Err(BenchError::SizedTwice {
                input: input.clone(),
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
    need: Need,
    observer: &dyn Observer,
) -> (SizeReport, Vec<Failure>) {
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
    let repeats = match need == Need::All && counted.iter().any(Option::is_none) {
        // Said before the others have run in vain.
        true => 0,
        false => plan.repeats,
    };
    for repeat in 1..=repeats {
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
