//! What benchmarks have in common: numbers to feed, medians, and the machine's own matrix product.

use std::cell::Cell;

use crate::host::{Host, Session, Tensor};
use crate::models::{self, PRODUCT};

/// The matrix product of ONNX Runtime.
pub struct Product<'h> {
    session: Session<'h>,
    factors: [Tensor; 3],
    /// Seconds of the fastest run so far.
    fastest: Cell<f64>,
}

impl<'h> Product<'h> {
    pub fn new(host: &'h Host, threads: usize) -> Result<Self, String> {
        let shape = [1, PRODUCT as i64, PRODUCT as i64];
        let factor = |salt| host.tensor(&shape, numbers(PRODUCT * PRODUCT, salt));
        Ok(Self {
            session: host.session(&models::matrix_product(), threads)?,
            factors: [factor(0)?, factor(1)?, factor(2)?],
            fastest: Cell::new(f64::INFINITY),
        })
    }

    /// Runs it so many times.
    pub fn run(&self, runs: usize) -> Result<(), String> {
        for _ in 0..runs {
            let seconds = self.session.time(&self.factors.each_ref())?;
            self.fastest.set(self.fastest.get().min(seconds));
        }
        Ok(())
    }

    /// GFLOP/s of the fastest run so far: other work on the machine only adds time.
    pub fn best(&self) -> f64 {
        2.0 * (PRODUCT as f64).powi(3) / self.fastest.get() / 1e9
    }
}

/// The numbers of an environment variable, separated by commas.
pub fn list(variable: &str, default: &[usize]) -> Vec<usize> {
    match std::env::var(variable) {
        Ok(text) => text
            .split(',')
            .filter_map(|s| s.trim().parse().ok())
            .collect(),
        Err(_) => default.to_vec(),
    }
}

/// The same numbers at every run, from -2 to 2.
pub fn numbers(len: usize, salt: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i + salt).wrapping_mul(2_654_435_761) % 1000) as f32 / 250.0 - 2.0)
        .collect()
}

/// The median of at least one time.
pub fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
