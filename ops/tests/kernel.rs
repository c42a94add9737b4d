//! The CPU kernels against the reference: every instruction set of this machine, element type and
//! layout, over ragged and extreme sizes and values.

use std::num::NonZeroUsize;

use half::{bf16, f16};
use linfusion_ops::cpu::{
    Element, Execution, Isa, KernelError, Pool, Serial, Tensors, Threads, as_output,
    linfusion_attention,
};
use linfusion_ops::reference::{self, ReferenceElement};
use linfusion_ops::{Dims, Layout, LinFusionAttentionAttrs};
use ndarray::{ArrayD, ArrayViewD};
use proptest::prelude::*;

/// A small deterministic generator (SplitMix64), so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn tensor<T: ReferenceElement>(&mut self, shape: &[usize], spread: f64) -> ArrayD<T> {
        ArrayD::from_shape_simple_fn(shape, || T::from_f64((self.next() * 2.0 - 1.0) * spread))
    }
}

fn dims(layout: Layout, [b, h, n, m, d, dv]: [usize; 6]) -> Dims {
    Dims {
        layout,
        batch: b,
        heads: h,
        queries: n,
        keys: m,
        head_dim: d,
        value_dim: dv,
    }
}

fn attrs(dims: &Dims) -> LinFusionAttentionAttrs {
    LinFusionAttentionAttrs {
        num_heads: dims.heads,
        eps: 1e-4,
    }
}

fn run<T: Element + num_zero::Zero>(
    dims: &Dims,
    q: &ArrayD<T>,
    k: &ArrayD<T>,
    v: &ArrayD<T>,
    isa: Isa,
    pool: &dyn Pool,
) -> Vec<T> {
    let mut out = vec![T::ZERO; dims.out_shape().iter().product()];
    linfusion_attention(
        dims,
        1e-4,
        Tensors {
            q: q.as_slice().unwrap(),
            k: k.as_slice().unwrap(),
            v: v.as_slice().unwrap(),
            out: as_output(&mut out),
        },
        Execution { isa, pool },
    )
    .unwrap();
    out
}

mod num_zero {
    pub trait Zero {
        const ZERO: Self;
    }
    impl Zero for f32 {
        const ZERO: Self = 0.0;
    }
    impl Zero for f64 {
        const ZERO: Self = 0.0;
    }
    impl Zero for half::f16 {
        const ZERO: Self = Self::ZERO;
    }
    impl Zero for half::bf16 {
        const ZERO: Self = Self::ZERO;
    }
}

/// The operator as it is written, every step in single precision (double for `f64`), sums in
/// order: what the kernels' error is measured against.
fn plain(
    dims: &Dims,
    q: ArrayViewD<'_, f64>,
    k: ArrayViewD<'_, f64>,
    v: ArrayViewD<'_, f64>,
) -> ArrayD<f64> {
    let at = |b: usize, h: usize, n: usize, i: usize, width: usize| match dims.layout {
        Layout::Packed => vec![b, n, h * width + i],
        Layout::Heads => vec![b, h, n, i],
    };
    let map = |u: f64| {
        let u = u as f32;
        if u > 0.0 { u + 1.0 } else { u.exp() }
    };
    let mut out = ArrayD::zeros(dims.out_shape());
    let scale = 1.0f32 / dims.keys.max(1) as f32;
    for b in 0..dims.batch {
        for h in 0..dims.heads {
            let mut sums = vec![0.0f32; dims.head_dim * dims.value_dim];
            let mut mean = vec![0.0f32; dims.head_dim];
            for m in 0..dims.keys {
                for i in 0..dims.head_dim {
                    let f = map(k[&at(b, h, m, i, dims.head_dim)[..]]);
                    mean[i] += f * scale;
                    for j in 0..dims.value_dim {
                        sums[i * dims.value_dim + j] +=
                            f * v[&at(b, h, m, j, dims.value_dim)[..]] as f32 * scale;
                    }
                }
            }
            for n in 0..dims.queries {
                let f: Vec<f32> = (0..dims.head_dim)
                    .map(|i| map(q[&at(b, h, n, i, dims.head_dim)[..]]))
                    .collect();
                let norm: f32 = f.iter().zip(&mean).map(|(f, z)| f * z).sum();
                for j in 0..dims.value_dim {
                    let sum: f32 = (0..dims.head_dim)
                        .map(|i| f[i] * sums[i * dims.value_dim + j])
                        .sum();
                    out[&at(b, h, n, j, dims.value_dim)[..]] = f64::from(sum / (norm + 1e-4));
                }
            }
        }
    }
    out
}

