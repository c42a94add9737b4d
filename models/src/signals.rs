//! Signals that end a program: SIGINT (Ctrl-C), SIGTERM, and SIGHUP, where whoever started it did not have it ignored, as
//! `nohup` does.

use std::io;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Lets `handler` hear of each of them, on a thread of its own.
///
/// # Errors
/// The system gives no handler or no thread.
pub fn on_each(mut handler: impl FnMut() + Send + 'static) -> io::Result<()> {
    let ignored = ignored();
    // SIGINT last: whoever sees that one handled can count on the others.
    let ending = [SIGHUP, SIGTERM, SIGINT].into_iter();
    // A shell has SIGINT ignored in what it runs beside itself; that is no wish to go on.
    let wanted = ending.filter(|signal| *signal != SIGHUP || ignored >> (SIGHUP - 1) & 1 == 0);
    let mut signals = Signals::new(wanted)?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || signals.forever().for_each(|_| handler()))
        .map(drop)
}

/// The signals that the program began with ignored, a bit each.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
    set.unwrap_or(0)
}
