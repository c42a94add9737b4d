//! All sites learn together on the model's output, as the paper trains: L_noise + ½·L_kd + ½·L_feat, differentiated
//! through the original graph with the students in the place of its attentions.
//!
//! L_kd is the mean squared error of the outputs against the original's, L_feat the mean over sites of that of the
//! attentions' outputs, L_noise that of the first output against the truth, where a sample tells it
//! ([`super::inputs::TRUTH`]). Source: Liu, Yu, Wang: "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024, section 3.3.

use std::f64::consts::PI;
use std::path::Path;

use candle_core::{Device, Tensor, Var};
use linfusion_runtime::tensor::{DType, Tensor as Fed};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::Progress;
use super::adam::AdamW;
use super::capture::Teacher;
use super::error::{DistillError, learning};
use super::inputs::{Sample, TRUTH};
use super::learn::{Learned, Work};
use super::state::State;
use super::student::{Student, Weights};
use super::student_graph::{StudentGraph, Students, outputs, student};
use super::target::Target;
use crate::plan::Selection;

/// How all sites learn together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Together {
    /// Steps of AdamW, a sample each.
    pub steps: usize,
    /// Learning rate at the first step; it falls to zero as a cosine.
    pub learning_rate: f64,
}

impl Default for Together {
    fn default() -> Self {
        Self {
            steps: 200,
            learning_rate: 1e-4,
        }
    }
}

/// Of the objective.
const KD: f64 = 0.5;
const FEATURES: f64 = 0.5;
/// Looks at the samples held out so often on the way.
const LOOKS: usize = 8;
/// Ends when so many looks in a row saw no improvement.
const PATIENCE: usize = 3;
const NAME: &str = "end to end";

/// Learning end to end, before its students are known.
pub(super) struct Whole {
    together: Together,
    graph: StudentGraph,
    device: Device,
}

/// What is learned from, and what is told on the way.
struct Course<'a> {
    learned: &'a [Sample],
    held_out: &'a [Sample],
    /// Takes what is learned at each look.
    state: &'a State,
    progress: &'a (dyn Fn(Progress) + Sync),
}

/// Where learning is after a look.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Standing {
    step: usize,
    /// Looks in a row without improvement.
    idle: usize,
    /// Bits of the least error so far: text could round it.
    least: u64,
}

impl Whole {
    /// Reads the graph; a converted copy is made in `scratch` where it is needed.
    ///
    /// # Errors
    /// An operator cannot be differentiated, or a truth is no output.
    pub fn new(
        teacher: &Teacher<'_>,
        targets: &[Target],
        samples: &[Sample],
        selection: &Selection,
        scratch: &Path,
        device: &Device,
        together: Together,
    ) -> Result<Self, DistillError> {
        if !(together.learning_rate.is_finite() && together.learning_rate > 0.0) {
            return Err(DistillError::Setting {
                option: "--end-to-end-lr",
                problem: "is no positive number".to_owned(),
            });
        }
        check_truths(teacher, samples)?;
        let inputs = samples.first().map_or(&[][..], |s| &s.inputs);
        let graph = StudentGraph::new(teacher, targets, selection, scratch, inputs, device)?;
        Ok(Self {
            together,
            graph,
            device: device.clone(),
        })
    }

    /// Learns all `sites` together; gives back those that served the samples held out best, which may be the same. `None`:
    /// none of them has anything to learn.
    ///
    /// # Errors
    /// An operation or its gradient fails, or what is learned cannot be kept.
    pub fn refine(
        &self,
        work: &Work<'_>,
        sites: &[Learned],
    ) -> Result<Option<Vec<Learned>>, DistillError> {
        let failed = learning(NAME);
        let students = sites.iter().map(|site| student(site, &self.device));
        let students = students.collect::<candle_core::Result<Vec<_>>>();
        let students = students.map_err(&failed)?;
        if students.iter().all(Option::is_none) {
            return Ok(None);
        }
        work.begin("learning end to end", self.together.steps);
        let course = Course {
            learned: work.learned(),
            held_out: work.held_out(),
            state: &work.state.with(&format!(
                "{NAME} {:?} {}",
                self.together,
                digest(sites, work.samples)
            )),
            progress: work.progress,
        };
        self.learn(&students, &course)?;
        let mut sites = sites.to_vec();
        for (site, student) in sites.iter_mut().zip(&students) {
            if let Some(student) = student {
                site.done.weights = student.weights().map_err(&failed)?;
            }
        }
        Ok(Some(sites))
    }