/// Largest difference from the exact result, and the largest exact magnitude.
fn worst<T: ReferenceElement>(found: &[T], exact: &ArrayD<f64>) -> f64 {
    found
        .iter()
        .zip(exact.iter())
        .map(|(f, e)| {
            let difference = (f.to_f64() - e).abs();
            if difference.is_nan() {
                f64::INFINITY
            } else {
                difference
            }
        })
        .fold(0.0, f64::max)
}

fn check<T>(dims: &Dims, seed: u64, spread: f64) -> Result<(), String>
where
    T: Element + ReferenceElement + num_zero::Zero + PartialEq + std::fmt::Debug,
{
    let mut random = Random(seed);
    let q = random.tensor::<T>(&dims.q_shape(), spread);
    let k = random.tensor::<T>(&dims.k_shape(), spread);
    let v = random.tensor::<T>(&dims.v_shape(), spread);
    let exact = reference::linfusion_attention(q.view(), k.view(), v.view(), &attrs(dims)).unwrap();
    let wide = |x: &ArrayD<T>| x.mapv(T::to_f64);
    let (qw, kw, vw) = (wide(&q), wide(&k), wide(&v));
    let magnitude = exact.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    // Twice the error of the plain computation in the type of the sums, or a few roundings of
    // the largest result where that happens to be exact; plus the rounding of the output.
    let accumulate = if T::TYPE.accumulator() == linfusion_ops::ElementType::F64 {
        16.0 * f64::EPSILON * vw.iter().fold(magnitude, |m, x| m.max(x.abs()))
    } else {
        let plain = plain(dims, qw.view(), kw.view(), vw.view());
        let floor =
            4.0 * f64::from(f32::EPSILON) * vw.iter().fold(magnitude, |m, x| m.max(x.abs()));
        (2.0 * worst(plain.as_slice().unwrap(), &exact)).max(floor)
    };
    let rounding = match T::TYPE {
        linfusion_ops::ElementType::F16 => magnitude * 2f64.powi(-11) + 2f64.powi(-25),
        linfusion_ops::ElementType::Bf16 => magnitude * 2f64.powi(-8),
        _ => 0.0,
    };
    for &isa in Isa::available() {
        let found = run(dims, &q, &k, &v, isa, &Serial);
        let error = worst(&found, &exact);
        if error > accumulate + rounding {
            return Err(format!(
                "{isa} {}: {dims:?} seed {seed}: error {error:e} > {:e}",
                T::TYPE,
                accumulate + rounding
            ));
        }
        let threads = Threads(NonZeroUsize::new(3).unwrap());
        if run(dims, &q, &k, &v, isa, &threads) != found {
            return Err(format!(
                "{isa} {}: {dims:?}: bits depend on threads",
                T::TYPE
            ));
        }
    }
    Ok(())
}

fn check_all(dims: &Dims, seed: u64, spread: f64) -> Result<(), String> {
    check::<f32>(dims, seed, spread)?;
    check::<f16>(dims, seed, spread)?;
    check::<bf16>(dims, seed, spread)?;
    check::<f64>(dims, seed, spread)
}

