//! What a site computed, against the references.

use std::collections::HashMap;

use linfusion_models::checkpoint::Checkpoint;
use linfusion_models::onnx::ElementType;
use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::reference::{linfusion_attention, window_attention};
use linfusion_ops::schema::DEFAULT_EPS;
use linfusion_runtime::engine::Engine;
use linfusion_runtime::tensor::Tensor;
use ndarray::{Array2, Array4, ArrayD, Axis};

use super::{Converted, Failure, VerifyError};
use crate::reference::Module;
use crate::rewrite::site::LinearPart;
use crate::rewrite::window::WindowPart;

/// One run of a site, to be judged.
pub(super) struct SiteRun<'a> {
    pub site: &'a Converted,
    pub engine: Engine,
    pub values: HashMap<String, Tensor>,
}

impl SiteRun<'_> {
    fn get(&self, name: &str) -> Result<ArrayD<f64>, Failure> {
        self.values
            .get(name)
            .map(Tensor::to_f64)
            .ok_or_else(|| Failure::CannotRun(format!("no output '{name}'")))
    }

    fn judge(&self, what: &'static str, error: f64, bound: f64) -> Result<f64, Failure> {
        // Written so that NaN fails.
        if error <= bound {
            return Ok(error);
        }
        Err(Failure::Wrong(Box::new(VerifyError::Numbers {
            module: self.site.module.clone(),
            what,
            error,
            bound,
            element: self.site.element.to_string(),
            engine: self.engine,
        })))
    }

    /// The LinFusion attention, and the layers around it.
    pub fn linear(
        &self,
        part: &LinearPart,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<f64, Failure> {
        let cannot = |e: String| Failure::CannotRun(e);
        let [q, k, v] = &part.qkv;
        let [q, k, v] = [self.get(q)?, self.get(k)?, self.get(v)?];
        let found = self.get(&part.attended)?;
        let attrs = LinFusionAttentionAttrs::new(part.heads, Some(DEFAULT_EPS))
            .map_err(|e| cannot(e.to_string()))?;
        let expected = linfusion_attention(q.view(), k.view(), v.view(), &attrs)
            .map_err(|e| cannot(e.to_string()))?;
        // fp32 accumulation over the tokens, then over a head's channels: the error of a sum of n terms of one sign
        // grows at most with n·u, in practice with its root; 8 leaves room for the
        // quotient of two sums. Features elu(x) + 1 are off by u themselves, which counts where they are small. Then one rounding
        // of the output, and of each of q, k and v: ONNX Runtime leaves casts to fp16 and back out, so that the attention may read
        // them unrounded. All of it is of the size of what is averaged, a channel of v; its averages can be far smaller.
        let apart = [&q, &k].map(|values| by_head(values, part.heads));
        let [Some(queries), Some(keys)] = &apart else {
            return Err(cannot(format!("q and k have no {} heads", part.heads)));
        };
        let (_, _, tokens, width) = keys.dim();
        let terms = (tokens + width) as f64;
        let (accumulate, round) = epsilons(self.site.element);
        let sums = 8.0 * terms.sqrt().max(4.0) + faintness(queries, keys);
        let bound = accumulate * sums + 4.0 * round;
        self.judge("the attention", of_averaged(&found, &expected, &v), bound)?;
        let error = relative(found.iter().zip(&expected));
        let (Some(checkpoint), Some(weights)) = (checkpoint, &part.weights) else {
            return Ok(error);
        };
        // The layers around the attention, against the checkpoint itself: they work
        // token by token, so some tokens tell.
        let module = Module::new(checkpoint, weights).map_err(|e| cannot(e.to_string()))?;
        let x = rows(&self.get(&part.tokens)?);
        let reference = module.project(x.view());
        // Up to a handful of layers, each rounding to the element type; weights were
        // rounded to it as well.
        let width = (x.ncols().max(1) as f64).sqrt();
        let bound = 8.0 * accumulate * width.max(4.0) + 16.0 * round;
        for (what, found, expected) in [
            ("q", &q, &reference.q),
            ("k", &k, &reference.k),
            ("v", &v, &reference.v),
        ] {
            // A hybrid site's checkpoint may leave a projection to the graph.
            if let Some(expected) = expected {
                self.judge(what, relative(rows(found).iter().zip(expected)), bound)?;
            }
        }
        if let Some((value, bias)) = &part.projected
            && let Some(expected) = module.out(rows(&found).view(), *bias)
        {
            let found = rows(&self.get(value)?);
            let error = relative(found.iter().zip(&expected));
            self.judge("the out projection", error, bound)?;
        }
        Ok(error)
    }

    /// The window attention, and the sum with the linear branch.
    pub fn window(&self, part: &WindowPart) -> Result<f64, Failure> {
        let [q, k, v] = &part.qkv;
        let [q, k, v] = [self.get(q)?, self.get(k)?, self.get(v)?];
        let found = self.get(&part.attended)?;
        let grid = [part.size.rows, part.size.cols];
        let expected = window_attention(q.view(), k.view(), v.view(), grid, &part.attrs)
            .map_err(|e| Failure::CannotRun(e.to_string()))?;
        // A weight exp(s − max) is off by what the scores are: products of D terms, of
        // noise below 16, of q and k that may be read unrounded as above. Then a quotient of
        // sums over the keys, and one rounding.
        let (accumulate, round) = epsilons(self.site.element);
        let terms = q.shape().get(1).copied().unwrap_or(1).max(1) as f64;
        let bound = 8.0 * accumulate * (terms.sqrt().max(4.0) + 16.0) + 16.0 * round;
        let error = relative(found.iter().zip(&expected));
        let mut error = self.judge("the window attention", error, bound)?;
        if let Some(mixed) = &part.mixed {
            let (near, far) = (self.get(&mixed.window)?, self.get(&mixed.linear)?);
            let width = near.shape().last().copied().unwrap_or(1).max(1);
            let channels = (width / mixed.local.len().max(1)).max(1);
            let scale = |heads: &[f64], i: usize| {
                heads.get(i % width / channels).copied().unwrap_or(f64::NAN)
            };
            let expected: Vec<f64> = near
                .iter()
                .zip(&far)
                .enumerate()
                .map(|(i, (near, far))| {
                    scale(&mixed.local, i) * near + scale(&mixed.global, i) * far
                })
                .collect();
            let value = self.get(&mixed.value)?;
            // Two factors, two products and a sum, each rounded.
            let sum = relative(value.iter().zip(&expected));
            error = error.max(self.judge(
                "the sum of the branches",
                sum,
                4.0 * (accumulate + round),
            )?);
        }
        Ok(error)
    }
}

