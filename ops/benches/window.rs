//! `WindowAttention` in ONNX Runtime beside its function body, com.microsoft.MultiHeadAttention and
//! MatMul+Softmax+MatMul over all tokens in the same process, run in turn; and beside what the
//! multiplications of the windows would take at the rate of this machine's own matrix product, run
//! in turn with them.
//!
//! `ORT_DYLIB_PATH=…/libonnxruntime.so cargo bench -p linfusion-ops --bench window` takes about
//! five minutes and writes `benches/results/cpu-window.{md,csv}`. `LINFUSION_BENCH_TOKENS=1024,4096`,
//! `LINFUSION_BENCH_WINDOWS=8,16` and `LINFUSION_BENCH_THREADS=1` narrow it; a narrowed run is only
//! printed. `LINFUSION_BENCH_CLOCK=cpu` (one thread) counts processor time.
//! `LINFUSION_BENCH_SECONDS` (60) is the longest run of softmax attention that is waited for.

#[path = "support/host.rs"]
mod host;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/measure.rs"]
mod measure;
#[path = "support/memory.rs"]
mod memory;
#[path = "support/models.rs"]
mod models;
#[path = "../tests/support/onnx_bytes.rs"]
mod onnx_bytes;

use std::fmt::{self, Write};
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::{Command, Stdio};

use host::{Host, Session, Tensor};
use linfusion_ops::cpu::Isa;
use linfusion_ops::schema::{Border, GridAxis, TextSide, Window, WindowAttentionAttrs};
use measure::{Product, list, median, numbers};
use models::{Attention, Contender, Operator};

/// PixArt's heads.
const HEADS: usize = 16;
/// And their width.
const WIDTH: usize = 72;
/// Seconds spent on one contender of a cell.
const SECONDS: f64 = 1.5;
/// Most runs of one contender in a cell.
const MOST_RUNS: usize = 21;
/// Runs at least, unless one takes longer than [`LONG`].
const LEAST_RUNS: usize = 3;
/// Seconds from which on one run is enough.
const LONG: f64 = 5.0;
/// Runs of the matrix product between those of the contenders.
const PRODUCTS: usize = 3;
/// Rows and columns of the tile of queries whose halo is counted.
const TILE: usize = 8;
/// Set for a process of its own that runs one contender once: its number, window and tokens.
const PEAK: &str = "LINFUSION_BENCH_PEAK";

fn main() {
    // `cargo test --benches` starts benchmarks without this argument.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let result = match std::env::var(PEAK) {
        Ok(case) => peak_of_one_run(&case),
        Err(_) => run(),
    };
    if let Err(message) = result {
        eprintln!("window benchmark: {message}");
        std::process::exit(1);
    }
}

