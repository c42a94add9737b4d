use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::reference::linfusion_attention;
use ndarray::{Array2, Array3};

use super::*;

const SHAPE: Shape = Shape { dim: 6, heads: 2 };

fn noise(random: &mut SplitMix64, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.symmetric() as f32).collect()
}

/// A student whose MLPs do something.
fn student(mid: Option<usize>, mixed: bool, seed: u64) -> Student {
    let mut random = SplitMix64::new(seed);
    let projections = [0, 1, 2].map(|_| Layer {
        weight: noise(&mut random, 36),
        bias: Some(noise(&mut random, 6)),
    });
    let beginning = Beginning {
        projections: &projections,
        mid,
        mixed,
        seed,
    };
    let student = Student::new(SHAPE, &beginning, &Device::Cpu).unwrap();
    let mut weights = student.weights().unwrap();
    for (_, values) in &mut weights.0 {
        for value in values {
            *value += 0.3 * random.symmetric() as f32;
        }
    }
    student.set(&weights).unwrap();
    student
}

/// Moves what the activation sees away from zero, where it bends and differences say little: normalised values of 5
/// channels are below 2.
fn unbent(student: &Student) {
    let mut weights = student.weights().unwrap();
    let biases = [Part::QMlp(MlpPart::NormBias), Part::KMlp(MlpPart::NormBias)];
    for (part, values) in &mut weights.0 {
        for (i, value) in values.iter_mut().enumerate() {
            if biases.contains(part) {
                *value = if i % 2 == 0 { 3.0 } else { -3.0 };
            }
        }
    }
    student.set(&weights).unwrap();
}

fn tokens(seed: u64, batch: usize, count: usize) -> Tensor {
    let values = noise(&mut SplitMix64::new(seed), batch * count * 6);
    Tensor::from_vec(values, (batch, count, 6), &Device::Cpu).unwrap()
}

#[test]
fn the_output_is_that_of_the_reference() {
    for (mid, mixed) in [(Some(4), false), (None, false), (Some(4), true)] {
        let student = student(mid, mixed, 3);
        let weights = student.weights().unwrap();
        let matrix = |part: Part, columns: usize| {
            let values: Vec<f64> = weights
                .get(part)
                .unwrap()
                .iter()
                .map(|v| f64::from(*v))
                .collect();
            Array2::from_shape_vec((values.len() / columns, columns), values).unwrap()
        };
        let (x, near) = (tokens(5, 2, 5), tokens(6, 2, 5));
        let found: Vec<f32> = student
            .forward(&x, mixed.then_some(&near))
            .and_then(|t| t.flatten_all()?.to_vec1())
            .unwrap();
        let values: Vec<f64> = x
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|v| f64::from(*v))
            .collect();
        let x = Array2::from_shape_vec((10, 6), values).unwrap();
        let shifted = |part: fn(MlpPart) -> Part| {
            let Some(mid) = mid else { return &x * 2.0 };
            let mut h = x.dot(&matrix(part(MlpPart::InWeight), 6).t())
                + matrix(part(MlpPart::InBias), mid).row(0);
            for mut row in h.rows_mut() {
                let mean = row.mean().unwrap();
                let variance = row.mapv(|v| (v - mean).powi(2)).mean().unwrap();
                row.mapv_inplace(|v| (v - mean) / (variance + 1e-5).sqrt());
            }
            let h = h * matrix(part(MlpPart::NormWeight), mid).row(0)
                + matrix(part(MlpPart::NormBias), mid).row(0);
            let h = h.mapv(|v| v.max(0.01 * v));
            &x + &(h.dot(&matrix(part(MlpPart::OutWeight), mid).t())
                + matrix(part(MlpPart::OutBias), 6).row(0))
        };
        let project = |x: Array2<f64>, weight: Part, bias: Part| -> Array3<f64> {
            let y = x.dot(&matrix(weight, 6).t()) + matrix(bias, 6).row(0);
            Array3::from_shape_vec((2, 5, 6), y.iter().copied().collect()).unwrap()
        };
        let q = project(shifted(Part::QMlp), Part::QWeight, Part::QBias);
        let k = project(shifted(Part::KMlp), Part::KWeight, Part::KBias);
        let v = project(x.clone(), Part::VWeight, Part::VBias);
        let attrs = LinFusionAttentionAttrs::new(2, Some(DEFAULT_EPS)).unwrap();
        let (q, k, v) = (q.into_dyn(), k.into_dyn(), v.into_dyn());
        let expected = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
        let near: Vec<f32> = near.flatten_all().unwrap().to_vec1().unwrap();
        let scale = |part: Part, i: usize| f64::from(weights.get(part).unwrap()[i % 6 / 3]);
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let expected = match mixed {
                true => {
                    scale(Part::LocalScale, i) * f64::from(near[i])
                        + scale(Part::GlobalScale, i) * expected
                }
                false => *expected,
            };
            // A dozen sums of at most 6 terms of size about 1, in float32.
            let bound = 100.0 * f64::from(f32::EPSILON);
            assert!(
                (f64::from(*found) - expected).abs() < bound,
                "{mid:?} {mixed}: {found} {expected}"
            );
        }
    }
}

