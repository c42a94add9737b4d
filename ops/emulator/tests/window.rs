//! The kernels of `WindowAttention`, emulated, against the reference: windows, borders, text, widths, types, layouts.

mod support;

use std::collections::BTreeSet;

use linfusion_cuda_emulator::{Plant, RunOptions, kernel_names, run_window};
use linfusion_ops::ElementType;
use linfusion_ops::reference::window_attention;
use linfusion_ops::schema::{
    Border, GridAxis, Layout, TextSide, Window, WindowAttentionAttrs, WindowDims,
};
use ndarray::ArrayD;
use rstest::rstest;
use support::{Random, largest_error, rounded, stored, unit};

#[derive(Debug, Clone, Copy)]
struct Case {
    layout: Layout,
    /// Batch, heads, D, Dv.
    sizes: [usize; 4],
    grid: [usize; 2],
    text: usize,
    window: Window,
    border: Border,
    side: TextSide,
}

const fn rect(rows: usize, cols: usize) -> Window {
    Window::Rect { rows, cols }
}

impl Case {
    /// A clamped rectangle in an image with some text before it.
    fn new(grid: [usize; 2], window: Window, width: usize) -> Self {
        Self {
            layout: Layout::Packed,
            sizes: [1, 2, width, width],
            grid,
            text: 0,
            window,
            border: match window {
                Window::Rect { .. } => Border::Clamp,
                Window::Circle { .. } => Border::Truncate,
            },
            side: TextSide::Prefix,
        }
    }

    fn attrs(&self) -> WindowAttentionAttrs {
        WindowAttentionAttrs {
            num_heads: self.sizes[1],
            scale: None,
            window: self.window,
            border: self.border,
            text: self.side,
        }
    }

    fn inputs(&self, element: ElementType, spread: f64) -> [ArrayD<f64>; 3] {
        let [b, h, d, dv] = self.sizes;
        let n = self.text + self.grid[0] * self.grid[1];
        let mut random = Random((n * 31 + d) as u64);
        [d, d, dv].map(|width| {
            let shape = match self.layout {
                Layout::Packed => vec![b, n, h * width],
                Layout::Heads => vec![b, h, n, width],
            };
            random.tensor(&shape, spread, element)
        })
    }

    fn grid(&self) -> [i64; 2] {
        self.grid.map(|side| side as i64)
    }
}

/// The operator computed in the element type with sums in the accumulator's: scores in single precision, weights
/// rounded before they meet the values.
fn plain(case: &Case, [q, k, v]: [&ArrayD<f64>; 3], element: ElementType) -> ArrayD<f64> {
    let attrs = case.attrs();
    let w = WindowDims::new(q.shape(), k.shape(), v.shape(), case.grid(), &attrs).unwrap();
    let at = |b: usize, h: usize, n: usize, i: usize, width: usize| match w.layout {
        Layout::Packed => vec![b, n, h * width + i],
        Layout::Heads => vec![b, h, n, i],
    };
    let number = |x: f64| stored(x, element.accumulator());
    let scale = number(1.0 / (w.head_dim as f64).sqrt());
    let (image, text) = (w.image_start(attrs.text), w.text_start(attrs.text));
    let keys_of = |n: usize| -> Vec<usize> {
        if n < image || n >= image + w.rows * w.cols {
            return (0..w.tokens()).collect();
        }
        let (y, x) = ((n - image) / w.cols, (n - image) % w.cols);
        let mut keys: Vec<usize> = (text..text + w.text).collect();
        for row in attrs.key_range(GridAxis::Rows, y, w.rows) {
            for col in attrs.key_range(GridAxis::Cols, x, w.cols) {
                if attrs.reaches(row.abs_diff(y), col.abs_diff(x)) {
                    keys.push(image + row * w.cols + col);
                }
            }
        }
        keys
    };
    let mut out = ArrayD::zeros(w.out_shape());
    for (b, h) in (0..w.batch).flat_map(|b| (0..w.heads).map(move |h| (b, h))) {
        for n in 0..w.tokens() {
            let keys = keys_of(n);
            let score = |m: &usize| {
                let term = |i: usize| {
                    q[&at(b, h, n, i, w.head_dim)[..]] * k[&at(b, h, *m, i, w.head_dim)[..]]
                };
                number((0..w.head_dim).fold(0.0, |a, i| number(a + term(i))) * scale)
            };
            let scores: Vec<f64> = keys.iter().map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| number((s - largest).exp())).collect();
            let total = weights.iter().fold(0.0, |a, x| number(a + x));
            for j in 0..w.value_dim {
                let term = |(m, weight): (&usize, &f64)| {
                    rounded(*weight, element) * v[&at(b, h, *m, j, w.value_dim)[..]]
                };
                let terms = keys.iter().zip(&weights).map(term);
                let sum = terms.fold(0.0, |a, x| number(a + x));
                out[&at(b, h, n, j, w.value_dim)[..]] = stored(sum / total, element);
            }
        }
    }
    out
}