/// Unit roundoff of sums (fp32, or fp64 in a graph of that) and of a stored value.
fn epsilons(element: ElementType) -> (f64, f64) {
    match element {
        ElementType::F64 => (f64::EPSILON, 0.0),
        ElementType::F16 => (f64::from(f32::EPSILON), half::f16::EPSILON.to_f64()),
        ElementType::Bf16 => (f64::from(f32::EPSILON), half::bf16::EPSILON.to_f64()),
        _ => (f64::from(f32::EPSILON), 0.0),
    }
}

/// `[B, N, H·D]` or `[B, H, N, D]` as the latter.
fn by_head(values: &ArrayD<f64>, heads: i64) -> Option<Array4<f64>> {
    let heads = usize::try_from(heads).ok().filter(|heads| *heads > 0)?;
    match *values.shape() {
        [batch, tokens, width] => {
            let sizes = (batch, tokens, heads, width / heads);
            let apart = values.to_shape(sizes).ok()?;
            Some(apart.permuted_axes([0, 2, 1, 3]).to_owned())
        }
        _ => values.clone().into_dimensionality().ok(),
    }
}

/// How much an error of one in every feature φ(q) and φ(k) can move the attention's output, as a share of what it averages: the
/// largest Σ(φ(q) + mean φ(k)) / φ(q)·mean φ(k) of a token and head.
fn faintness(q: &Array4<f64>, k: &Array4<f64>) -> f64 {
    let features = |x: f64| if x > 0.0 { x + 1.0 } else { x.exp() };
    let mut worst = 0.0_f64;
    let Some(keys) = k.mapv(features).mean_axis(Axis(2)) else {
        return worst;
    };
    for (q, keys) in q.outer_iter().zip(keys.outer_iter()) {
        for (q, keys) in q.outer_iter().zip(keys.outer_iter()) {
            for row in q.outer_iter() {
                let row = row.mapv(features);
                let norm = row.dot(&keys) + f64::from(DEFAULT_EPS);
                worst = worst.max((row.sum() + keys.sum()) / norm);
            }
        }
    }
    worst
}

