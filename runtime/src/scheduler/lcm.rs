//! Multistep sampling of latent consistency models (Luo et al. 2023).

use super::ddim::{clip, last_alpha};
use super::fields::{Fields, SchedulerError};
use super::recipe::{Recipe, Slot};
use super::schedule::{Prediction, Spacing, Training};
use super::{Evaluation, Run, Scheduler};

/// Deviation of the data, in the boundary condition of consistency models.
const DATA: f64 = 0.5;

pub(super) struct Lcm {
    training: Training,
    prediction: Prediction,
    clip: Option<f64>,
    last_alpha: f64,
    timestep_scaling: f64,
    timesteps: Vec<f64>,
    is_cut: bool,
}

impl Lcm {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let training = Training::read_stable_diffusion(fields)?;
        let original = fields.count("original_inference_steps", 50)?;
        // These say where other samplers' steps lie; the distilled steps are fixed.
        Spacing::read(fields, Spacing::Leading)?;
        fields.ignore("steps_offset");
        if original == 0 || original > training.len() {
            return Err(SchedulerError::Field {
                field: "original_inference_steps".to_owned(),
                found: original.to_string(),
                expected: format!("1 to {}, the steps of training", training.len()),
            });
        }
        let taken = ((original as f64 * run.strength) as usize).min(original);
        if run.steps > taken {
            let part = match run.strength {
                1.0 => String::new(),
                strength => format!(", {original}, times the strength, {strength}"),
            };
            return Err(SchedulerError::Steps {
                found: run.steps,
                expected: format!("1 to {taken} (original_inference_steps{part})"),
            });
        }
        let stride = training.len() / original;
        let distilled: Vec<f64> = (1..=taken).rev().map(|i| (i * stride - 1) as f64).collect();
        let place = |i: usize| (i as f64 * (taken as f64 / run.steps as f64)).floor() as usize;
        Ok(Self {
            prediction: Prediction::read(fields)?,
            clip: clip(fields, false)?,
            last_alpha: last_alpha(fields, &training, true)?,
            timestep_scaling: fields.number("timestep_scaling", 10.0)?,
            timesteps: (0..run.steps)
                .filter_map(|i| distilled.get(place(i)).copied())
                .collect(),
            is_cut: run.strength < 1.0,
            training,
        })
    }
}

impl Scheduler for Lcm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn is_cut(&self) -> bool {
        self.is_cut
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let mut recipe = Recipe::default();
        let Some(timestep) = self.timesteps.get(at.index).copied() else {
            return recipe;
        };
        let alpha = self.training.alpha(timestep as i64, self.last_alpha);
        let (signal, level) = (alpha.sqrt(), (1.0 - alpha).sqrt());
        let scaled = timestep * self.timestep_scaling;
        let keep = DATA * DATA / (scaled * scaled + DATA * DATA);
        let take = scaled / (scaled * scaled + DATA * DATA).sqrt();
        let [clean, _] = self.prediction.split(Slot::Output, signal, level);
        recipe.set_within(Slot::Clean, clean, self.clip);
        recipe.set(Slot::Clean, Slot::Clean * take + Slot::Sample * keep);
        match self.timesteps.get(at.index + 1) {
            Some(next) => {
                let alpha = self.training.alpha(*next as i64, self.last_alpha);
                let noised = Slot::Clean * alpha.sqrt() + Slot::Noise * (1.0 - alpha).sqrt();
                recipe.set(Slot::Sample, noised);
            }
            None => recipe.set(Slot::Sample, Slot::Clean),
        }
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        self.training.noising(self.timesteps.get(index))
    }
}
