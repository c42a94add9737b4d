//! What this machine's multiply-add units and memory give, and what it is.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The first line of `/proc/cpuinfo` that names the processor.
pub fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line
        .and_then(|line| line.split_once(':'))
        .map(|(_, n)| n.trim());
    name.unwrap_or(std::env::consts::ARCH).to_owned()
}

/// Bytes of memory that are free for use, where the system says so.
pub fn free_memory() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("MemAvailable"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.map_or(f64::INFINITY, |kib| kib * 1024.0)
}

/// Seconds since some fixed moment; with `LINFUSION_BENCH_CLOCK=cpu` (Linux, one thread) the
/// processor time of the calling thread, which other work on the machine disturbs less.
pub fn now() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    static BY_CPU: OnceLock<bool> = OnceLock::new();
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    if *BY_CPU.get_or_init(|| std::env::var("LINFUSION_BENCH_CLOCK").is_ok_and(|c| c == "cpu")) {
        const CLOCK_THREAD_CPUTIME_ID: i32 = 3;
        unsafe extern "C" {
            fn clock_gettime(clock: i32, time: *mut [i64; 2]) -> i32;
        }
        let mut time = [0; 2];
        // SAFETY: two 64-bit numbers are the C library's timespec here.
        unsafe { clock_gettime(CLOCK_THREAD_CPUTIME_ID, &mut time) };
        return time[0] as f64 + time[1] as f64 * 1e-9;
    }
    let _ = &BY_CPU;
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// The shortest of several runs within half a second: other work on the machine only adds time.
pub fn best_time(mut run: impl FnMut()) -> f64 {
    run();
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed() < Duration::from_millis(500) {
        let one = now();
        run();
        best = best.min(now() - one);
    }
    best
}

/// GFLOP/s of independent multiply-adds on registers, on all threads at once.
pub fn fma_peak(threads: usize) -> f64 {
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
pub fn copy_bandwidth(threads: usize) -> f64 {
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