/// The largest difference over the largest magnitude of the averaged `values` in its channel: all are `[…, N, C]`, and each
/// channel of the outputs is a mean of the same channel over the tokens. NaN if any is.
fn of_averaged(found: &ArrayD<f64>, expected: &ArrayD<f64>, values: &ArrayD<f64>) -> f64 {
    let Some(tokens) = values.ndim().checked_sub(2).map(Axis) else {
        return f64::NAN;
    };
    if found.shape() != expected.shape() || found.ndim() != values.ndim() {
        return f64::NAN;
    }
    let largest = values.map_axis(tokens, |channel| {
        channel
            .iter()
            .fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()))
    });
    let rows = found.axis_iter(tokens).zip(expected.axis_iter(tokens));
    let mut worst = 0.0_f64;
    for (found, expected) in rows {
        for ((found, expected), largest) in found.iter().zip(&expected).zip(&largest) {
            let error = (found - expected).abs() / largest;
            if error.is_nan() {
                return error;
            }
            worst = worst.max(error);
        }
    }
    worst
}

/// The largest difference over the largest expected magnitude; NaN if any is.
fn relative<'a>(pairs: impl Iterator<Item = (&'a f64, &'a f64)>) -> f64 {
    let (mut error, mut largest) = (0.0f64, f64::MIN_POSITIVE);
    for (found, expected) in pairs {
        let difference = (found - expected).abs();
        if difference.is_nan() {
            return f64::NAN;
        }
        error = error.max(difference);
        largest = largest.max(expected.abs());
    }
    error / largest
}

/// Some rows of `[B, N, C]`, from all over it.
fn rows(value: &ArrayD<f64>) -> Array2<f64> {
    const ROWS: usize = 48;
    let width = value.shape().last().copied().unwrap_or(1).max(1);
    let total = value.len() / width;
    let step = total.div_ceil(ROWS).max(1);
    let picked = (0..total).step_by(step).flat_map(|row| {
        let start = row * width;
        start..start + width
    });
    // Outputs of a session are contiguous.
    let flat: Vec<f64> = value.iter().copied().collect();
    let values: Vec<f64> = picked.filter_map(|i| flat.get(i).copied()).collect();
    Array2::from_shape_vec((values.len() / width, width), values).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use ndarray::IxDyn;

    use super::*;

    #[test]
    fn small_features_are_the_more_uncertain() {
        // φ = 1 for both: an error of one in each of two features moves half of each side.
        let zeros = Array4::zeros((1, 2, 3, 4));
        let eps = f64::from(DEFAULT_EPS);
        assert_eq!(faintness(&zeros, &zeros), 8.0 / (4.0 + eps));
        let small = Array4::from_elem((1, 2, 3, 4), -3.0);
        let expected = 4.0 * (1.0 + (-3.0_f64).exp()) / (4.0 * (-3.0_f64).exp() + eps);
        assert!((faintness(&small, &zeros) / expected - 1.0).abs() < 1e-12);
        let packed = ArrayD::from_shape_fn(IxDyn(&[1, 3, 8]), |i| i[2] as f64);
        let apart = by_head(&packed, 2).unwrap();
        assert_eq!(apart[[0, 1, 2, 3]], 7.0);
    }

    #[test]
    fn an_error_counts_by_what_its_channel_averages() {
        let array = |values: Vec<f64>| ArrayD::from_shape_vec(IxDyn(&[1, 2, 2]), values).unwrap();
        // Averages of the first channel cancel, the second is small itself.
        let values = array(vec![8.0, 0.5, -8.0, 0.5]);
        let expected = array(vec![0.0, 0.5, 0.0, 0.5]);
        let off =
            |by: [f64; 4]| of_averaged(&(&expected + &array(by.to_vec())), &expected, &values);
        assert_eq!(off([0.0, 0.0, 0.25, 0.0]), 0.25 / 8.0);
        assert_eq!(off([0.0, 0.0, 0.0, 0.25]), 0.5);
        assert!(off([0.0, f64::NAN, 0.0, 0.0]).is_nan());
        assert_eq!(off([0.0; 4]), 0.0);
    }
}
