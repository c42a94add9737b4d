//! Reads arbitrary bytes as a model. See `make fuzz`.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};

#[path = "../src/targets.rs"]
#[expect(dead_code, reason = "each target uses one of its functions")]
mod targets;

fuzz_target!(|data: &[u8]| -> Corpus {
    match targets::read(data) {
        targets::Reached::Nothing => Corpus::Reject,
        _ => Corpus::Keep,
    }
});
