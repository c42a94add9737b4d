//! The operator in ONNX Runtime beside its function body, MatMul+Softmax+MatMul and
//! com.microsoft.MultiHeadAttention in the same process, run in turn; and beside what this
//! machine's own matrix product and copy reach, measured in the same run.
//!
//! `ORT_DYLIB_PATH=…/libonnxruntime.so cargo bench -p linfusion-ops` takes about five minutes and
//! writes `benches/results/cpu-attention.{md,csv}`. `LINFUSION_BENCH_TOKENS=256,4096`,
//! `LINFUSION_BENCH_WIDTHS=40,64` and `LINFUSION_BENCH_THREADS=1` narrow it; a narrowed run is
//! only printed. `LINFUSION_BENCH_CLOCK=cpu` (one thread) counts processor time. `LINFUSION_BENCH_SECONDS` (8) is the longest run of softmax attention that is
//! waited for.

#[path = "support/host.rs"]
mod host;
#[path = "support/limits.rs"]
mod limits;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/measure.rs"]
mod measure;
#[path = "support/models.rs"]
mod models;
#[path = "../tests/support/onnx_bytes.rs"]
mod onnx_bytes;

use std::fmt::Write;
use std::num::NonZeroUsize;
use std::path::Path;

use half::{bf16, f16};
use host::Host;
use linfusion_ops::cpu::{
    Element, Execution, Isa, Tensors, Threads, as_output, linfusion_attention,
};
use linfusion_ops::{Dims, ElementType, Layout};
use measure::{Product, list, median, numbers};
use models::{Attention, Contender, Operator};

const BATCH: usize = 2;
const HEADS: usize = 8;

/// Seconds spent on one cell of the table, all contenders together.
const CELL_SECONDS: f64 = 2.0;
/// Most runs of one contender in a cell.
const MOST_RUNS: usize = 41;

fn main() {
    // `cargo test --benches` starts benchmarks without this argument.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    if let Err(message) = run() {
        eprintln!("attention benchmark: {message}");
        std::process::exit(1);
    }
}

/// What the machine reaches on so many threads.
#[derive(Clone, Copy)]
struct Limits {
    gflops: f64,
    gbytes: f64,
}

impl Limits {
    fn measure(host: Option<&Host>, threads: usize) -> Result<Self, String> {
        let gbytes = limits::copy_bandwidth(threads);
        let Some(host) = host else {
            let gflops = limits::fma_peak(threads);
            return Ok(Self { gflops, gbytes });
        };
        let product = Product::new(host, threads)?;
        product.run(1)?;
        limits::best_time(|| {
            // The first run went well, and all are the same.
            let _ = product.run(1);
        });
        let gflops = product.best();
        Ok(Self { gflops, gbytes })
    }

    /// Seconds that the slower of the two resources needs at least.
    fn seconds(&self, dims: &Dims, element: ElementType) -> f64 {
        (dims.flops() / self.gflops / 1e9).max(dims.bytes(element) / self.gbytes / 1e9)
    }
}

