//! The kernels of `LinFusionAttention`, emulated, against the reference: every width, type and layout over ragged and
//! extreme sizes and values.

mod support;

use std::collections::BTreeSet;

use linfusion_cuda_emulator::{Plant, RunOptions, kernel_names, run_linear};
use linfusion_ops::cuda::plan::Device;
use linfusion_ops::reference::{feature_map, linfusion_attention};
use linfusion_ops::{Dims, ElementType, Layout, LinFusionAttentionAttrs};
use ndarray::ArrayD;
use rstest::rstest;
use support::{Random, largest_error, rounded, stored, unit};

/// Widths with kernels of their own; the values of `ragged_numbers_of_tokens`.
const WIDTHS: [usize; 6] = [40, 64, 72, 80, 128, 160];

/// A device on which `fused` kernels don't fit and every head has two splits or more.
const SMALL: Device = Device {
    capability: (8, 6),
    multiprocessors: 84,
    shared_bytes: 99 << 10,
};

fn attrs(heads: usize) -> LinFusionAttentionAttrs {
    LinFusionAttentionAttrs {
        num_heads: heads,
        eps: 1e-4,
    }
}

/// One call's sizes: batch, heads, queries, keys, D, Dv.
#[derive(Debug, Clone, Copy)]
struct Case {
    layout: Layout,
    sizes: [usize; 6],
}

impl Case {
    fn shapes(self) -> [Vec<usize>; 3] {
        let [b, h, n, m, d, dv] = self.sizes;
        match self.layout {
            Layout::Packed => [vec![b, n, h * d], vec![b, m, h * d], vec![b, m, h * dv]],
            Layout::Heads => [vec![b, h, n, d], vec![b, h, m, d], vec![b, h, m, dv]],
        }
    }

    fn inputs(self, element: ElementType, spread: f64) -> [ArrayD<f64>; 3] {
        let mut random = Random(self.sizes.iter().fold(7, |a, x| a * 31 + *x as u64));
        self.shapes()
            .map(|shape| random.tensor(&shape, spread, element))
    }
}

/// The operator computed in the element type, with sums in the accumulator's: features, sums and means are rounded.
fn plain(
    [q, k, v]: [&ArrayD<f64>; 3],
    attrs: &LinFusionAttentionAttrs,
    element: ElementType,
) -> ArrayD<f64> {
    let dims = Dims::new(q.shape(), k.shape(), v.shape(), attrs).unwrap();
    let at = |b: usize, h: usize, n: usize, i: usize, width: usize| match dims.layout {
        Layout::Packed => vec![b, n, h * width + i],
        Layout::Heads => vec![b, h, n, i],
    };
    let round = |x: f64| rounded(x, element);
    let total = |terms: &mut dyn Iterator<Item = f64>| {
        terms.fold(0.0, |a, x| stored(a + x, element.accumulator()))
    };
    let mut out = ArrayD::zeros(dims.out_shape());
    let count = dims.keys.max(1) as f64;
    for (b, h) in (0..dims.batch).flat_map(|b| (0..dims.heads).map(move |h| (b, h))) {
        let feature =
            |x: &ArrayD<f64>, n, i| round(feature_map(x[&at(b, h, n, i, dims.head_dim)[..]]));
        let keys: Vec<Vec<f64>> = (0..dims.keys)
            .map(|m| (0..dims.head_dim).map(|i| feature(k, m, i)).collect())
            .collect();
        let mean = |i: usize| round(total(&mut keys.iter().map(|f| f[i])) / count);
        let means: Vec<f64> = (0..dims.head_dim).map(mean).collect();
        let value = |m: usize, j: usize| v[&at(b, h, m, j, dims.value_dim)[..]];
        let sum = |i: usize, j: usize| {
            let mut terms = keys.iter().enumerate().map(|(m, f)| f[i] * value(m, j));
            round(total(&mut terms) / count)
        };
        let sums: Vec<Vec<f64>> = (0..dims.head_dim)
            .map(|i| (0..dims.value_dim).map(|j| sum(i, j)).collect())
            .collect();
        for n in 0..dims.queries {
            let f: Vec<f64> = (0..dims.head_dim).map(|i| feature(q, n, i)).collect();
            let norm = total(&mut f.iter().zip(&means).map(|(f, z)| f * z));
            for j in 0..dims.value_dim {
                let top = total(&mut f.iter().zip(&sums).map(|(f, s)| f * s[j]));
                out[&at(b, h, n, j, dims.value_dim)[..]] =
                    stored(top / (norm + f64::from(attrs.eps)), element);
            }
        }
    }
    out
}