fn run() -> Result<(), String> {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let windows = list("LINFUSION_BENCH_WINDOWS", &[8, 16, 32]);
    let tokens = list("LINFUSION_BENCH_TOKENS", &[1024, 4096, 16384, 65536]);
    let mut threads = list("LINFUSION_BENCH_THREADS", &[1, cores.min(2)]);
    threads.dedup();
    let narrowed = ["WINDOWS", "TOKENS", "THREADS"]
        .iter()
        .any(|name| std::env::var_os(format!("LINFUSION_BENCH_{name}")).is_some());
    let host = Host::from_environment()?;
    let mut report = Report::default();
    report.add(&format!(
        "# Window attention on the CPU\n\n{}, {cores} cores; ONNX Runtime {}; kernels {}; \
         B = 1, H = {HEADS}, D = {WIDTH} (PixArt), f32; square grids of N tokens, square windows \
         shifted inside at the border (`clamp`); median times.\n\n\
         Command: `ORT_DYLIB_PATH=… cargo bench -p linfusion-ops --bench window`\n\n\
         \"full softmax\" is MatMul, Softmax, MatMul over all N tokens; like MultiHeadAttention it \
         does not depend on the window. ×: how many times the operator's time. \"useful\" counts \
         the window's own products, 4·N·W²·H·D; \"with halo\" those of all keys that the windows \
         of a tile of {TILE}×{TILE} queries reach together. \"of limit\" is the time that \
         the matrix product (MatMul of ONNX Runtime, 1024³, the best of its runs between those of \
         the contenders) would need for them, over the time taken; a kernel that skips keys on a finer grain than that tile can pass 100 % with \
         halo, but not of the useful ones.\n",
        machine::processor(),
        host.release,
        Isa::best()
    ));
    let mut measured = vec![];
    for &threads in &threads {
        let product = Product::new(&host, threads)?;
        product.run(PRODUCTS)?;
        let mut cells = vec![];
        for &tokens in &tokens {
            let cell = Cell::new(threads, product.best(), tokens)?;
            let mut times = vec![];
            for (i, &window) in windows.iter().enumerate() {
                let contenders = Contender::ALL
                    .iter()
                    .filter(|c| i == 0 || takes_window(**c));
                cell.times(&host, &product, window, contenders, &mut times)?;
                eprintln!("{threads} threads, {tokens} tokens, window {window}: done");
            }
            cells.push((cell, times));
        }
        let gflops = product.best();
        report.add(&format!(
            "\n## {threads} thread{}\n\nMatrix product {gflops:.0} GFLOP/s.\n\n\
             | N | window | operator ms | body ms | × | full softmax ms | × | MultiHeadAttention ms | × | \
             useful GFLOP | with halo | of limit with halo | of useful limit |\n\
             |--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
            if threads == 1 { "" } else { "s" }
        ));
        for (cell, times) in cells {
            for &window in &windows {
                report.add(&cell.row(window, gflops, &times));
            }
            measured.extend(times);
        }
        report.add(&exponents(
            "time",
            measured.iter().filter(|m| m.threads == threads),
        ));
    }
    report.add(
        "\n## Peak memory\n\nMiB by which the resident memory of a process of its own grows at most, \
         from the loaded model on: q, k, v, the output, and what the run takes besides. One \
         thread.\n",
    );
    let mut peaks = vec![];
    report.add("\n| N | window | operator | body | full softmax | MultiHeadAttention |\n|--:|--:|--:|--:|--:|--:|\n");
    let product = Product::new(&host, 1)?;
    product.run(PRODUCTS)?;
    for &tokens in &tokens {
        let cell = Cell::new(1, product.best(), tokens)?;
        let found = cell.peaks(&windows)?;
        for &window in &windows {
            report.add(&cell.peak_row(window, &found));
        }
        peaks.extend(found);
    }
    report.add(&exponents("peak memory", peaks.iter()));
    if narrowed {
        return Ok(());
    }
    let mut csv = String::from("quantity,threads,window,tokens,contender,value\n");
    for (quantity, of, unit) in [("milliseconds", &measured, 1e-3), ("peak MiB", &peaks, MIB)] {
        for m in of {
            if let Outcome::Value(value) = m.outcome {
                writeln!(
                    csv,
                    "{quantity},{},{},{},{},{:.4}",
                    m.threads,
                    m.window.map_or(String::new(), |w| w.to_string()),
                    m.tokens,
                    m.contender.name(),
                    value / unit
                )
                .map_err(|e| e.to_string())?;
            }
        }
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../benches/results");
    std::fs::create_dir_all(&folder)
        .and_then(|()| std::fs::write(folder.join("cpu-window.md"), &report.text))
        .and_then(|()| std::fs::write(folder.join("cpu-window.csv"), csv))
        .map_err(|e| format!("{}: {e}", folder.display()))
}

const MIB: f64 = 1_048_576.0;

/// What is printed, and kept.
#[derive(Default)]
struct Report {
    text: String,
}

impl Report {
    fn add(&mut self, text: &str) {
        print!("{text}");
        self.text += text;
    }
}

/// What became of a contender.
#[derive(Clone, Copy)]
enum Outcome {
    /// Seconds or bytes.
    Value(f64),
    Skipped(Reason),
}

/// Why a contender was not run.
#[derive(Clone, Copy)]
enum Reason {
    Memory,
    /// It would take longer than so many seconds.
    Time(f64),
    /// The system doesn't tell.
    Unknown,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory => write!(f, "does not fit"),
            Self::Time(longest) => write!(f, "over {longest} s"),
            Self::Unknown => write!(f, "not known here"),
        }
    }
}

