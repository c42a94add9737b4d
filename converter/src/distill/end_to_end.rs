//! All sites learn together on the model's output, as the paper trains: L_noise + ½·L_kd + ½·L_feat, differentiated
//! through the original graph with the students in the place of its attentions.
//!
//! L_kd is the mean squared error of the outputs against the original's, L_feat the mean over sites of that of the
//! attentions' outputs, L_noise that of the first output against the truth, where a sample tells it
//! ([`super::inputs::TRUTH`]). Source: Liu, Yu, Wang: "LinFusion: 1 GPU, 1 Minute, 16K Image", 2024, section 3.3.

use std::f64::consts::PI;

use candle_core::{Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use linfusion_runtime::tensor::{DType, Tensor as Fed};
use serde::{Deserialize, Serialize};

use super::capture::Teacher;
use super::error::{DistillError, learning};
use super::graph::{Program, Replaced};
use super::inputs::{Sample, TRUTH};
use super::learn::{Learned, Work};
use super::student::{Beginning, Student};
use super::target::Target;
use crate::attention::plain::Layout;
use crate::plan::Method;

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

/// The original as a function that can be differentiated, with and without its attentions.
pub(super) struct Whole {
    together: Together,
    original: Program,
    student: Program,
    /// Of the wanted values those that are the model's outputs; the others are the attentions'.
    outputs: usize,
    /// Where the students' tokens are, and their outputs' shapes.
    places: Vec<Place>,
}

struct Place {
    target: Target,
    shape: Vec<usize>,
}

impl Whole {
    /// Reads the graph.
    ///
    /// # Errors
    /// An operator cannot be differentiated, a site becomes something else than linear, or a truth is no output.
    pub fn new(
        teacher: &Teacher<'_>,
        targets: &[Target],
        samples: &[Sample],
        together: Together,
    ) -> Result<Self, DistillError> {
        let fault = |problem: String| DistillError::Setting {
            option: "--end-to-end",
            problem,
        };
        if !(together.learning_rate.is_finite() && together.learning_rate > 0.0) {
            return Err(fault(
                "has a learning rate that is no positive number".to_owned(),
            ));
        }
        if let Some(other) = targets.iter().find(|t| t.methods != [Method::Linear]) {
            return Err(fault(format!(
                "is for linear attention alone so far, and {} may become something else (hint: --attention linear)",
                other.module
            )));
        }
        let whole = Self::of(teacher, targets, together)?;
        let found: Option<Vec<i64>> = whole.shape_of_output(teacher).map(<[i64]>::to_vec);
        for sample in samples {
            let Some(truth) = &sample.truth else { continue };
            let dims: Vec<i64> = truth.shape().iter().map(|d| *d as i64).collect();
            if Some(&dims) != found.as_ref() {
                return Err(DistillError::Inputs {
                    place: sample.origin.clone(),
                    problem: format!(
                        "'{TRUTH}' has shape {dims:?}, and the first output has {found:?}"
                    ),
                });
            }
        }
        Ok(whole)
    }

    fn of(
        teacher: &Teacher<'_>,
        targets: &[Target],
        together: Together,
    ) -> Result<Self, DistillError> {
        let outputs = outputs(teacher);
        let attentions = targets.iter().map(|t| t.merged.name.as_str());
        let wanted: Vec<&str> = outputs.iter().copied().chain(attentions).collect();
        let replaced: Vec<Replaced<'_>> = targets
            .iter()
            .map(|t| Replaced {
                input: &t.x.name,
                output: &t.merged.name,
            })
            .collect();
        let program = |replaced: &[Replaced<'_>]| {
            Program::new(
                teacher.file,
                teacher.shapes,
                replaced,
                &wanted,
                &Device::Cpu,
            )
        };
        let place = |target: &Target| {
            let dims = teacher.shapes.shape(&target.merged.name);
            let dims =
                dims.and_then(|dims| dims.iter().map(|d| usize::try_from(*d).ok()).collect());
            Ok(Place {
                target: target.clone(),
                shape: dims
                    .ok_or_else(|| target.fault(&target.merged.name, "has no known shape"))?,
            })
        };
        Ok(Self {
            together,
            original: program(&[])?,
            student: program(&replaced)?,
            outputs: outputs.len(),
            places: targets
                .iter()
                .map(place)
                .collect::<Result<_, DistillError>>()?,
        })
    }

    fn shape_of_output<'t>(&self, teacher: &'t Teacher<'_>) -> Option<&'t [i64]> {
        outputs(teacher)
            .first()
            .and_then(|name| teacher.shapes.shape(name))
    }

    /// Learns all `sites` together; gives back those that served the samples held out best, which may be the same.
    ///
    /// # Errors
    /// An operation or its gradient fails.
    pub fn refine(&self, work: &Work<'_>, sites: &[Learned]) -> Result<Vec<Learned>, DistillError> {
        let failed = learning(NAME);
        let students = sites
            .iter()
            .map(student)
            .collect::<candle_core::Result<Vec<_>>>();
        let students = students.map_err(&failed)?;
        let (learned, held_out) = (work.learned(), work.held_out());
        work.begin("learning end to end", self.together.steps);
        self.learn(&students, learned, held_out, &|steps| work.advance(steps))?;
        let mut sites = sites.to_vec();
        for (site, student) in sites.iter_mut().zip(&students) {
            site.done.weights = student.weights().map_err(&failed)?;
        }
        Ok(sites)
    }

    /// Leaves the students with the weights that served `held_out` best; gives the error on them before and after:
    /// ‖student − original‖² / ‖original‖² of the model's outputs.
    fn learn(
        &self,
        students: &[Student],
        samples: &[Sample],
        held_out: &[Sample],
        tick: &dyn Fn(usize),
    ) -> Result<[f64; 2], DistillError> {
        let failed = learning(NAME);
        let weights: Vec<Var> = students.iter().flat_map(Student::vars).collect();
        let all = || {
            students
                .iter()
                .map(Student::weights)
                .collect::<candle_core::Result<Vec<_>>>()
        };
        let expected = held_out
            .iter()
            .map(|sample| Ok(self.original.run(&sample.inputs, &|_, x| Ok(x.clone()))?))
            .collect::<Result<Vec<_>, DistillError>>()?;
        let before = self.error(students, held_out, &expected)?;
        let (mut least, mut best, mut idle) = (before, all().map_err(&failed)?, 0);
        let mut optimizer = AdamW::new(weights.clone(), ParamsAdamW::default()).map_err(&failed)?;
        let steps = self.together.steps;
        let every = steps.div_ceil(LOOKS).max(1);
        for step in 0..steps {
            let at = step % samples.len().max(1);
            let Some(sample) = samples.get(at) else { break };
            let cosine = 0.5 * (1.0 + (PI * step as f64 / steps as f64).cos());
            optimizer.set_learning_rate(self.together.learning_rate * cosine);
            let original = self.original.run(&sample.inputs, &|_, x| Ok(x.clone()))?;
            let truth = truth(sample).map_err(&failed)?;
            let sites = |i: usize, x: &Tensor| self.site(students, i, x);
            let loss = |results: &[Tensor]| self.loss(results, &original, truth.as_ref());
            let gradient = self
                .student
                .gradient(&sample.inputs, &sites, &weights, &loss)?;
            optimizer.step(&gradient.by).map_err(&failed)?;
            tick(1);
            if (step + 1) % every != 0 && step + 1 != steps {
                continue;
            }
            let now = self.error(students, held_out, &expected)?;
            idle += 1;
            // NaN is no improvement.
            if now < least {
                (least, best, idle) = (now, all().map_err(&failed)?, 0);
            }
            if idle >= PATIENCE {
                tick(steps - step - 1);
                break;
            }
        }
        for (student, weights) in students.iter().zip(&best) {
            student.set(weights).map_err(&failed)?;
        }
        Ok([before, least])
    }

    /// A student in the place of its attention: tensors as the graph has them.
    fn site(&self, students: &[Student], index: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        let (Some(place), Some(student)) = (self.places.get(index), students.get(index)) else {
            candle_core::bail!("there is no attention {index}");
        };
        let tokens = matrix(x, &place.target)?;
        let out = student.forward(&tokens, None)?;
        match place.target.merged.layout {
            Layout::ChannelsFirst => out.transpose(1, 2)?.reshape(place.shape.as_slice()),
            _ => out.reshape(place.shape.as_slice()),
        }
    }

    fn loss(
        &self,
        results: &[Tensor],
        original: &[Tensor],
        truth: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let mean = |pairs: &mut dyn Iterator<Item = (&Tensor, &Tensor)>| {
            let (mut sum, mut count) =
                (Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?, 0);
            for (found, wanted) in pairs {
                sum = (sum + (found - wanted)?.sqr()?.mean_all()?)?;
                count += 1;
            }
            sum / f64::from(count.max(1))
        };
        let mut pairs = results.iter().zip(original);
        let kd = mean(&mut pairs.by_ref().take(self.outputs))?;
        let features = mean(&mut pairs)?;
        let loss = ((kd * KD)? + (features * FEATURES)?)?;
        match (truth, results.first()) {
            (Some(truth), Some(output)) => loss + (output - truth)?.sqr()?.mean_all()?,
            _ => Ok(loss),
        }
    }

    fn error(
        &self,
        students: &[Student],
        samples: &[Sample],
        expected: &[Vec<Tensor>],
    ) -> Result<f64, DistillError> {
        let failed = learning(NAME);
        let energy = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        let (mut error, mut squares) = (0.0, 0.0);
        for (sample, expected) in samples.iter().zip(expected) {
            let found = self
                .student
                .run(&sample.inputs, &|i, x| self.site(students, i, x))?;
            for (found, expected) in found.iter().zip(expected).take(self.outputs) {
                error += (found - expected)
                    .and_then(|d| energy(&d))
                    .map_err(&failed)?;
                squares += energy(expected).map_err(&failed)?;
            }
        }
        Ok(error / squares.max(f64::MIN_POSITIVE))
    }
}

fn truth(sample: &Sample) -> candle_core::Result<Option<Tensor>> {
    match sample.truth.as_ref().map(|truth| truth.cast(DType::F32)) {
        Some(Fed::F32(values)) => {
            let dims = values.shape().to_vec();
            let values: Vec<f32> = values.into_iter().collect();
            Tensor::from_vec(values, dims, &Device::Cpu).map(Some)
        }
        _ => Ok(None),
    }
}

fn outputs<'t>(teacher: &'t Teacher<'_>) -> Vec<&'t str> {
    let outputs = teacher.file.model.graph.output.iter();
    outputs.filter_map(|o| o.name.as_deref()).collect()
}

fn student(site: &Learned) -> candle_core::Result<Student> {
    let beginning = Beginning {
        projections: &site.layers.projections,
        mid: site.done.report.mid,
        mixed: false,
        seed: 0,
    };
    let student = Student::new(site.target.shape, &beginning, &Device::Cpu)?;
    student.set(&site.done.weights)?;
    Ok(student)
}

/// A site's tokens as `[B, N, C]`.
fn matrix(x: &Tensor, target: &Target) -> candle_core::Result<Tensor> {
    let (tokens, dim) = (target.tokens, target.shape.dim);
    let images = x.elem_count() / (tokens * dim).max(1);
    match target.x.layout {
        Layout::ChannelsFirst => x
            .reshape((images, dim, tokens))?
            .transpose(1, 2)?
            .contiguous(),
        _ => x.reshape((images, tokens, dim)),
    }
}

#[cfg(test)]
#[path = "end_to_end_tests.rs"]
mod tests;