/// Runs a case; what is wrong with it, if anything, and the kernels that ran.
fn check(
    inputs: &[ArrayD<f64>; 3],
    heads: usize,
    options: &RunOptions,
) -> Result<Vec<String>, String> {
    let [q, k, v] = inputs;
    let attrs = attrs(heads);
    let exact = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
    let found = run_linear([q, k, v], &attrs, options).map_err(|e| e.to_string())?;
    let plain = largest_error(&plain([q, k, v], &attrs, options.element), &exact);
    let error = largest_error(&found.values, &exact);
    let most = 2.0 * plain.max(unit(&exact, options.element));
    if error <= most {
        Ok(found.kernels)
    } else {
        Err(format!(
            "{:?}: error {error:e}, at most {most:e}",
            found.kernels
        ))
    }
}

fn check_all(cases: &[Case], options: &RunOptions, spread: f64) -> BTreeSet<String> {
    let mut kernels = BTreeSet::new();
    let mut failures = vec![];
    for case in cases {
        let inputs = case.inputs(options.element, spread);
        match check(&inputs, case.sizes[1], options) {
            Ok(ran) => kernels.extend(ran),
            Err(error) => failures.push(format!("{case:?}: {error}")),
        }
    }
    assert!(failures.is_empty(), "{options:?}\n{}", failures.join("\n"));
    kernels
}

fn cases(sizes: &[[usize; 6]]) -> Vec<Case> {
    let layouts = [Layout::Packed, Layout::Heads];
    let of = |(i, sizes): (usize, &[usize; 6])| Case {
        layout: layouts[i % 2],
        sizes: *sizes,
    };
    sizes.iter().enumerate().map(of).collect()
}

#[rstest]
fn ragged_numbers_of_tokens(
    #[values(ElementType::F16, ElementType::Bf16)] element: ElementType,
    #[values(40, 64, 72, 80, 128, 160)] width: usize,
) {
    assert!(WIDTHS.contains(&width));
    let tokens = [
        [1, 1],
        [2, 3],
        [15, 16],
        [17, 15],
        [63, 65],
        [64, 64],
        [130, 129],
        [5, 300],
    ];
    let sizes: Vec<[usize; 6]> = tokens
        .iter()
        .map(|[n, m]| [1, 2, *n, *m, width, width])
        .collect();
    let mut ran = check_all(&cases(&sizes), &RunOptions::new(element), 2.0);
    let mut options = RunOptions::new(element);
    options.device = SMALL;
    ran.extend(check_all(
        &cases(&[[2, 2, 300, 517, width, width]]),
        &options,
        2.0,
    ));
    // Too many tokens for one launch.
    ran.extend(check_all(
        &cases(&[[1, 1, 1100, 1025, width, width]]),
        &options,
        2.0,
    ));
    let names =
        ["state", "apply", "fused"].map(|k| format!("linfusion_{k}_{}_d{width}", name(element)));
    assert_ran(&ran, &names);
}

fn name(element: ElementType) -> &'static str {
    match element {
        ElementType::F16 => "f16",
        ElementType::Bf16 => "bf16",
        ElementType::F32 => "f32",
        ElementType::F64 => "f64",
    }
}

fn assert_ran(ran: &BTreeSet<String>, names: &[String]) {
    for name in names {
        assert!(ran.contains(name), "{name} was not run: {ran:?}");
    }
}

#[rstest]
fn any_width(#[values(ElementType::F16, ElementType::Bf16)] element: ElementType) {
    let widths = [
        [8, 8],
        [16, 24],
        [24, 16],
        [32, 64],
        [48, 72],
        [88, 40],
        [40, 80],
        [96, 136],
        [136, 96],
        [256, 256],
        [200, 8],
        [8, 256],
    ];
    let sizes: Vec<[usize; 6]> = widths
        .iter()
        .map(|[d, dv]| [1, 2, 35, 81, *d, *dv])
        .collect();
    let mut ran = check_all(&cases(&sizes), &RunOptions::new(element), 2.0);
    ran.extend(check_all(
        &cases(&[[2, 1, 70, 600, 104, 176], [1, 3, 9, 520, 24, 24]]),
        &RunOptions::new(element),
        2.0,
    ));
    let names = [
        "state_{}_any64",
        "state_{}_any128",
        "reduce_{}",
        "apply_{}_any",
    ];
    assert_ran(
        &ran,
        &names.map(|k| format!("linfusion_{}", k.replace("{}", name(element)))),
    );
}