/// A time or a peak of one contender.
struct Measured {
    threads: usize,
    /// `None` for those that take all tokens.
    window: Option<usize>,
    tokens: usize,
    contender: Contender,
    outcome: Outcome,
}

/// One number of tokens.
struct Cell {
    threads: usize,
    /// Of the matrix product, to tell what would take too long.
    gflops: f64,
    tokens: usize,
    /// Rows and columns of the grid.
    side: usize,
}

/// A contender that is being timed.
struct Running<'h> {
    contender: Contender,
    window: Option<usize>,
    session: Session<'h>,
    runs: usize,
    times: Vec<f64>,
}

impl Cell {
    fn new(threads: usize, gflops: f64, tokens: usize) -> Result<Self, String> {
        let side = tokens.isqrt();
        if side * side != tokens || side == 0 {
            return Err(format!("{tokens} tokens are no square grid"));
        }
        Ok(Self {
            threads,
            gflops,
            tokens,
            side,
        })
    }

    /// Median times of contenders with a window, run in turn with each other and the matrix
    /// product.
    fn times<'c>(
        &self,
        host: &Host,
        product: &Product<'_>,
        window: usize,
        contenders: impl Iterator<Item = &'c Contender>,
        found: &mut Vec<Measured>,
    ) -> Result<(), String> {
        let inputs = Inputs::new(host, self.side)?;
        let mut running = vec![];
        for &contender in contenders {
            let takes = takes_window(contender).then_some(window);
            if let Some(reason) = self.skip(contender) {
                found.push(self.measured(contender, takes, Outcome::Skipped(reason)));
                continue;
            }
            let model = models::model(contender, attention(window))?;
            let session = host.session(&model, self.threads)?;
            // Memory is taken and caches are filled before it counts, unless that takes long.
            let first = inputs.time(contender, &session)?;
            let (runs, times) = if first > LONG {
                (0, vec![first])
            } else {
                let runs = (SECONDS / first) as usize;
                (runs.clamp(LEAST_RUNS, MOST_RUNS), vec![])
            };
            running.push(Running {
                contender,
                window: takes,
                session,
                runs,
                times,
            });
        }
        product.run(PRODUCTS)?;
        while running.iter().any(|r| r.runs > 0) {
            for r in running.iter_mut().filter(|r| r.runs > 0) {
                r.times.push(inputs.time(r.contender, &r.session)?);
                r.runs -= 1;
            }
            product.run(PRODUCTS)?;
        }
        for r in running {
            let outcome = Outcome::Value(median(r.times));
            found.push(self.measured(r.contender, r.window, outcome));
        }
        Ok(())
    }

    fn measured(&self, contender: Contender, window: Option<usize>, outcome: Outcome) -> Measured {
        Measured {
            threads: self.threads,
            window,
            tokens: self.tokens,
            contender,
            outcome,
        }
    }

    /// Why a contender is not run.
    fn skip(&self, contender: Contender) -> Option<Reason> {
        let scores = HEADS as f64 * (self.tokens as f64).powi(2);
        let seconds = 4.0 * scores * WIDTH as f64 / self.gflops / 1e9;
        let longest = std::env::var("LINFUSION_BENCH_SECONDS")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(60.0);
        match contender {
            Contender::Operator | Contender::Body => None,
            // The scores and their softmax.
            Contender::Softmax if 8.0 * scores > 0.7 * machine::free_memory() => {
                Some(Reason::Memory)
            }
            _ if seconds > longest => Some(Reason::Time(longest)),
            _ => None,
        }
    }

    fn row(&self, window: usize, gflops: f64, all: &[Measured]) -> String {
        let Some(Outcome::Value(operator)) = outcome(all, Contender::Operator, window) else {
            return String::new();
        };
        let mut row = format!("| {} | {window}² | {:.3} |", self.tokens, operator * 1e3);
        for contender in [Contender::Body, Contender::Softmax, Contender::Fused] {
            row += &match outcome(all, contender, window) {
                Some(Outcome::Value(s)) => format!(" {:.3} | {:.1} |", s * 1e3, s / operator),
                Some(Outcome::Skipped(reason)) => format!(" {reason} | – |"),
                None => " – | – |".to_owned(),
            };
        }
        let [useful, halo] = [1, TILE].map(|tile| self.flops(window, tile));
        let share = |flops: f64| 100.0 * flops / gflops / 1e9 / operator;
        row + &format!(
            " {:.2} | {:.2} | {:.0} % | {:.0} % |\n",
            useful / 1e9,
            halo / 1e9,
            share(halo),
            share(useful)
        )
    }

    /// Multiplications and additions of the two products where tiles of so many rows and columns
    /// of queries meet all keys that their windows reach.
    fn flops(&self, window: usize, tile: usize) -> f64 {
        let attrs = attrs(window);
        // Rows and columns are alike.
        let pairs: usize = (0..self.side)
            .step_by(tile)
            .map(|first| {
                let last = (first + tile).min(self.side) - 1;
                let start = attrs.key_range(GridAxis::Rows, first, self.side).start;
                let end = attrs.key_range(GridAxis::Rows, last, self.side).end;
                (last + 1 - first) * (end - start)
            })
            .sum();
        4.0 * (pairs as f64).powi(2) * (HEADS * WIDTH) as f64
    }

    /// Peak memory of all contenders, each in a process of its own.
    fn peaks(&self, windows: &[usize]) -> Result<Vec<Measured>, String> {
        let mut found = vec![];
        for (i, &window) in windows.iter().enumerate() {
            for (number, contender) in Contender::ALL.into_iter().enumerate() {
                let takes = takes_window(contender).then_some(window);
                if takes.is_none() && i > 0 {
                    continue;
                }
                let outcome = match self.skip(contender) {
                    Some(reason) => Outcome::Skipped(reason),
                    None => peak_elsewhere(number, window, self.side)?,
                };
                found.push(self.measured(contender, takes, outcome));
            }
        }
        Ok(found)
    }

    fn peak_row(&self, window: usize, all: &[Measured]) -> String {
        let mut row = format!("| {} | {window}² |", self.tokens);
        for contender in Contender::ALL {
            row += &match outcome(all, contender, window) {
                Some(Outcome::Value(bytes)) => format!(" {:.0} |", bytes / MIB),
                Some(Outcome::Skipped(reason)) => format!(" {reason} |"),
                None => " – |".to_owned(),
            };
        }
        row + "\n"
    }
}

