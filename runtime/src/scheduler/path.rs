//! The way of the solvers that work with logarithms of signal to noise, DPM-Solver and UniPC.

use super::fields::{Fields, SchedulerError};
use super::schedule::{
    Levels, Spacing, Training, check_steps, interpolate, linspace, timestep_of, trailing,
};

/// Noise levels of the steps, the last behind them, with the time steps that the model is told.
pub(super) struct Path {
    pub sigmas: Vec<f64>,
    pub timesteps: Vec<f64>,
    /// Whether the end has no noise at all.
    pub ends_clean: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Last {
    Zero,
    SigmaMin,
}

impl Path {
    pub(super) fn read(fields: &mut Fields, steps: usize) -> Result<Self, SchedulerError> {
        let training = Training::read(fields)?;
        let total = training.len();
        check_steps(total, steps)?;
        fields.refuse_flag("use_flow_sigmas")?;
        fields.ignore("flow_shift");
        fields.refuse_flag("thresholding")?;
        fields.ignore("dynamic_thresholding_ratio");
        fields.ignore("sample_max_value");
        let offset = fields.count("steps_offset", 0)?;
        let mut timesteps: Vec<f64> = match Spacing::read(fields, Spacing::Linspace)? {
            Spacing::Linspace => {
                let rising = linspace(0.0, (total - 1) as f64, steps + 1);
                rising
                    .iter()
                    .skip(1)
                    .rev()
                    .map(|t| t.round_ties_even())
                    .collect()
            }
            Spacing::Leading => {
                let ratio = total / (steps + 1);
                (1..=steps)
                    .rev()
                    .map(|i| (i * ratio + offset) as f64)
                    .collect()
            }
            Spacing::Trailing => trailing(total, steps),
        };
        let mut table = training.sigmas();
        // A schedule that ends in noise alone has no finite last level; this stands for it.
        if let Some(last) = table.last_mut().filter(|s| s.is_infinite()) {
            *last = (1.0 / 2.0_f64.powi(-24) - 1.0).sqrt();
        }
        let levels = Levels::read(fields)?;
        let [lowest, highest] = [fields.optional("sigma_min")?, fields.optional("sigma_max")?];
        let mut sigmas: Vec<f64> = match (levels, table.last(), table.first()) {
            (Levels::Karras | Levels::Exponential, Some(high), Some(low)) => {
                let spread = levels.spread(highest.unwrap_or(*high), lowest.unwrap_or(*low), steps);
                let near = |s: &f64| timestep_of(*s, &table);
                let rounded = !training.cosine || levels == Levels::Exponential;
                timesteps = spread
                    .iter()
                    .map(near)
                    .map(|t| if rounded { t.round_ties_even() } else { t })
                    .collect();
                spread
            }
            _ => timesteps.iter().map(|t| interpolate(&table, *t)).collect(),
        };
        let last = fields.choice(
            "final_sigmas_type",
            Last::Zero,
            &[("zero", Last::Zero), ("sigma_min", Last::SigmaMin)],
        )?;
        sigmas.push(match last {
            Last::Zero => 0.0,
            Last::SigmaMin => table.first().copied().unwrap_or(0.0),
        });
        sigmas.iter_mut().for_each(|s| *s = f64::from(*s as f32));
        timesteps.iter_mut().for_each(|t| *t = t.trunc());
        Ok(Self {
            sigmas,
            timesteps,
            ends_clean: last == Last::Zero,
        })
    }

    /// Signal and noise of x = α·x₀ + σ·ε at a step.
    pub(super) fn parts(&self, index: usize) -> [f64; 2] {
        let sigma = self.sigmas.get(index).copied().unwrap_or(0.0);
        let signal = 1.0 / (sigma * sigma + 1.0).sqrt();
        [signal, sigma * signal]
    }

    /// λ = log(α / σ); infinite at the end of a path without noise.
    pub(super) fn lambda(&self, index: usize) -> f64 {
        let [signal, noise] = self.parts(index);
        signal.ln() - noise.ln()
    }
}
