//! The window attention kernel against the reference: every element type, instruction set, layout,
//! window and place of text, at sizes that divide by nothing.

use std::mem::MaybeUninit;
use std::num::NonZeroUsize;

use half::{bf16, f16};
use linfusion_ops::cpu::{self, Element, Execution, Isa, Pool, Serial, Tensors, Threads};
use linfusion_ops::reference::{ReferenceElement, window_attention};
use linfusion_ops::schema::{Border, TextSide, Window, WindowAttentionAttrs, WindowDims};
use ndarray::{ArrayD, IxDyn};

/// One call's sizes.
#[derive(Clone, Copy, Debug)]
struct Case {
    packed: bool,
    batch: usize,
    heads: usize,
    text: usize,
    grid: [usize; 2],
    head_dim: usize,
    value_dim: usize,
    attrs: WindowAttentionAttrs,
}

const RECT: fn(usize, usize) -> Window = |rows, cols| Window::Rect { rows, cols };

fn attrs(window: Window, border: Border, text: TextSide) -> WindowAttentionAttrs {
    WindowAttentionAttrs {
        num_heads: 1,
        scale: None,
        window,
        border,
        text,
    }
}

fn case(attrs: WindowAttentionAttrs, text: usize, grid: [usize; 2]) -> Case {
    Case {
        packed: true,
        batch: 1,
        heads: 2,
        text,
        grid,
        head_dim: 8,
        value_dim: 8,
        attrs,
    }
}

fn cases() -> Vec<Case> {
    use Border::{Clamp, Truncate};
    use TextSide::{Prefix, Suffix};
    let circle = |radius| Window::Circle { radius };
    let base = attrs(RECT(3, 5), Clamp, Prefix);
    let mut cases = vec![
        case(base, 0, [7, 11]),
        case(attrs(RECT(4, 2), Clamp, Prefix), 0, [9, 6]),
        case(attrs(RECT(4, 2), Truncate, Prefix), 0, [9, 6]),
        case(attrs(RECT(1, 1), Clamp, Prefix), 0, [3, 4]),
        case(attrs(RECT(16, 16), Clamp, Prefix), 0, [5, 23]),
        case(attrs(RECT(16, 16), Truncate, Prefix), 0, [23, 5]),
        case(attrs(RECT(40, 40), Clamp, Suffix), 7, [9, 10]),
        case(attrs(circle(1), Truncate, Prefix), 0, [4, 4]),
        case(attrs(circle(3), Truncate, Suffix), 1, [17, 13]),
        case(attrs(circle(9), Truncate, Prefix), 70, [10, 12]),
        case(attrs(RECT(3, 3), Clamp, Prefix), 77, [1, 9]),
        case(attrs(RECT(3, 3), Truncate, Suffix), 65, [9, 1]),
        // Several tiles and blocks of keys, in each direction.
        case(attrs(RECT(9, 7), Clamp, Prefix), 0, [37, 35]),
        case(attrs(RECT(8, 12), Truncate, Suffix), 5, [35, 37]),
        case(attrs(circle(12), Truncate, Prefix), 2, [40, 33]),
        case(attrs(RECT(1, 200), Clamp, Prefix), 3, [2, 300]),
        case(attrs(RECT(150, 1), Truncate, Prefix), 0, [260, 2]),
        case(attrs(RECT(3, 3), Clamp, Prefix), 300, [5, 5]),
    ];
    for (head_dim, value_dim) in [(5, 5), (40, 40), (64, 64), (72, 72), (80, 33), (16, 128)] {
        cases.push(Case {
            head_dim,
            value_dim,
            batch: 2,
            ..case(base, 3, [9, 10])
        });
    }
    let scaled = WindowAttentionAttrs {
        scale: Some(-0.7),
        ..base
    };
    cases.push(case(scaled, 2, [5, 6]));
    let heads = cases.iter().map(|c| Case {
        packed: false,
        ..*c
    });
    let both: Vec<Case> = cases.iter().copied().chain(heads).collect();
    both.into_iter()
        .map(|mut c| {
            c.attrs.num_heads = c.heads;
            c
        })
        .collect()
}

