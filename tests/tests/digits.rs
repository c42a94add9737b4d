//! The committed transformer of digits: its attentions are found, and its digits recognised.

use linfusion_convert::attention::kind::Kind;
use linfusion_convert::convert::inspect;
use linfusion_convert::plan::Selection;
use linfusion_models::fixtures;
use linfusion_runtime::engine::Engine;
use linfusion_tests::digits::Experiment;
use linfusion_tests::has_ort;

#[test]
fn every_attention_is_found() {
    let model = fixtures::path("digits").join("digits-dit.onnx");
    let report = inspect(&model, &Selection::default()).unwrap();
    assert_eq!(report.architecture, "dit");
    assert_eq!(
        (report.sites.len(), report.count(Kind::SelfAttention)),
        (5, 5)
    );
    assert!(report.sites.iter().all(|s| s.action == "convert"));
}

/// Of 50 samples at the rate of `expected.json` (0.958), fewer than 40 are recognised six times in a million.
#[test]
fn its_digits_are_recognised() {
    if !has_ort() {
        return;
    }
    let folder = fixtures::path("digits");
    let mut experiment =
        Experiment::new(Engine::Ort, &folder.join("classifier.onnx"), 50, 1).unwrap();
    let result = experiment
        .run(&folder.join("digits-dit.onnx"), &mut |_| {})
        .unwrap();
    assert!(result.of == 50 && result.right >= 40, "{result:?}");
}
