//! Times whole steps of several models, or whole images of several pipelines, at growing resolution, in one run.
//!
//! Every model and size has a process of its own, so that its peak memory is its own; the processes of one
//! size live side by side and take turns, so that whatever slows the machine down slows all of them.

mod host;
mod job;
mod pipeline;
pub mod plot;
mod process;
mod profile;
mod size;
mod verdict;
mod worker;

use std::path::PathBuf;

use serde::Serialize;

pub use self::host::{Asked, BenchError, run};
pub use self::job::{EngineName, Expected, Fault, Job, OperatorsFrom, Profiling, StageTime};
pub use self::pipeline::Images;
pub use self::profile::{OperatorTime, Profile};
pub use self::size::{ImageInput, NotDivisible, Pixels};
pub use self::verdict::{ENOUGH, Speedup, Verdict};
pub use self::worker::work;

use crate::engine::Engine;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The program to start workers with: this one, with the subcommand that calls [`work`].
    pub worker: WorkerCommand,
    /// The models, or pipelines' folders; ratios are taken against the first.
    pub models: Vec<PathBuf>,
    /// What they run at.
    pub sizes: Sizes,
    /// Runs that count, for each model and size.
    pub repeats: usize,
    /// How each job runs; model and size are filled in.
    pub template: Job,
}

/// Which image sizes are measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sizes {
    /// Square images with these sides in pixels.
    Sides(Vec<usize>),
    /// The one that the graphs, or the job's shapes, fix; where they fix none, square images with these sides.
    Fixed {
        /// Sides in pixels.
        otherwise: Vec<usize>,
    },
}

/// Watches a measurement.
pub trait Observer {
    /// What is being done.
    fn progress(&self, what: &str);

    /// Whether to stop, which leaves the sizes that are finished; asked many times a second.
    fn stopped(&self) -> bool {
        false
    }
}

impl<F: Fn(&str)> Observer for F {
    fn progress(&self, what: &str) {
        self(what);
    }
}

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// The executable.
    pub program: PathBuf,
    /// Arguments before those that [`work`] takes.
    pub arguments: Vec<String>,
}

/// Everything measured.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// What ran the models.
    pub engine: String,
    /// Threads that were asked for; `None` left it to the engine.
    pub threads: Option<usize>,
    /// Logical processors of the machine.
    pub processors: usize,
    /// Runs that count.
    pub repeats: usize,
    /// The models, in the order given.
    pub models: Vec<ModelSummary>,
    /// One entry a size, smallest first.
    pub sizes: Vec<SizeReport>,
    /// For each model but the first, the smallest measured size from which on it is faster than the first.
    pub crossovers: Vec<Crossover>,
    /// The size during which it was stopped; neither that nor the following are in `sizes`.
    pub stopped_at: Option<String>,
}

/// A measured model.
#[derive(Debug, Clone, Serialize)]
pub struct ModelSummary {
    /// Its file.
    pub path: PathBuf,
    /// Whether its metadata says that it was converted without trained weights.
    pub untrained: bool,
}

/// All models at one size.
#[derive(Debug, Clone, Serialize)]
pub struct SizeReport {
    /// Height and width of the image; `None` where no model that was loaded has an image input.
    pub pixels: Option<Pixels>,
    /// In the models' order.
    pub results: Vec<Measurement>,
}

/// One model at one size.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Measurement {
    /// What a run should take, by counting; `None` if the model did not even load.
    pub expected: Option<Expected>,
    /// Every run that counts, in milliseconds: a step of a model, a whole image of a pipeline.
    pub runs_ms: Vec<f64>,
    /// Their median; `None` if the model did not get through this size.
    pub median_ms: Option<f64>,
    /// The largest resident memory of the process, model and all, in bytes; `None` where the system
    /// does not tell.
    pub peak_rss_bytes: Option<u64>,
    /// What was taken of a GPU's memory, in bytes; `None` on the processor.
    pub device_bytes: Option<u64>,
    /// The median step of a pipeline's denoising model, in milliseconds.
    pub step_ms: Option<f64>,
    /// Median times of a pipeline's stages.
    pub stages: Vec<StageTime>,
    /// Where a model's time goes, where the engine tells (ONNX Runtime does).
    pub profile: Option<Profile>,
    /// Why there is none where the engine tells.
    pub unprofiled: Option<String>,
    /// How its time compares with the first model's; `None` if either did not get through.
    pub speedup: Option<Speedup>,
    /// Why it did not get through: usually memory.
    pub failure: Option<String>,
}

