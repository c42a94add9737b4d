//! The largest resident memory of a run.

use std::fs;

/// Forgets the largest resident memory so far and returns the present one in bytes, where the
/// system can (Linux).
pub fn start() -> Option<f64> {
    fs::write("/proc/self/clear_refs", "5").ok()?;
    field("VmRSS")
}

/// Bytes of the largest resident memory since [`start`].
pub fn peak() -> Option<f64> {
    field("VmHWM")
}

fn field(name: &str) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024.0)
}