    /// Leaves the students with the weights that served the samples held out best; gives the error on them before and after:
    /// ‖student − original‖² / ‖original‖² of the model's outputs.
    fn learn(&self, students: &Students, course: &Course<'_>) -> Result<[f64; 2], DistillError> {
        let failed = learning(NAME);
        let tick = |steps: usize| (course.progress)(Progress::Advance(steps as u64));
        let weights: Vec<Var> = students.iter().flatten().flat_map(Student::vars).collect();
        let expected = course
            .held_out
            .iter()
            .map(|sample| self.graph.original(sample))
            .collect::<Result<Vec<_>, DistillError>>()?;
        let before = self.error(students, course.held_out, &expected)?;
        let mut adam = AdamW::new(weights.clone()).map_err(&failed)?;
        let mut best = now(students).map_err(&failed)?;
        let mut at = Standing {
            step: 0,
            idle: 0,
            least: before.to_bits(),
        };
        let (steps, every) = (self.together.steps, self.together.steps.div_ceil(LOOKS));
        if let Some((then, found)) = load(course.state, students, &mut adam).map_err(&failed)? {
            (at, best) = (then, found);
            (course.progress)(Progress::Note(format!(
                "{NAME}: {} of {steps} steps are taken over from an interrupted run",
                at.step
            )));
            tick(at.step);
        }
        while at.step < steps && at.idle < PATIENCE {
            let Some(sample) = course.learned.get(at.step % course.learned.len().max(1)) else {
                break;
            };
            let cosine = 0.5 * (1.0 + (PI * at.step as f64 / steps as f64).cos());
            let original = self.graph.original(sample)?;
            let truth = self.truth(sample).map_err(&failed)?;
            let loss = |results: &[Tensor]| self.loss(results, &original, truth.as_ref());
            let gradient = self.graph.gradient(students, sample, &weights, &loss)?;
            let rate = self.together.learning_rate * cosine;
            adam.step(&gradient.by, rate).map_err(&failed)?;
            at.step += 1;
            tick(1);
            if !at.step.is_multiple_of(every) && at.step != steps {
                continue;
            }
            let error = self.error(students, course.held_out, &expected)?;
            at.idle += 1;
            let least = f64::from_bits(at.least);
            // NaN is no improvement, and any number one on NaN.
            if error < least || (least.is_nan() && !error.is_nan()) {
                (at.least, at.idle) = (error.to_bits(), 0);
                best = now(students).map_err(&failed)?;
            }
            save(course.state, at, students, &best, &adam)?;
            (course.progress)(Progress::Kept);
        }
        tick(steps - at.step.min(steps));
        for (student, weights) in students.iter().flatten().zip(&best) {
            student.set(weights).map_err(&failed)?;
        }
        Ok([before, f64::from_bits(at.least)])
    }

    fn loss(
        &self,
        results: &[Tensor],
        original: &[Tensor],
        truth: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let mean = |pairs: &mut dyn Iterator<Item = (&Tensor, &Tensor)>| {
            let mut sum = Tensor::zeros((), candle_core::DType::F32, &self.device)?;
            let mut count = 0;
            for (found, wanted) in pairs {
                sum = (sum + (found - wanted)?.sqr()?.mean_all()?)?;
                count += 1;
            }
            sum / f64::from(count.max(1))
        };
        let mut pairs = results.iter().zip(original);
        let kd = mean(&mut pairs.by_ref().take(self.graph.outputs))?;
        let features = mean(&mut pairs)?;
        let loss = ((kd * KD)? + (features * FEATURES)?)?;
        match (truth, results.first()) {
            (Some(truth), Some(output)) => loss + (output - truth)?.sqr()?.mean_all()?,
            _ => Ok(loss),
        }
    }

    fn error(
        &self,
        students: &Students,
        samples: &[Sample],
        expected: &[Vec<Tensor>],
    ) -> Result<f64, DistillError> {
        let failed = learning(NAME);
        let energy = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        let (mut error, mut squares) = (0.0, 0.0);
        for (sample, expected) in samples.iter().zip(expected) {
            let found = self.graph.run(students, sample)?;
            for (found, expected) in found.iter().zip(expected).take(self.graph.outputs) {
                error += (found - expected)
                    .and_then(|d| energy(&d))
                    .map_err(&failed)?;
                squares += energy(expected).map_err(&failed)?;
            }
        }
        Ok(error / squares.max(f64::MIN_POSITIVE))
    }

    fn truth(&self, sample: &Sample) -> candle_core::Result<Option<Tensor>> {
        match sample.truth.as_ref().map(|truth| truth.cast(DType::F32)) {
            Some(Fed::F32(values)) => {
                let dims = values.shape().to_vec();
                let values: Vec<f32> = values.into_iter().collect();
                Tensor::from_vec(values, dims, &self.device).map(Some)
            }
            _ => Ok(None),
        }
    }
}

