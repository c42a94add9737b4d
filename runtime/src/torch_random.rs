//! The normal numbers that PyTorch draws on the CPU, so that a seed gives the same image here as there.

use std::f64::consts::TAU;

use rand_mt::Mt;

/// PyTorch computes so many values at once, the cosines in the first half and the sines in the second.
const BLOCK: usize = 16;

/// A generator as `torch.Generator("cpu").manual_seed(seed)`.
///
/// The raw numbers (a Mersenne Twister's) are the same bits. The logarithm, root, sine and cosine of counts from
/// 16 on are rounded once each, in f32, with the angle as PyTorch's AVX2 kernel has it; that kernel's own
/// polynomials are off by an ulp here and there, so that a value here is within 4 ulps of its value (5 in 6 are
/// the same bits). PyTorch without AVX2 rounds the angle differently, by up to 2^-21, and is within
/// 2^-21 * 5.8 = 2.8e-6. Counts below 16 are computed in f64 everywhere and agree to the last bit of f32 but for
/// rounding ties.
#[derive(Debug, Clone)]
pub struct TorchRandom {
    bits: Mt,
    /// The second value of the last pair of a count below 16.
    left_over: Option<f64>,
}

impl TorchRandom {
    /// A generator with a seed, of which the Mersenne Twister takes the low 32 bits.
    pub fn new(seed: u64) -> Self {
        Self {
            bits: Mt::new((seed & 0xffff_ffff) as u32),
            left_over: None,
        }
    }

    /// The next numbers of `torch.randn(count, generator=..., dtype=torch.float32)`.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.one() as f32).collect();
        }
        let mut values: Vec<f32> = (0..count).map(|_| self.uniform_24()).collect();
        values
            .as_chunks_mut::<BLOCK>()
            .0
            .iter_mut()
            .for_each(box_muller);
        if !count.is_multiple_of(BLOCK)
            && let Some(last) = values.last_chunk_mut::<BLOCK>()
        {
            last.fill_with(|| self.uniform_24());
            box_muller(last);
        }
        values
    }

    fn one(&mut self) -> f64 {
        if let Some(value) = self.left_over.take() {
            return value;
        }
        let angle = TAU * self.uniform_53();
        let radius = (-2.0 * (-self.uniform_53()).ln_1p()).sqrt();
        self.left_over = Some(radius * angle.sin());
        radius * angle.cos()
    }

    fn uniform_24(&mut self) -> f32 {
        (self.bits.next_u32() & 0xff_ffff) as f32 / (1 << 24) as f32
    }

    fn uniform_53(&mut self) -> f64 {
        let high = u64::from(self.bits.next_u32());
        let bits = high << 32 | u64::from(self.bits.next_u32());
        (bits & ((1 << 53) - 1)) as f64 / (1_u64 << 53) as f64
    }
}

/// From uniform numbers in [0, 1) to normal ones. Every function is computed in f64 and rounded: the platform's f32
/// functions differ from one another.
fn box_muller(block: &mut [f32; BLOCK]) {
    let (first, second) = block.split_at_mut(BLOCK / 2);
    for (a, b) in first.iter_mut().zip(second) {
        let log = f64::from(1.0 - *a).ln() as f32;
        let radius = (-2.0 * log).sqrt();
        let angle = f64::from(TAU as f32 * *b);
        *a = radius * angle.cos() as f32;
        *b = radius * angle.sin() as f32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{npz, tensor::Tensor};

    /// The tolerances follow from the type's documentation: 4 ulps of f32, and 1 where PyTorch computes in f64.
    #[test]
    fn draws_what_pytorch_draws() {
        let path = linfusion_models::fixtures::path("torch-random/cases.npz");
        let cases = npz::read(&path).unwrap();
        assert_eq!(cases.len(), 50);
        let mut generator = (u64::MAX, TorchRandom::new(0));
        let mut same = (0, 0);
        for (name, expected) in &cases {
            let Tensor::F32(expected) = expected else {
                panic!("{name} is not f32");
            };
            let mut parts = name.split('/');
            let seed = parts.next().unwrap().parse().unwrap();
            if seed != generator.0 {
                generator = (seed, TorchRandom::new(seed));
            }
            let found = generator.1.normal(expected.len());
            let ulps = if found.len() < BLOCK { 1.0 } else { 4.0 };
            for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
                let tolerance = ulps * f32::EPSILON * expected.abs();
                assert!(
                    (found - expected).abs() <= tolerance,
                    "{name}[{i}]: {found}, expected {expected}"
                );
                same.0 += usize::from(found == expected);
                same.1 += 1;
            }
        }
        assert!(
            same.0 * 4 > same.1 * 3,
            "{} of {} are the same",
            same.0,
            same.1
        );
    }

    #[test]
    fn nothing_is_drawn_for_a_count_of_zero() {
        let mut random = TorchRandom::new(7);
        assert!(random.normal(0).is_empty());
        assert_eq!(random.normal(20), TorchRandom::new(7).normal(20));
    }
}