fn check(case: &Case, options: &RunOptions, spread: f64) -> Result<Vec<String>, String> {
    let inputs = case.inputs(options.element, spread);
    let [q, k, v] = &inputs;
    let attrs = case.attrs();
    let exact = window_attention(q.view(), k.view(), v.view(), case.grid(), &attrs).unwrap();
    let found = run_window([q, k, v], case.grid(), &attrs, options).map_err(|e| e.to_string())?;
    let plain = largest_error(&plain(case, [q, k, v], options.element), &exact);
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

fn check_all(cases: &[Case], options: &RunOptions) -> BTreeSet<String> {
    let mut kernels = BTreeSet::new();
    let mut failures = vec![];
    for case in cases {
        match check(case, options, 2.0) {
            Ok(ran) => kernels.extend(ran),
            Err(error) => failures.push(format!("{case:?}: {error}")),
        }
    }
    assert!(failures.is_empty(), "{options:?}\n{}", failures.join("\n"));
    kernels
}

fn name(element: ElementType) -> &'static str {
    match element {
        ElementType::F16 => "f16",
        ElementType::Bf16 => "bf16",
        ElementType::F32 => "f32",
        ElementType::F64 => "f64",
    }
}

/// Windows of every kind, in images of every kind, on heads of `width`.
fn geometry(width: usize) -> Vec<Case> {
    let images = [[1, 1], [3, 5], [8, 8], [9, 17], [20, 11], [1, 30]];
    let windows = [
        rect(1, 1),
        rect(3, 5),
        rect(4, 4),
        rect(16, 2),
        rect(50, 50),
        Window::Circle { radius: 1 },
        Window::Circle { radius: 4 },
        Window::Circle { radius: 30 },
    ];
    let mut cases = vec![];
    for (i, (grid, window)) in images
        .iter()
        .flat_map(|g| windows.map(|w| (*g, w)))
        .enumerate()
    {
        let mut case = Case::new(grid, window, width);
        case.text = [0, 1, 7, 70][i % 4];
        case.side = [TextSide::Prefix, TextSide::Suffix][i / 2 % 2];
        case.layout = [Layout::Packed, Layout::Heads][i / 3 % 2];
        if i % 5 == 0 {
            case.border = Border::Truncate;
        }
        cases.push(case);
    }
    cases
}

#[rstest]
fn every_window_in_every_image(
    #[values(ElementType::F16, ElementType::Bf16, ElementType::F32)] element: ElementType,
) {
    check_all(&geometry(16), &RunOptions::new(element));
}

