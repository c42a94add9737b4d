//! Signals that end a program: SIGINT (Ctrl-C), SIGTERM, and SIGHUP, where whoever started it did not have it ignored, as
//! `nohup` does.

use std::io;
use std::sync::mpsc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Lets `handler` hear of each of them, on a thread of its own.
///
/// SIGINT is heard where it was ignored, too: shells without job control have it so in what they run beside themselves, and
/// whoever sends it to that program alone means it.
///
/// # Errors
/// The system gives no thread or no handler; signals then do what they did before.
pub fn on_each(mut handler: impl FnMut() + Send + 'static) -> io::Result<()> {
    // SIGINT last: whoever sees that one handled can count on the others.
    let ending = [SIGHUP, SIGTERM, SIGINT].into_iter();
    let hangup = is_in(own("SigIgn"), SIGHUP);
    let wanted: Vec<i32> = ending.filter(|s| !(*s == SIGHUP && hangup)).collect();
    let (tell, told) = mpsc::channel();
    // The thread first: a handler without one would swallow signals.
    let hear = move || {
        let signals = Signals::new(wanted);
        let (mut signals, outcome) = match signals {
            Ok(signals) => (Some(signals), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // Fails only if nobody waits any more.
        let _ = tell.send(outcome);
        let heard = signals.iter_mut().flat_map(|signals| signals.forever());
        heard.for_each(|_| handler());
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(hear)?;
    told.recv().map_err(io::Error::other)?
}

/// A set of signals of this process, as Linux tells it: `SigIgn`, those ignored. Nothing where it does not tell.
fn own(set: &str) -> u64 {
    signal_set("self", set).unwrap_or_default()
}

/// A set of signals of a process, `SigIgn` or `SigCgt`, a bit each.
pub(crate) fn signal_set(process: &str, set: &str) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
    let mut lines = status.lines();
    let bits = lines.find_map(|line| line.strip_prefix(set)?.strip_prefix(':'))?;
    u64::from_str_radix(bits.trim(), 16).ok()
}

/// Whether a signal is in a set.
pub(crate) fn is_in(set: u64, signal: i32) -> bool {
    set >> (signal - 1) & 1 == 1
}
