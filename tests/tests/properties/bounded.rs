//! LinFusion attention in f64, with a bound on how far rounding can take a
//! computation in a narrower type away from it.
//!
//! The standard model of floating-point arithmetic (Higham, *Accuracy and Stability
//! of Numerical Algorithms*, section 2.2): each operation is off by at most a factor
//! 1 ± u, so a sum of n products by n·u times the sum of their absolute values.
//! Bounds are carried along with the values, to first order.

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, concatenate, s};

/// Values, and how far off each can be.
#[derive(Clone)]
pub struct Bounded {
    pub value: Array2<f64>,
    pub error: Array2<f64>,
}

/// Roundings that an engine may make besides those of the formula: stores between
/// nodes, an `exp` that is some units off, a sum taken in parts.
const MORE: f64 = 8.0;

impl Bounded {
    /// Values that are given as they are.
    pub fn exact(value: Array2<f64>) -> Self {
        let error = Array2::zeros(value.dim());
        Bounded { value, error }
    }

    /// Values that were rounded before.
    pub fn with_error(value: Array2<f64>, error: Array2<f64>) -> Self {
        Bounded { value, error }
    }

    /// The sum; `other` may be one row for all.
    pub fn plus(&self, other: &Bounded, u: f64) -> Self {
        let value = &self.value + &other.value;
        let error = &self.error + &other.error + value.mapv(|v| u * v.abs());
        Bounded::with_error(value, error)
    }

    /// Each column times an element of the row `other`.
    pub fn scaled(&self, other: &Bounded, u: f64) -> Self {
        let value = &self.value * &other.value;
        let error = &self.error * &other.value.mapv(f64::abs)
            + self.value.mapv(f64::abs) * &other.error
            + &self.error * &other.error
            + value.mapv(|v| u * v.abs());
        Bounded::with_error(value, error)
    }

    /// LeakyReLU of slope 0.01.
    pub fn leaky(&self, u: f64) -> Self {
        let value = self.value.mapv(|v| if v < 0.0 { 0.01 * v } else { v });
        let error = &self.error + &value.mapv(|v| 2.0 * u * v.abs());
        Bounded::with_error(value, error)
    }

    /// Each row less its mean, by its standard deviation (LayerNorm, eps 1e-5).
    pub fn normalised(&self, u: f64) -> Self {
        let (mut value, mut error) = (self.value.clone(), self.error.clone());
        for (mut values, mut errors) in value.rows_mut().into_iter().zip(error.rows_mut()) {
            let n = values.len() as f64;
            let sums = (n + MORE) * u;
            let size = values.iter().map(|v| v.abs()).sum::<f64>() / n;
            let mean = values.sum() / n;
            let mean_error = errors.sum() / n + sums * size;
            values.mapv_inplace(|v| v - mean);
            Zip::from(&values)
                .and(&mut errors)
                .for_each(|v, e| *e += mean_error + u * v.abs());
            let variance = values.iter().map(|v| v * v).sum::<f64>() / n;
            let moved = values
                .iter()
                .zip(&errors)
                .map(|(v, e)| 2.0 * v.abs() * e + e * e);
            // Engines may also take the mean of the squares less the squared mean.
            let variance_error =
                moved.sum::<f64>() / n + sums * (variance + mean * mean + size * size);
            let below = variance + f64::from(1e-5_f32);
            let relative = variance_error / below;
            // 1/√(1 - r) - 1 is no more than r where r is at most one half.
            let relative = if relative < 0.5 {
                relative
            } else {
                f64::INFINITY
            };
            let scale = below.sqrt().recip();
            Zip::from(&mut values).and(&mut errors).for_each(|v, e| {
                *v *= scale;
                *e = *e * scale * (1.0 + relative) + v.abs() * (relative + MORE * u);
            });
        }
        Bounded::with_error(value, error)
    }

    /// `self · weight + bias` in arithmetic of unit roundoff `u`.
    pub fn linear(&self, weight: ArrayView2<'_, f64>, bias: Option<&Array1<f64>>, u: f64) -> Self {
        let product = self.times(&Bounded::exact(weight.to_owned()), u);
        match bias {
            Some(bias) => {
                let value = &product.value + bias;
                let error = &product.error + &value.mapv(|v| u * v.abs());
                Bounded::with_error(value, error)
            }
            None => product,
        }
    }

