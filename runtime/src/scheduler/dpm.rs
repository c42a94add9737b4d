//! DPM-Solver++, multistep, deterministic and as a stochastic equation (Lu et al. 2022).

use std::collections::VecDeque;

use super::fields::{Fields, SchedulerError};
use super::path::Path;
use super::schedule::{Prediction, mix};
use super::{Run, Scheduler};

#[derive(Clone, Copy, PartialEq)]
enum Algorithm {
    Deterministic,
    Stochastic,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Midpoint,
    Heun,
}

pub(super) struct DpmSolver {
    path: Path,
    prediction: Prediction,
    algorithm: Algorithm,
    kind: Kind,
    order: usize,
    lower_order_final: bool,
    euler_at_final: bool,
    /// Clean samples, the newest first.
    history: VecDeque<Vec<f32>>,
}

/// Few steps end with lower orders, where the solver would not be stable.
const FEW: usize = 15;

impl DpmSolver {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let algorithm = fields.choice(
            "algorithm_type",
            Algorithm::Deterministic,
            &[
                ("dpmsolver++", Algorithm::Deterministic),
                ("sde-dpmsolver++", Algorithm::Stochastic),
            ],
        )?;
        let kind = fields.choice(
            "solver_type",
            Kind::Midpoint,
            &[("midpoint", Kind::Midpoint), ("heun", Kind::Heun)],
        )?;
        let order = fields.count("solver_order", 2)?;
        let most = if algorithm == Algorithm::Stochastic {
            2
        } else {
            3
        };
        if !(1..=most).contains(&order) {
            return Err(SchedulerError::Field {
                field: "solver_order".to_owned(),
                found: order.to_string(),
                expected: format!("1 to {most}"),
            });
        }
        fields.refuse_flag("use_lu_lambdas")?;
        // Variances that a model predicts are cut off before.
        fields.ignore("variance_type");
        fields.refuse_finite("lambda_min_clipped")?;
        Ok(Self {
            path: Path::read(fields, run.steps)?,
            prediction: Prediction::read(fields)?,
            algorithm,
            kind,
            order,
            lower_order_final: fields.flag("lower_order_final", true)?,
            euler_at_final: fields.flag("euler_at_final", false)?,
            history: VecDeque::new(),
        })
    }

    fn order_at(&self, index: usize) -> usize {
        let count = self.path.timesteps.len();
        let few = self.lower_order_final && count < FEW;
        let last = index + 1 == count && (self.euler_at_final || few || self.path.ends_clean);
        let second = index + 2 == count && few;
        match self.history.len() {
            _ if last => 1,
            known if second => known.min(2).min(self.order),
            known => known.min(self.order),
        }
    }
}

/// Numbers of an update x ← keep·x + Σ weights·clean samples + noise·ε.
struct Update {
    keep: f64,
    weights: [f64; 3],
    noise: f64,
}

impl DpmSolver {
    fn update(&self, index: usize) -> Update {
        let [signal, noise] = self.path.parts(index + 1);
        let [_, noise_before] = self.path.parts(index);
        let lambda = |back: usize| self.path.lambda(index.saturating_sub(back));
        let h = self.path.lambda(index + 1) - lambda(0);
        let decay = (-h).exp();
        let ratio = noise / noise_before;
        let order = self.order_at(index);
        let r0 = (lambda(0) - lambda(1)) / h;
        // Factors of D0, D1 and D2, the differences of clean samples.
        let (keep, d0, d1, d2, noise) = match self.algorithm {
            Algorithm::Deterministic => {
                let d0 = signal * (1.0 - decay);
                let heun = signal * ((decay - 1.0) / h + 1.0);
                let d1 = match (order, self.kind) {
                    (3, _) | (_, Kind::Heun) => heun,
                    _ => 0.5 * d0,
                };
                let d2 = -signal * ((decay - 1.0 + h) / (h * h) - 0.5);
                (ratio, d0, d1, d2, 0.0)
            }
            Algorithm::Stochastic => {
                let loss = 1.0 - (-2.0 * h).exp();
                let d0 = signal * loss;
                let d1 = match self.kind {
                    Kind::Midpoint => 0.5 * d0,
                    Kind::Heun => signal * (loss / (-2.0 * h) + 1.0),
                };
                (ratio * decay, d0, d1, 0.0, noise * loss.sqrt())
            }
        };
        let weights = match order {
            1 => [d0, 0.0, 0.0],
            2 => [d0 + d1 / r0, -d1 / r0, 0.0],
            _ => {
                let r1 = (lambda(1) - lambda(2)) / h;
                // D1 = D1₀ + r0/(r0+r1)·(D1₀ − D1₁), D2 = (D1₀ − D1₁)/(r0+r1), D1₀ = (m0−m1)/r0, D1₁ = (m1−m2)/r1.
                let near = d1 * (1.0 + r0 / (r0 + r1)) + d2 / (r0 + r1);
                let far = -d1 * r0 / (r0 + r1) - d2 / (r0 + r1);
                [d0 + near / r0, -near / r0 + far / r1, -far / r1]
            }
        };
        Update {
            keep,
            weights,
            noise,
        }
    }
}

impl Scheduler for DpmSolver {
    fn timesteps(&self) -> &[f64] {
        &self.path.timesteps
    }

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, _: &mut [f32], _: usize) {}

    fn begin(&mut self, _: usize) {
        self.history.clear();
    }

    fn step(
        &mut self,
        model_output: &[f32],
        index: usize,
        sample: &mut [f32],
        noise: &mut dyn FnMut(usize) -> Vec<f32>,
    ) {
        self.history.push_front(
            self.path
                .clean(self.prediction, model_output, sample, index),
        );
        self.history.truncate(self.order);
        let update = self.update(index);
        let keep = update.keep as f32;
        sample.iter_mut().for_each(|x| *x *= keep);
        for (clean, weight) in self.history.iter().zip(update.weights) {
            if weight != 0.0 {
                for (x, clean) in sample.iter_mut().zip(clean) {
                    *x += weight as f32 * clean;
                }
            }
        }
        if self.algorithm == Algorithm::Stochastic {
            for (x, noise) in sample.iter_mut().zip(noise(model_output.len())) {
                *x += update.noise as f32 * noise;
            }
        }
    }

    fn add_noise(&self, original: &mut [f32], noise: &[f32], index: usize) {
        let [signal, level] = self.path.parts(index);
        mix(original, noise, signal, level);
    }

    fn predicted_original(&self) -> Option<&[f32]> {
        self.history.front().map(Vec::as_slice)
    }
}
