//! The programs of `examples/` as their users run them: all print the same numbers, with and without the library.
//!
//! `make test` sets `LINFUSION_TEST_PYTHON_DIR`, `LINFUSION_OPS_LIBRARY` and `ORT_DYLIB_PATH`. `LINFUSION_TEST_ORT_INCLUDE`, a folder
//! with ONNX Runtime's C++ headers, has the C++ example compiled and run too.

use std::path::{Path, PathBuf};
use std::process::Command;

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::tensor::Tensor;
use linfusion_tests::{request, run};
use ndarray::{ArrayD, IxDyn};

/// The two numbers that the programs print to four digits may be rounded apart.
const ROUNDING: f64 = 1.001e-4;

fn examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

fn model(folder: &Path) -> PathBuf {
    let case = fixtures::path("sd15-tiny");
    let out = folder.join("unet.linfusion.onnx");
    let weights = WeightsFrom::Path(case.join("linfusion"));
    convert(
        &request(&case.join("unet.onnx"), &out, weights),
        &mut |_| {},
    )
    .unwrap();
    out
}

fn waves(shape: &[usize]) -> Tensor {
    let mut index = 0.0_f64;
    Tensor::F32(ArrayD::from_shape_simple_fn(IxDyn(shape), || {
        let value = index.sin() as f32;
        index += 1.0;
        value
    }))
}

/// Mean, deviation and the first four values, from tract: not the engine of the examples.
fn expected(model: &Path) -> Vec<f64> {
    let inputs = [
        ("sample".to_owned(), waves(&[2, 4, 16, 16])),
        (
            "timestep".to_owned(),
            Tensor::F32(ArrayD::from_elem(IxDyn(&[]), 500.0)),
        ),
        ("encoder_hidden_states".to_owned(), waves(&[2, 7, 12])),
    ];
    let outputs = run(Engine::Tract, model, Operators::InProcess, &inputs).unwrap();
    let values = outputs[0].1.to_f64();
    let first = values.iter().take(4).copied();
    [values.mean().unwrap(), values.std(0.0)]
        .into_iter()
        .chain(first)
        .collect()
}

/// Holds both lines of a program's output against the expected numbers.
fn judge(command: &mut Command, expected: &[f64]) {
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success(),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    for (line, begin) in lines.iter().zip(["without library: ", "with library: "]) {
        let rest = line.strip_prefix(begin).unwrap_or_else(|| panic!("{text}"));
        let found: Vec<f64> = rest
            .split(' ')
            .filter_map(|word| word.parse().ok())
            .collect();
        assert_eq!(found.len(), expected.len(), "{line}");
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() <= ROUNDING, "{line}: expected {expected:?}");
        }
    }
}

fn library() -> Option<PathBuf> {
    let library = std::env::var_os("LINFUSION_OPS_LIBRARY");
    if library.is_none() {
        eprintln!("skipped: LINFUSION_OPS_LIBRARY is not set (make test sets it)");
    }
    library.map(PathBuf::from)
}

#[test]
fn python() {
    let Some(library) = library() else { return };
    let Some(packages) = std::env::var_os("LINFUSION_TEST_PYTHON_DIR") else {
        eprintln!("skipped: LINFUSION_TEST_PYTHON_DIR is not set (make test sets it)");
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let model = model(scratch.path());
    let program = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let mut command = Command::new(program);
    command
        .env("PYTHONPATH", Path::new(&packages).join("1.32.0"))
        .arg(examples().join("python/unet.py"))
        .args([&model, &library]);
    judge(&mut command, &expected(&model));
}

#[test]
fn rust() {
    let Some(library) = library() else { return };
    if std::env::var_os("ORT_DYLIB_PATH").is_none() {
        eprintln!("skipped: ORT_DYLIB_PATH is not set (make test sets it)");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let model = model(scratch.path());
    // A target folder of its own: Cargo holds the workspace's while it runs its tests.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("examples-rust");
    let mut command = Command::new(env!("CARGO"));
    command
        .args(["run", "--quiet", "--locked", "--target-dir"])
        .arg(target)
        .arg("--manifest-path")
        .arg(examples().join("rust/Cargo.toml"))
        .arg("--")
        .args([&model, &library]);
    judge(&mut command, &expected(&model));
}

#[test]
fn cpp() {
    let Some(library) = library() else { return };
    let include = std::env::var_os("LINFUSION_TEST_ORT_INCLUDE");
    let (Some(include), Some(ort)) = (include, std::env::var_os("ORT_DYLIB_PATH")) else {
        eprintln!(
            "skipped: LINFUSION_TEST_ORT_INCLUDE (a folder with onnxruntime_cxx_api.h) and ORT_DYLIB_PATH are not set"
        );
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let model = model(scratch.path());
    // The name that programs look for; the wheels' libraries have their full version in theirs.
    let linked = scratch.path().join("libonnxruntime.so.1");
    std::os::unix::fs::symlink(ort, &linked).unwrap();
    let program = scratch.path().join("unet");
    let built = Command::new("g++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-isystem"])
        .arg(include)
        .arg(examples().join("cpp/unet.cpp"))
        .arg(&linked)
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    assert!(
        built.status.success(),
        "{}",
        String::from_utf8_lossy(&built.stderr)
    );
    let mut command = Command::new(program);
    command
        .env("LD_LIBRARY_PATH", scratch.path())
        .args([&model, &library]);
    judge(&mut command, &expected(&model));
}
