//! Times whole steps of several models, or whole images of several pipelines, at growing resolution, in one run.
//!
//! Every model and size has a process of its own, so that its peak memory is its own; the processes of one
//! size live side by side and take turns, so that whatever slows the machine down slows all of them.

mod host;
mod pipeline;
pub mod plot;
mod profile;
mod worker;

use std::path::PathBuf;

use serde::Serialize;

pub use self::host::{BenchError, run};
pub use self::pipeline::Images;
pub use self::profile::{OperatorTime, Profile};
pub use self::worker::{EngineName, Expected, Job, OperatorsFrom, Profiling, StageTime, serve};

use crate::engine::Engine;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The program to start workers with: this one, with the subcommand that calls [`serve`].
    pub worker: WorkerCommand,
    /// The models, or pipelines' folders; ratios are taken against the first.
    pub models: Vec<PathBuf>,
    /// Latent sizes (an eighth of the pixels along an edge).
    pub latents: Vec<usize>,
    /// Runs that count, for each model and size.
    pub repeats: usize,
    /// How each job runs; model and latent are filled in.
    pub template: Job,
}

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    /// The executable.
    pub program: PathBuf,
    /// Arguments before the job, which is passed as JSON.
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
    /// Height and width of the latent.
    pub latent: usize,
    /// Height and width of the image.
    pub pixels: usize,
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
    /// Time of the first model ÷ time of this one; `None` if either did not get through.
    pub speedup: Option<f64>,
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
    /// Image size in pixels; `None` if it is slower at the largest size.
    pub pixels: Option<usize>,
}

impl BenchReport {
    fn new(plan: &Plan, models: Vec<ModelSummary>, sizes: Vec<SizeReport>) -> Self {
        let crossovers = (1..models.len())
            .map(|model| Crossover {
                model,
                pixels: crossover(&sizes, model),
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
        }
    }
}

fn crossover(sizes: &[SizeReport], model: usize) -> Option<usize> {
    sizes
        .iter()
        .rev()
        .take_while(|size| {
            let median = |i: usize| size.results.get(i).and_then(|r| r.median_ms);
            match (median(0), median(model)) {
                (Some(first), Some(this)) => this < first,
                // What does not get through is slower than what does.
                (None, Some(_)) => true,
                _ => false,
            }
        })
        .last()
        .map(|size| size.pixels)
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
        let measurement = |median_ms| Measurement {
            median_ms,
            ..Measurement::default()
        };
        let sizes = |speedups: &[f64]| -> Vec<SizeReport> {
            let size = |(i, speedup): (usize, &f64)| SizeReport {
                latent: i,
                pixels: i * 8,
                // The first model does not get through where the speed-up is infinite.
                results: vec![
                    measurement(speedup.is_finite().then_some(*speedup)),
                    measurement(Some(1.0)),
                ],
            };
            speedups.iter().enumerate().map(size).collect()
        };
        assert_eq!(crossover(&sizes(&[0.9, 1.1, 0.9, 1.2, 3.0]), 1), Some(24));
        assert_eq!(crossover(&sizes(&[2.0, f64::INFINITY]), 1), Some(0));
        assert_eq!(crossover(&sizes(&[2.0, 0.5]), 1), None);
        assert_eq!(crossover(&[], 1), None);
    }
}
