//! Every exporter's UNet: all sites found, converted, and the same with our
//! operator as with its function body.

use std::path::{Path, PathBuf};

use linfusion_convert::attention::kind::Kind;
use linfusion_convert::convert::{Partial, WeightsFrom, convert, inspect};
use linfusion_convert::plan::Selection;
use linfusion_models::checkpoint::MlpWidth;
use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::inputs;
use linfusion_runtime::tensor::{DType, Tensor};
use linfusion_tests::{checkpoint_for, has_ort, max_difference, request, unpack};

/// (self, cross) of an export, from the architecture in its name.
fn expected(name: &str) -> (usize, usize) {
    match () {
        () if name.contains("controlnet") => (7, 7),
        () if name.contains("sdxl") => (28, 28),
        () if name.contains("pixel") => (3, 0),
        () => (16, 16),
    }
}

/// The committed exports, and every graph of the folder that `LINFUSION_GRAPHS`
/// names: a way to try a collection of one's own.
fn graphs(scratch: &Path) -> Vec<(String, PathBuf)> {
    let mut graphs: Vec<_> = fixtures::exports()
        .unwrap()
        .into_iter()
        .map(|name| (unpack(&name, scratch).unwrap(), name))
        .map(|(path, name)| (name, path))
        .collect();
    if let Some(folder) = std::env::var_os("LINFUSION_GRAPHS") {
        let more = std::fs::read_dir(folder)
            .unwrap()
            .map(|e| e.unwrap().path());
        graphs.extend(
            more.filter(|p| p.extension().is_some_and(|e| e == "onnx"))
                .map(|p| (p.file_name().unwrap().to_string_lossy().into_owned(), p)),
        );
    }
    graphs
}

fn largest(outputs: &[(String, Tensor)]) -> f64 {
    let values = outputs.iter().flat_map(|(_, t)| t.to_f64());
    values.fold(0.0, |m, v| m.max(v.abs()))
}

#[test]
fn every_site_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let names = fixtures::exports().unwrap();
    assert!(names.len() >= 6, "fixtures are missing: {names:?}");
    for name in names.iter() {
        let path = unpack(name, folder.path()).unwrap();
        let report = inspect(&path, &Selection::default()).unwrap();
        let found = (report.count(Kind::SelfAttention), report.count(Kind::Cross));
        let converts = report
            .sites
            .iter()
            .filter(|s| s.action == "convert")
            .count();
        if found != expected(name) || report.sites.len() != found.0 + found.1 || converts != found.0
        {
            failures.push(format!(
                "{name}: {found:?}, {converts} to convert of {} sites",
                report.sites.len()
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn converted_graphs_run_alike_with_and_without_the_operator() {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for (name, path) in graphs(folder.path()) {
        let session = |path: &std::path::Path, operators| {
            Session::from_file(
                Engine::Ort,
                path,
                &SessionOptions {
                    operators,
                    ..SessionOptions::default()
                },
            )
        };
        let report = inspect(&path, &Selection::default()).unwrap();
        if !report.sites.iter().any(|s| s.action == "convert") {
            continue;
        }
        // Some optimized graphs need kernels that a CPU build lacks.
        let Ok(mut original) = session(&path, Operators::None) else {
            continue;
        };
        let mut request_inputs = inputs::Request {
            latent: Some(16),
            sequence: 7,
            ..inputs::Request::default()
        };
        if name.contains("exports/controlnet") {
            // Tiny: its image is twice as wide as the latent, not eight times.
            request_inputs
                .shapes
                .push(("controlnet_cond".to_owned(), vec![2, 3, 32, 32]));
        }
        // The default size is for what was exported at one.
        let feed = inputs::make(original.inputs(), &request_inputs)
            .or_else(|_| inputs::make(original.inputs(), &inputs::Request::default()));
        let feed = match feed {
            Ok(feed) => feed,
            Err(e) => {
                failures.push(format!("{name}: inputs: {e}"));
                continue;
            }
        };
        let before = match original.run(&feed) {
            Ok(before) => before,
            Err(e) => {
                failures.push(format!("{name}: the original: {e}"));
                continue;
            }
        };
        let weights = checkpoint_for(
            &path,
            &folder.path().join(name.replace('/', "_")),
            MlpWidth::Width(4),
        )
        .unwrap();
        for (what, weights) in [
            ("untrained", WeightsFrom::Untrained),
            ("checkpoint", WeightsFrom::Path(weights)),
        ] {
            let out = folder.path().join(format!(
                "{what}-{}",
                name.replace('/', "_").trim_end_matches(".gz")
            ));
            let mut job = request(&path, &out, weights);
            job.partial = Partial::Allow;
            if let Err(e) = convert(&job, &mut |_| {}) {
                failures.push(format!("{name} {what}: {e}"));
                continue;
            }
            let results: Result<Vec<_>, _> = [Operators::None, Operators::InProcess]
                .into_iter()
                .map(|o| session(&out, o).and_then(|mut s| s.run(&feed)))
                .collect();
            match results {
                Err(e) => failures.push(format!("{name} {what}: {e}")),
                Ok(r) => {
                    let half = r[0].iter().any(|(_, t)| t.dtype() == DType::F16);
                    let bound = match () {
                        // A last bit can tip a value over to the next of 256
                        // quantization steps.
                        () if name.contains("int8dyn") || name.contains("int8.") => 5e-2,
                        () if half => 2e-2,
                        // Both round sums of up to 256 terms in f32, in other orders.
                        () => 2e-5,
                    };
                    let largest = largest(&r[0]).max(1.0);
                    let apart = max_difference(&r[0], &r[1]) / largest;
                    if apart > bound {
                        failures.push(format!("{name} {what}: {apart:e} apart"));
                    }
                    if max_difference(&r[0], &before) < 1e-6 {
                        failures.push(format!(
                            "{name} {what}: same output as the original, so nothing was converted"
                        ));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
