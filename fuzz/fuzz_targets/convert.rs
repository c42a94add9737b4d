//! Inspects and converts arbitrary bytes as a model. See `make fuzz`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{Corpus, fuzz_target};
use tempfile::TempDir;

#[path = "../src/targets.rs"]
#[expect(dead_code, reason = "each target uses one of its functions")]
mod targets;

static FOLDER: LazyLock<TempDir> =
    LazyLock::new(|| tempfile::tempdir().expect("a temporary folder can be made"));

fuzz_target!(|data: &[u8]| -> Corpus {
    match targets::convert(data, FOLDER.path()) {
        targets::Reached::Nothing => Corpus::Reject,
        _ => Corpus::Keep,
    }
});
