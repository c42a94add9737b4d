//! Converted graphs compute what the official PyTorch LinFusion computes.

use std::path::{Path, PathBuf};

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::rewrite::Emit;
use linfusion_convert::verify::compare_weights;
use linfusion_models::checkpoint::{Checkpoint, MlpWidth};
use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::npz;
use linfusion_runtime::tensor::{DType, Tensor};
use linfusion_tests::{checkpoint_for, has_ort, max_difference, request, run, unpack};
use rstest::rstest;

/// A conversion with plain standard operators is 2e-6 to 7e-6 off; outputs have a
/// standard deviation near 0.6.
const BOUND: f64 = 3e-5;

/// The case's model, unpacked if need be.
fn model(case: &Path, scratch: &Path) -> PathBuf {
    let plain = case.join("unet.onnx");
    if plain.exists() {
        return plain;
    }
    let unpacked = scratch.join("model.onnx");
    let packed = ["unet.onnx.gz", "model.onnx.gz"].map(|name| case.join(name));
    let name = packed.into_iter().find(|path| path.exists()).unwrap();
    std::fs::write(&unpacked, fixtures::bytes(name.to_str().unwrap()).unwrap()).unwrap();
    unpacked
}

#[rstest]
fn equals_the_official_code(
    // The third has checkpoint MLPs that are the identity, in opset 14; the fourth
    // comes from the dynamo exporter.
    #[values("sd15-tiny", "sdxl-tiny", "sd15-identity", "sd21-narrow")] case: &str,
    #[values(Emit::Function, Emit::Op, Emit::Standard)] emit: Emit,
) {
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures::path(case);
    let out = folder.path().join("unet.linfusion.onnx");
    let mut job = request(
        &model(&case, folder.path()),
        &out,
        WeightsFrom::Path(case.join("linfusion")),
    );
    job.emit = emit;
    let report = convert(&job, &mut |_| {}).unwrap();
    assert_eq!(report.converted, report.model.expected_self.unwrap());

    let inputs = npz::read(&case.join("inputs.npz")).unwrap();
    let expected = npz::read(&case.join("expected.npz")).unwrap();
    let mut engines = vec![(Engine::Tract, Operators::InProcess)];
    if has_ort() {
        engines.push((Engine::Ort, Operators::InProcess));
        if emit != Emit::Op {
            engines.push((Engine::Ort, Operators::None));
        }
    }
    let mut failures = Vec::new();
    for (engine, operators) in engines {
        let found = run(engine, &out, operators.clone(), &inputs).unwrap();
        let error = max_difference(&found, &expected);
        if error > BOUND {
            failures.push(format!("{engine} {operators:?}: {error:e}"));
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Transformers with hybrid and window attention compute what PyTorch computes, in f64,
/// with the same weights: models/scripts/make_hybrid_parity.py.
#[rstest]
fn transformers_equal_pytorch(
    #[values(
        "hybrid-pixart",
        "hybrid-sd3",
        "hybrid-sd35",
        "hybrid-flux",
        "window-sd3"
    )]
    case: &str,
    #[values(Emit::Function, Emit::Op, Emit::Standard)] emit: Emit,
) {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures::path(case);
    let out = folder.path().join("model.linfusion.onnx");
    let original = model(&case, folder.path());
    let weights = WeightsFrom::Path(case.join("linfusion"));
    let mut job = request(&original, &out, weights);
    job.emit = emit;
    let report = convert(&job, &mut |_| {}).unwrap();
    let checkpoint = Checkpoint::open(case.join("linfusion")).unwrap();
    assert_eq!(report.converted, checkpoint.modules.len());
    let file = OnnxFile::open(&out).unwrap();
    let stored = compare_weights(&file, &checkpoint).unwrap();
    assert!(stored.different.is_empty(), "{stored}");
    assert_eq!(stored.equal.len(), checkpoint.modules.len(), "{stored:?}");

    let inputs = npz::read(&case.join("inputs.npz")).unwrap();
    let expected = npz::read(&case.join("expected.npz")).unwrap();
    let values = expected.iter().flat_map(|(_, t)| t.to_f64());
    let largest = values.fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    let apart = |engine: Engine, model: &Path, operators: Operators| {
        let found = run(engine, model, operators, &inputs).unwrap();
        max_difference(&found, &expected) / largest
    };
    // It would mean nothing if the original passed too.
    let before = apart(Engine::Ort, &original, Operators::None);
    assert!(before > 100.0 * BOUND, "the original is {before:e} off");
    let mut runs = vec![(Engine::Ort, Operators::InProcess)];
    if emit != Emit::Op {
        runs.push((Engine::Ort, Operators::None));
    }
    // FLUX's grid is in the values of its ids; tract wants shapes from shapes. The body's loop
    // over tiles is of as many rounds as the grid says.
    if emit != Emit::Standard && !case.ends_with("hybrid-flux") {
        runs.push((Engine::Tract, Operators::InProcess));
    }
    for (engine, operators) in runs {
        let error = apart(engine, &out, operators.clone());
        assert!(error <= BOUND, "{engine} {operators:?}: {error:e}");
    }
}

/// The parity would mean nothing if the original passed it too.
#[rstest]
fn the_original_does_not(#[values("sd15-tiny", "sdxl-tiny")] case: &str) {
    let case = fixtures::path(case);
    let inputs = npz::read(&case.join("inputs.npz")).unwrap();
    let expected = npz::read(&case.join("expected.npz")).unwrap();
    let found = run(
        Engine::Tract,
        &case.join("unet.onnx"),
        Operators::InProcess,
        &inputs,
    )
    .unwrap();
    assert!(max_difference(&found, &expected) > 100.0 * BOUND);
}

/// In fp16 the converted graph must not lose more than twice what fp16 costs the
/// original (measured here: it loses a quarter).
#[test]
fn half_precision_costs_no_more_than_in_the_original() {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let single = unpack("exports/sd15-ts14-dyn-sdpa.onnx.gz", folder.path()).unwrap();
    let half = unpack("exports/sd15-ts17-dyn-sdpa-fp16.onnx.gz", folder.path()).unwrap();
    let weights = checkpoint_for(&single, folder.path(), MlpWidth::Width(16)).unwrap();
    let convert_to = |model: &Path, name: &str| {
        let out = folder.path().join(name);
        let job = request(model, &out, WeightsFrom::Path(weights.clone()));
        convert(&job, &mut |_| {}).unwrap();
        out
    };
    let feed = npz::read(&fixtures::path("sd15-tiny").join("inputs.npz")).unwrap();
    let feed_half: Vec<_> = feed
        .iter()
        .map(|(name, t)| {
            let dtype = match t.dtype() {
                DType::F32 => DType::F16,
                other => other,
            };
            (name.clone(), Tensor::from_f64(t.to_f64(), dtype))
        })
        .collect();
    // Both from inputs that fp16 holds.
    let feed: Vec<_> = feed_half
        .iter()
        .zip(&feed)
        .map(|((name, h), (_, s))| (name.clone(), Tensor::from_f64(h.to_f64(), s.dtype())))
        .collect();
    let apart = |single: &Path, half: &Path, operators: Operators| {
        let single = run(Engine::Ort, single, operators.clone(), &feed).unwrap();
        let half = run(Engine::Ort, half, operators, &feed_half).unwrap();
        max_difference(&single, &half)
    };
    let original = apart(&single, &half, Operators::None);
    assert!(original < 0.2, "not the same weights: {original}");
    let (single, half) = (convert_to(&single, "single"), convert_to(&half, "half"));
    for operators in [Operators::None, Operators::InProcess] {
        let converted = apart(&single, &half, operators.clone());
        assert!(
            converted <= 2.0 * original,
            "{operators:?}: {converted:e}, the original {original:e}"
        );
    }
}