impl Case {
    fn tokens(&self) -> usize {
        self.text + self.grid[0] * self.grid[1]
    }

    fn shape(&self, width: usize) -> Vec<usize> {
        if self.packed {
            vec![self.batch, self.tokens(), self.heads * width]
        } else {
            vec![self.batch, self.heads, self.tokens(), width]
        }
    }

    fn grid(&self) -> [i64; 2] {
        self.grid.map(|v| v as i64)
    }
}

/// The same values at every run, about −spread … spread.
fn values<T: ReferenceElement>(shape: &[usize], seed: u64, spread: f64) -> ArrayD<T> {
    let mut state = seed;
    ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let unit = (state >> 33) as f64 / (1u64 << 31) as f64;
        T::from_f64((2.0 * unit - 1.0) * spread)
    })
}

struct Inputs<T> {
    q: ArrayD<T>,
    k: ArrayD<T>,
    v: ArrayD<T>,
}

fn inputs<T: ReferenceElement>(case: &Case, spread: f64) -> Inputs<T> {
    Inputs {
        q: values(&case.shape(case.head_dim), 1, spread),
        k: values(&case.shape(case.head_dim), 2, spread),
        v: values(&case.shape(case.value_dim), 3, 1.0),
    }
}

fn run<T: Element>(case: &Case, inputs: &Inputs<T>, isa: Isa, pool: &dyn Pool) -> Vec<T> {
    let Inputs { q, k, v } = inputs;
    let dims = WindowDims::new(q.shape(), k.shape(), v.shape(), case.grid(), &case.attrs).unwrap();
    let len = case.shape(case.value_dim).iter().product();
    let mut out = vec![MaybeUninit::<T>::uninit(); len];
    let tensors = Tensors {
        q: q.as_slice().unwrap(),
        k: k.as_slice().unwrap(),
        v: v.as_slice().unwrap(),
        out: &mut out,
    };
    cpu::window_attention(&dims, &case.attrs, tensors, Execution { isa, pool }).unwrap();
    // SAFETY: the kernel wrote every element.
    out.into_iter()
        .map(|v| unsafe { v.assume_init() })
        .collect()
}

/// The largest error, relative to the largest value.
fn error<T: Element + ReferenceElement>(case: &Case, spread: f64, isa: Isa) -> f64 {
    let inputs = inputs::<T>(case, spread);
    let found = run(case, &inputs, isa, &Serial);
    let Inputs { q, k, v } = &inputs;
    let expected =
        window_attention(q.view(), k.view(), v.view(), case.grid(), &case.attrs).unwrap();
    let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let difference = found
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a.to_f64() - b).abs())
        .fold(
            0.0f64,
            |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) },
        );
    difference / largest
}

#[test]
fn every_case_type_and_instruction_set() {
    for case in cases() {
        for &isa in Isa::available() {
            // Scores are sums of D products, softmax weights exponentials of them; one rounding of
            // the output.
            let bound = 2e-6;
            let found = [
                (error::<f32>(&case, 2.0, isa), bound),
                (error::<f64>(&case, 2.0, isa), 1e-14),
                (error::<f16>(&case, 2.0, isa), bound + 2f64.powi(-11)),
                (error::<bf16>(&case, 2.0, isa), bound + 2f64.powi(-8)),
            ];
            for (error, bound) in found {
                assert!(error <= bound, "{case:?} {isa}: {error:e} > {bound:e}");
            }
        }
    }
}