    /// The matrix product in arithmetic of unit roundoff `u`.
    pub fn times(&self, other: &Bounded, u: f64) -> Self {
        let absolute = |m: &Array2<f64>| m.mapv(f64::abs);
        let terms = self.value.ncols() as f64 + MORE;
        let error = absolute(&self.value).dot(&other.error)
            + self.error.dot(&absolute(&other.value))
            + self.error.dot(&other.error)
            + absolute(&self.value).dot(&absolute(&other.value)) * (terms * u);
        Bounded::with_error(self.value.dot(&other.value), error)
    }

    /// elu(x) + 1, whose slope is at most 1; the sum with 1 is rounded.
    fn features(&self, u: f64) -> Self {
        let value = self.value.mapv(linfusion_ops::reference::feature_map);
        let error = &self.error + &value.mapv(|v| MORE * u * (1.0 + v));
        Bounded::with_error(value, error)
    }

    /// Attention of `heads` heads over `batch` sequences, rows being batch·tokens.
    pub fn attention(qkv: [&Bounded; 3], batch: usize, heads: usize, u: f64) -> Self {
        let eps = f64::from(linfusion_ops::schema::DEFAULT_EPS);
        let tokens = qkv[0].value.nrows() / batch;
        let part = |m: &Bounded, b: usize, h: usize| {
            let columns = m.value.ncols() / heads;
            let window = s![b * tokens..(b + 1) * tokens, h * columns..(h + 1) * columns];
            Bounded::with_error(
                m.value.slice(window).to_owned(),
                m.error.slice(window).to_owned(),
            )
        };
        let mut sequences = Vec::new();
        for b in 0..batch {
            let mut of_heads = Vec::new();
            for h in 0..heads {
                let [q, k, v] = qkv.map(|m| part(m, b, h));
                let (q, k) = (q.features(u), k.features(u));
                let share = 1.0 / tokens as f64;
                let turned = Bounded::with_error(
                    k.value.t().to_owned() * share,
                    k.error.t().to_owned() * share,
                );
                let ones = Bounded::exact(Array2::ones((tokens, 1)));
                let sums = q.times(&turned.times(&v, u), u);
                let norm = q.times(&turned.times(&ones, u), u);
                of_heads.push(sums.over(&norm, eps, u));
            }
            sequences.push(join(&of_heads, Axis(1)));
        }
        join(&sequences, Axis(0))
    }

    /// `self / (norm + eps)`, norm being one column.
    fn over(&self, norm: &Bounded, eps: f64, u: f64) -> Self {
        let (mut value, mut error) = (self.value.clone(), self.error.clone());
        for (i, (mut values, mut errors)) in value
            .rows_mut()
            .into_iter()
            .zip(error.rows_mut())
            .enumerate()
        {
            let below = norm.value[[i, 0]] + eps;
            let relative = norm.error[[i, 0]] / below;
            Zip::from(&mut values).and(&mut errors).for_each(|v, e| {
                *v /= below;
                if relative >= 0.5 {
                    *e = f64::INFINITY;
                    return;
                }
                *e = (*e / below + v.abs() * relative) / (1.0 - relative) + MORE * u * v.abs();
            });
        }
        Bounded::with_error(value, error)
    }

    /// The first element of `found` that is further off than it can be.
    pub fn refuse(&self, found: &Array2<f64>) -> Result<(), String> {
        assert_eq!(self.value.dim(), found.dim());
        for (((at, expected), error), found) in
            self.value.indexed_iter().zip(&self.error).zip(found)
        {
            let apart = (expected - found).abs();
            if apart.is_nan() || apart > *error {
                return Err(format!(
                    "at {at:?}: {found}, not {expected} ± {error:e}; {apart:e} apart"
                ));
            }
        }
        Ok(())
    }
}

fn join(parts: &[Bounded], axis: Axis) -> Bounded {
    let all = |of: fn(&Bounded) -> ArrayView2<'_, f64>| {
        let views: Vec<_> = parts.iter().map(of).collect();
        concatenate(axis, &views).expect("parts have equal shapes")
    };
    Bounded::with_error(all(|p| p.value.view()), all(|p| p.error.view()))
}
