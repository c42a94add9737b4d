//! What the demo does beside learning: it measures in processes of its own program.

use linfusion_models::fixtures;
use linfusion_runtime::bench::{self, EngineName, Job, Plan, Sizes, WorkerCommand};

#[test]
fn the_demo_measures_models() {
    let plan = Plan {
        worker: WorkerCommand {
            program: env!("CARGO_BIN_EXE_demo").into(),
            arguments: vec!["worker".to_owned()],
        },
        models: vec![fixtures::path("sd15-tiny/unet.onnx")],
        sizes: Sizes::Sides(vec![64]),
        repeats: 1,
        template: Job {
            sequence: 7,
            ..Job::on(match linfusion_tests::has_ort() {
                true => EngineName::Ort,
                false => EngineName::Tract,
            })
        },
    };
    let report = bench::run(&plan, &|_: &str| {}).unwrap();
    assert!(report.sizes[0].results[0].median_ms.is_some());
}