/// What a contender reached with this window.
fn outcome(all: &[Measured], contender: Contender, window: usize) -> Option<Outcome> {
    let window = takes_window(contender).then_some(window);
    let found = all
        .iter()
        .find(|m| m.contender == contender && m.window == window)?;
    Some(found.outcome)
}

fn takes_window(contender: Contender) -> bool {
    matches!(contender, Contender::Operator | Contender::Body)
}

fn attrs(window: usize) -> WindowAttentionAttrs {
    WindowAttentionAttrs {
        num_heads: HEADS,
        scale: None,
        window: Window::Rect {
            rows: window,
            cols: window,
        },
        border: Border::Clamp,
        text: TextSide::Prefix,
    }
}

fn attention(window: usize) -> Attention {
    Attention {
        operator: Operator::Window(attrs(window)),
        heads: HEADS,
        width: WIDTH,
    }
}

/// q, k, v and grid.
struct Inputs([Tensor; 4]);

impl Inputs {
    fn new(host: &Host, side: usize) -> Result<Self, String> {
        let tokens = side * side;
        let shape = [1, tokens as i64, (HEADS * WIDTH) as i64];
        let tensor = |salt| host.tensor(&shape, numbers(tokens * HEADS * WIDTH, salt));
        let grid = host.tensor(&[2], vec![side as i64; 2])?;
        Ok(Self([tensor(0)?, tensor(1)?, tensor(2)?, grid]))
    }

