//! Every kernel with all its loads and stores watched: no races, no access outside of a tensor or of shared memory.

mod support;

use std::collections::BTreeSet;

use linfusion_cuda_emulator::{Plant, RunError, RunOptions, Watch, kernel_names};
use linfusion_cuda_emulator::{run_linear, run_window};
use linfusion_ops::cuda::plan::Device;
use linfusion_ops::schema::{Border, TextSide, Window, WindowAttentionAttrs};
use linfusion_ops::{ElementType, LinFusionAttentionAttrs};
use support::Random;

const HALVES: [ElementType; 2] = [ElementType::F16, ElementType::Bf16];
const ALL: [ElementType; 4] = [
    ElementType::F16,
    ElementType::Bf16,
    ElementType::F32,
    ElementType::F64,
];

/// Turing has no instruction that the kernels on tensor cores need.
const TURING: (u32, u32) = (7, 5);

fn watched(element: ElementType) -> RunOptions {
    let mut options = RunOptions::new(element);
    options.settings.watch = Watch::Memory;
    options
}

/// `sizes`: heads, queries, keys, D, Dv.
fn linear(sizes: [usize; 5], options: &RunOptions) -> Result<Vec<String>, RunError> {
    let [h, n, m, d, dv] = sizes;
    let mut random = Random(n as u64);
    let [q, k, v] =
        [[n, d], [m, d], [m, dv]].map(|[n, d]| random.tensor(&[1, n, h * d], 1.0, options.element));
    let attrs = LinFusionAttentionAttrs {
        num_heads: h,
        eps: 1e-4,
    };
    run_linear([&q, &k, &v], &attrs, options).map(|bits| bits.kernels)
}

/// `widths`: D, Dv.
fn window(
    widths: [usize; 2],
    window: Window,
    text: usize,
    options: &RunOptions,
) -> Result<Vec<String>, RunError> {
    let grid = [10, 13];
    let tokens = text + grid[0] * grid[1];
    let [d, dv] = widths;
    let mut random = Random(tokens as u64);
    let [q, k, v] = [d, d, dv].map(|d| random.tensor(&[1, tokens, d], 1.0, options.element));
    let attrs = WindowAttentionAttrs {
        num_heads: 1,
        scale: None,
        window,
        border: match window {
            Window::Rect { .. } => Border::Clamp,
            Window::Circle { .. } => Border::Truncate,
        },
        text: TextSide::Suffix,
    };
    run_window([&q, &k, &v], grid.map(|n| n as i64), &attrs, options).map(|bits| bits.kernels)
}

/// What ran, and every run that failed.
#[derive(Default)]
struct Seen {
    kernels: BTreeSet<String>,
    failures: Vec<String>,
}

impl Seen {
    fn add(&mut self, case: &str, result: Result<Vec<String>, RunError>) {
        match result {
            Ok(kernels) => self.kernels.extend(kernels),
            Err(error) => self.failures.push(format!("{case}: {error}")),
        }
    }

    /// Every kernel of the library that `belongs` has run, and rightly.
    fn check(self, belongs: impl Fn(&str) -> bool) {
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n"));
        let names = kernel_names().into_iter();
        let all: BTreeSet<String> = names
            .filter(|name| name.starts_with("linfusion_") && belongs(name))
            .collect();
        assert!(!all.is_empty());
        assert_eq!(self.kernels, all);
    }
}

#[test]
fn linear_kernels_neither_race_nor_stray() {
    let mut seen = Seen::default();
    for element in HALVES {
        for width in [40, 64, 72, 80, 128, 160, 48, 56, 184] {
            let options = watched(element);
            let mut few = options;
            few.device = Device {
                capability: (8, 6),
                multiprocessors: 2,
                shared_bytes: 99 << 10,
            };
            // In one launch, in several, with ragged ends.
            for sizes in [[2, 33, 150, width, width], [1, 1030, 1040, width, width]] {
                for options in [options, few] {
                    let case = format!("{element:?} {sizes:?} {:?}", options.device);
                    seen.add(&case, linear(sizes, &options));
                }
            }
        }
    }
    for element in ALL {
        let mut options = watched(element);
        options.device.capability = TURING;
        for sizes in [[2, 66, 37, 7, 20], [1, 5, 300, 65, 64]] {
            let case = format!("{element:?} {sizes:?}");
            seen.add(&case, linear(sizes, &options));
        }
    }
    seen.check(|name| !name.contains("window"));
}

#[test]
fn window_kernels_neither_race_nor_stray() {
    let mut seen = Seen::default();
    let rect = Window::Rect { rows: 5, cols: 6 };
    let circle = Window::Circle { radius: 4 };
    for element in HALVES {
        for widths in [[64, 64], [80, 72], [128, 128], [256, 248]] {
            for (shape, text) in [(rect, 70), (circle, 3)] {
                let case = format!("{element:?} {widths:?} {shape:?}");
                seen.add(&case, window(widths, shape, text, &watched(element)));
            }
        }
    }
    for element in ALL {
        let mut options = watched(element);
        options.device.capability = TURING;
        seen.add(
            &format!("{element:?} plain"),
            window([20, 7], rect, 5, &options),
        );
    }
    seen.check(|name| name.contains("window"));
}

/// The test of the tests: each kind of mistake is a race in the kernels that it matters to.
#[test]
fn planted_mistakes_are_races() {
    let rect = Window::Rect { rows: 8, cols: 8 };
    for plant in [
        Plant::MissingBarrier,
        Plant::MissingWarpBarrier,
        Plant::WaitOffByOne,
    ] {
        let mut options = watched(ElementType::F16);
        options.settings.plant = plant;
        options.device.multiprocessors = 1;
        for (case, result) in [
            ("linear", linear([1, 300, 1100, 64, 64], &options)),
            ("window", window([64, 64], rect, 9, &options)),
        ] {
            let found = result.map_err(|e| e.to_string());
            assert!(
                found.as_ref().is_err_and(|text| text.contains("race")),
                "{plant:?}, {case}: {found:?}"
            );
        }
    }
}
