//! The meaning of the operators in plain `f64` arithmetic, for tests and for checking results.
//!
//! Written for clarity, not for speed: every sum is taken in order, in `f64`, whatever the
//! element type of the input.

use half::{bf16, f16};
use ndarray::{Array, ArrayD, ArrayView, ArrayViewD, Dimension, Ix3, Ix4, IxDyn, s};

use crate::schema::{
    Dims, GridAxis, Layout, LinFusionAttentionAttrs, ShapeError, WindowAttentionAttrs, WindowDims,
};

/// An element that the reference can read and write.
pub trait ReferenceElement: Copy {
    /// The exact value.
    fn to_f64(self) -> f64;
    /// The nearest representable value.
    fn from_f64(value: f64) -> Self;
}

impl ReferenceElement for f32 {
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as Self
    }
}

impl ReferenceElement for f64 {
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
}

impl ReferenceElement for f16 {
    fn to_f64(self) -> f64 {
        Self::to_f64(self)
    }
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

impl ReferenceElement for bf16 {
    fn to_f64(self) -> f64 {
        Self::to_f64(self)
    }
    fn from_f64(value: f64) -> Self {
        Self::from_f64(value)
    }
}

/// φ(u) = elu(u) + 1: `u + 1` above zero, `exp(u)` otherwise.
pub fn feature_map(u: f64) -> f64 {
    if u > 0.0 { u + 1.0 } else { u.exp() }
}

/// The operator's output in `f64`, of shape [`Dims::out_shape`]; q, k and v as in
/// [`Dims::new`], any mix of element types.
///
/// # Errors
/// [`ShapeError`] when shapes and attributes don't fit together.
pub fn linfusion_attention<Q, K, V>(
    q: ArrayViewD<'_, Q>,
    k: ArrayViewD<'_, K>,
    v: ArrayViewD<'_, V>,
    attrs: &LinFusionAttentionAttrs,
) -> Result<ArrayD<f64>, ShapeError>
where
    Q: ReferenceElement,
    K: ReferenceElement,
    V: ReferenceElement,
{
    let dims = Dims::new(q.shape(), k.shape(), v.shape(), attrs)?;
    let q = by_head(q, &dims, dims.head_dim);
    let k = by_head(k, &dims, dims.head_dim);
    let v = by_head(v, &dims, dims.value_dim);
    let scale = 1.0 / dims.keys.max(1) as f64;

    let mut out = Array::<f64, Ix4>::zeros((dims.batch, dims.heads, dims.queries, dims.value_dim));
    for b in 0..dims.batch {
        for h in 0..dims.heads {
            let mut sums = Array::<f64, _>::zeros((dims.head_dim, dims.value_dim));
            let mut mean_key = vec![0.0; dims.head_dim];
            for m in 0..dims.keys {
                for (i, mean) in mean_key.iter_mut().enumerate() {
                    let feature = feature_map(k[[b, h, m, i]]);
                    *mean += feature * scale;
                    for j in 0..dims.value_dim {
                        sums[[i, j]] += feature * v[[b, h, m, j]] * scale;
                    }
                }
            }
            for n in 0..dims.queries {
                let features: Vec<f64> = (0..dims.head_dim)
                    .map(|i| feature_map(q[[b, h, n, i]]))
                    .collect();
                let norm: f64 = features.iter().zip(&mean_key).map(|(f, z)| f * z).sum();
                for j in 0..dims.value_dim {
                    let sum: f64 = features
                        .iter()
                        .enumerate()
                        .map(|(i, f)| f * sums[[i, j]])
                        .sum();
                    out[[b, h, n, j]] = sum / (norm + f64::from(attrs.eps));
                }
            }
        }
    }
    Ok(in_layout(out, &dims))
}

/// The output of `WindowAttention` in `f64`; q, k, v and the grid as in [`WindowDims::new`].
///
/// # Errors
/// [`ShapeError`] when shapes, grid and attributes don't fit together.
pub fn window_attention<Q, K, V>(
    q: ArrayViewD<'_, Q>,
    k: ArrayViewD<'_, K>,
    v: ArrayViewD<'_, V>,
    grid: [i64; 2],
    attrs: &WindowAttentionAttrs,
) -> Result<ArrayD<f64>, ShapeError>
where
    Q: ReferenceElement,
    K: ReferenceElement,
    V: ReferenceElement,
{
    let w = WindowDims::new(q.shape(), k.shape(), v.shape(), grid, attrs)?;
    let dims = Dims {
        layout: w.layout,
        batch: w.batch,
        heads: w.heads,
        queries: w.tokens(),
        keys: w.tokens(),
        head_dim: w.head_dim,
        value_dim: w.value_dim,
    };
    let scale = match attrs.scale.filter(|s| *s != 0.0) {
        Some(scale) => f64::from(scale),
        None => 1.0 / (w.head_dim as f64).sqrt(),
    };
    let q = by_head(q, &dims, dims.head_dim);
    let k = by_head(k, &dims, dims.head_dim);
    let v = by_head(v, &dims, dims.value_dim);
    let (image, text) = (w.image_start(attrs.text), w.text_start(attrs.text));
    let keys_of = |query: usize| -> Vec<usize> {
        if !(image..image + w.rows * w.cols).contains(&query) {
            return (0..w.tokens()).collect();
        }
        let (y, x) = ((query - image) / w.cols, (query - image) % w.cols);
        let mut keys: Vec<usize> = (text..text + w.text).collect();
        for row in attrs.key_range(GridAxis::Rows, y, w.rows) {
            for col in attrs.key_range(GridAxis::Cols, x, w.cols) {
                if attrs.reaches(row.abs_diff(y), col.abs_diff(x)) {
                    keys.push(image + row * w.cols + col);
                }
            }
        }
        keys
    };
    let mut out = Array::<f64, Ix4>::zeros((w.batch, w.heads, w.tokens(), w.value_dim));
    for n in 0..w.tokens() {
        let keys = keys_of(n);
        for b in 0..w.batch {
            for h in 0..w.heads {
                let (query, keys_here) = (q.slice(s![b, h, n, ..]), k.slice(s![b, h, .., ..]));
                let score = |&m: &usize| scale * query.dot(&keys_here.row(m));
                let scores: Vec<f64> = keys.iter().map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut row = out.slice_mut(s![b, h, n, ..]);
                for (&m, weight) in keys.iter().zip(&weights) {
                    row.scaled_add(weight / total, &v.slice(s![b, h, m, ..]));
                }
            }
        }
    }
    Ok(in_layout(out, &dims))
}

/// The input as `[B, H, rows, width]` in `f64`.
fn by_head<T: ReferenceElement>(
    x: ArrayViewD<'_, T>,
    dims: &Dims,
    width: usize,
) -> Array<f64, Ix4> {
    let rows = x.shape()[dims.layout.rank() - 2];
    let at = |b: usize, h: usize, n: usize, i: usize| match dims.layout {
        Layout::Packed => view::<_, Ix3>(&x)[[b, n, h * width + i]],
        Layout::Heads => view::<_, Ix4>(&x)[[b, h, n, i]],
    };
    Array::from_shape_fn((dims.batch, dims.heads, rows, width), |(b, h, n, i)| {
        at(b, h, n, i).to_f64()
    })
}

fn view<'a, T, D: Dimension>(x: &'a ArrayViewD<'_, T>) -> ArrayView<'a, T, D> {
    x.view()
        .into_dimensionality::<D>()
        .expect("Dims::new checked the rank")
}

fn in_layout(out: Array<f64, Ix4>, dims: &Dims) -> ArrayD<f64> {
    match dims.layout {
        Layout::Heads => out.into_dyn(),
        Layout::Packed => Array::from_shape_fn(IxDyn(&dims.out_shape()), |at| {
            let (b, n, column) = (at[0], at[1], at[2]);
            out[[b, column / dims.value_dim, n, column % dims.value_dim]]
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn one_head_by_hand() {
        // φ(q) = [1, 3], φ(k) = [[1, e^-1], [2, 1]], v = [[3], [5]].
        let q = array![[[0.0f32, 2.0]]].into_dyn();
        let k = array![[[0.0f32, -1.0], [1.0, 0.0]]].into_dyn();
        let v = array![[[3.0f32], [5.0]]].into_dyn();
        let attrs = LinFusionAttentionAttrs::new(1, Some(0.5)).unwrap();
        let out = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
        let e = f64::exp(-1.0);
        let sums = [(3.0 + 2.0 * 5.0) / 2.0, (3.0 * e + 5.0) / 2.0];
        let mean = [1.5, (e + 1.0) / 2.0];
        let expected = (sums[0] + 3.0 * sums[1]) / (mean[0] + 3.0 * mean[1] + 0.5);
        assert!((out[[0, 0, 0]] - expected).abs() < 1e-14);
    }

    #[test]
    fn no_keys_give_zeros() {
        let q = ArrayD::<f32>::ones(IxDyn(&[1, 2, 4]));
        let kv = ArrayD::<f32>::ones(IxDyn(&[1, 0, 4]));
        let attrs = LinFusionAttentionAttrs::new(2, None).unwrap();
        let out = linfusion_attention(q.view(), kv.view(), kv.view(), &attrs).unwrap();
        assert_eq!(out, ArrayD::<f64>::zeros(IxDyn(&[1, 2, 4])));
    }

    #[test]
    fn layouts_agree() {
        let packed = Array::from_shape_fn((2, 5, 6), |(b, n, c)| {
            ((b * 31 + n * 7 + c) % 11) as f64 / 5.0 - 1.0
        });
        let heads = Array::from_shape_fn((2, 3, 5, 2), |(b, h, n, i)| packed[[b, n, h * 2 + i]]);
        let attrs = LinFusionAttentionAttrs::new(3, None).unwrap();
        let (p, h) = (packed.into_dyn(), heads.into_dyn());
        let from_packed = linfusion_attention(p.view(), p.view(), p.view(), &attrs).unwrap();
        let from_heads = linfusion_attention(h.view(), h.view(), h.view(), &attrs).unwrap();
        for b in 0..2 {
            for n in 0..5 {
                for c in 0..6 {
                    assert_eq!(from_packed[[b, n, c]], from_heads[[b, c / 2, n, c % 2]]);
                }
            }
        }
    }
}