#[test]
fn blocks_do_not_change_the_output() {
    // 60,000 elements a block: 7 samples of 5,000 tokens are cut within samples, 3,000 samples of 5 between them.
    for (batch, count) in [(2, 12_000), (3_000, 5)] {
        let student = student(Some(4), false, 9);
        let x = tokens(1, batch, count);
        let groups = Block::groups(batch, count, Block::OF_A_CORE / 6);
        assert!(groups.iter().flatten().count() > 1);
        let whole: Vec<f32> = student
            .forward(&x, None)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let last = x.narrow(0, batch - 1, 1).unwrap();
        let alone: Vec<f32> = student
            .forward(&last, None)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap();
        let tail = &whole[whole.len() - alone.len()..];
        let largest = alone.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        // A sample is cut alike in both; only products of other numbers of rows may take kernels that add their six terms
        // in another order, a rounding a term.
        let bound = 6.0 * f32::EPSILON * largest;
        for (a, b) in tail.iter().zip(&alone) {
            assert!((a - b).abs() <= bound, "{a} {b}");
        }
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    for (mid, mixed) in [(Some(4), false), (None, false), (Some(5), true)] {
        let student = student(mid, mixed, 11);
        unbent(&student);
        let (x, target, near) = (tokens(1, 2, 7), tokens(2, 2, 7), tokens(3, 2, 7));
        let near = mixed.then_some(&near);
        let loss = || student.squared_error(&x, near, &target).unwrap();
        let gradients = loss().backward().unwrap();
        let value = || f64::from(loss().to_scalar::<f32>().unwrap());
        let begin = student.weights().unwrap();
        for (index, (part, var)) in student.parts().into_iter().enumerate() {
            let gradient: Vec<f32> = gradients
                .get(var)
                .unwrap()
                .flatten_all()
                .unwrap()
                .to_vec1()
                .unwrap();
            // One direction for each part, so that every entry counts.
            let mut random = SplitMix64::new(index as u64);
            let direction = noise(&mut random, gradient.len());
            let moved = |by: f32| {
                let mut weights = begin.clone();
                for (v, d) in weights.0[index].1.iter_mut().zip(&direction) {
                    *v += by * d;
                }
                student.set(&weights).unwrap();
                value()
            };
            // The five-point formula: what it leaves out is of the order of step⁴.
            let step = 2.0_f32.powi(-6);
            let slope = |by: f32| (moved(by) - moved(-by)) / (2.0 * f64::from(by));
            let numeric = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;
            student.set(&begin).unwrap();
            let exact: f64 = gradient
                .iter()
                .zip(&direction)
                .map(|(g, d)| f64::from(g * d))
                .sum();
            let size: f64 = gradient
                .iter()
                .map(|g| f64::from(g * g))
                .sum::<f64>()
                .sqrt();
            // A loss near 100 comes with errors of some 2⁻¹⁷, which the step's inverse makes 2⁻¹⁰; the fourth power of the
            // double step is 2⁻²⁰.
            let bound = 2.0_f64.powi(-8) + 0.003 * size;
            assert!(
                (numeric - exact).abs() < bound,
                "{part:?} {mid:?} {mixed}: {numeric} {exact} of {size}"
            );
        }
    }
}