#[test]
fn diffusion_shapes() {
    let mut failures = Vec::new();
    for layout in [Layout::Packed, Layout::Heads] {
        for d in [40, 64, 72, 80, 160] {
            for n in [1, 63, 64, 65, 256, 1100] {
                let dims = dims(layout, [2, 2, n, n, d, d]);
                failures.extend(check::<f32>(&dims, 7, 3.0).err());
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_head_width_to_100() {
    let mut failures = Vec::new();
    for d in 1..=100 {
        failures.extend(check_all(&dims(Layout::Packed, [1, 2, 9, 5, d, d]), d as u64, 2.0).err());
        let wide = dims(Layout::Heads, [1, 1, 9, 5, 7, 101 - d]);
        failures.extend(check_all(&wide, d as u64, 2.0).err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_long_single_head_is_split() {
    let dims = dims(Layout::Packed, [1, 1, 33, 9001, 24, 40]);
    check_all(&dims, 3, 1.0).unwrap();
}

#[test]
fn empty_dimensions() {
    for (b, n, m) in [(0, 3, 3), (1, 0, 3), (1, 3, 0)] {
        let dims = dims(Layout::Packed, [b, 2, n, m, 5, 5]);
        check_all(&dims, 1, 1.0).unwrap();
    }
}

/// The largest finite values must neither overflow nor turn into NaN.
#[test]
fn extreme_half_precision_stays_finite() {
    let values = [65504.0, -65504.0, 6e-8, 0.0, -0.0, 1.0];
    for &isa in Isa::available() {
        for q in values {
            for k in values {
                for v in values {
                    let dims = dims(Layout::Packed, [1, 1, 5, 1000, 17, 24]);
                    let fill = |shape: &[usize], x: f64| ArrayD::from_elem(shape, f16::from_f64(x));
                    let (q, k, v) = (
                        fill(&dims.q_shape(), q),
                        fill(&dims.k_shape(), k),
                        fill(&dims.v_shape(), v),
                    );
                    let out = run(&dims, &q, &k, &v, isa, &Serial);
                    let exact =
                        reference::linfusion_attention(q.view(), k.view(), v.view(), &attrs(&dims))
                            .unwrap();
                    for (found, exact) in out.iter().zip(exact.iter()) {
                        let tolerance = exact.abs() * 2f64.powi(-10) + 2f64.powi(-24);
                        let error = (found.to_f64() - exact).abs();
                        assert!(
                            error <= tolerance,
                            "{isa} {q} {k} {v}: {found}, not {exact}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn not_a_number_is_not_hidden() {
    for &isa in Isa::available() {
        for d in [1, 4, 8, 16, 17, 40] {
            let dims = dims(Layout::Heads, [1, 2, 3, 4, d, d]);
            let ones = ArrayD::<f32>::ones(dims.q_shape());
            let keys = ArrayD::<f32>::ones(dims.k_shape());
            let mut bad = ones.clone();
            bad[[0, 1, 2, d - 1]] = f32::NAN;
            let out = run(&dims, &bad, &keys, &keys, isa, &Serial);
            let nan_rows = out.chunks(d).map(|row| row.iter().all(|x| x.is_nan()));
            assert_eq!(
                nan_rows.collect::<Vec<_>>(),
                [false, false, false, false, false, true],
                "{isa} {d}"
            );
        }
    }
}

#[test]
fn wrong_lengths_and_attributes_are_refused() {
    let dims = dims(Layout::Packed, [1, 1, 2, 2, 4, 4]);
    let (full, short) = (vec![0.0f32; 8], vec![0.0f32; 7]);
    for bad in 0..3 {
        let pick = |i| if i == bad { &short[..] } else { &full[..] };
        let mut out = vec![0.0f32; 8];
        let tensors = Tensors {
            q: pick(0),
            k: pick(1),
            v: pick(2),
            out: as_output(&mut out),
        };
        let error = linfusion_attention(&dims, 1e-4, tensors, Execution::default()).unwrap_err();
        let tensor = ["q", "k", "v"][bad];
        let expected = KernelError::Length {
            tensor,
            expected: 8,
            found: 7,
        };
        assert_eq!(error, expected);
    }
    for eps in [0.0, -1.0, f32::NAN] {
        let mut out = vec![0.0f32; 8];
        let tensors = Tensors {
            q: &full,
            k: &full,
            v: &full,
            out: as_output(&mut out),
        };
        assert!(linfusion_attention(&dims, eps, tensors, Execution::default()).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn random_shapes(
        packed in any::<bool>(),
        b in 1usize..3, h in 1usize..4, n in 1usize..140, m in 1usize..140,
        d in 1usize..90, dv in 1usize..170, seed in any::<u64>(), spread in 0.1f64..30.0,
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Heads };
        check_all(&dims(layout, [b, h, n, m, d, dv]), seed, spread).map_err(TestCaseError::fail)?;
    }
}
