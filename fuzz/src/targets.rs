//! What the fuzz targets do with bytes, shared with `tests/tests/fuzz_smoke.rs`,
//! which does the same without a fuzzer.

use std::path::Path;

use bytes::Bytes;
use linfusion_convert::convert::{
    Partial, Request, WeightsFrom, convert as convert_model, inspect,
};
use linfusion_convert::plan::Selection;
use linfusion_convert::resize::{ImageSize, resize};
use linfusion_convert::rewrite::Emit;
use linfusion_convert::verify::Verify;
use linfusion_models::onnx::check::check_model;
use linfusion_models::onnx::text::{PrintOptions, print_model};
use linfusion_models::onnx::{OnnxFile, for_each_tensor};

/// How far the bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reached {
    /// They are no model: nothing to start mutations from.
    Nothing,
    /// They were read.
    Model,
    /// A converted model was written.
    Converted,
}

/// Reads `data` as a model, and does with it all that reading can do.
pub fn read(data: &[u8]) -> Reached {
    // With a folder, so that external data is looked up too. Nothing is in it.
    let folder = Path::new("/proc/self/fdinfo");
    let Ok(file) = OnnxFile::from_bytes(Bytes::copy_from_slice(data), Some(folder)) else {
        return Reached::Nothing;
    };
    let _ = check_model(&file.model, Some(&file));
    for_each_tensor(&file.model, &mut |_, tensor| {
        if let Ok(values) = file.tensor(tensor) {
            let fits = values.element.byte_len(&values.dims);
            assert_eq!(fits, Ok(Some(values.bytes.len())));
            let _ = (
                values.to_f32_vec(),
                values.to_f64_vec(),
                values.to_i64_vec(),
            );
        }
    });
    let options = PrintOptions {
        file: Some(&file),
        ..PrintOptions::default()
    };
    assert!(!print_model(&file.model, options).to_string().is_empty());
    Reached::Model
}

/// Inspects `data` as a model, resizes it, and converts it without weights, in `folder`, which is
/// left empty: what is written must read back, and be in order if the model was.
pub fn convert(data: &[u8], folder: &Path) -> Reached {
    let (model, out) = (folder.join("model.onnx"), folder.join("out.onnx"));
    if std::fs::write(&model, data).is_err() {
        return Reached::Nothing;
    }
    let reached = match inspect(&model, &Selection::default()) {
        Ok(report) => {
            assert!(!report.table().is_empty());
            if let Ok(file) = OnnxFile::open(&model) {
                let _ = resize(&file, ImageSize::Dynamic);
            }
            let emit = [Emit::Function, Emit::Op, Emit::Standard][data.len() % 3];
            convert_file(&model, &out, emit)
        }
        Err(_) => Reached::Nothing,
    };
    let _ = std::fs::remove_file(&out);
    let _ = std::fs::remove_file(&model);
    reached
}

fn convert_file(model: &Path, out: &Path, emit: Emit) -> Reached {
    let was_in_order = OnnxFile::open(model).is_ok_and(|f| check_model(&f.model, Some(&f)).is_ok());
    let request = Request {
        model: model.to_owned(),
        out: Some(out.to_owned()),
        weights: WeightsFrom::Untrained,
        emit,
        partial: Partial::Allow,
        verify: Verify::Off,
        ..Request::default()
    };
    let converted = convert_model(&request, &mut |_| {}).is_ok();
    assert_eq!(converted, out.exists());
    if !converted {
        return Reached::Model;
    }
    let file = OnnxFile::open(out).expect("what was written reads back");
    if was_in_order {
        let problems = check_model(&file.model, Some(&file));
        assert!(problems.is_ok(), "{problems:?}");
    }
    Reached::Converted
}
