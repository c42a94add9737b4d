//! DDIM (Song et al. 2021).

use super::fields::{Fields, SchedulerError};
use super::recipe::{Recipe, Slot};
use super::schedule::{Prediction, Spacing, Training};
use super::{Evaluation, Run, Scheduler};

pub(super) struct Ddim {
    training: Training,
    prediction: Prediction,
    clip: Option<f64>,
    /// ᾱ behind the last step.
    last_alpha: f64,
    /// Training steps between two steps.
    stride: i64,
    eta: f64,
    timesteps: Vec<f64>,
}

/// The bound on clean samples, if there is one.
pub(super) fn clip(fields: &mut Fields, usual: bool) -> Result<Option<f64>, SchedulerError> {
    fields.refuse_flag("thresholding")?;
    fields.ignore("dynamic_thresholding_ratio");
    fields.ignore("sample_max_value");
    let range = fields.number("clip_sample_range", 1.0)?;
    Ok(fields.flag("clip_sample", usual)?.then_some(range))
}

/// ᾱ behind the last step: 1, or that of the first training step.
pub(super) fn last_alpha(
    fields: &mut Fields,
    training: &Training,
    usual: bool,
) -> Result<f64, SchedulerError> {
    Ok(if fields.flag("set_alpha_to_one", usual)? {
        1.0
    } else {
        training.first()
    })
}

impl Ddim {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let training = Training::read(fields)?;
        let spacing = Spacing::read(fields, Spacing::Leading)?;
        let offset = fields.count("steps_offset", 0)?;
        let timesteps = spacing.timesteps(training.len(), run.steps, offset)?;
        Ok(Self {
            prediction: Prediction::read(fields)?,
            clip: clip(fields, true)?,
            last_alpha: last_alpha(fields, &training, true)?,
            stride: (training.len() / run.steps) as i64,
            eta: run.eta,
            timesteps: timesteps.iter().map(|t| t.round_ties_even()).collect(),
            training,
        })
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let mut recipe = Recipe::default();
        let Some(timestep) = self.timesteps.get(at.index).map(|t| *t as i64) else {
            return recipe;
        };
        let alpha = self.training.alpha(timestep, self.last_alpha);
        let before = self.training.alpha(timestep - self.stride, self.last_alpha);
        let variance = (1.0 - before) / (1.0 - alpha) * (1.0 - alpha / before);
        let deviation = self.eta * variance.max(0.0).sqrt();
        let direction = (1.0 - before - deviation * deviation).max(0.0).sqrt();
        let (signal, level) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let [clean, epsilon] = self.prediction.split(Slot::Output, signal, level);
        recipe.set_within(Slot::Clean, clean, self.clip);
        let mut next = Slot::Clean * before.sqrt() + epsilon * direction;
        if self.eta > 0.0 {
            next = next + Slot::Noise * deviation;
        }
        recipe.set(Slot::Sample, next);
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        self.training.noising(self.timesteps.get(index))
    }
}
