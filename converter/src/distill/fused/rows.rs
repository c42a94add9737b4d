//! What is done to each row alone: activations, norms, and the error of the output.

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, Error, Layout, Result, Shape, Tensor,
};

use super::{NORM_EPS, SLOPE, values, with};

pub struct Features;
pub struct Hidden;
pub struct SquaredError;

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
            // `f32::min` would make 1 of NaN.
            let slope = |o: f32| if o > 1.0 { 1.0 } else { o };
            pairs.map(|(o, g)| slope(*o) * g).collect::<Vec<f32>>()
        })?;
        Tensor::from_vec(made, out.shape(), out.device()).map(Some)
    }
}

impl CustomOp2 for SquaredError {
    fn name(&self) -> &'static str {
        "squared-error"
    }

    fn cpu_fwd(
        &self,
        out: &CpuStorage,
        out_layout: &Layout,
        target: &CpuStorage,
        target_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if out_layout.shape() != target_layout.shape() {
            return Err(Error::Msg(format!(
                "an output of {:?} has no error to {:?}",
                out_layout.shape(),
                target_layout.shape()
            )));
        }
        let out = values(out, out_layout)?.iter();
        let pairs = out.zip(values(target, target_layout)?);
        let sum: f64 = pairs.map(|(o, t)| f64::from((o - t) * (o - t))).sum();
        Ok((CpuStorage::F32(vec![sum as f32]), Shape::from(())))
    }

    fn bwd(
        &self,
        out: &Tensor,
        target: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let scale = 2.0 * gradient.to_scalar::<f32>()?;
        let made = with([out, target], |[out, target]| {
            let pairs = out.iter().zip(target);
            pairs.map(|(o, t)| scale * (o - t)).collect::<Vec<f32>>()
        })?;
        let of_out = Tensor::from_vec(made, out.shape(), out.device())?;
        Ok((Some(of_out), None))
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
        let (_, width) = rows_layout.shape().dims2()?;
        if width != weight.len() || width != bias.len() {
            return Err(Error::Msg(format!(
                "rows of {width} have a norm of {} and {}",
                weight.len(),
                bias.len()
            )));
        }
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