#[rstest]
fn every_width(
    #[values(ElementType::F16, ElementType::Bf16)] element: ElementType,
    #[values(64, 80, 128, 256)] width: usize,
) {
    let mut cases = vec![];
    for (i, [d, dv]) in [[width, width], [width - 8, width], [width, 8], [24, width]]
        .into_iter()
        .enumerate()
    {
        let mut case = Case::new([11, 13], rect(5, 6), width);
        case.sizes = [1, 1, d, dv];
        case.text = [0, 9, 66, 3][i];
        cases.push(case);
    }
    let ran = check_all(&cases, &RunOptions::new(element));
    for kernel in ["window_{}_w", "window_text_{}_w"] {
        let kernel = format!("linfusion_{}{width}", kernel.replace("{}", name(element)));
        assert!(ran.contains(&kernel), "{kernel} was not run: {ran:?}");
    }
    assert!(ran.contains(&format!("linfusion_window_combine_{}", name(element))));
}

#[rstest]
fn text_over_several_splits(#[values(ElementType::F16, ElementType::Bf16)] element: ElementType) {
    let mut case = Case::new([40, 33], rect(3, 3), 16);
    case.text = 65;
    check_all(&[case], &RunOptions::new(element));
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
    let mut options = RunOptions::new(element);
    // Turing has no instruction that the others need.
    options.device.capability = (7, 5);
    let mut cases = vec![];
    for (i, [d, dv]) in [[1, 1], [7, 40], [72, 33], [300, 300]]
        .into_iter()
        .enumerate()
    {
        for window in [rect(4, 7), Window::Circle { radius: 3 }] {
            let mut case = Case::new([6, 9], window, d);
            case.sizes = [2, 1, d, dv];
            case.text = i * 3;
            cases.push(case);
        }
    }
    let ran = check_all(&cases, &options);
    assert!(ran.contains(&format!("linfusion_window_plain_{}", name(element))));
}

#[rstest]
fn extreme_values(#[values(ElementType::F16, ElementType::Bf16)] element: ElementType) {
    let mut case = Case::new([9, 10], rect(5, 5), 64);
    case.text = 5;
    let options = RunOptions::new(element);
    // Scores of ±10^5 and of nearly nothing, values of any size.
    for spread in [100.0, 10.0, 1e-3] {
        assert_eq!(
            check(&case, &options, spread).err(),
            None,
            "spread {spread}"
        );
    }
}

#[test]
fn the_order_of_warps_changes_no_bit() {
    let mut case = Case::new([17, 12], rect(7, 4), 72);
    case.text = 40;
    let [q, k, v] = case.inputs(ElementType::F16, 2.0);
    let bits = |seed| {
        let mut options = RunOptions::new(ElementType::F16);
        options.settings.seed = seed;
        run_window([&q, &k, &v], case.grid(), &case.attrs(), &options)
            .unwrap()
            .bytes
    };
    let first = bits(1);
    assert!((2..6).all(|seed| bits(seed) == first));
}

/// The test of the tests: mistakes put into the machine must show.
#[rstest]
fn planted_mistakes_show(
    #[values(64, 80, 128, 256)] width: usize,
    #[values(Plant::MissingBarrier, Plant::MissingWarpBarrier, Plant::WaitOffByOne)] plant: Plant,
) {
    let case = Case::new([24, 24], rect(12, 12), width);
    let mut options = RunOptions::new(ElementType::F16);
    assert_eq!(check(&case, &options, 2.0).err(), None);
    options.settings.plant = plant;
    assert!(
        check(&case, &options, 2.0).is_err(),
        "{plant:?} does not show"
    );
}

/// A kernel that is added needs a case above: this list is of those that the cases ask for by name.
#[test]
fn every_kernel_has_a_case() {
    let mut expected = BTreeSet::new();
    for element in ["f16", "bf16"] {
        for width in [64, 80, 128, 256] {
            expected.insert(format!("linfusion_window_{element}_w{width}"));
            expected.insert(format!("linfusion_window_text_{element}_w{width}"));
        }
        expected.insert(format!("linfusion_window_combine_{element}"));
    }
    for element in ["f16", "bf16", "f32", "f64"] {
        expected.insert(format!("linfusion_window_plain_{element}"));
    }
    let names = kernel_names().into_iter();
    let window: BTreeSet<_> = names
        .filter(|n| n.starts_with("linfusion_window_"))
        .collect();
    assert_eq!(window, expected);
}