impl Measurement {
    fn failed(failure: &BenchError) -> Self {
        Self {
            failure: Some(failure.to_string()),
            ..Self::default()
        }
    }
}

/// Where a model overtakes the first.
#[derive(Debug, Clone, Serialize)]
pub struct Crossover {
    /// Position among the models.
    pub model: usize,
    /// The image size; `None` if it is not faster at the largest size.
    pub pixels: Option<Pixels>,
    /// What can be said of it at the largest size; `None` where one of the two did not get through, or they
    /// ran less than [`ENOUGH`] times.
    pub at_largest: Option<Verdict>,
}

impl BenchReport {
    fn new(
        plan: &Plan,
        models: Vec<ModelSummary>,
        sizes: Vec<SizeReport>,
        stopped_at: Option<String>,
    ) -> Self {
        let crossovers = (1..models.len())
            .map(|model| Crossover {
                model,
                pixels: crossover(&sizes, model),
                at_largest: sizes.last().and_then(|size| verdict(size, model)),
            })
            .collect();
        Self {
            engine: plan.template.engine.name().to_owned(),
            threads: plan.template.threads.map(|t| t.get()),
            processors: std::thread::available_parallelism().map_or(1, |n| n.get()),
            repeats: plan.repeats,
            models,
            sizes,
            crossovers,
            stopped_at,
        }
    }
}

fn crossover(sizes: &[SizeReport], model: usize) -> Option<Pixels> {
    let ran =
        |size: &SizeReport, i: usize| size.results.get(i).is_some_and(|r| r.median_ms.is_some());
    sizes
        .iter()
        .rev()
        .take_while(|size| match (ran(size, 0), ran(size, model)) {
            (true, true) => verdict(size, model) == Some(Verdict::Faster),
            // What does not get through is slower than what does.
            (first, this) => this && !first,
        })
        .last()
        .and_then(|size| size.pixels)
}

fn verdict(size: &SizeReport, model: usize) -> Option<Verdict> {
    size.results.get(model)?.speedup?.verdict
}

/// The middle value, or the mean of the two; `None` of nothing.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    if sorted.len() % 2 == 1 {
        return Some(upper);
    }
    let lower = *sorted.get((sorted.len() / 2).checked_sub(1)?)?;
    Some((lower + upper) / 2.0)
}

impl Engine {
    /// The name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ort => "ort",
            Self::Tract => "tract",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_crossover_holds_to_the_largest_size() {
        use Verdict::{Faster, Slower, Unclear};
        let measurement = |verdict: Option<Verdict>| Measurement {
            median_ms: Some(1.0),
            speedup: verdict.map(|verdict| Speedup {
                ratio: 1.0,
                range: [1.0, 1.0],
                verdict: Some(verdict),
            }),
            ..Measurement::default()
        };
        // `None`: the first model does not get through.
        let sizes = |verdicts: &[Option<Verdict>]| -> Vec<SizeReport> {
            let size = |(i, verdict): (usize, &Option<Verdict>)| SizeReport {
                pixels: Some(Pixels::square(8 * i)),
                results: vec![
                    verdict.map_or(Measurement::default(), |_| measurement(None)),
                    measurement(*verdict),
                ],
            };
            verdicts.iter().enumerate().map(size).collect()
        };
        let from = |verdicts: &[Option<Verdict>]| crossover(&sizes(verdicts), 1);
        let runs = [Slower, Faster, Unclear, Faster, Faster].map(Some);
        assert_eq!(from(&runs), Some(Pixels::square(24)));
        assert_eq!(from(&[Some(Faster), None]), Some(Pixels::square(0)));
        assert_eq!(from(&[Some(Faster), Some(Unclear)]), None);
        assert_eq!(from(&[]), None);
    }
}