/// Truths have the shape of the first output.
fn check_truths(teacher: &Teacher<'_>, samples: &[Sample]) -> Result<(), DistillError> {
    let first = outputs(teacher).first().copied();
    let found = first.and_then(|name| teacher.shapes.shape(name));
    for sample in samples {
        let Some(truth) = &sample.truth else { continue };
        let dims: Vec<i64> = truth.shape().iter().map(|d| *d as i64).collect();
        if Some(dims.as_slice()) != found {
            return Err(DistillError::Inputs {
                place: sample.origin.clone(),
                problem: format!(
                    "'{TRUTH}' has shape {dims:?}, and the first output has {found:?}"
                ),
            });
        }
    }
    Ok(())
}

/// The weights of the students that have some.
fn now(students: &Students) -> candle_core::Result<Vec<Weights>> {
    students.iter().flatten().map(Student::weights).collect()
}

/// Of the weights that learning begins from, and of the truths, which only learning end to end knows.
fn digest(sites: &[Learned], samples: &[Sample]) -> String {
    let mut digest = Sha256::new();
    for truth in samples.iter().map(|sample| &sample.truth) {
        digest.update([u8::from(truth.is_some())]);
        for value in truth.iter().flat_map(|t| t.to_f64()) {
            digest.update(value.to_le_bytes());
        }
    }
    for site in sites {
        digest.update(&site.target.module);
        for (part, values) in &site.done.weights.0 {
            digest.update(part.suffix());
            for value in values {
                digest.update(value.to_le_bytes());
            }
        }
    }
    format!("{:?}", digest.finalize())
}

const KEPT: &str = "end-to-end";
const NOW: &str = "now";
const BEST: &str = "best";
const MOMENTS: [&str; 2] = ["mean", "square"];

fn save(
    state: &State,
    at: Standing,
    students: &Students,
    best: &[Weights],
    adam: &AdamW,
) -> Result<(), DistillError> {
    let now = now(students).map_err(learning(NAME))?;
    let moments = adam.moments().map_err(learning(NAME))?;
    let mut tensors: Vec<(String, &[f32])> = Vec::new();
    for (which, all) in [(NOW, now.as_slice()), (BEST, best)] {
        for (index, weights) in all.iter().enumerate() {
            let parts = weights.0.iter();
            tensors.extend(parts.map(|(part, values)| {
                let name = format!("{which}.{index}.{}", part.suffix());
                (name, values.as_slice())
            }));
        }
    }
    for (index, both) in moments.iter().enumerate() {
        let both = MOMENTS.iter().zip(both);
        tensors.extend(both.map(|(which, values)| (format!("{which}.{index}"), values.as_slice())));
    }
    state.save_tensors(KEPT, &at, tensors)
}

/// What an interrupted run of the same request left: the students and the optimizer go on from there. What does not fit is
/// none.
fn load(
    state: &State,
    students: &Students,
    adam: &mut AdamW,
) -> candle_core::Result<Option<(Standing, Vec<Weights>)>> {
    let Some((at, mut tensors)) = state.load_tensors::<Standing>(KEPT) else {
        return Ok(None);
    };
    let mut take = |name: String, like: usize| {
        let values = tensors.remove(&name)?;
        (values.len() == like).then_some(values)
    };
    let mut weights = |which: &str| -> candle_core::Result<Option<Vec<Weights>>> {
        let mut all = Vec::new();
        for (index, like) in now(students)?.into_iter().enumerate() {
            let parts = like.0.into_iter().map(|(part, like)| {
                let name = format!("{which}.{index}.{}", part.suffix());
                Some((part, take(name, like.len())?))
            });
            let Some(parts) = parts.collect() else {
                return Ok(None);
            };
            all.push(Weights(parts));
        }
        Ok(Some(all))
    };
    let (Some(current), Some(best)) = (weights(NOW)?, weights(BEST)?) else {
        return Ok(None);
    };
    let mut moments = Vec::new();
    for (index, var) in students
        .iter()
        .flatten()
        .flat_map(Student::vars)
        .enumerate()
    {
        let mut moment = |which: &str| take(format!("{which}.{index}"), var.elem_count());
        let (Some(mean), Some(square)) = (moment(MOMENTS[0]), moment(MOMENTS[1])) else {
            return Ok(None);
        };
        moments.push([mean, square]);
    }
    for (student, weights) in students.iter().flatten().zip(&current) {
        student.set(weights)?;
    }
    adam.resume(at.step, &moments)?;
    Ok(Some((at, best)))
}

#[cfg(test)]
#[path = "end_to_end_tests.rs"]
mod tests;
