//! Steps of the student in one pass over memory each, with their gradients. On a processor they take a third of the time
//! of the same written in candle's operations, whose gradients walk memory many times; elsewhere those are used.

mod attention;
mod layer;
mod rows;

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};
use ndarray::{ArrayView, Dimension};

pub(super) use self::attention::Cut;
use self::attention::{Attend, State};
use self::layer::{Linear, Product};
use self::rows::{Features, Hidden, SquaredError};

/// φ(u) = elu(u) + 1.
pub(super) fn features(u: &Tensor) -> Result<Tensor> {
    match u.device().is_cpu() {
        true => u.apply_op1(Features),
        false => composed::features(u),
    }
}

/// `rows` `[R, I]` · `weight` `[O, I]`ᵀ, with `bias` `[O]` added to each row where there is one.
pub(super) fn linear(rows: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    match (rows.device().is_cpu(), bias) {
        (true, Some(bias)) => rows.apply_op3(weight, bias, Linear),
        (true, None) => rows.apply_op2(weight, Product),
        (false, bias) => composed::linear(rows, weight, bias),
    }
}

/// a · bᵀ of two matrices; nothing is differentiated.
pub(super) fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match a.device().is_cpu() {
        true => a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &Product),
        false => a.matmul(&b.t()?),
    }
}

/// Σ φ(k)ᵀ [v, 1] over the tokens of each sample, `[samples, heads, D, D + 1]`, of `k`, which is φ(k), and `v`.
pub(super) fn state(k: &Tensor, v: &Tensor, cut: Cut) -> Result<Tensor> {
    match k.device().is_cpu() {
        true => k.apply_op2(v, State(cut)),
        false => composed::state(k, v, cut),
    }
}

/// φ(q)·S / (φ(q)·s + eps) of `q`, which is φ(q), and `state`, [S, s] of each sample and head.
pub(super) fn attend(q: &Tensor, state: &Tensor, cut: Cut, eps: f32) -> Result<Tensor> {
    match q.device().is_cpu() {
        true => q.apply_op2(&state.contiguous()?, Attend { cut, eps }),
        false => composed::attend(q, state, cut, eps),
    }
}

/// Σ (out − target)², of which `target` is no part that is learned.
pub(super) fn squared_error(out: &Tensor, target: &Tensor) -> Result<Tensor> {
    match out.device().is_cpu() {
        true => out.apply_op2(&target.contiguous()?, SquaredError),
        false => composed::squared_error(out, target),
    }
}

/// LeakyReLU(LayerNorm(rows) ⊙ weight + bias) of `rows` `[R, M]`.
pub(super) fn hidden(rows: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
    match rows.device().is_cpu() {
        true => rows.apply_op3(weight, bias, Hidden),
        false => composed::hidden(rows, weight, bias),
    }
}

/// The same in candle's operations.
mod composed {
    use candle_core::{D, DType, Result, Tensor};

    use super::{Cut, NORM_EPS, SLOPE};

    pub fn features(u: &Tensor) -> Result<Tensor> {
        u.elu(1.0)? + 1.0
    }

    pub fn linear(rows: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let y = rows.matmul(&weight.t()?)?;
        match bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }

    pub fn state(k: &Tensor, v: &Tensor, cut: Cut) -> Result<Tensor> {
        let (k, v) = (heads(k, cut)?, heads(v, cut)?);
        let (samples, heads, tokens, _) = v.dims4()?;
        let ones = Tensor::ones((samples, heads, tokens, 1), DType::F32, v.device())?;
        k.transpose(2, 3)?
            .contiguous()?
            .matmul(&Tensor::cat(&[&v, &ones], D::Minus1)?)
    }

    pub fn attend(q: &Tensor, state: &Tensor, cut: Cut, eps: f32) -> Result<Tensor> {
        let (rows, dim) = q.dims2()?;
        let width = dim / cut.heads;
        let both = heads(q, cut)?.matmul(state)?;
        let norm = (both.narrow(D::Minus1, width, 1)? + f64::from(eps))?;
        let out = both.narrow(D::Minus1, 0, width)?.broadcast_div(&norm)?;
        out.transpose(1, 2)?.reshape((rows, dim))
    }

