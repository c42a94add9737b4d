//! How far two tensors, two graphs' attentions, or two pipelines are apart.

mod pipelines;
mod sites;

pub use pipelines::{CompareError, ImageDifference, PipelineComparison, StepDifference, pipelines};
use serde::Serialize;
pub use sites::{SiteDifference, SitesError, sites};

use crate::tensor::Tensor;

/// The distance of an output from its reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Name of the output.
    pub output: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Largest |other − reference|; `None` if either has a value that is not finite.
    pub max_abs: Option<f64>,
    /// Mean of |other − reference|.
    pub mean_abs: Option<f64>,
    /// ‖other − reference‖ / ‖reference‖, Euclidean; `None` for a reference of zeros.
    pub relative: Option<f64>,
    /// Peak signal-to-noise ratio in dB, with the reference's range as peak; `None` for equal tensors.
    pub psnr_db: Option<f64>,
    /// Standard deviation of the reference, to judge the others by.
    pub reference_std: Option<f64>,
    /// Values that are infinite or NaN, in the reference and in the other.
    pub not_finite: [usize; 2],
}

/// Compares an output with its reference; `None` if the shapes differ.
pub fn difference(output: &str, reference: &Tensor, other: &Tensor) -> Option<Difference> {
    if reference.shape() != other.shape() {
        return None;
    }
    let (a, b) = (reference.to_f64(), other.to_f64());
    let not_finite = [&a, &b].map(|t| t.iter().filter(|v| !v.is_finite()).count());
    let count = a.len() as f64;
    let finite = not_finite == [0, 0] && !a.is_empty();
    let errors = &b - &a;
    let squares: f64 = errors.iter().map(|e| e * e).sum();
    let norm: f64 = a.iter().map(|v| v * v).sum();
    let lowest = a.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = a.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let when = |condition: bool, value: f64| (finite && condition).then_some(value);
    Some(Difference {
        output: output.to_owned(),
        shape: a.shape().to_vec(),
        max_abs: when(true, errors.iter().fold(0.0, |max, e| e.abs().max(max))),
        mean_abs: when(true, errors.iter().map(|e| e.abs()).sum::<f64>() / count),
        relative: when(norm > 0.0, (squares / norm).sqrt()),
        psnr_db: when(
            squares > 0.0 && highest > lowest,
            20.0 * (highest - lowest).log10() - 10.0 * (squares / count).log10(),
        ),
        reference_std: when(true, a.std(0.0)),
        not_finite,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr1;

    #[test]
    fn the_measures_are_those_of_their_definitions() {
        let a = Tensor::from(arr1(&[0.0_f32, 2.0, -2.0, 1.0]));
        let b = Tensor::from(arr1(&[0.0_f32, 2.0, -2.0, 1.5]));
        let d = difference("x", &a, &b).unwrap();
        assert_eq!(d.max_abs, Some(0.5));
        assert_eq!(d.mean_abs, Some(0.125));
        assert!((d.relative.unwrap() - 0.5 / 3.0).abs() < 1e-12);
        // Peak 4, mean squared error 1/16.
        assert!((d.psnr_db.unwrap() - 10.0 * (16.0_f64 * 16.0).log10()).abs() < 1e-9);
        let same = difference("x", &a, &a).unwrap();
        assert_eq!((same.max_abs, same.psnr_db), (Some(0.0), None));
    }

    #[test]
    fn what_cannot_be_measured_is_none() {
        let a = Tensor::from(arr1(&[0.0_f32, 0.0]));
        let nan = Tensor::from(arr1(&[f32::NAN, f32::INFINITY]));
        let d = difference("x", &a, &nan).unwrap();
        assert_eq!((d.max_abs, d.not_finite), (None, [0, 2]));
        assert_eq!(difference("x", &a, &a).unwrap().relative, None);
        let longer = Tensor::from(arr1(&[0.0_f32; 3]));
        assert_eq!(difference("x", &a, &longer), None);
    }
}
