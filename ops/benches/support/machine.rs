//! What this machine is, and its clock.

use std::sync::OnceLock;
use std::time::Instant;

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
