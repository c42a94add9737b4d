//! PNDM (Liu et al. 2022): linear multistep, with Runge-Kutta steps before it unless they are skipped.

use super::ddim::last_alpha;
use super::fields::{Fields, SchedulerError};
use super::recipe::{Combination, Recipe, Slot};
use super::schedule::{Prediction, Spacing, Training, check_steps, linspace, trailing};
use super::{Evaluation, Run, Scheduler};

pub(super) struct Pndm {
    training: Training,
    prediction: Prediction,
    last_alpha: f64,
    stride: i64,
    timesteps: Vec<f64>,
    /// Evaluations at the begin that are of Runge-Kutta.
    runge_kutta: usize,
}

/// Outputs that the multistep rule uses, in the first memories, the newest first.
const OUTPUTS: usize = 4;
/// The sample that a step of several evaluations began with.
const BEGIN: Slot = Slot::Memory(OUTPUTS);
/// The weighted outputs of a Runge-Kutta step.
const GATHERED: Slot = Slot::Memory(OUTPUTS + 1);

impl Pndm {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let training = Training::read(fields)?;
        let prediction = Prediction::read(fields)?;
        if prediction == Prediction::Sample {
            return Err(SchedulerError::Field {
                field: "prediction_type".to_owned(),
                found: "`sample`".to_owned(),
                expected: "`epsilon` or `v_prediction` for PNDM".to_owned(),
            });
        }
        let total = training.len();
        check_steps(total, run.steps)?;
        let offset = fields.count("steps_offset", 0)?;
        let rising: Vec<f64> = match Spacing::read(fields, Spacing::Leading)? {
            Spacing::Linspace => linspace(0.0, (total - 1) as f64, run.steps)
                .iter()
                .map(|t| t.round_ties_even())
                .collect(),
            Spacing::Leading => (0..run.steps)
                .map(|i| (i * (total / run.steps) + offset) as f64)
                .collect(),
            Spacing::Trailing => trailing(total, run.steps).into_iter().rev().collect(),
        };
        let skip = fields.flag("skip_prk_steps", false)?;
        if !skip && run.steps < 4 {
            return Err(SchedulerError::Steps {
                found: run.steps,
                expected:
                    "4 or more, for the Runge-Kutta steps of PNDM (skip_prk_steps leaves them out)"
                        .to_owned(),
            });
        }
        let (timesteps, runge_kutta) = arrange(&rising, skip, (total / run.steps / 2) as f64);
        Ok(Self {
            last_alpha: last_alpha(fields, &training, false)?,
            stride: (total / run.steps) as i64,
            prediction,
            timesteps,
            runge_kutta,
            training,
        })
    }

    /// Equation 9 of the paper, from step `from` to `to`.
    fn transfer(&self, recipe: &mut Recipe, output: Combination, from: i64, to: i64) {
        let (a, b) = (
            self.training.alpha(from, self.last_alpha),
            self.training.alpha(to, self.last_alpha),
        );
        let (signal, level) = (a.sqrt(), (1.0 - a).sqrt());
        let keep = (b / a).sqrt();
        let take = (b - a) / (a * (1.0 - b).sqrt() + (a * (1.0 - a) * b).sqrt());
        let [clean, epsilon] = self.prediction.split(output, signal, level);
        recipe.set(Slot::Clean, clean);
        recipe.set(Slot::Sample, Slot::Sample * keep - epsilon * take);
    }

    fn multistep(&self, recipe: &mut Recipe, counter: usize, timestep: i64) {
        let (mut from, mut to) = (timestep, timestep - self.stride);
        // Outputs of Runge-Kutta steps, and since; that of the step that is taken twice counts once.
        let before = match self.runge_kutta {
            0 => counter - usize::from(counter > 1),
            steps => steps.div_ceil(4) + counter - steps,
        };
        if counter == 1 {
            // The first step is taken again, from its begin.
            (from, to) = (timestep + self.stride, timestep);
        } else {
            recipe.remember(Slot::Output, before, OUTPUTS);
        }
        let m = Slot::Memory;
        let combined = match (counter, before) {
            (0, _) => {
                recipe.set(BEGIN, Slot::Sample);
                m(0).into()
            }
            (1, _) => {
                recipe.set(Slot::Sample, BEGIN);
                Slot::Output * 0.5 + m(0) * 0.5
            }
            (_, 0) => m(0).into(),
            (_, 1) => (m(0) * 3.0 - m(1) * 1.0) * 0.5,
            (_, 2) => (m(0) * 23.0 - m(1) * 16.0 + m(2) * 5.0) * (1.0 / 12.0),
            _ => (m(0) * 55.0 - m(1) * 59.0 + m(2) * 37.0 - m(3) * 9.0) * (1.0 / 24.0),
        };
        self.transfer(recipe, combined, from, to);
    }

    fn runge_kutta(&self, recipe: &mut Recipe, counter: usize, timestep: i64) {
        let to = timestep - if counter % 2 == 1 { 0 } else { self.stride / 2 };
        let first = counter / 4 * 4;
        let from = self.timesteps.get(first).map_or(timestep, |t| *t as i64);
        let output = Slot::Output;
        let combined = match counter % 4 {
            0 => {
                recipe.remember(output, counter / 4, OUTPUTS);
                recipe.set(BEGIN, Slot::Sample);
                recipe.set(GATHERED, output * (1.0 / 6.0));
                output.into()
            }
            3 => {
                recipe.set(Slot::Sample, BEGIN);
                GATHERED * 1.0 + output * (1.0 / 6.0)
            }
            _ => {
                recipe.set(Slot::Sample, BEGIN);
                recipe.set(GATHERED, GATHERED * 1.0 + output * (1.0 / 3.0));
                output.into()
            }
        };
        self.transfer(recipe, combined, from, to);
    }
}

/// The evaluations in order, and how many are of Runge-Kutta.
fn arrange(rising: &[f64], skip: bool, half: f64) -> (Vec<f64>, usize) {
    let falling = |steps: &[f64]| -> Vec<f64> { steps.iter().rev().copied().collect() };
    if skip {
        // The last but one comes twice: its step is taken again.
        let mut steps = rising.to_vec();
        if let Some(place) = rising.len().checked_sub(2) {
            steps.insert(place, rising[place]);
        }
        return (falling(&steps), 0);
    }
    let last = rising
        .get(rising.len().saturating_sub(4)..)
        .unwrap_or_default();
    let pairs: Vec<f64> = last.iter().flat_map(|t| [*t, t + half]).collect();
    let inner = pairs
        .get(..pairs.len().saturating_sub(1))
        .unwrap_or_default();
    let doubled: Vec<f64> = inner.iter().flat_map(|t| [*t, *t]).collect();
    let mut steps = falling(
        doubled
            .get(1..doubled.len().saturating_sub(1))
            .unwrap_or_default(),
    );
    let count = steps.len();
    steps.extend(falling(
        rising
            .get(..rising.len().saturating_sub(3))
            .unwrap_or_default(),
    ));
    (steps, count)
}

impl Scheduler for Pndm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let mut recipe = Recipe::default();
        let Some(timestep) = self.timesteps.get(at.index).map(|t| *t as i64) else {
            return recipe;
        };
        if at.done() < self.runge_kutta {
            self.runge_kutta(&mut recipe, at.done(), timestep);
        } else {
            self.multistep(&mut recipe, at.done(), timestep);
        }
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        self.training.noising(self.timesteps.get(index))
    }
}
