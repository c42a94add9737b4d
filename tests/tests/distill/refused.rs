//! Recorded inputs, and what cannot be done.

use std::fs::File;
use std::path::PathBuf;

use linfusion_convert::distill::{DistillError, Request, Source};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::random::SplitMix64;
use linfusion_runtime::npz;
use linfusion_runtime::tensor::Tensor;
use ndarray::{ArrayD, IxDyn};

use super::sketch::{Looks, SIDE, SPEC, left, quietly, request, weights};

#[test]
fn inputs_may_be_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    let recorded = folder.path().join("inputs");
    std::fs::create_dir(&recorded).unwrap();
    let mut random = SplitMix64::new(2);
    let mut record = |number: usize, names: [&str; 2], side: usize, broken: f32| {
        let image = ArrayD::from_shape_simple_fn(IxDyn(&[1, 4, side, side]), || {
            random.symmetric() as f32 + broken
        });
        let arrays = [
            (names[0].to_owned(), Tensor::F32(image)),
            (names[1].to_owned(), Tensor::from(ndarray::arr1(&[1.0_f64]))),
        ];
        npz::write(&recorded.join(format!("{number:03}.npz")), &arrays).unwrap();
    };
    for number in 0..12 {
        record(number, ["sample", "t"], SIDE, 0.0);
    }
    request.source = Source::Folder(recorded.clone());
    request.schedule.steps = 5;
    quietly(&request).unwrap();
    let learned = weights(&request.out);
    request.overwrite = Overwrite::Force;

    let mut refused = |number, names, side, broken, expected: &[&str]| {
        record(number, names, side, broken);
        let error = quietly(&request).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(weights(&request.out), learned, "earlier weights are kept");
        record(number, ["sample", "t"], SIDE, 0.0);
    };
    refused(
        3,
        ["image", "t"],
        SIDE,
        0.0,
        &["003.npz", "'sample'", "image"],
    );
    refused(
        4,
        ["sample", "t"],
        16,
        0.0,
        &["004.npz", "[1, 4, 16, 16]", "f32[1, 4, 8, 8]"],
    );
    refused(
        11,
        ["sample", "t"],
        SIDE,
        f32::NAN,
        &["011.npz", "'sample'", "NaN"],
    );
    // Finite itself, and its square is not.
    refused(
        11,
        ["sample", "t"],
        SIDE,
        1e30,
        &["011.npz", "blocks.0.attn1", "NaN"],
    );
    request.samples = 9;
    let error = quietly(&request).unwrap_err().to_string();
    assert!(
        error.contains("12 .npz files") && error.contains("13"),
        "{error}"
    );
}

#[test]
fn two_do_not_learn_into_one_output() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.schedule.steps = 5;
    let kept = folder.path().join("linfusion.unfinished");
    std::fs::create_dir(&kept).unwrap();
    let other = File::open(&kept).unwrap();
    other.lock().unwrap();
    let error = quietly(&request).unwrap_err();
    assert!(matches!(error, DistillError::Busy { .. }), "{error}");
    drop(other);
    quietly(&request).unwrap();
    assert!(!kept.exists());
}

#[test]
fn what_cannot_be_done_is_said_before_work_begins() {
    let folder = tempfile::tempdir().unwrap();
    let good = request(folder.path(), Looks::Anywhere);
    let refused = |change: &dyn Fn(&mut Request), expected: &str| {
        let mut request = good.clone();
        change(&mut request);
        let error = quietly(&request).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(
            left(&folder).iter().all(|n| n == "taken"),
            "{:?}",
            left(&folder)
        );
    };
    refused(&|r| r.samples = 0, "--samples");
    refused(&|r| r.holdout = 0, "--holdout");
    refused(&|r| r.schedule.batch = Some(0), "--batch");
    refused(
        &|r| r.plot = Some(PathBuf::from("nowhere/losses.svg")),
        "nowhere/losses.svg",
    );
    refused(&|r| r.schedule.learning_rate = f64::NAN, "--lr");
    refused(&|r| r.disk_budget = 1000, "--disk-budget");
    refused(&|r| r.out = folder.path().join("no/where"), "where");
    std::fs::create_dir(folder.path().join("taken")).unwrap();
    refused(&|r| r.out = folder.path().join("taken"), "--force");
    let spec = |text: &'static str| {
        move |r: &mut Request| {
            let path = r.scratch.clone().unwrap().join("spec.json");
            std::fs::write(&path, text).unwrap();
            r.source = Source::Random(path);
        }
    };
    refused(&spec(r#"{"t": {"constant": 1}}"#), "'sample'");
    refused(
        &spec(r#"{"sample": {"normal": {}}, "t": {"constant": 1}, "u": {"constant": 1}}"#),
        "'u'",
    );
    refused(
        &spec(r#"{"sample": {"wide": {}}, "t": {"constant": 1}}"#),
        "log-uniform",
    );
    refused(
        &spec(r#"{"sample": {"normal": {}}, "t": {"uniform": {"min": 2, "max": 1}}}"#),
        "impossible",
    );
    refused(
        &spec(r#"{"sample": {"normal": {}, "shape": [1, 4, 9, 9]}, "t": {"constant": 1}}"#),
        "[1, 4, 9, 9]",
    );
    std::fs::write(folder.path().join("spec.json"), SPEC).unwrap();
    let none = linfusion_convert::patterns::Patterns::new("--keep", &["*".to_owned()]).unwrap();
    refused(
        &|r| r.selection.keep = none.clone(),
        "no attention whose weights could be learned",
    );
}