    pub fn squared_error(out: &Tensor, target: &Tensor) -> Result<Tensor> {
        (out - target)?.sqr()?.sum_all()
    }

    /// `[samples, heads, N, D]` of `[samples · N, heads · D]`.
    fn heads(rows: &Tensor, cut: Cut) -> Result<Tensor> {
        let (count, dim) = rows.dims2()?;
        let tokens = count / cut.samples;
        rows.reshape((cut.samples, tokens, cut.heads, dim / cut.heads))?
            .transpose(1, 2)?
            .contiguous()
    }

    pub fn hidden(rows: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let centred = rows.broadcast_sub(&rows.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normal = centred.broadcast_div(&(variance + f64::from(NORM_EPS))?.sqrt()?)?;
        let scaled = normal.broadcast_mul(weight)?.broadcast_add(bias)?;
        scaled.maximum(&(&scaled * f64::from(SLOPE))?)
    }
}

const NORM_EPS: f32 = 1e-5;
const SLOPE: f32 = 0.01;

/// The values of a contiguous tensor of f32.
fn values<'s>(storage: &'s CpuStorage, layout: &Layout) -> Result<&'s [f32]> {
    let CpuStorage::F32(values) = storage else {
        return Err(Error::Msg("only f32 is learned".to_owned()));
    };
    layout
        .contiguous_offsets()
        .and_then(|(start, end)| values.get(start..end))
        .ok_or_else(|| Error::Msg("a tensor is not contiguous".to_owned()))
}

/// `values` as an array of so many elements, neither more nor fewer.
fn view<D: Dimension>(values: &[f32], shape: D) -> Result<ArrayView<'_, f32, D>> {
    if values.len() != shape.size() {
        return Err(Error::Msg(format!(
            "{} elements are not {:?}",
            values.len(),
            shape.slice()
        )));
    }
    ArrayView::from_shape(shape, values).map_err(Error::wrap)
}

