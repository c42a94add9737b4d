//! Reads arbitrary bytes as a model, and does with it all that reading can do.
//!
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run read -- -max_total_time=60`, after
//! `cargo run -p linfusion-models --example fuzz_seeds fuzz/corpus/read` for a start.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::{Corpus, fuzz_target};
use linfusion_models::onnx::check::check_model;
use linfusion_models::onnx::text::{PrintOptions, print_model};
use linfusion_models::onnx::{OnnxFile, for_each_tensor};

fuzz_target!(|data: &[u8]| -> Corpus {
    let bytes = Bytes::copy_from_slice(data);
    // With a folder, so that external data is looked up too. Nothing is in it.
    let folder = std::path::Path::new("/proc/self/fdinfo");
    let Ok(file) = OnnxFile::from_bytes(bytes, Some(folder)) else {
        return Corpus::Reject;
    };
    let _ = check_model(&file.model, Some(&file));
    for_each_tensor(&file.model, &mut |_, tensor| {
        if let Ok(values) = file.tensor(tensor) {
            let fits = values.element.byte_len(&values.dims);
            assert_eq!(fits, Ok(Some(values.bytes.len())));
            let _ = (values.to_f32_vec(), values.to_f64_vec(), values.to_i64_vec());
        }
    });
    let options = PrintOptions {
        file: Some(&file),
        ..PrintOptions::default()
    };
    assert!(!print_model(&file.model, options).to_string().is_empty());
    Corpus::Keep
});
