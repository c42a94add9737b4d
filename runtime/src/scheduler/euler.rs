//! Euler steps over noise levels, plain and ancestral (Karras et al. 2022, algorithm 1 without churn).

use super::fields::{Fields, SchedulerError};
use super::recipe::{Recipe, Slot};
use super::schedule::{Levels, Prediction, Spacing, Training, interpolate, linspace, timestep_of};
use super::{Evaluation, Run, Scheduler};

pub(super) struct Euler {
    prediction: Prediction,
    ancestral: bool,
    /// One more than there are steps: the last is what is left in the end.
    sigmas: Vec<f64>,
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
}

#[derive(Clone, Copy, PartialEq)]
enum Interpolation {
    Linear,
    LogLinear,
}

#[derive(Clone, Copy, PartialEq)]
enum Last {
    Zero,
    SigmaMin,
}

#[derive(Clone, Copy, PartialEq)]
enum TimestepType {
    Discrete,
    Continuous,
}

impl Euler {
    pub(super) fn new(
        fields: &mut Fields,
        run: &Run,
        ancestral: bool,
    ) -> Result<Self, SchedulerError> {
        let training = Training::read(fields)?;
        let prediction = Prediction::read(fields)?;
        let spacing = Spacing::read(fields, Spacing::Linspace)?;
        let offset = fields.count("steps_offset", 0)?;
        let mut timesteps = spacing.timesteps(training.len(), run.steps, offset)?;
        // In single precision, as the model is told them.
        timesteps.iter_mut().for_each(|t| *t = f64::from(*t as f32));
        let mut table = training.sigmas();
        // A schedule that ends in noise alone has no finite last level; this stands for it.
        if let Some(last) = table.last_mut().filter(|s| s.is_infinite()) {
            *last = (1.0 / 2.0_f64.powi(-24) - 1.0).sqrt();
        }
        let mut sigmas: Vec<f64> = timesteps.iter().map(|t| interpolate(&table, *t)).collect();
        let mut last = 0.0;
        if !ancestral {
            let end = fields.choice(
                "final_sigmas_type",
                Last::Zero,
                &[("zero", Last::Zero), ("sigma_min", Last::SigmaMin)],
            )?;
            let (lowest, highest) = (fields.optional("sigma_min")?, fields.optional("sigma_max")?);
            let how = fields.choice(
                "interpolation_type",
                Interpolation::Linear,
                &[
                    ("linear", Interpolation::Linear),
                    ("log_linear", Interpolation::LogLinear),
                ],
            )?;
            let kind = fields.choice(
                "timestep_type",
                TimestepType::Discrete,
                &[
                    ("discrete", TimestepType::Discrete),
                    ("continuous", TimestepType::Continuous),
                ],
            )?;
            if let (Interpolation::LogLinear, Some(low), Some(high)) =
                (how, table.first(), table.last())
            {
                sigmas = linspace(high.ln(), low.ln(), run.steps + 1)
                    .iter()
                    .map(|l| l.exp())
                    .collect();
            }
            let levels = Levels::read(fields)?;
            if let (true, Some(high), Some(low)) =
                (levels != Levels::Plain, sigmas.first(), sigmas.last())
            {
                sigmas = levels.spread(highest.unwrap_or(*high), lowest.unwrap_or(*low), run.steps);
                timesteps = sigmas.iter().map(|s| timestep_of(*s, &table)).collect();
            }
            if end == Last::SigmaMin {
                last = table.first().copied().unwrap_or(0.0);
            }
            if kind == TimestepType::Continuous && prediction == Prediction::V {
                timesteps = sigmas.iter().map(|s| 0.25 * s.ln()).collect();
            }
        }
        sigmas.push(last);
        sigmas.iter_mut().for_each(|s| *s = f64::from(*s as f32));
        timesteps.iter_mut().for_each(|t| *t = f64::from(*t as f32));
        let highest = sigmas.iter().copied().fold(0.0, f64::max);
        Ok(Self {
            prediction,
            ancestral,
            init_noise_sigma: match spacing {
                Spacing::Leading => (highest * highest + 1.0).sqrt(),
                Spacing::Linspace | Spacing::Trailing => highest,
            },
            sigmas,
            timesteps,
        })
    }

    fn sigma(&self, index: usize) -> f64 {
        self.sigmas.get(index).copied().unwrap_or(0.0)
    }
}

impl Scheduler for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        self.init_noise_sigma
    }

    fn input_scale(&self, index: usize) -> f64 {
        let sigma = self.sigma(index);
        1.0 / (sigma * sigma + 1.0).sqrt()
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let (from, to) = (self.sigma(at.index), self.sigma(at.index + 1));
        let (up, down) = if self.ancestral {
            let up = (to * to * (from * from - to * to) / (from * from)).sqrt();
            (up, (to * to - up * up).max(0.0).sqrt())
        } else {
            (0.0, to)
        };
        let clean = self.prediction.clean(from);
        let slope = (Slot::Sample * 1.0 - clean.clone()) * (1.0 / from);
        let mut next = Slot::Sample * 1.0 + slope * (down - from);
        if self.ancestral {
            next = next + Slot::Noise * up;
        }
        let mut recipe = Recipe::default();
        recipe.set(Slot::Clean, clean);
        recipe.set(Slot::Sample, next);
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        [1.0, self.sigma(index)]
    }
}
