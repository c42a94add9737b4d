//! DDIM (Song et al. 2021).

use super::fields::{Fields, SchedulerError};
use super::schedule::{Prediction, Spacing, Training, mix};
use super::{Run, Scheduler};

pub(super) struct Ddim {
    training: Training,
    prediction: Prediction,
    clip: Option<f32>,
    /// ᾱ behind the last step.
    last_alpha: f64,
    /// Training steps between two steps.
    stride: i64,
    eta: f64,
    timesteps: Vec<f64>,
    clean: Vec<f32>,
}

/// The bound on clean samples, if there is one.
pub(super) fn clip(fields: &mut Fields, usual: bool) -> Result<Option<f32>, SchedulerError> {
    fields.refuse_flag("thresholding")?;
    fields.ignore("dynamic_thresholding_ratio");
    fields.ignore("sample_max_value");
    let range = fields.number("clip_sample_range", 1.0)?;
    Ok(fields.flag("clip_sample", usual)?.then_some(range as f32))
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
            clean: Vec::new(),
            training,
        })
    }
}

impl Scheduler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, _: &mut [f32], _: usize) {}

    fn begin(&mut self, _: usize) {}

    fn step(
        &mut self,
        model_output: &[f32],
        index: usize,
        sample: &mut [f32],
        noise: &mut dyn FnMut(usize) -> Vec<f32>,
    ) {
        let Some(timestep) = self.timesteps.get(index).map(|t| *t as i64) else {
            return;
        };
        let alpha = self.training.alpha(timestep, self.last_alpha);
        let before = self.training.alpha(timestep - self.stride, self.last_alpha);
        let variance = (1.0 - before) / (1.0 - alpha) * (1.0 - alpha / before);
        let deviation = self.eta * variance.max(0.0).sqrt();
        let direction = (1.0 - before - deviation * deviation).max(0.0).sqrt() as f32;
        let (signal, level) = (alpha.sqrt() as f32, (1.0 - alpha).sqrt() as f32);
        let before = before.sqrt() as f32;
        self.clean.resize(sample.len(), 0.0);
        for ((x, output), clean) in sample.iter_mut().zip(model_output).zip(&mut self.clean) {
            let [mut x0, epsilon] = self.prediction.split(*output, *x, signal, level);
            if let Some(range) = self.clip {
                x0 = x0.clamp(-range, range);
            }
            *clean = x0;
            *x = before * x0 + direction * epsilon;
        }
        if self.eta > 0.0 {
            for (x, noise) in sample.iter_mut().zip(noise(model_output.len())) {
                *x += deviation as f32 * noise;
            }
        }
    }

    fn add_noise(&self, original: &mut [f32], noise: &[f32], index: usize) {
        let timestep = self.timesteps.get(index).map_or(0, |t| *t as i64);
        let alpha = self.training.alpha(timestep, 1.0);
        mix(original, noise, alpha.sqrt(), (1.0 - alpha).sqrt());
    }

    fn predicted_original(&self) -> Option<&[f32]> {
        (!self.clean.is_empty()).then_some(&self.clean)
    }
}