#[test]
fn large_scores_make_no_nan() {
    // Scores up to 1e4: softmax takes the largest alone.
    for &isa in Isa::available() {
        let base = case(
            attrs(RECT(5, 5), Border::Clamp, TextSide::Prefix),
            3,
            [9, 9],
        );
        let mut case = Case {
            head_dim: 16,
            value_dim: 16,
            ..base
        };
        case.attrs.num_heads = case.heads;
        let inputs = inputs::<f16>(&case, 100.0);
        let found = run(&case, &inputs, isa, &Serial);
        assert!(found.iter().all(|v| v.is_finite()));
        // f32 scores of 1e4 are off by 1e-3, and so are weights.
        assert!(error::<f32>(&case, 100.0, isa) < 2e-2, "{isa}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for case in cases() {
        let inputs = inputs::<f32>(&case, 2.0);
        let one = run(&case, &inputs, Isa::best(), &Serial);
        let threads = Threads(NonZeroUsize::new(3).unwrap());
        let bits = |v: &[f32]| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            bits(&one),
            bits(&run(&case, &inputs, Isa::best(), &threads))
        );
    }
}

/// Softmax over all tokens, in another way: by the reference with a window larger than the image.
#[test]
fn a_window_over_the_image_is_full_attention() {
    let base = attrs(RECT(99, 99), Border::Clamp, TextSide::Prefix);
    let mut whole = case(base, 5, [6, 7]);
    whole.attrs.num_heads = whole.heads;
    let inputs = inputs::<f64>(&whole, 2.0);
    let Inputs { q, k, v } = &inputs;
    let (heads, width) = (whole.heads, whole.head_dim);
    let found = run(&whole, &inputs, Isa::best(), &Serial);
    let tokens = whole.tokens();
    for n in 0..tokens {
        for h in 0..heads {
            let at = |t: &ArrayD<f64>, n: usize, d: usize| t[[0, n, h * width + d]];
            let score = |m: usize| -> f64 {
                let dot: f64 = (0..width).map(|d| at(q, n, d) * at(k, m, d)).sum();
                (dot / (width as f64).sqrt()).exp()
            };
            let total: f64 = (0..tokens).map(score).sum();
            for d in 0..width {
                let expected: f64 = (0..tokens).map(|m| score(m) / total * at(v, m, d)).sum();
                let found = found[n * heads * width + h * width + d];
                assert!((found - expected).abs() < 1e-13, "{n} {h} {d}");
            }
        }
    }
}

#[test]
fn shapes_and_attributes_that_do_not_fit() {
    let good = attrs(RECT(3, 3), Border::Clamp, TextSide::Prefix);
    let q = [1, 20, 8];
    let check = |grid: [i64; 2], attrs: WindowAttentionAttrs, k: [usize; 3]| {
        WindowDims::new(&q, &k, &k, grid, &attrs)
            .unwrap_err()
            .to_string()
    };
    let zero = attrs(RECT(0, 3), Border::Clamp, TextSide::Prefix);
    let circle = Window::Circle { radius: 2 };
    let clamped = attrs(circle, Border::Clamp, TextSide::Prefix);
    let nan = WindowAttentionAttrs {
        scale: Some(f32::NAN),
        ..good
    };
    for (grid, attrs, k, message) in [
        ([5, 5], good, q, "rows * columns <= 20"),
        ([0, 5], good, q, "found [0, 5]"),
        ([-4, -5], good, q, "found [-4, -5]"),
        ([i64::MAX, i64::MAX], good, q, "rows * columns <= 20"),
        (
            [4, 5],
            good,
            [1, 19, 8],
            "the number of keys (dimension 1) = 20",
        ),
        ([4, 5], zero, q, "found 0x3"),
        ([4, 5], clamped, q, "`truncate` for a circular window"),
        ([4, 5], nan, q, "`scale` must be finite"),
    ] {
        let error = check(grid, attrs, k);
        assert!(error.contains(message), "{error}");
    }
    assert_eq!(WindowDims::new(&q, &q, &q, [3, 5], &good).unwrap().text, 5);
}
