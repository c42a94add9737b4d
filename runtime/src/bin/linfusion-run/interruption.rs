//! What happens on a signal that ends a program: it ends at once, and leaves no temporary files, or it stops when it may.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use linfusion_models::terminal::say;
use linfusion_models::{leftovers, signals};
use miette::IntoDiagnostic;

/// Exit code of a run that the user stopped, as shells give it for Ctrl-C.
pub const STOPPED: u8 = 130;

/// What is said to the first signal, which only asks to stop; nothing where it ends the program.
static NOTE: OnceLock<&str> = OnceLock::new();
static ASKED: AtomicBool = AtomicBool::new(false);

/// To be called once, before anything is done.
pub fn handle() -> miette::Result<()> {
    signals::on_each(|| {
        // The second time it means it, even in the middle of a step.
        let again = ASKED.swap(true, Ordering::SeqCst);
        if let (Some(note), false) = (NOTE.get(), again) {
            // Nobody may be there to read it, as after SIGHUP.
            say(note);
            return;
        }
        leftovers::remove_all();
        // Without the destructors of ONNX Runtime, whose threads still run.
        signal_hook::low_level::exit(i32::from(STOPPED));
    })
    .into_diagnostic()
}

/// From here on somebody looks between two steps whether it [`is_asked_for`]: the first signal only asks.
pub fn may_wait() {
    asks("stopping after this step; Ctrl-C again stops at once");
}

/// The same, with other words.
pub fn asks(note: &'static str) {
    // Where there are some, they hold.
    let _ = NOTE.set(note);
}

/// Whether there was a signal.
pub fn is_asked_for() -> bool {
    ASKED.load(Ordering::SeqCst)
}
