//! Terrains as numbers and as pictures.

use std::error::Error;
use std::path::Path;

use linfusion_models::onnx::{OnnxFile, make};
use linfusion_runtime::image::{Metadata, Rgb, difference, side_by_side, to_byte};
use linfusion_runtime::tensor::Tensor;
use linfusion_runtime::torch_random::TorchRandom;
use ndarray::{Array1, Array2, Array4, Ix4, arr1, s};

/// Brightness of a difference's picture.
pub const GAIN: f32 = 16.0;

/// Rows and columns that the model was made for.
pub fn native(model: &Path) -> Result<usize, Box<dyn Error>> {
    let file = OnnxFile::open(model)?;
    let mut inputs = file.model.graph.input.iter();
    let noisy = inputs.find(|v| v.name.as_deref() == Some("noisy"));
    match noisy.and_then(make::tensor_type_of) {
        Some((_, Some(dims))) => match dims.last() {
            Some(make::Dim::Fixed(side)) => Ok(usize::try_from(*side)?),
            _ => Err("the size of the input `noisy` is open".into()),
        },
        _ => Err("the model has no input `noisy`".into()),
    }
}

/// The generator's inputs for one square terrain.
pub fn noise(seed: u64, side: usize) -> Vec<(String, Tensor)> {
    let values = TorchRandom::new(seed).normal(side * side);
    let noisy = Array4::from_shape_fn((1, 1, side, side), |(_, _, y, x)| {
        80.0 * values[y * side + x]
    });
    vec![
        ("noisy".to_owned(), noisy.into()),
        ("sigma".to_owned(), arr1(&[80.0_f32]).into()),
        ("difficulty".to_owned(), arr1(&[0.7_f32]).into()),
    ]
}

/// The heights that a model gave, −1 … 1.
pub fn heights(outputs: &[(String, Tensor)]) -> Result<Array2<f32>, Box<dyn Error>> {
    let (_, first) = outputs.first().ok_or("the model has no output")?;
    let images = first.to_f64().into_dimensionality::<Ix4>()?;
    Ok(images.slice(s![0, 0, .., ..]).mapv(|v| v as f32))
}

/// How far two terrains are apart.
pub struct Difference {
    errors: Array1<f64>,
    range: f64,
}

impl Difference {
    /// Of `b` from `a`, which is right.
    pub fn of(a: &Array2<f32>, b: &Array2<f32>) -> Self {
        let (low, high) = range(a);
        Self {
            errors: a
                .iter()
                .zip(b)
                .map(|(a, b)| f64::from(*b) - f64::from(*a))
                .collect(),
            range: f64::from(high) - f64::from(low),
        }
    }

    /// Peak signal-to-noise ratio in dB with the range of the right one as peak; `None` of equal ones.
    pub fn psnr_db(&self) -> Option<f64> {
        let mean = self.errors.mapv(|e| e * e).mean().unwrap_or(0.0);
        (mean > 0.0).then(|| 20.0 * self.range.log10() - 10.0 * mean.log10())
    }

    /// The largest error over the range.
    pub fn largest(&self) -> f64 {
        self.errors
            .iter()
            .fold(0.0_f64, |most, e| most.max(e.abs()))
            / self.range
    }
}

fn range(heights: &Array2<f32>) -> (f32, f32) {
    let fold = |from, f: fn(f32, f32) -> f32| heights.iter().copied().fold(from, f);
    (
        fold(f32::INFINITY, f32::min),
        fold(f32::NEG_INFINITY, f32::max),
    )
}

/// Heights as grey, from black for `low` to white for `high`.
fn grey(heights: &Array2<f32>, (low, high): (f32, f32)) -> Result<Rgb, Box<dyn Error>> {
    let (rows, columns) = heights.dim();
    let scale = 2.0 / (high - low).max(f32::MIN_POSITIVE);
    let bytes = heights
        .iter()
        .flat_map(|h| [to_byte((h - low) * scale - 1.0); 3]);
    Ok(Rgb::new(
        u32::try_from(columns)?,
        u32::try_from(rows)?,
        bytes.collect(),
    )?)
}

/// A terrain with its own lowest and highest points as black and white.
pub fn write(heights: &Array2<f32>, path: &Path) -> Result<(), Box<dyn Error>> {
    Ok(grey(heights, range(heights))?.write(path, &Metadata::default())?)
}

/// Original, converted and difference beside each other, a row for each pair.
pub fn write_rows(pairs: &[(Array2<f32>, Array2<f32>)], path: &Path) -> Result<(), Box<dyn Error>> {
    let mut bytes = Vec::new();
    let mut size = (0, 0);
    for (a, b) in pairs {
        let range = range(a);
        let (a, b) = (grey(a, range)?, grey(b, range)?);
        let row = side_by_side(&[&a, &b, &difference(&a, &b, GAIN)?])?;
        size = (row.width(), size.1 + row.height());
        bytes.extend_from_slice(row.bytes());
    }
    Ok(Rgb::new(size.0, size.1, bytes)?.write(path, &Metadata::default())?)
}