/// Runs `work` on the values of tensors, which are made contiguous.
fn with<R, const N: usize>(
    tensors: [&Tensor; N],
    work: impl FnOnce([&[f32]; N]) -> R,
) -> Result<R> {
    let mut whole = Vec::with_capacity(N);
    for tensor in tensors {
        whole.push(tensor.contiguous()?);
    }
    let guards: Vec<_> = whole.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        let Storage::Cpu(storage) = &**storage else {
            return Err(Error::Msg(
                "a tensor is not in the processor's memory".to_owned(),
            ));
        };
        *slice = values(storage, layout)?;
    }
    Ok(work(slices))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use linfusion_models::random::SplitMix64;

    use super::*;

    fn var(random: &mut SplitMix64, dims: &[usize]) -> Var {
        let count = dims.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| 2.0 * random.symmetric() as f32)
            .collect();
        Var::from_tensor(&Tensor::from_vec(values, dims, &Device::Cpu).unwrap()).unwrap()
    }

    const CUT: Cut = Cut {
        samples: 2,
        heads: 3,
    };

    /// A step and the same in candle's operations.
    type Step = fn(&[Var; 3]) -> Result<Tensor>;

    #[test]
    fn outputs_and_gradients_are_those_of_the_library() {
        let rows: [&[usize]; 3] = [&[8, 6], &[6], &[6]];
        let layer: [&[usize]; 3] = [&[8, 6], &[5, 6], &[5]];
        let tokens: [&[usize]; 3] = [&[8, 6], &[8, 6], &[1]];
        let states: [&[usize]; 3] = [&[8, 6], &[2, 3, 2, 3], &[1]];
        let steps: [(&str, [&[usize]; 3], Step, Step); 7] = [
            (
                "features",
                rows,
                |[u, ..]| features(u),
                |[u, ..]| composed::features(u),
            ),
            (
                "hidden",
                rows,
                |[h, w, b]| hidden(h, w, b),
                |[h, w, b]| composed::hidden(h, w, b),
            ),
            (
                "linear",
                layer,
                |[x, w, b]| linear(x, w, Some(b)),
                |[x, w, b]| composed::linear(x, w, Some(b)),
            ),
            (
                "without a bias",
                layer,
                |[x, w, _]| linear(x, w, None),
                |[x, w, _]| composed::linear(x, w, None),
            ),
            (
                "state",
                tokens,
                |[k, v, _]| state(k, v, CUT),
                |[k, v, _]| composed::state(k, v, CUT),
            ),
            (
                "attend",
                states,
                |[q, s, _]| attend(&features(q)?, &features(s)?, CUT, 0.5),
                |[q, s, _]| composed::attend(&features(q)?, &features(s)?, CUT, 0.5),
            ),
            (
                "squared error",
                tokens,
                |[o, t, _]| squared_error(o, &t.detach()),
                |[o, t, _]| composed::squared_error(o, &t.detach()),
            ),
        ];
        let mut random = SplitMix64::new(5);
        for (name, dims, fused, composed) in steps {
            let given = dims.map(|dims| var(&mut random, dims));
            let pull = fused(&given).unwrap();
            let pull = var(&mut random, pull.dims());
            let [a, b] = [fused, composed].map(|step| {
                let out = step(&given).unwrap();
                let loss = (&out * pull.as_tensor()).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let mut values: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
                for var in &given {
                    if let Some(g) = gradients.get(var) {
                        values.extend(g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                    }
                }
                values
            });
            assert_eq!(a.len(), b.len(), "{name}");
            let largest = b.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
            for (a, b) in a.iter().zip(&b) {
                // Four steps, each a sum of up to 8 terms: 8 roundings by half an epsilon on either side, twice that where
                // a step divides by what the one before it made.
                assert!(
                    (a - b).abs() < 64.0 * f32::EPSILON * largest,
                    "{name}: {a} {b}"
                );
            }
        }
    }

    #[test]
    fn products_are_those_of_their_numbers() {
        let mut random = SplitMix64::new(6);
        let (a, b) = (var(&mut random, &[4, 6]), var(&mut random, &[3, 6]));
        let found = product(&a, &b.t().unwrap().contiguous().unwrap().t().unwrap()).unwrap();
        let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        let (found, a, b) = (rows(&found), rows(&a), rows(&b));
        for (row, found) in a.iter().zip(&found) {
            for (column, found) in b.iter().zip(found) {
                let products = row.iter().zip(column);
                let expected: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                // Six products of up to four, added in some order, each rounded by half an epsilon: of 6 x 4, and of 8 + 12 +
                // 16 + 20 + 24.
                let bound = 52.0 * f64::from(f32::EPSILON);
                let found = f64::from(*found);
                assert!((found - expected).abs() <= bound, "{found} {expected}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_an_error() {
        let mut random = SplitMix64::new(7);
        let q = var(&mut random, &[8, 6]);
        for rows in [7, 9, 10] {
            let other = var(&mut random, &[rows, 6]);
            assert!(state(&q, &other, CUT).is_err());
            assert!(squared_error(&q, &other).is_err());
        }
        for inner in [4, 7] {
            let weight = var(&mut random, &[5, inner]);
            let bias = var(&mut random, &[5]);
            assert!(linear(&q, &weight, None).is_err());
            assert!(linear(&q, &weight, Some(&bias)).is_err());
            let norm = var(&mut random, &[inner]);
            assert!(hidden(&q, &norm, &norm).is_err());
        }
        for width in [1, 3] {
            let states = var(&mut random, &[2, 3, width, width + 1]);
            assert!(attend(&q, &states, CUT, 0.5).is_err());
        }
        for outputs in [4, 6] {
            let bias = var(&mut random, &[outputs]);
            assert!(linear(&q, &var(&mut random, &[5, 6]), Some(&bias)).is_err());
        }
        let odd = Cut {
            samples: 3,
            heads: 3,
        };
        assert!(state(&q, &q, odd).is_err());
    }
}
