//! Exports of one image size, resized: they compute what an export of the same weights that takes any
//! size computes.

use std::path::{Path, PathBuf};

use linfusion_convert::convert::{ConvertError, WeightsFrom, convert};
use linfusion_convert::plan::{MethodRule, Selection};
use linfusion_convert::report::ConvertReport;
use linfusion_convert::resize::{ImageSize, ResizeError};
use linfusion_models::checkpoint::MlpWidth;
use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::inputs;
use linfusion_runtime::tensor::Tensor;
use linfusion_tests::{checkpoint_for, has_ort, max_difference, request};
use rstest::rstest;

fn engine() -> Engine {
    if has_ort() {
        Engine::Ort
    } else {
        Engine::Tract
    }
}

fn unpack(name: &str, folder: &Path) -> PathBuf {
    let path = folder.join(name.replace('/', "_").trim_end_matches(".gz"));
    std::fs::write(&path, fixtures::bytes(name).unwrap()).unwrap();
    path
}

/// Resizes and keeps all attention.
fn resize(model: &Path, out: &Path, size: ImageSize) -> Result<ConvertReport, ConvertError> {
    let mut job = request(model, out, WeightsFrom::Search);
    job.resize = Some(size);
    job.selection = keep();
    convert(&job, &mut |_| {})
}

fn keep() -> Selection {
    Selection {
        attention: vec![MethodRule {
            sites: None,
            method: None,
        }],
        ..Selection::default()
    }
}

/// Outputs of both models on the same inputs, with an image of `size`.
fn run_both(a: &Path, b: &Path, size: [usize; 2]) -> [Vec<(String, Tensor)>; 2] {
    let options = SessionOptions {
        operators: Operators::InProcess,
        ..SessionOptions::default()
    };
    let mut sessions = [a, b].map(|path| Session::from_file(engine(), path, &options).unwrap());
    let ports = sessions[0].inputs();
    let image = ports
        .iter()
        .find(|p| p.shape.as_ref().is_some_and(|s| s.len() == 4))
        .unwrap();
    let channels = if image.name == "noisy" { 1 } else { 4 };
    let wanted = inputs::Request {
        shapes: vec![(image.name.clone(), vec![2, channels, size[0], size[1]])],
        sequence: 7,
        ..inputs::Request::default()
    };
    let mut feed = inputs::make(ports, &wanted).unwrap();
    for (_, tensor) in &mut feed {
        // Noise levels are positive.
        if tensor.dtype().is_float() && tensor.shape().len() < 2 {
            let levels = tensor.to_f64().mapv(|v| v.abs() + 0.1);
            *tensor = Tensor::from_f64(levels, tensor.dtype());
        }
    }
    sessions.each_mut().map(|s| s.run(&feed).unwrap())
}

fn apart([a, b]: &[Vec<(String, Tensor)>; 2]) -> f64 {
    let values = a.iter().flat_map(|(_, t)| t.to_f64());
    let largest = values.fold(0.0f64, |m, v| m.max(v.abs()));
    max_difference(a, b) / largest
}

/// Both are the same sums in float32, of up to 300 terms, in an order that an exporter chose.
const ROUNDING: f64 = 2e-5;

#[rstest]
#[case::einsum(
    "terrain/terrain-fixed.onnx.gz",
    "terrain/terrain-dynamic.onnx.gz",
    55,
    4
)]
#[case::torchscript(
    "exports/sd15-ts17-fix-sdpa.onnx.gz",
    "exports/sd15-ts14-dyn-sdpa.onnx.gz",
    32,
    8
)]
#[case::onnxslim(
    "exports/sd15-ts17-fix-sdpa-slim.onnx.gz",
    "exports/sd15-ts14-dyn-sdpa.onnx.gz",
    157,
    8
)]
#[case::dynamo(
    "exports/sd15-dynamo20-fix-sdpa.onnx.gz",
    "exports/sd15-dynamo20-dyn-sdpa.onnx.gz",
    125,
    8
)]
#[case::opset23(
    "exports/sd15-dynamo23-fix-sdpa.onnx.gz",
    "exports/sd15-ts14-dyn-sdpa.onnx.gz",
    32,
    8
)]
fn a_resized_export_is_the_dynamic_one(
    #[case] fixed: &str,
    #[case] dynamic: &str,
    #[case] nodes: usize,
    #[case] multiple_of: i64,
) {
    // tract takes a minute to load the larger ones at their sizes.
    if !has_ort() && !fixed.starts_with("terrain") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (fixed, dynamic) = (unpack(fixed, folder.path()), unpack(dynamic, folder.path()));
    let any = folder.path().join("any.onnx");
    let report = resize(&fixed, &any, ImageSize::Dynamic).unwrap();
    let resized = report.resized.unwrap();
    assert_eq!(
        (resized.nodes.len(), resized.multiple_of),
        (nodes, multiple_of)
    );
    assert_eq!(resized.verified.unwrap().max_relative_error, Some(0.0));
    assert_eq!((report.converted, report.output.is_some()), (0, true));
    for size in [[24, 40], [32, 16]] {
        let apart = apart(&run_both(&dynamic, &any, size));
        assert!(apart < ROUNDING, "{size:?}: {apart:e} apart");
    }
    let one = folder.path().join("one.onnx");
    resize(
        &fixed,
        &one,
        ImageSize::Fixed {
            height: 24,
            width: 40,
        },
    )
    .unwrap();
    let apart = apart(&run_both(&dynamic, &one, [24, 40]));
    assert!(apart < ROUNDING, "24x40 alone: {apart:e} apart");
}

#[test]
fn resizing_and_converting_at_once_is_converting_the_dynamic_export() {
    if !has_ort() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [fixed, dynamic] = ["fix", "dyn"].map(|shapes| {
        unpack(
            &format!("exports/sd15-dynamo20-{shapes}-sdpa.onnx.gz"),
            folder.path(),
        )
    });
    let weights = checkpoint_for(&dynamic, folder.path(), MlpWidth::Width(4)).unwrap();
    let outs = ["fixed", "dynamic"].map(|n| folder.path().join(format!("{n}.linfusion.onnx")));
    for (model, out, size) in [
        (&fixed, &outs[0], Some(ImageSize::Dynamic)),
        (&dynamic, &outs[1], None),
    ] {
        let mut job = request(model, out, WeightsFrom::Path(weights.clone()));
        job.resize = size;
        let report = convert(&job, &mut |_| {}).unwrap();
        assert_eq!(report.converted, 16);
    }
    let apart = apart(&run_both(&outs[1], &outs[0], [24, 40]));
    assert!(apart < ROUNDING, "{apart:e} apart");
}

#[rstest]
#[case("transformers/pixart-ts17-fix-attn.onnx.gz", "/pos_embed/")]
#[case("transformers/sit-dynamo23-fix-sdpa.onnx.gz", "pos_embed")]
fn a_position_table_is_named(#[case] name: &str, #[case] table: &str) {
    let folder = tempfile::tempdir().unwrap();
    let model = unpack(name, folder.path());
    let out = folder.path().join("out.onnx");
    match resize(&model, &out, ImageSize::Dynamic) {
        Err(ConvertError::Resize { source, .. }) => {
            let ResizeError::FixedTensor { tensor, .. } = *source else {
                panic!("{source}");
            };
            assert!(tensor.starts_with(table), "{tensor}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!out.exists());
}
