//! Converted models in four releases of ONNX Runtime through Python, each with
//! and without the operator library; and `onnx.checker` on all of them.
//!
//! `make test` sets `LINFUSION_TEST_PYTHON_DIR`, a folder of VERSION/ folders of
//! Python packages, and `LINFUSION_OPS_LIBRARY`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use linfusion_convert::convert::{Partial, WeightsFrom, convert};
use linfusion_models::checkpoint::MlpWidth;
use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::{inputs, npz};
use linfusion_tests::{checkpoint_for, request, unpack};
use rstest::rstest;
use serde_json::{Value, json};

struct Prepared {
    /// Keeps the files.
    _folder: tempfile::TempDir,
    jobs: PathBuf,
    /// `converted:original`.
    pairs: Vec<String>,
}

/// Parity cases of hybrid and window attention.
const TRANSFORMERS: [&str; 5] = [
    "hybrid-pixart",
    "hybrid-sd3",
    "hybrid-sd35",
    "hybrid-flux",
    "window-sd3",
];

/// Converts every fixture once for all tests of this file.
fn prepared(library: &Path) -> &'static Prepared {
    static PREPARED: OnceLock<Prepared> = OnceLock::new();
    PREPARED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (mut models, mut pairs) = (Vec::new(), Vec::new());
        let unets = ["sd15-tiny", "sdxl-tiny", "sd15-identity", "sd21-narrow"];
        for case in unets.iter().chain(&TRANSFORMERS) {
            let source = fixtures::path(case);
            let place = folder.path().join(case);
            std::fs::create_dir(&place).unwrap();
            let original = place.join("unet.onnx");
            let stored = ["unet.onnx", "unet.onnx.gz", "model.onnx.gz"];
            let stored = stored.map(|n| format!("{case}/{n}"));
            let stored = stored.iter().find(|n| fixtures::path(n).exists()).unwrap();
            std::fs::write(&original, fixtures::bytes(stored).unwrap()).unwrap();
            let weights = WeightsFrom::Path(source.join("linfusion"));
            let converted = converted(&original, weights);
            pairs.push(format!("{}:{}", converted.display(), original.display()));
            models.push(json!({
                "name": case, "original": original, "converted": converted,
                "inputs": source.join("inputs.npz"), "expected": source.join("expected.npz"),
                "tolerance": 3e-5, "apart": 3e-5,
            }));
        }
        for name in fixtures::exports().unwrap() {
            let place = folder.path().join(name.replace(['/', '.'], "_"));
            std::fs::create_dir(&place).unwrap();
            let original = unpack(&name, &place).unwrap_or_else(|e| panic!("{name}: {e}"));
            let weights = checkpoint_for(&original, &place, MlpWidth::Width(4)).unwrap();
            let converted = converted(&original, WeightsFrom::Path(weights));
            pairs.push(format!("{}:{}", converted.display(), original.display()));
            let Some(feed) = feed(&name, &original) else {
                continue;
            };
            let npz_path = place.join("inputs.npz");
            npz::write(&npz_path, &feed).unwrap();
            let apart = match () {
                // A last bit can tip a value over to the next of 256 quantization steps.
                () if name.contains("int8") => 5e-2,
                () if name.contains("fp16") => 2e-2,
                () => 3e-5,
            };
            models.push(json!({
                "name": name, "original": original, "converted": converted,
                "inputs": npz_path, "expected": null, "tolerance": 0.0, "apart": apart,
            }));
        }
        let jobs = folder.path().join("jobs.json");
        let text = json!({"library": library, "models": models}).to_string();
        std::fs::write(&jobs, text).unwrap();
        Prepared {
            _folder: folder,
            jobs,
            pairs,
        }
    })
}

fn converted(original: &Path, weights: WeightsFrom) -> PathBuf {
    let out = original.with_extension("linfusion.onnx");
    let mut job = request(original, &out, weights);
    job.partial = Partial::Allow;
    convert(&job, &mut |_| {}).unwrap_or_else(|e| panic!("{}: {e}", original.display()));
    out
}

