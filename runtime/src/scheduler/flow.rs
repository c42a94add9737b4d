//! Euler steps along a straight flow from noise to image (Esser et al. 2024).

use super::fields::{Fields, SchedulerError};
use super::recipe::{Recipe, Slot};
use super::schedule::{Levels, check_steps, linspace};
use super::{Evaluation, Run, Scheduler};

#[derive(Clone, Copy, PartialEq)]
enum Shift {
    Exponential,
    Linear,
}

pub(super) struct FlowEuler {
    sigmas: Vec<f64>,
    timesteps: Vec<f64>,
}

impl FlowEuler {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let total = fields.count("num_train_timesteps", 1000)?.max(1) as f64;
        check_steps(total as usize, run.steps)?;
        let shift = fields.number("shift", 1.0)?;
        let dynamic = fields.flag("use_dynamic_shifting", false)?;
        let base = [
            fields.number("base_image_seq_len", 256.0)?,
            fields.number("base_shift", 0.5)?,
        ];
        let most = [
            fields.number("max_image_seq_len", 4096.0)?,
            fields.number("max_shift", 1.15)?,
        ];
        let kind = fields.choice(
            "time_shift_type",
            Shift::Exponential,
            &[
                ("exponential", Shift::Exponential),
                ("linear", Shift::Linear),
            ],
        )?;
        let terminal = fields.optional("shift_terminal")?;
        fields.refuse_flag("invert_sigmas")?;
        fields.refuse_flag("stochastic_sampling")?;
        let levels = Levels::read(fields)?;
        let constant = |s: f64| shift * s / (1.0 + (shift - 1.0) * s);
        // The levels of the training are shifted once, and those between its ends again.
        let ends = [1.0, 1.0 / total].map(|s| if dynamic { s } else { constant(s) });
        let even = linspace(ends[0], ends[1], run.steps);
        let mut sigmas: Vec<f64> = if dynamic {
            let tokens = run.image_tokens.ok_or_else(|| SchedulerError::Field {
                field: "use_dynamic_shifting".to_owned(),
                found: "true".to_owned(),
                expected: "false, for a model whose number of image tokens isn't known".to_owned(),
            })? as f64;
            let slope = (most[1] - base[1]) / (most[0] - base[0]);
            let mu = tokens * slope + base[1] - slope * base[0];
            let mu = if kind == Shift::Exponential {
                mu.exp()
            } else {
                mu
            };
            even.iter().map(|s| mu / (mu + (1.0 / s - 1.0))).collect()
        } else {
            even.into_iter().map(constant).collect()
        };
        if let (Some(terminal), Some(last)) = (terminal, sigmas.last().copied()) {
            let factor = (1.0 - last) / (1.0 - terminal);
            sigmas
                .iter_mut()
                .for_each(|s| *s = 1.0 - (1.0 - *s) / factor);
        }
        if let (true, Some(high), Some(low)) =
            (levels != Levels::Plain, sigmas.first(), sigmas.last())
        {
            sigmas = levels.spread(*high, *low, run.steps);
        }
        sigmas.iter_mut().for_each(|s| *s = f64::from(*s as f32));
        let timesteps = sigmas
            .iter()
            .map(|s| f64::from((s * total) as f32))
            .collect();
        sigmas.push(0.0);
        Ok(Self { sigmas, timesteps })
    }

    fn sigma(&self, index: usize) -> f64 {
        self.sigmas.get(index).copied().unwrap_or(0.0)
    }
}

impl Scheduler for FlowEuler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let (sigma, next) = (self.sigma(at.index), self.sigma(at.index + 1));
        let (x, output) = (Slot::Sample, Slot::Output);
        let mut recipe = Recipe::default();
        recipe.set(Slot::Clean, x * 1.0 - output * sigma);
        recipe.set(Slot::Sample, x * 1.0 + output * (next - sigma));
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        let sigma = self.sigma(index);
        [1.0 - sigma, sigma]
    }
}