    fn time(&self, contender: Contender, session: &Session<'_>) -> Result<f64, String> {
        let [q, k, v, grid] = &self.0;
        if takes_window(contender) {
            session.time(&[q, k, v, grid])
        } else {
            session.time(&[q, k, v])
        }
    }
}

/// [`peak_of_one_run`] in a process of its own.
fn peak_elsewhere(contender: usize, window: usize, side: usize) -> Result<Outcome, String> {
    let this = std::env::current_exe().map_err(|e| e.to_string())?;
    let output = Command::new(this)
        .arg("--bench")
        .env(PEAK, format!("{contender},{window},{side}"))
        .stderr(Stdio::inherit())
        .output()
        .map_err(|e| e.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.trim().parse() {
        Ok(bytes) => Ok(Outcome::Value(bytes)),
        Err(_) if output.status.success() => Ok(Outcome::Skipped(Reason::Unknown)),
        Err(_) => Err(format!("the run for peak memory: {}", output.status)),
    }
}

/// Prints by how many bytes one run makes this process grow, where the system tells.
fn peak_of_one_run(case: &str) -> Result<(), String> {
    let numbers: Vec<usize> = case.split(',').filter_map(|s| s.parse().ok()).collect();
    let &[contender, window, side] = &numbers[..] else {
        return Err(format!("{PEAK}={case}: expected three numbers"));
    };
    let contender = *Contender::ALL.get(contender).ok_or("no such contender")?;
    let host = Host::from_environment()?;
    let session = host.session(&models::model(contender, attention(window))?, 1)?;
    let Some(before) = memory::start() else {
        return Ok(());
    };
    let inputs = Inputs::new(&host, side)?;
    inputs.time(contender, &session)?;
    if let Some(peak) = memory::peak() {
        println!("{}", peak - before);
    }
    Ok(())
}

/// The exponent of N in `quantity`, by contender and window.
fn exponents<'a>(quantity: &str, measured: impl Iterator<Item = &'a Measured>) -> String {
    let measured: Vec<_> = measured.collect();
    let mut keys: Vec<(Contender, Option<usize>)> = vec![];
    for m in &measured {
        if !keys.contains(&(m.contender, m.window)) {
            keys.push((m.contender, m.window));
        }
    }
    let mut text = format!(
        "\nExponent of N in {quantity} (least squares of its logarithm over that of N):\n\n\
         | | window | exponent | over N = |\n|--|--:|--:|--|\n"
    );
    for contender in Contender::ALL {
        for &(_, window) in keys.iter().filter(|(c, _)| *c == contender) {
            let points: Vec<(usize, f64)> = measured
                .iter()
                .filter(|m| m.contender == contender && m.window == window)
                .filter_map(|m| match m.outcome {
                    Outcome::Value(value) => Some((m.tokens, value)),
                    Outcome::Skipped(_) => None,
                })
                .collect();
            let tokens: Vec<String> = points.iter().map(|(n, _)| n.to_string()).collect();
            text += &format!(
                "| {} | {} | {} | {} |\n",
                contender.name(),
                window.map_or("–".into(), |w| format!("{w}²")),
                slope(&points).map_or("–".into(), |s| format!("{s:.3}")),
                tokens.join(", ")
            );
        }
    }
    text
}

/// The slope of log value over log tokens; of two points or more.
fn slope(points: &[(usize, f64)]) -> Option<f64> {
    let logs: Vec<(f64, f64)> = points
        .iter()
        .map(|(n, value)| ((*n as f64).ln(), value.ln()))
        .collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|l| l.0), mean(|l| l.1));
    let spread: f64 = logs.iter().map(|l| (l.0 - x).powi(2)).sum();
    let along: f64 = logs.iter().map(|l| (l.0 - x) * (l.1 - y)).sum();
    (logs.len() > 1 && spread > 0.0).then(|| along / spread)
}
