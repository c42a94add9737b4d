//! UniPC (Zhao et al. 2023), multistep with its corrector, on predictions of the clean sample.

use std::collections::VecDeque;

use super::fields::{Fields, SchedulerError};
use super::path::Path;
use super::schedule::{Prediction, mix};
use super::{Run, Scheduler};

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
    /// Clean samples, the newest first.
    history: VecDeque<Vec<f32>>,
    /// The sample before the last step and the order of that step.
    last: Option<(Vec<f32>, usize)>,
    steps_done: usize,
}

impl UniPc {
    pub(super) fn new(fields: &mut Fields, run: &Run) -> Result<Self, SchedulerError> {
        let order = fields.count("solver_order", 2)?;
        if !(1..=3).contains(&order) {
            return Err(SchedulerError::Field {
                field: "solver_order".to_owned(),
                found: order.to_string(),
                expected: "1 to 3".to_owned(),
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
            history: VecDeque::new(),
            last: None,
            steps_done: 0,
        })
    }

    /// Moves `x` from step `from` to the next, with the clean samples from `history` on and, for the corrector, that of
    /// the target.
    fn transfer(
        &self,
        x: &mut [f32],
        from: usize,
        order: usize,
        history: &[&Vec<f32>],
        target: Option<&[f32]>,
    ) {
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
        let Some(newest) = history.first() else {
            return;
        };
        let keep = (noise / noise_before) as f32;
        let base = (-signal * phi) as f32;
        for (i, x) in x.iter_mut().enumerate() {
            let m0 = newest[i];
            let mut sum = 0.0_f64;
            let older = history.iter().take(order).skip(1);
            for ((older, ratio), weight) in older.zip(&ratios).zip(&weights) {
                sum += weight * f64::from(older[i] - m0) / ratio;
            }
            if let (Some(target), Some(weight)) = (target, weights.last()) {
                sum += weight * f64::from(target[i] - m0);
            }
            *x = keep * *x + base * m0;
            if sum != 0.0 {
                *x -= (signal * bh * sum) as f32;
            }
        }
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

    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    fn scale_model_input(&self, _: &mut [f32], _: usize) {}

    fn begin(&mut self, _: usize) {
        self.history.clear();
        self.last = None;
        self.steps_done = 0;
    }

    fn step(
        &mut self,
        model_output: &[f32],
        index: usize,
        sample: &mut [f32],
        _: &mut dyn FnMut(usize) -> Vec<f32>,
    ) {
        let clean = self
            .path
            .clean(self.prediction, model_output, sample, index);
        let corrected = index > 0 && !self.uncorrected.contains(&(index - 1));
        if let (true, Some((last, order))) = (corrected, self.last.take()) {
            sample.copy_from_slice(&last);
            let history: Vec<&Vec<f32>> = self.history.iter().collect();
            self.transfer(sample, index - 1, order, &history, Some(&clean));
        }
        self.history.push_front(clean);
        self.history.truncate(self.order);
        let left = self.path.timesteps.len().saturating_sub(index);
        let most = if self.lower_order_final {
            self.order.min(left)
        } else {
            self.order
        };
        let order = most.min(self.steps_done + 1).max(1);
        self.last = Some((sample.to_vec(), order));
        let history: Vec<&Vec<f32>> = self.history.iter().collect();
        self.transfer(sample, index, order, &history, None);
        self.steps_done = (self.steps_done + 1).min(self.order);
    }

    fn add_noise(&self, original: &mut [f32], noise: &[f32], index: usize) {
        let [signal, level] = self.path.parts(index);
        mix(original, noise, signal, level);
    }

    fn predicted_original(&self) -> Option<&[f32]> {
        self.history.front().map(Vec::as_slice)
    }
}