fn run() -> Result<(), String> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let widths = list("LINFUSION_BENCH_WIDTHS", &[40, 64, 80, 160]);
    let tokens = list("LINFUSION_BENCH_TOKENS", &[256, 1024, 4096, 16384, 65536]);
    let threads = list("LINFUSION_BENCH_THREADS", &[1, cores.min(2)]);
    let narrowed = ["WIDTHS", "TOKENS", "THREADS"]
        .iter()
        .any(|name| std::env::var_os(format!("LINFUSION_BENCH_{name}")).is_some());
    let host = Host::from_environment();
    let runtime = match &host {
        Ok(host) => format!("ONNX Runtime {}", host.release),
        Err(reason) => format!("without ONNX Runtime ({reason}): the kernel alone"),
    };
    let mut text = format!(
        "# Attention on the CPU\n\n{}, {cores} cores; {runtime}; kernels {}; \
         B = {BATCH}, H = {HEADS}, f32; median times.\n\n\
         Command: `ORT_DYLIB_PATH=… cargo bench -p linfusion-ops --bench attention`\n\n\
         GFLOP/s and GB/s count the operator's two products and q, k, v and the output once. \
         \"of limit\" is the time that the machine's own matrix product (MatMul of ONNX Runtime) \
         or its copy, whichever is slower, would need, over the time taken. ×: how many times \
         the operator's time.\n",
        machine::processor(),
        Isa::best()
    );
    print!("{text}");
    let mut csv = String::from("threads,head_dim,tokens,contender,milliseconds\n");
    let mut seen = vec![];
    for threads in threads {
        if seen.contains(&threads) {
            continue;
        }
        seen.push(threads);
        let limits = Limits::measure(host.as_ref().ok(), threads)?;
        let head = format!(
            "\n## {threads} thread{}\n\nMatrix product {:.0} GFLOP/s, copy {:.1} GB/s.\n\n\
             | D | N | operator ms | body ms | × | softmax ms | × | MultiHeadAttention ms | × | GFLOP/s | GB/s | of limit |\n\
             |--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
            if threads == 1 { "" } else { "s" },
            limits.gflops,
            limits.gbytes
        );
        print!("{head}");
        text += &head;
        for &width in &widths {
            for &tokens in &tokens {
                let cell = Cell {
                    threads,
                    limits,
                    dims: dims(width, tokens),
                };
                let times = match &host {
                    Ok(host) => cell.contenders(host)?,
                    Err(_) => vec![(Contender::Operator, Outcome::Seconds(cell.alone::<f32>()))],
                };
                let row = cell.row(&times);
                print!("{row}");
                text += &row;
                for (contender, outcome) in &times {
                    if let Outcome::Seconds(seconds) = outcome {
                        writeln!(
                            csv,
                            "{threads},{width},{tokens},{},{:.4}",
                            contender.name(),
                            seconds * 1e3
                        )
                        .map_err(|e| e.to_string())?;
                    }
                }
            }
        }
        let types = element_types(threads, limits, &widths);
        print!("{types}");
        text += &types;
    }
    if narrowed {
        return Ok(());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/results");
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join("cpu-attention.md"), text))
        .and_then(|()| std::fs::write(folder.join("cpu-attention.csv"), csv))
        .map_err(|e| format!("{}: {e}", folder.display()))
}

fn dims(width: usize, tokens: usize) -> Dims {
    Dims {
        layout: Layout::Packed,
        batch: BATCH,
        heads: HEADS,
        queries: tokens,
        keys: tokens,
        head_dim: width,
        value_dim: width,
    }
}

/// What became of a contender.
enum Outcome {
    Seconds(f64),
    Skipped(&'static str),
}

/// One line of the table.
struct Cell {
    threads: usize,
    limits: Limits,
    dims: Dims,
}

impl Cell {
    /// Median times of all contenders, run in turn.
    fn contenders(&self, host: &Host) -> Result<Vec<(Contender, Outcome)>, String> {
        let (width, tokens) = (self.dims.head_dim, self.dims.queries);
        let shape = [BATCH as i64, tokens as i64, (HEADS * width) as i64];
        let len = BATCH * tokens * HEADS * width;
        let q = host.tensor(&shape, numbers(len, 0))?;
        let k = host.tensor(&shape, numbers(len, 1))?;
        let v = host.tensor(&shape, numbers(len, 2))?;
        let attention = Attention {
            operator: Operator::Linear,
            heads: HEADS,
            width,
        };
        let mut found = vec![];
        let mut running = vec![];
        for contender in Contender::ALL {
            if let Some(reason) = self.skip(contender) {
                found.push((contender, Outcome::Skipped(reason)));
                continue;
            }
            let session = host.session(&models::model(contender, attention)?, self.threads)?;
            // Memory is taken and caches are filled before it counts, unless that takes long.
            let first = session.time(&[&q, &k, &v])?;
            running.push((contender, session, first, vec![]));
        }
        for (_, session, first, times) in &mut running {
            if *first > CELL_SECONDS / 2.0 {
                times.push(*first);
            } else {
                times.push(session.time(&[&q, &k, &v])?);
            }
        }
        let start = std::time::Instant::now();
        for _ in 1..MOST_RUNS {
            let mut ran = false;
            for (_, session, first, times) in &mut running {
                if *first <= CELL_SECONDS / 2.0 {
                    times.push(session.time(&[&q, &k, &v])?);
                    ran = true;
                }
            }
            if !ran || start.elapsed().as_secs_f64() > CELL_SECONDS {
                break;
            }
        }
        for (contender, _, _, times) in running {
            found.push((contender, Outcome::Seconds(median(times))));
        }
        Ok(found)
    }

