//! UniPC (Zhao et al. 2023), multistep with its corrector, on predictions of the clean sample.

use super::fields::{Fields, SchedulerError};
use super::path::Path;
use super::recipe::{Combination, Recipe, Slot};
use super::schedule::Prediction;
use super::{Evaluation, Run, Scheduler};

/// B(h) of the paper.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Bh1,
    Bh2,
}

pub(super) struct UniPc {
    path: Path,
    prediction: Prediction,
    kind: Kind,
    order: usize,
    lower_order_final: bool,
    /// Steps after which nothing is corrected.
    uncorrected: Vec<usize>,
}

/// The highest order, of as many clean samples in the first memories, the newest first.
const MOST: usize = 3;
/// The sample before the last step.
const BEGIN: Slot = Slot::Memory(MOST);

impl UniPc {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let order = fields.count("solver_order", 2)?;
        if !(1..=MOST).contains(&order) {
            return Err(SchedulerError::Field {
                field: "solver_order".to_owned(),
                found: order.to_string(),
                expected: format!("1 to {MOST}"),
            });
        }
        if !fields.flag("predict_x0", true)? {
            return Err(SchedulerError::Field {
                field: "predict_x0".to_owned(),
                found: "false".to_owned(),
                expected: "true".to_owned(),
            });
        }
        fields.refuse("solver_p")?;
        let uncorrected = fields.numbers("disable_corrector")?.unwrap_or_default();
        Ok(Self {
            path: Path::read(fields, run.steps)?,
            prediction: Prediction::read(fields)?,
            kind: fields.choice(
                "solver_type",
                Kind::Bh2,
                &[("bh1", Kind::Bh1), ("bh2", Kind::Bh2)],
            )?,
            order,
            lower_order_final: fields.flag("lower_order_final", true)?,
            uncorrected: uncorrected.iter().map(|v| *v as usize).collect(),
        })
    }

    /// Order of the step at an evaluation.
    fn order_at(&self, index: usize, done: usize) -> usize {
        let left = self.path.timesteps.len().saturating_sub(index);
        let most = if self.lower_order_final {
            self.order.min(left)
        } else {
            self.order
        };
        most.min(done + 1).max(1)
    }

    /// `x` moved from step `from` to the next, with the clean samples that are remembered and, for the corrector, that of
    /// the target.
    fn transfer(&self, x: Slot, from: usize, order: usize, target: Option<Slot>) -> Combination {
        let [signal, noise] = self.path.parts(from + 1);
        let [_, noise_before] = self.path.parts(from);
        let h = self.path.lambda(from + 1) - self.path.lambda(from);
        let back =
            |i: usize| (self.path.lambda(from.saturating_sub(i)) - self.path.lambda(from)) / h;
        let mut ratios: Vec<f64> = (1..order).map(back).collect();
        ratios.push(1.0);
        let phi = (-h).exp_m1();
        let bh = match self.kind {
            Kind::Bh1 => -h,
            Kind::Bh2 => phi,
        };
        let weights = weights(&ratios, -h, bh, target.is_some());
        let newest = Slot::Memory(0);
        let mut next = x * (noise / noise_before) - newest * (signal * phi);
        let difference = |of: Slot, weight: f64| (of * 1.0 - newest * 1.0) * (signal * bh * weight);
        for (older, (ratio, weight)) in (1..order).zip(ratios.iter().zip(&weights)) {
            next = next - difference(Slot::Memory(older), weight / ratio);
        }
        if let (Some(target), Some(weight)) = (target, weights.last()) {
            next = next - difference(target, *weight);
        }
        next
    }
}

/// Weights of the differences: of the older samples, and with a corrector of the target too.
fn weights(ratios: &[f64], hh: f64, bh: f64, corrector: bool) -> Vec<f64> {
    let order = ratios.len();
    let unknowns = if corrector { order } else { order - 1 };
    match (corrector, order) {
        (false, 1) => return vec![],
        (false, 2) | (true, 1) => return vec![0.5],
        _ => {}
    }
    let mut term = hh.exp_m1() / hh - 1.0;
    let mut factorial = 1.0;
    let mut matrix = Vec::new();
    for i in 1..=unknowns {
        let mut row: Vec<f64> = ratios
            .iter()
            .take(unknowns)
            .map(|r| r.powi(i as i32 - 1))
            .collect();
        row.push(term * factorial / bh);
        matrix.push(row);
        factorial *= (i + 1) as f64;
        term = term / hh - 1.0 / factorial;
    }
    solve(matrix)
}

/// Gaussian elimination with pivoting; each row ends with its right-hand side. At most 3 × 3.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f64> {
    let n = rows.len();
    for column in 0..n {
        let pivot =
            (column..n).max_by(|a, b| rows[*a][column].abs().total_cmp(&rows[*b][column].abs()));
        rows.swap(column, pivot.unwrap_or(column));
        let lead = rows[column].clone();
        for (i, row) in rows.iter_mut().enumerate() {
            if i != column {
                let factor = row[column] / lead[column];
                row.iter_mut()
                    .zip(&lead)
                    .for_each(|(a, b)| *a -= factor * b);
            }
        }
    }
    (0..n).map(|i| rows[i][n] / rows[i][i]).collect()
}

impl Scheduler for UniPc {
    fn timesteps(&self) -> &[f64] {
        &self.path.timesteps
    }

    fn step(&self, at: Evaluation) -> Recipe {
        let Evaluation { index, .. } = at;
        let mut recipe = Recipe::default();
        let [signal, level] = self.path.parts(index);
        let [clean, _] = self.prediction.split(Slot::Output, signal, level);
        recipe.set(Slot::Clean, clean);
        if let (Some(done), Some(last)) = (at.done().checked_sub(1), index.checked_sub(1))
            && !self.uncorrected.contains(&last)
        {
            let order = self.order_at(last, done);
            let corrected = self.transfer(BEGIN, last, order, Some(Slot::Clean));
            recipe.set(Slot::Sample, corrected);
        }
        recipe.remember(Slot::Clean, at.done(), self.order);
        recipe.set(BEGIN, Slot::Sample);
        let order = self.order_at(index, at.done());
        recipe.set(
            Slot::Sample,
            self.transfer(Slot::Sample, index, order, None),
        );
        recipe
    }

    fn noising(&self, index: usize) -> [f64; 2] {
        self.path.parts(index)
    }
}
