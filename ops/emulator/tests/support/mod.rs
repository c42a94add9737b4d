//! Inputs, and what the error of an emulated call is measured against.
#![allow(dead_code, reason = "each test binary uses its part")]

use half::{bf16, f16};
use linfusion_ops::ElementType;
use ndarray::{ArrayD, Zip};

/// A small deterministic generator (SplitMix64), so that a failure can be repeated.
pub struct Random(pub u64);

impl Random {
    /// Evenly spread over 0..1.
    pub fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Numbers of the element type, evenly spread over -spread..spread.
    pub fn tensor(&mut self, shape: &[usize], spread: f64, element: ElementType) -> ArrayD<f64> {
        ArrayD::from_shape_simple_fn(shape, || {
            stored((self.next() * 2.0 - 1.0) * spread, element)
        })
    }
}

/// The nearest number of the element type.
pub fn stored(x: f64, element: ElementType) -> f64 {
    match element {
        ElementType::F32 => f64::from(x as f32),
        ElementType::F16 => f16::from_f64(x).to_f64(),
        ElementType::Bf16 => bf16::from_f64(x).to_f64(),
        ElementType::F64 => x,
    }
}

/// Significant bits of the element type.
fn bits(element: ElementType) -> i32 {
    match element {
        ElementType::F32 => 24,
        ElementType::F16 => 11,
        ElementType::Bf16 => 8,
        ElementType::F64 => 53,
    }
}

/// `x` with as many digits as the element type has, whatever its range: the rounding of an
/// intermediate result that an implementation in the element type makes where it does not overflow.
pub fn rounded(x: f64, element: ElementType) -> f64 {
    if x == 0.0 || !x.is_finite() || element == ElementType::F64 {
        return x;
    }
    let ulp = (x.abs().log2().floor() as i32 + 1 - bits(element)) as f64;
    let unit = ulp.exp2();
    (x / unit).round_ties_even() * unit
}

/// The largest difference between two tensors; NaN where there is one.
pub fn largest_error(found: &ArrayD<f64>, exact: &ArrayD<f64>) -> f64 {
    let mut largest = 0.0f64;
    Zip::from(found).and(exact).for_each(|f, e| {
        let error = (f - e).abs();
        if error.is_nan() || error > largest {
            largest = error;
        }
    });
    largest
}

/// One unit in the last place of the largest number of a tensor.
pub fn unit(exact: &ArrayD<f64>, element: ElementType) -> f64 {
    let largest = exact.iter().fold(0.0f64, |a, x| a.max(x.abs()));
    // Below single precision's own error nothing is asked of single precision's sums.
    largest * f64::from(1 - bits(element)).exp2()
}
