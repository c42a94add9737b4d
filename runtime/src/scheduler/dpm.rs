//! DPM-Solver++, multistep, deterministic and as a stochastic equation (Lu et al. 2022).

use super::fields::{Fields, SchedulerError};
use super::path::Path;
use super::recipe::{Recipe, Slot};
use super::schedule::Prediction;
use super::{Evaluation, Run, Scheduler};

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
        })
    }

    /// `known` clean samples are there, this evaluation's among them.
    fn order_at(&self, index: usize, known: usize) -> usize {
        let count = self.path.timesteps.len();
        let few = self.lower_order_final && count < FEW;
        let last = index + 1 == count && (self.euler_at_final || few || self.path.ends_clean);
        let second = index + 2 == count && few;
        match (last, second) {
            (true, _) => 1,
            (_, true) => known.min(2).min(self.order),
            _ => known.min(self.order),
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
    fn update(&self, index: usize, known: usize) -> Update {
        let [signal, noise] = self.path.parts(index + 1);
        let [_, noise_before] = self.path.parts(index);
        let lambda = |back: usize| self.path.lambda(index.saturating_sub(back));
        let h = self.path.lambda(index + 1) - lambda(0);
        let decay = (-h).exp();
        let ratio = noise / noise_before;
        let order = self.order_at(index, known);
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

    fn step(&self, at: Evaluation) -> Recipe {
        let mut recipe = Recipe::default();
        let [signal, level] = self.path.parts(at.index);
        let [clean, _] = self.prediction.split(Slot::Output, signal, level);
        recipe.set(Slot::Clean, clean);
        // Clean samples, the newest first.
        recipe.remember(Slot::Clean, at.done(), self.order);
        let update = self.update(at.index, at.done() + 1);
        let mut next = Slot::Sample * update.keep;
        for (back, weight) in update.weights.into_iter().enumerate() {
            if weight != 0.0 {
                next = next + Slot::Memory(back) * weight;
            }
        }
        if self.algorithm == Algorithm::Stochastic {
            next = next + Slot::Noise * update.noise;
        }
        recipe.set(Slot::Sample, next);
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        self.path.parts(index)
    }
}
