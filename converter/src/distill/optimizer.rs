//! What takes the steps of learning: AdamW, and for matrices Muon where it pays.
//!
//! Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal one, so that a step moves all its
//! singular directions alike, the weak ones too. At the sites measured (`docs/distill.md`) it halves what AdamW leaves
//! unexplained after as many steps.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};

use super::fused::product;

/// The weights of one student with what their steps depend on.
pub(super) struct Optimizer {
    adam: AdamW,
    matrices: Vec<Matrix>,
}

struct Matrix {
    var: Var,
    momentum: Tensor,
}

/// Muon's step, in AdamW's learning rates: that of a matrix is the size of what it adds in each singular direction.
const RATE: f64 = 8.0;
const MOMENTUM: f64 = 0.95;

impl Optimizer {
    /// For `vars`, each step of which sees `rows` tokens.
    pub fn new(vars: Vec<Var>, rows: usize) -> Result<Self> {
        let (matrices, others): (Vec<Var>, Vec<Var>) =
            vars.into_iter().partition(|var| pays(var, rows));
        let matrices = matrices.into_iter().map(|var| {
            Ok(Matrix {
                momentum: var.zeros_like()?,
                var,
            })
        });
        Ok(Self {
            adam: AdamW::new(others, ParamsAdamW::default())?,
            matrices: matrices.collect::<Result<_>>()?,
        })
    }

    /// A step down the gradients of `loss` at AdamW's learning rate `rate`.
    pub fn step(&mut self, loss: &Tensor, rate: f64) -> Result<()> {
        let gradients = loss.backward()?;
        self.adam.set_learning_rate(rate);
        self.adam.step(&gradients)?;
        for matrix in &mut self.matrices {
            matrix.step(&gradients, rate * RATE)?;
        }
        Ok(())
    }
}

/// Whether orthogonalizing costs no more than twice what the matrix's own part of the gradients does: with n ≤ m, 9 products
/// of n × n with n × m are 18 n² m operations, and forward and backward take 6 · rows · n · m.
fn pays(var: &Var, rows: usize) -> bool {
    match var.dims() {
        [a, b] => 3 * a.min(b) <= 2 * rows,
        _ => false,
    }
}

impl Matrix {
    fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        let Some(gradient) = gradients.get(&self.var) else {
            return Ok(());
        };
        // Detached: each would hold on to the graph that it was computed by.
        let gradient = gradient.detach();
        self.momentum = ((&self.momentum * MOMENTUM)? + &gradient)?.detach();
        let direction = orthogonal(&(gradient + (&self.momentum * MOMENTUM)?)?)?;
        let (rows, columns) = self.var.dims2()?;
        let scale = (rows as f64 / columns as f64).max(1.0).sqrt();
        let moved = (self.var.as_tensor().detach() - (direction * (rate * scale))?)?;
        self.var.set(&moved)
    }
}

/// About U·Vᵀ of the decomposition U·Σ·Vᵀ of `matrix` (zeros for zeros), by Jordan's quintic Newton-Schulz iteration, whose
/// coefficients bring singular values to between 0.7 and 1.2 quickly instead of to 1. Three rounds serve as well as
/// his five here.
fn orthogonal(matrix: &Tensor) -> Result<Tensor> {
    const ROUNDS: usize = 3;
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let (rows, columns) = matrix.dims2()?;
    let tall = rows > columns;
    // Squares of small gradients would vanish.
    let largest = f64::from(matrix.abs()?.max_all()?.to_scalar::<f32>()?);
    if largest <= f64::from(f32::MIN_POSITIVE) {
        return matrix.zeros_like();
    }
    let scaled = (matrix * (1.0 / largest))?;
    let norm = f64::from(scaled.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    let mut x = (scaled * (1.0 / norm))?;
    if tall {
        x = x.t()?.contiguous()?;
    }
    for _ in 0..ROUNDS {
        let square = product(&x, &x)?;
        // It is its own transpose.
        let mix = ((&square * B)? + (product(&square, &square)? * C)?)?;
        x = ((&x * A)? + product(&mix, &x.t()?)?)?;
    }
    match tall {
        true => x.t()?.contiguous(),
        false => Ok(x),
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use linfusion_models::random::SplitMix64;

    use super::*;

    fn random(rows: usize, columns: usize) -> Tensor {
        let mut random = SplitMix64::new(1);
        let values: Vec<f32> = (0..rows * columns)
            .map(|_| random.normal() as f32)
            .collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    #[test]
    fn directions_get_their_size_whatever_the_gradients() {
        for (rows, columns) in [(4, 16), (16, 4)] {
            let short = orthogonal(&random(rows, columns)).unwrap();
            let short = if rows > columns {
                short.t().unwrap()
            } else {
                short
            };
            let square = short.matmul(&short.t().unwrap()).unwrap();
            let square = square.to_vec2::<f32>().unwrap();
            for (i, row) in square.iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    // Singular values within 0.5 … 1.3: 4 random rows of 16 are far from parallel.
                    let (low, high) = if i == j { (0.25, 1.7) } else { (-0.6, 0.6) };
                    assert!((low..high).contains(value), "{i} {j} {value}");
                }
            }
        }
        let close = |scale: f64| {
            let small = orthogonal(&(random(4, 16) * scale).unwrap()).unwrap();
            let difference = (small - orthogonal(&random(4, 16)).unwrap()).unwrap();
            difference
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap()
                < 1e-4
        };
        assert!(close(1e-30) && close(1e30));
        let zero = orthogonal(&random(3, 3).zeros_like().unwrap()).unwrap();
        assert_eq!(
            zero.sqr()
                .unwrap()
                .sum_all()
                .unwrap()
                .to_scalar::<f32>()
                .unwrap(),
            0.0
        );
    }

    /// Steps until ‖W·X − T‖² has fallen to a thousandth, where the columns of X differ in size.
    fn steps(rows: usize) -> Option<usize> {
        let scales: Vec<f32> = (0..8).map(|i| 0.5_f32.powi(i)).collect();
        let scales = Tensor::from_vec(scales, (8, 1), &Device::Cpu).unwrap();
        let x = random(8, 64).broadcast_mul(&scales).unwrap();
        let target = random(8, 8).matmul(&x).unwrap();
        let weight = Var::zeros((8, 8), DType::F32, &Device::Cpu).unwrap();
        let mut optimizer = Optimizer::new(vec![weight.clone()], rows).unwrap();
        let loss = || {
            let out = weight.as_tensor().matmul(&x).unwrap();
            (out - &target).unwrap().sqr().unwrap().sum_all().unwrap()
        };
        let value = |loss: &Tensor| loss.to_scalar::<f32>().unwrap();
        let first = value(&loss());
        (0..400).find(|_| {
            let now = loss();
            optimizer.step(&now, 0.005).unwrap();
            value(&now) < 1e-3 * first
        })
    }

    #[test]
    fn matrices_of_enough_rows_are_learned_in_fewer_steps() {
        let muon = steps(12).unwrap();
        let adam = steps(11);
        assert!(adam.is_none_or(|adam| adam > 2 * muon), "{muon} {adam:?}");
    }
}
