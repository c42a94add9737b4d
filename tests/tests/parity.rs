//! Converted graphs compute what the official PyTorch LinFusion computes.

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::rewrite::Emit;
use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::npz;
use linfusion_tests::{has_ort, max_difference, request, run};
use rstest::rstest;

/// A conversion with plain standard operators is 2e-6 to 7e-6 off; outputs have a
/// standard deviation near 0.6.
const BOUND: f64 = 3e-5;

#[rstest]
fn equals_the_official_code(
    #[values("sd15-tiny", "sdxl-tiny")] case: &str,
    #[values(Emit::Function, Emit::Op, Emit::Standard)] emit: Emit,
) {
    let folder = tempfile::tempdir().unwrap();
    let case = fixtures::path(case);
    let out = folder.path().join("unet.linfusion.onnx");
    let mut job = request(
        &case.join("unet.onnx"),
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
