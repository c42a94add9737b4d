//! What this machine's multiply-add units and memory give.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::machine::now;

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
