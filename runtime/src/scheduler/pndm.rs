//! PNDM (Liu et al. 2022): linear multistep, with Runge-Kutta steps before it unless they are skipped.

use super::ddim::last_alpha;
use super::fields::{Fields, SchedulerError};
use super::schedule::{Prediction, Spacing, Training, check_steps, linspace, mix, trailing};
use super::{Run, Scheduler};

pub(super) struct Pndm {
    training: Training,
    prediction: Prediction,
    last_alpha: f64,
    stride: i64,
    timesteps: Vec<f64>,
    /// Evaluations at the begin that are of Runge-Kutta.
    runge_kutta: usize,
    counter: usize,
    /// Earlier outputs, the newest last.
    outputs: Vec<Vec<f32>>,
    kept_sample: Option<Vec<f32>>,
    gathered: Vec<f32>,
    clean: Vec<f32>,
}

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
            counter: 0,
            outputs: Vec::new(),
            kept_sample: None,
            gathered: Vec::new(),
            clean: Vec::new(),
            training,
        })
    }

    /// Equation 9 of the paper, from step `from` to `to`.
    fn transfer(&mut self, sample: &mut [f32], output: &[f32], from: i64, to: i64) {
        let (a, b) = (
            self.training.alpha(from, self.last_alpha),
            self.training.alpha(to, self.last_alpha),
        );
        let (signal, level) = (a.sqrt() as f32, (1.0 - a).sqrt() as f32);
        let keep = (b / a).sqrt() as f32;
        let take = ((b - a) / (a * (1.0 - b).sqrt() + (a * (1.0 - a) * b).sqrt())) as f32;
        self.clean.resize(sample.len(), 0.0);
        for ((x, output), clean) in sample.iter_mut().zip(output).zip(&mut self.clean) {
            let [x0, epsilon] = self.prediction.split(*output, *x, signal, level);
            *clean = x0;
            *x = keep * *x - take * epsilon;
        }
    }

    fn multistep(&mut self, output: &[f32], timestep: i64, sample: &mut [f32]) {
        let (mut from, mut to) = (timestep, timestep - self.stride);
        if self.counter == 1 {
            // The first step is taken again, from its begin.
            (from, to) = (timestep + self.stride, timestep);
        } else {
            let excess = self.outputs.len().saturating_sub(3);
            self.outputs.drain(..excess);
            self.outputs.push(output.to_vec());
        }
        let combined: Vec<f32> = match (self.outputs.as_slice(), self.counter) {
            ([_], 0) => {
                self.kept_sample = Some(sample.to_vec());
                output.to_vec()
            }
            ([before], 1) => {
                if let Some(kept) = self.kept_sample.take() {
                    sample.copy_from_slice(&kept);
                }
                output
                    .iter()
                    .zip(before)
                    .map(|(a, b)| (a + b) / 2.0)
                    .collect()
            }
            ([.., b, a], _) if self.outputs.len() == 2 => {
                a.iter().zip(b).map(|(a, b)| (3.0 * a - b) / 2.0).collect()
            }
            ([c, b, a], _) => (0..a.len())
                .map(|i| (23.0 * a[i] - 16.0 * b[i] + 5.0 * c[i]) / 12.0)
                .collect(),
            ([d, c, b, a], _) => {
                let term = |i: usize| 55.0 * a[i] - 59.0 * b[i] + 37.0 * c[i] - 9.0 * d[i];
                (0..a.len()).map(|i| term(i) / 24.0).collect()
            }
            _ => output.to_vec(),
        };
        self.transfer(sample, &combined, from, to);
    }

    fn runge_kutta(&mut self, output: &[f32], timestep: i64, sample: &mut [f32]) {
        let to = timestep
            - if self.counter % 2 == 1 {
                0
            } else {
                self.stride / 2
            };
        let first = self.counter / 4 * 4;
        let from = self.timesteps.get(first).map_or(timestep, |t| *t as i64);
        self.gathered.resize(output.len(), 0.0);
        let weight = if matches!(self.counter % 4, 1 | 2) {
            1.0 / 3.0
        } else {
            1.0 / 6.0
        };
        for (sum, output) in self.gathered.iter_mut().zip(output) {
            *sum += weight * output;
        }
        let combined = match self.counter % 4 {
            0 => {
                self.outputs.push(output.to_vec());
                self.kept_sample = Some(sample.to_vec());
                output.to_vec()
            }
            3 => std::mem::take(&mut self.gathered),
            _ => output.to_vec(),
        };
        if let Some(kept) = &self.kept_sample {
            sample.copy_from_slice(kept);
        }
        self.transfer(sample, &combined, from, to);
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

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, _: &mut [f32], _: usize) {}

    fn begin(&mut self, _: usize) {
        self.counter = 0;
        self.outputs.clear();
        self.kept_sample = None;
        self.gathered.clear();
    }

    fn step(
        &mut self,
        model_output: &[f32],
        index: usize,
        sample: &mut [f32],
        _: &mut dyn FnMut(usize) -> Vec<f32>,
    ) {
        let Some(timestep) = self.timesteps.get(index).map(|t| *t as i64) else {
            return;
        };
        if self.counter < self.runge_kutta {
            self.runge_kutta(model_output, timestep, sample);
        } else {
            self.multistep(model_output, timestep, sample);
        }
        self.counter += 1;
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
