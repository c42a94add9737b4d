//! Steps of the student in one pass over memory each, with their gradients. On a processor they take a third of the time
//! of the same written in candle's operations, whose gradients walk memory many times; elsewhere those are used.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Storage, Tensor,
};

/// φ(u) = elu(u) + 1.
pub(super) fn features(u: &Tensor) -> Result<Tensor> {
    match u.device().is_cpu() {
        true => u.apply_op1(Features),
        false => composed::features(u),
    }
}

/// `rows` `[R, C]` with `bias` `[C]` added to each.
pub(super) fn add_bias(rows: &Tensor, bias: &Tensor) -> Result<Tensor> {
    match rows.device().is_cpu() {
        true => rows.apply_op2(bias, AddBias),
        false => composed::add_bias(rows, bias),
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
    use candle_core::{D, Result, Tensor};

    use super::{NORM_EPS, SLOPE};

    pub fn features(u: &Tensor) -> Result<Tensor> {
        u.elu(1.0)? + 1.0
    }

    pub fn add_bias(rows: &Tensor, bias: &Tensor) -> Result<Tensor> {
        rows.broadcast_add(bias)
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

struct Features;
struct AddBias;
struct Hidden;

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

impl CustomOp1 for Features {
    fn name(&self) -> &'static str {
        "elu-plus-one"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let phi = |u: &f32| if *u > 0.0 { u + 1.0 } else { u.exp() };
        let made = values(storage, layout)?.iter().map(phi).collect();
        Ok((CpuStorage::F32(made), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, out: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        // Below 1 the output is exp(u), its own derivative.
        let made = with([out, gradient], |[out, gradient]| {
            let pairs = out.iter().zip(gradient);
            pairs.map(|(o, g)| o.min(1.0) * g).collect::<Vec<f32>>()
        })?;
        Tensor::from_vec(made, out.shape(), out.device()).map(Some)
    }
}

impl CustomOp2 for AddBias {
    fn name(&self) -> &'static str {
        "add-bias"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let bias = values(bias, bias_layout)?;
        let mut made = values(rows, rows_layout)?.to_vec();
        for row in made.chunks_mut(bias.len().max(1)) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value += bias;
            }
        }
        Ok((CpuStorage::F32(made), rows_layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let sums = with([gradient], |[gradient]| {
            let mut sums = vec![0.0_f32; bias.elem_count()];
            for row in gradient.chunks(sums.len().max(1)) {
                for (sum, g) in sums.iter_mut().zip(row) {
                    *sum += g;
                }
            }
            sums
        })?;
        let sums = Tensor::from_vec(sums, bias.shape(), bias.device())?;
        Ok((Some(gradient.clone()), Some(sums)))
    }
}

/// Mean of a row, and 1 / its standard deviation.
fn moments(row: &[f32]) -> (f32, f32) {
    let n = row.len().max(1) as f32;
    let mean = row.iter().sum::<f32>() / n;
    let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    (mean, (variance + NORM_EPS).sqrt().recip())
}

impl CustomOp3 for Hidden {
    fn name(&self) -> &'static str {
        "norm-and-activation"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (weight, bias) = (values(weight, weight_layout)?, values(bias, bias_layout)?);
        let mut made = values(rows, rows_layout)?.to_vec();
        for row in made.chunks_mut(weight.len().max(1)) {
            let (mean, scale) = moments(row);
            for ((value, weight), bias) in row.iter_mut().zip(weight).zip(bias) {
                let scaled = (*value - mean) * scale * weight + bias;
                *value = scaled.max(SLOPE * scaled);
            }
        }
        Ok((CpuStorage::F32(made), rows_layout.shape().clone()))
    }

    fn bwd(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        out: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let all = [rows, weight, out, gradient];
        let made = with(all, |[rows, weight, out, gradient]| {
            gradients(rows, weight, out, gradient)
        })?;
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), like.device());
        let [of_rows, of_weight, of_bias] = made;
        Ok((
            Some(tensor(of_rows, rows)?),
            Some(tensor(of_weight, weight)?),
            Some(tensor(of_bias, bias)?),
        ))
    }
}

/// With n the normalised row, s = n ⊙ weight + bias and g the gradient of s: bias gets Σ g, weight Σ g ⊙ n, and a row
/// (h − mean(h) − n·mean(h ⊙ n)) / deviation for h = g ⊙ weight.
fn gradients(rows: &[f32], weight: &[f32], out: &[f32], gradient: &[f32]) -> [Vec<f32>; 3] {
    let width = weight.len().max(1);
    let mut of_rows = vec![0.0; rows.len()];
    let mut of_weight = vec![0.0; width];
    let mut of_bias = vec![0.0; width];
    let n = width as f32;
    let chunks = rows.chunks(width).zip(out.chunks(width));
    let chunks = chunks.zip(gradient.chunks(width));
    for (((row, out), gradient), made) in chunks.zip(of_rows.chunks_mut(width)) {
        let (mean, scale) = moments(row);
        let (mut sum, mut product) = (0.0, 0.0);
        for (i, (made, value)) in made.iter_mut().zip(row).enumerate() {
            let normal = (value - mean) * scale;
            let (Some(out), Some(g), Some(w)) = (out.get(i), gradient.get(i), weight.get(i)) else {
                continue;
            };
            // The activation keeps the sign.
            let g = if *out > 0.0 { *g } else { SLOPE * g };
            if let (Some(of_weight), Some(of_bias)) = (of_weight.get_mut(i), of_bias.get_mut(i)) {
                *of_weight += g * normal;
                *of_bias += g;
            }
            *made = g * w;
            sum += *made;
            product += *made * normal;
        }
        let (sum, product) = (sum / n, product / n);
        for (made, value) in made.iter_mut().zip(row) {
            let normal = (value - mean) * scale;
            *made = (*made - sum - normal * product) * scale;
        }
    }
    [of_rows, of_weight, of_bias]
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

    /// A step and the same in candle's operations.
    type Step = fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>;

    #[test]
    fn outputs_and_gradients_are_those_of_the_library() {
        let steps: [(&str, Step, Step); 3] = [
            (
                "features",
                |u, _, _| features(u),
                |u, _, _| composed::features(u),
            ),
            (
                "add_bias",
                |u, _, b| add_bias(u, b),
                |u, _, b| composed::add_bias(u, b),
            ),
            ("hidden", hidden, composed::hidden),
        ];
        let mut random = SplitMix64::new(5);
        let [rows, weight, bias, pull] =
            [&[7, 5][..], &[5], &[5], &[7, 5]].map(|dims| var(&mut random, dims));
        for (name, fused, composed) in steps {
            let [a, b] = [fused, composed].map(|step| {
                let out = step(&rows, &weight, &bias).unwrap();
                let loss = (&out * pull.as_tensor()).unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let mut values: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
                for var in [&rows, &weight, &bias] {
                    if let Some(g) = gradients.get(var) {
                        values.extend(g.flatten_all().unwrap().to_vec1::<f32>().unwrap());
                    }
                }
                values
            });
            assert_eq!(a.len(), b.len(), "{name}");
            for (a, b) in a.iter().zip(&b) {
                // Sums of 7 terms of size up to 10, in another order.
                assert!((a - b).abs() < 1e-4, "{name}: {a} {b}");
            }
        }
    }
}
