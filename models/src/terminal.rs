//! What programs tell whoever started them. `println!` and `eprintln!` panic where a pipe is closed or a disk full.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

/// Writes a line to standard error. Where that is closed or full, there is nobody to tell.
pub fn say(line: impl Display) {
    // In one piece, so that no other process's line comes between.
    let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// Writes a report to standard output. A reader that went away (`| head`) is no failure.
///
/// # Errors
/// Standard output takes no more; the message names it.
pub fn print(report: impl AsRef<[u8]>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(report.as_ref()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(io::Error::new(
            e.kind(),
            format!("writing to standard output: {e}"),
        )),
        _ => Ok(()),
    }
}