#[rstest]
fn plain_kernels_take_every_type_and_width(
    #[values(
        ElementType::F16,
        ElementType::Bf16,
        ElementType::F32,
        ElementType::F64
    )]
    element: ElementType,
) {
    let widths = [
        [1, 1],
        [7, 20],
        [20, 7],
        [40, 40],
        [64, 65],
        [65, 64],
        [130, 3],
        [300, 300],
    ];
    let sizes: Vec<[usize; 6]> = widths
        .iter()
        .map(|[d, dv]| [1, 2, 66, 37, *d, *dv])
        .collect();
    let mut options = RunOptions::new(element);
    // Turing has no instruction that the others need.
    options.device.capability = (7, 5);
    let ran = check_all(&cases(&sizes), &options, 2.0);
    let names = ["state", "reduce", "apply"];
    assert_ran(
        &ran,
        &names.map(|k| format!("linfusion_plain_{k}_{}", name(element))),
    );
    check_all(&cases(&[[2, 2, 5, 700, 24, 24]]), &options, 2.0);
}

#[rstest]
fn tensors_that_are_not_aligned_go_to_the_plain_kernels(
    #[values(ElementType::F16, ElementType::Bf16)] element: ElementType,
) {
    let mut options = RunOptions::new(element);
    options.shift = 2;
    let ran = check_all(&cases(&[[1, 2, 33, 50, 40, 40]]), &options, 2.0);
    assert!(ran.iter().all(|k| k.contains("plain")), "{ran:?}");
}

