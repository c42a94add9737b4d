//! Multistep sampling of latent consistency models (Luo et al. 2023).

use super::ddim::{clip, last_alpha};
use super::fields::{Fields, SchedulerError};
use super::schedule::{Prediction, Spacing, Training, mix};
use super::{Run, Scheduler};

/// Deviation of the data, in the boundary condition of consistency models.
const DATA: f64 = 0.5;

pub(super) struct Lcm {
    training: Training,
    prediction: Prediction,
    clip: Option<f32>,
    last_alpha: f64,
    timestep_scaling: f64,
    timesteps: Vec<f64>,
    clean: Vec<f32>,
}

impl Lcm {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let training = Training::read_stable_diffusion(fields)?;
        let original = fields.count("original_inference_steps", 50)?;
        // These say where other samplers' steps lie; the distilled steps are fixed.
        Spacing::read(fields, Spacing::Leading)?;
        fields.ignore("steps_offset");
        if original == 0 || original > training.len() || run.steps > original {
            return Err(SchedulerError::Steps {
                found: run.steps,
                expected: format!("1 to {original} (original_inference_steps)"),
            });
        }
        let stride = training.len() / original;
        let distilled: Vec<f64> = (1..=original)
            .rev()
            .map(|i| (i * stride - 1) as f64)
            .collect();
        let place = |i: usize| (i as f64 * (original as f64 / run.steps as f64)).floor() as usize;
        Ok(Self {
            prediction: Prediction::read(fields)?,
            clip: clip(fields, false)?,
            last_alpha: last_alpha(fields, &training, true)?,
            timestep_scaling: fields.number("timestep_scaling", 10.0)?,
            timesteps: (0..run.steps)
                .filter_map(|i| distilled.get(place(i)).copied())
                .collect(),
            clean: Vec::new(),
            training,
        })
    }
}

impl Scheduler for Lcm {
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
        let Some(timestep) = self.timesteps.get(index).copied() else {
            return;
        };
        let alpha = self.training.alpha(timestep as i64, self.last_alpha);
        let (signal, level) = (alpha.sqrt() as f32, (1.0 - alpha).sqrt() as f32);
        let scaled = timestep * self.timestep_scaling;
        let keep = (DATA * DATA / (scaled * scaled + DATA * DATA)) as f32;
        let take = (scaled / (scaled * scaled + DATA * DATA).sqrt()) as f32;
        self.clean.resize(sample.len(), 0.0);
        for ((x, output), clean) in sample.iter_mut().zip(model_output).zip(&mut self.clean) {
            let [mut x0, _] = self.prediction.split(*output, *x, signal, level);
            if let Some(range) = self.clip {
                x0 = x0.clamp(-range, range);
            }
            *clean = take * x0 + keep * *x;
            *x = *clean;
        }
        if let Some(next) = self.timesteps.get(index + 1) {
            let alpha = self.training.alpha(*next as i64, self.last_alpha);
            mix(
                sample,
                &noise(model_output.len()),
                alpha.sqrt(),
                (1.0 - alpha).sqrt(),
            );
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