/// Inputs for an export; `None` where the newest ONNX Runtime does not load it.
fn feed(name: &str, original: &Path) -> Option<Vec<(String, linfusion_runtime::tensor::Tensor)>> {
    let options = SessionOptions {
        operators: Operators::None,
        ..SessionOptions::default()
    };
    let session = Session::from_file(Engine::Ort, original, &options).ok()?;
    let mut wanted = inputs::Request {
        latent: Some(16),
        sequence: 7,
        ..inputs::Request::default()
    };
    if name.contains("controlnet") {
        let image = ("controlnet_cond".to_owned(), vec![2, 3, 32, 32]);
        wanted.shapes.push(image);
    }
    let made = inputs::make(session.inputs(), &wanted);
    let made = made.or_else(|_| inputs::make(session.inputs(), &inputs::Request::default()));
    Some(made.unwrap_or_else(|e| panic!("{name}: {e}")))
}

/// The folder of Python packages of a release and the operator library; says so
/// and returns none where they are not given.
fn environment(version: &str) -> Option<(PathBuf, PathBuf)> {
    let python = std::env::var_os("LINFUSION_TEST_PYTHON_DIR");
    let library = std::env::var_os("LINFUSION_OPS_LIBRARY");
    let (Some(python), Some(library)) = (python, library) else {
        eprintln!(
            "skipped: LINFUSION_TEST_PYTHON_DIR and LINFUSION_OPS_LIBRARY are not set (make test sets them)"
        );
        return None;
    };
    let packages = Path::new(&python).join(version);
    if !packages.join("onnxruntime").is_dir() {
        eprintln!("skipped: no onnxruntime {version} for this Python");
        return None;
    }
    Some((packages, PathBuf::from(library)))
}

fn python(packages: &Path, script: &str, arguments: &[&str]) -> Value {
    let program = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts")
        .join(script);
    let out = Command::new(program)
        .env("PYTHONPATH", packages)
        .arg(script)
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    serde_json::from_slice(&out.stdout).unwrap_or_else(|e| panic!("{e}: {errors}"))
}

#[rstest]
fn runs_in(#[values("1.17.3", "1.20.1", "1.24.4", "1.32.0")] version: &str) {
    let Some((packages, library)) = environment(version) else {
        return;
    };
    let prepared = prepared(&library);
    let report = python(&packages, "matrix.py", &[prepared.jobs.to_str().unwrap()]);
    assert_eq!(report["version"], version);
    let models = report["models"].as_object().unwrap();
    let of = |key: &str| models.iter().filter(|(_, m)| m.get(key).is_some()).count();
    println!(
        "onnxruntime {version}: {} models, {} run with and without the library, {} whose original does not load",
        models.len(),
        of("apart"),
        of("skipped")
    );
    let failed: Vec<_> = models
        .iter()
        .filter(|(_, m)| m.get("failed").is_some())
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(of("apart") >= 10, "{report:#}");
    // The other originals have opsets that are newer than the oldest of these.
    let everywhere = [
        "sd15-tiny",
        "sdxl-tiny",
        "sd15-identity",
        "hybrid-pixart",
        "hybrid-sd3",
        "window-sd3",
    ];
    for case in everywhere {
        assert!(models[case].get("library").is_some(), "{case} did not run");
    }
}

#[test]
fn onnx_checker_accepts_every_output() {
    let Some((packages, library)) = environment("1.32.0") else {
        return;
    };
    let pairs: Vec<&str> = prepared(&library)
        .pairs
        .iter()
        .map(String::as_str)
        .collect();
    let report = python(&packages, "check.py", &pairs);
    let mut wrong = report.as_object().unwrap().clone();
    let flawed = wrong.remove("_flawed_originals");
    println!("originals that onnx itself does not accept: {flawed:?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
