//! Memory of this process and of the machine, where the system tells (Linux).

use sysinfo::System;

/// Bytes that can be had without swapping, within the limit of a container.
pub fn available() -> Option<u64> {
    let mut system = System::new();
    system.refresh_memory();
    let free = Some(system.available_memory()).filter(|bytes| *bytes > 0)?;
    // A group without a limit has the machine's memory as limit. Its own count of what is free takes cached files for used.
    let limit = system
        .cgroup_limits()
        .filter(|group| group.total_memory < system.total_memory())
        .map(|group| group.total_memory.saturating_sub(group.rss));
    Some(limit.map_or(free, |limit| free.min(limit)))
}

/// The most that this process had in memory since it began, or since [`reset_peak`].
pub fn peak() -> Option<u64> {
    status("VmHWM:")
}

/// What this process has in memory.
pub fn resident() -> Option<u64> {
    status("VmRSS:")
}

/// Begins [`peak`] anew; where the system doesn't allow it, it goes on from the process's begin.
pub fn reset_peak() {
    // 5: only this process's high-water mark, see proc_pid_clear_refs(5).
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn status(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(field))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// `bytes` for people: `812 MB`, `12.5 GB`.
pub fn shown(bytes: u64) -> String {
    let megabytes = bytes as f64 / 1e6;
    match megabytes {
        m if m < 999.5 => format!("{m:.0} MB"),
        m if m < 99_950.0 => format!("{:.1} GB", m / 1e3),
        m if m < 999_500.0 => format!("{:.0} GB", m / 1e3),
        m => format!("{:.1} TB", m / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_os = "linux")]
    fn what_is_taken_is_seen() {
        let block = vec![1_u8; 64 << 20];
        assert!(peak().unwrap() >= 64 << 20);
        assert!(resident().unwrap() <= peak().unwrap());
        assert!(available().unwrap() > 1 << 20);
        assert_eq!(block.iter().map(|b| u64::from(*b)).sum::<u64>(), 64 << 20);
    }

    #[test]
    fn sizes_are_readable() {
        assert_eq!(shown(812_400_000), "812 MB");
        assert_eq!(shown(12_460_000_000), "12.5 GB");
        assert_eq!(shown(2_000_000_000_000), "2.0 TB");
    }
}