    /// Why a contender is not run.
    fn skip(&self, contender: Contender) -> Option<&'static str> {
        let heads = (BATCH * HEADS) as f64;
        let scores = heads * (self.dims.queries as f64).powi(2);
        let seconds = 4.0 * scores * self.dims.head_dim as f64 / self.limits.gflops / 1e9;
        let longest = std::env::var("LINFUSION_BENCH_SECONDS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(8.0);
        match contender {
            Contender::Operator | Contender::Body => None,
            // The scores and their softmax.
            Contender::Softmax if 8.0 * scores > 0.7 * machine::free_memory() => Some("no memory"),
            _ if seconds > longest => Some("too long"),
            _ => None,
        }
    }

    /// Median time of the kernel without ONNX Runtime.
    fn alone<T: Element + From32>(&self) -> f64 {
        let len = BATCH * HEADS * self.dims.queries * self.dims.head_dim;
        let data = |salt| -> Vec<T> { numbers(len, salt).into_iter().map(T::from32).collect() };
        let (q, k, v, mut out) = (data(0), data(1), data(2), data(3));
        let threads = Threads(NonZeroUsize::new(self.threads).unwrap_or(NonZeroUsize::MIN));
        let execution = Execution {
            isa: Isa::best(),
            pool: &threads,
        };
        let mut times = vec![];
        let start = std::time::Instant::now();
        while times.len() < 4 || (times.len() < MOST_RUNS && start.elapsed().as_secs_f64() < 0.5) {
            let one = machine::now();
            let tensors = Tensors {
                q: &q,
                k: &k,
                v: &v,
                out: as_output(&mut out),
            };
            linfusion_attention(&self.dims, 1e-4, tensors, execution).expect("sizes fit");
            times.push(machine::now() - one);
        }
        median(times.split_off(1))
    }

    fn row(&self, times: &[(Contender, Outcome)]) -> String {
        let of = |wanted| times.iter().find(|(c, _)| *c == wanted).map(|(_, o)| o);
        let Some(Outcome::Seconds(operator)) = of(Contender::Operator) else {
            return String::new();
        };
        let mut row = format!(
            "| {} | {} | {:.3} |",
            self.dims.head_dim,
            self.dims.queries,
            operator * 1e3
        );
        for contender in [Contender::Body, Contender::Softmax, Contender::Fused] {
            row += &match of(contender) {
                Some(Outcome::Seconds(s)) => {
                    format!(" {:.3} | {:.1} |", s * 1e3, s / operator)
                }
                Some(Outcome::Skipped(reason)) => format!(" {reason} | – |"),
                None => " – | – |".to_owned(),
            };
        }
        row + &format!(
            " {:.1} | {:.1} | {:.0} % |\n",
            self.dims.flops() / operator / 1e9,
            self.dims.bytes(ElementType::F32) / operator / 1e9,
            100.0 * self.limits.seconds(&self.dims, ElementType::F32) / operator
        )
    }
}

/// The kernel on f32, f16 and bf16, without ONNX Runtime.
fn element_types(threads: usize, limits: Limits, widths: &[usize]) -> String {
    let mut text = String::from(
        "\nThe kernel by element type, outside ONNX Runtime, N = 4096:\n\n\
         | D | f32 ms | f16 ms | bf16 ms |\n|--:|--:|--:|--:|\n",
    );
    for &width in widths {
        let cell = Cell {
            threads,
            limits,
            dims: dims(width, 4096),
        };
        text += &format!(
            "| {width} | {:.3} | {:.3} | {:.3} |\n",
            cell.alone::<f32>() * 1e3,
            cell.alone::<f16>() * 1e3,
            cell.alone::<bf16>() * 1e3
        );
    }
    text
}

trait From32 {
    fn from32(value: f32) -> Self;
}
impl From32 for f32 {
    fn from32(value: f32) -> Self {
        value
    }
}
impl From32 for f16 {
    fn from32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
impl From32 for bf16 {
    fn from32(value: f32) -> Self {
        Self::from_f32(value)
    }
}
