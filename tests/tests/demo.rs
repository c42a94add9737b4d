//! What the demo does beside learning: it measures in processes of its own program.

use std::path::PathBuf;

use linfusion_models::fixtures;
use linfusion_runtime::bench::{
    self, EngineName, Images, Job, OperatorsFrom, Plan, Profiling, Sizes, WorkerCommand,
};
use linfusion_runtime::engine::Device;

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
            model: PathBuf::new(),
            engine: match linfusion_tests::has_ort() {
                true => EngineName::Ort,
                false => EngineName::Tract,
            },
            threads: None,
            operators: OperatorsFrom::InProcess,
            library: None,
            device: Device::Cpu,
            device_memory: None,
            side: None,
            scale: None,
            batch: 1,
            sequence: 7,
            shapes: Vec::new(),
            seed: 0,
            images: Images::default(),
            profiling: Profiling::Off,
        },
    };
    let report = bench::run(&plan, &|_: &str| {}).unwrap();
    assert!(report.sizes[0].results[0].median_ms.is_some());
}