#[rstest]
fn extreme_values(
    #[values(ElementType::F16, ElementType::Bf16)] element: ElementType,
    #[values(40, 64)] width: usize,
    #[values(true, false)] one_launch: bool,
) {
    let case = Case {
        layout: Layout::Packed,
        sizes: [1, 2, 33, 140, width, width],
    };
    let mut options = RunOptions::new(element);
    if !one_launch {
        options.device.shared_bytes = 90 << 10;
        options.device.multiprocessors = 2;
    }
    let mut failures = vec![];
    for (name, key, value) in [
        ("largest", 60000.0, 60000.0),
        ("negative keys", -60000.0, 1.0),
        ("small features", -9.0, 1.0),
        ("zeros", 0.0, 0.0),
        ("tiny values", 1.0, 1e-6),
    ] {
        let [q, mut k, mut v] = case.inputs(element, 1.0);
        k.fill(stored(key, element));
        v.mapv_inplace(|x| stored(x * value, element));
        if let Err(error) = check(&[q, k, v], 2, &options) {
            failures.push(format!("{name}: {error}"));
        }
    }
    // Signs and sizes mixed.
    for spread in [60000.0, 30.0, 1e-3] {
        if let Err(error) = check(&case.inputs(element, spread), 2, &options) {
            failures.push(format!("spread {spread}: {error}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The limit that the documentation states: features are float16 numbers on the tensor cores, so one below 2^-14, of an
/// element below -9.7, keeps an absolute accuracy of 2^-25 only. Queries of 1000 keep eps from hiding it.
#[rstest]
fn features_below_half_precision(#[values(true, false)] keys_are_small: bool) {
    let case = Case {
        layout: Layout::Packed,
        sizes: [1, 2, 33, 140, 64, 64],
    };
    let options = RunOptions::new(ElementType::F16);
    for small in [-8.0, -10.0, -12.0, -15.5, -18.0] {
        let [mut q, mut k, v] = case.inputs(ElementType::F16, 1.0);
        q.fill(if keys_are_small { 1000.0 } else { small });
        k.fill(if keys_are_small { small } else { 1000.0 });
        let attrs = attrs(2);
        let exact = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
        let found = run_linear([&q, &k, &v], &attrs, &options).unwrap();
        let largest = exact.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        // Half a unit of the feature's, of the output's, and what the sums of an ordinary case may err.
        let relative = 2.0_f64.powi(-25) / small.exp() + 2.0_f64.powi(-10);
        let error = largest_error(&found.values, &exact);
        assert!(
            error <= largest * relative.min(1.0 + 2.0_f64.powi(-10)),
            "{small}: error {error:e} of {largest:e}"
        );
    }
}

/// The sums of so many keys must not drown in their own rounding, nor the means in half precision's range.
#[rstest]
fn a_million_keys(#[values(1.0, 60000.0, 1e-4)] size: f64) {
    let element = ElementType::F16;
    let case = Case {
        layout: Layout::Heads,
        sizes: [1, 1, 40, 1 << 20, 8, 8],
    };
    let [q, k, mut v] = case.inputs(element, 1.0);
    v.mapv_inplace(|x| stored((x + 0.5) * size / 1.5, element));
    assert_eq!(check(&[q, k, v], 1, &RunOptions::new(element)).err(), None);
}

#[test]
fn no_tokens() {
    let options = RunOptions::new(ElementType::F16);
    let run = |sizes: [usize; 6]| {
        let case = Case {
            layout: Layout::Packed,
            sizes,
        };
        let [q, k, v] = case.inputs(ElementType::F16, 1.0);
        run_linear([&q, &k, &v], &attrs(sizes[1]), &options).unwrap()
    };
    assert!(run([0, 2, 4, 4, 40, 40]).kernels.is_empty());
    assert!(run([1, 2, 0, 4, 40, 40]).kernels.is_empty());
    // Without keys the output is zeros.
    for width in [40, 48, 7] {
        let out = run([1, 2, 4, 0, width, width]);
        assert!(out.values.iter().all(|x| *x == 0.0), "{:?}", out.kernels);
    }
}

#[rstest]
fn the_order_of_warps_changes_no_bit(#[values(40, 72, 128, 48, 7)] width: usize) {
    let case = Case {
        layout: Layout::Packed,
        sizes: [1, 2, 150, 700, width, width],
    };
    let [q, k, v] = case.inputs(ElementType::F16, 2.0);
    let bits = |seed| {
        let mut options = RunOptions::new(ElementType::F16);
        options.settings.seed = seed;
        run_linear([&q, &k, &v], &attrs(2), &options).unwrap().bytes
    };
    let first = bits(1);
    assert!((2..6).all(|seed| bits(seed) == first));
}

/// The test of the tests: mistakes put into the machine must show.
#[rstest]
fn planted_mistakes_show(
    #[values(40, 64, 72, 128, 160, 48)] width: usize,
    #[values(Plant::MissingBarrier, Plant::MissingWarpBarrier, Plant::WaitOffByOne)] plant: Plant,
) {
    let case = Case {
        layout: Layout::Packed,
        sizes: [1, 1, 300, 1100, width, width],
    };
    let inputs = case.inputs(ElementType::F16, 2.0);
    let mut options = RunOptions::new(ElementType::F16);
    // Few blocks of many tokens.
    options.device.multiprocessors = 1;
    assert_eq!(check(&inputs, 1, &options).err(), None);
    options.settings.plant = plant;
    assert!(
        check(&inputs, 1, &options).is_err(),
        "{plant:?} does not show"
    );
}

/// A kernel that is added needs a case above: this list is of those that the cases ask for by name.
#[test]
fn every_kernel_has_a_case() {
    let mut expected = BTreeSet::new();
    for element in ["f16", "bf16"] {
        for width in WIDTHS {
            for kernel in ["state", "apply", "fused"] {
                expected.insert(format!("linfusion_{kernel}_{element}_d{width}"));
            }
        }
        for kernel in [
            "state_{}_any64",
            "state_{}_any128",
            "apply_{}_any",
            "reduce_{}",
        ] {
            expected.insert(format!("linfusion_{}", kernel.replace("{}", element)));
        }
    }
    for element in ["f16", "bf16", "f32", "f64"] {
        for kernel in ["state", "reduce", "apply"] {
            expected.insert(format!("linfusion_plain_{kernel}_{element}"));
        }
    }
    let names = kernel_names().into_iter();
    let linear: BTreeSet<_> = names
        .filter(|n| n.starts_with("linfusion_") && !n.starts_with("linfusion_window_"))
        .collect();
    assert_eq!(linear, expected);
}
