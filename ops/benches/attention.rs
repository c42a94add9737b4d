//! The kernel itself: time, GFLOP/s and GB/s beside what this machine's multiply-add units and
//! memory give, by head width and number of tokens.
//!
//! `cargo bench -p linfusion-ops [-- FILTER]`; `LINFUSION_BENCH_TOKENS=256,4096` and
//! `LINFUSION_BENCH_WIDTHS=40,64` narrow it. On a busy machine `LINFUSION_BENCH_CLOCK=cpu` (Linux)
//! counts the processor time of the calling thread instead of wall time, with one thread.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use half::f16;
use linfusion_ops::cpu::{
    Element, Execution, Isa, Tensors, Threads, as_output, linfusion_attention,
};
use linfusion_ops::{Dims, Layout};

const BATCH: usize = 2;
const HEADS: usize = 8;

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let widths = list("LINFUSION_BENCH_WIDTHS", &[40, 64, 80, 160]);
    let tokens = list("LINFUSION_BENCH_TOKENS", &[256, 1024, 4096, 16384, 65536]);
    let most = if cpu_clock() { 1 } else { cores.min(2) };
    for threads in 1..=most {
        let peak = fma_peak(threads);
        let copy = copy_bandwidth(threads);
        println!(
            "{threads} thread(s): multiply-add peak {peak:.0} GFLOP/s, copy {copy:.1} GB/s, kernels {}",
            Isa::best()
        );
        println!(
            "{:>5} {:>4} {:>7} {:>10} {:>9} {:>7} {:>9}",
            "type", "D", "tokens", "ms", "GFLOP/s", "GB/s", "of limit"
        );
        for &width in &widths {
            for &tokens in &tokens {
                row::<f32>("f32", width, tokens, threads, peak, copy);
            }
        }
        for &tokens in &tokens {
            row::<f16>("f16", 64, tokens, threads, peak, copy);
        }
    }
}

fn list(variable: &str, default: &[usize]) -> Vec<usize> {
    match std::env::var(variable) {
        Ok(text) => text
            .split(',')
            .filter_map(|s| s.trim().parse().ok())
            .collect(),
        Err(_) => default.to_vec(),
    }
}

fn row<T: Element + From32>(
    name: &str,
    width: usize,
    tokens: usize,
    threads: usize,
    peak: f64,
    copy: f64,
) {
    let dims = Dims {
        layout: Layout::Packed,
        batch: BATCH,
        heads: HEADS,
        queries: tokens,
        keys: tokens,
        head_dim: width,
        value_dim: width,
    };
    let len = BATCH * HEADS * tokens * width;
    let data: Vec<T> = (0..len)
        .map(|i| T::from32(((i * 2_654_435_761) % 1000) as f32 / 250.0 - 2.0))
        .collect();
    let mut out = vec![T::from32(0.0); len];
    let pool = Threads(NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN));
    let (k, v) = (data.clone(), data.clone());
    let seconds = best_time(|| {
        let tensors = Tensors {
            q: &data,
            k: &k,
            v: &v,
            out: as_output(&mut out),
        };
        let execution = Execution {
            isa: Isa::best(),
            pool: &pool,
        };
        linfusion_attention(&dims, 1e-4, tensors, execution).expect("sizes fit");
        black_box(&mut out);
    });
    let gflops = dims.flops() / seconds / 1e9;
    let gbytes = dims.bytes(T::TYPE) / seconds / 1e9;
    // The time that the slower of the two resources needs at least.
    let limit = (dims.flops() / peak / 1e9).max(dims.bytes(T::TYPE) / copy / 1e9);
    println!(
        "{name:>5} {width:>4} {tokens:>7} {:>10.3} {gflops:>9.1} {gbytes:>7.1} {:>8.0}%",
        seconds * 1e3,
        100.0 * limit / seconds
    );
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

/// The shortest of several runs: other work on the machine only ever adds time. By processor time,
/// whose steps are coarse, the mean.
fn best_time(mut run: impl FnMut()) -> f64 {
    run();
    let (mut best, mut runs) = (f64::INFINITY, 0);
    let (start, wall) = (now(), Instant::now());
    while runs < 5 || (wall.elapsed() < Duration::from_millis(500) && runs < 1000) {
        let one = now();
        run();
        best = best.min(now() - one);
        runs += 1;
    }
    if cpu_clock() {
        return (now() - start) / f64::from(runs);
    }
    best
}

fn cpu_clock() -> bool {
    std::env::var("LINFUSION_BENCH_CLOCK").is_ok_and(|clock| clock == "cpu")
}

/// Seconds since some fixed moment.
fn now() -> f64 {
    if cpu_clock() {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
        let nanoseconds = text.split(' ').next().and_then(|n| n.parse::<f64>().ok());
        return nanoseconds.expect("the processor-time clock needs Linux") / 1e9;
    }
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// GFLOP/s of independent multiply-adds on registers, on all threads at once.
fn fma_peak(threads: usize) -> f64 {
    const ROUNDS: usize = 2_000_000;
    let per_round = multiply_adds(1);
    let seconds = best_time(|| {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| black_box(multiply_adds(ROUNDS)));
            }
            black_box(multiply_adds(ROUNDS));
        });
    });
    threads as f64 * 2.0 * per_round as f64 * ROUNDS as f64 / seconds / 1e9
}

/// Runs `rounds` rounds and returns the multiply-adds of one.
fn multiply_adds(rounds: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the machine has AVX-512F.
            return unsafe { multiply_adds_avx512(rounds) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the machine has AVX2 and FMA.
            return unsafe { multiply_adds_avx2(rounds) };
        }
    }
    let mut sums = [1.0f32; 32];
    for _ in 0..rounds {
        for s in &mut sums {
            *s = *s * 0.999 + 0.001;
        }
    }
    black_box(sums).len()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn multiply_adds_avx512(rounds: usize) -> usize {
    use std::arch::x86_64::*;
    let (a, b) = (
        _mm512_set1_ps(black_box(0.999)),
        _mm512_set1_ps(black_box(0.001)),
    );
    let mut sums = [_mm512_set1_ps(1.0); 16];
    for _ in 0..rounds {
        for s in &mut sums {
            *s = _mm512_fmadd_ps(*s, a, b);
        }
    }
    black_box(sums).len() * 16
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_adds_avx2(rounds: usize) -> usize {
    use std::arch::x86_64::*;
    let (a, b) = (
        _mm256_set1_ps(black_box(0.999)),
        _mm256_set1_ps(black_box(0.001)),
    );
    let mut sums = [_mm256_set1_ps(1.0); 12];
    for _ in 0..rounds {
        for s in &mut sums {
            *s = _mm256_fmadd_ps(*s, a, b);
        }
    }
    black_box(sums).len() * 8
}

/// GB/s of copying, read and written bytes both counted, far beyond the caches.
fn copy_bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let from = vec![1u8; BYTES];
    let mut to = vec![0u8; BYTES];
    let part = BYTES / threads;
    let seconds = best_time(|| {
        if threads == 1 {
            to.copy_from_slice(&from);
        } else {
            std::thread::scope(|scope| {
                for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
                    scope.spawn(|| to.copy_from_slice(from));
                }
            });
        }
        black_box(&mut to);
    });
    2.0 * BYTES as f64 / seconds / 1e9
}
