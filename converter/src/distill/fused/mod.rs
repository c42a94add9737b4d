//! Steps of the student in one pass over memory each, with their gradients. On a processor they take a third of the time
//! of the same written in candle's operations, whose gradients walk memory many times; elsewhere those are used.

mod rows;

use candle_core::{CpuStorage, Error, Layout, Result, Storage, Tensor};

use self::rows::{AddBias, Features, Hidden};

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
