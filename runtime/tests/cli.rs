//! `linfusion-run` as its users run it. The engine is the default one: ONNX Runtime where there is one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_linfusion-run"))
        .args(arguments)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    serde_json::from_str(&stdout(output)).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../models/fixtures")
        .join(name);
    path.to_str().unwrap().to_owned()
}

/// A model's path needs no file system trick to be told from another's.
fn copy_of(model: &str, folder: &Path) -> PathBuf {
    let copy = folder.join("copy.onnx");
    std::fs::copy(model, &copy).unwrap();
    copy
}

#[test]
fn compare_finds_a_model_equal_to_itself_on_given_inputs() {
    let model = fixture("sd15-tiny/unet.onnx");
    let inputs = fixture("sd15-tiny/inputs.npz");
    let output = run(&[
        "compare",
        &model,
        &model,
        "--inputs",
        &inputs,
        "--tolerance",
        "0",
        "--report",
        "json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    assert_eq!(report["within_tolerance"], true);
    assert_eq!(report["untrained"], serde_json::json!([false, false]));
    assert_eq!(report["outputs"][0]["output"], "out_sample");
    assert_eq!(report["outputs"][0]["max_abs"], 0.0);
    assert!(report["outputs"][0]["reference_std"].as_f64().unwrap() > 0.1);
}

#[test]
fn compare_says_which_input_is_missing() {
    let (sd15, sdxl) = (
        fixture("sd15-tiny/unet.onnx"),
        fixture("sdxl-tiny/unet.onnx"),
    );
    let inputs = fixture("sd15-tiny/inputs.npz");
    let output = run(&["compare", &sd15, &sdxl, "--inputs", &inputs]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("`text_embeds`"),
        "{}",
        stderr(&output)
    );
    assert_eq!(stdout(&output), "");
}

#[test]
fn bench_measures_each_model_in_its_own_process() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    let copy = copy_of(&model, folder.path());
    let plot = folder.path().join("plot.svg");
    let output = run(&[
        "bench",
        &model,
        copy.to_str().unwrap(),
        "--sizes",
        "64,128",
        "--repeats",
        "2",
        "--batch",
        "1",
        "--sequence",
        "7",
        "--report",
        "json",
        "--plot",
        plot.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    let sizes = report["sizes"].as_array().unwrap();
    assert_eq!(sizes.len(), 2);
    assert_eq!(sizes[1]["pixels"], 128);
    for size in sizes {
        let results = size["results"].as_array().unwrap();
        assert_eq!(results.len(), 2);
        for result in results {
            assert_eq!(result["runs_ms"].as_array().unwrap().len(), 2);
            assert!(result["median_ms"].as_f64().unwrap() > 0.0);
            assert!(
                result["peak_rss_bytes"]
                    .as_u64()
                    .is_none_or(|b| b > 1 << 20)
            );
        }
        assert_eq!(results[0]["speedup"], 1.0);
    }
    assert!(std::fs::read_to_string(plot).unwrap().contains("copy.onnx"));
}

#[test]
fn bench_of_what_does_not_run_fails_with_its_name() {
    let output = run(&["bench", "/nowhere/x.onnx", "--sizes", "64"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("/nowhere/x.onnx"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn doctor_tells_success_by_its_exit_code() {
    let output = run(&[
        "doctor",
        "--report",
        "json",
        "--ort-library",
        "/nowhere/libonnxruntime.so",
    ]);
    assert_eq!(output.status.code(), Some(4));
    let report = json(&output);
    assert!(report["onnx_runtime"].is_null());
    let problem = report["onnx_runtime_problem"].as_str().unwrap();
    assert!(problem.contains("/nowhere/libonnxruntime.so"), "{problem}");
    if std::env::var_os("ORT_DYLIB_PATH").is_some() {
        let output = run(&["doctor"]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(stdout(&output).contains("CPUExecutionProvider"));
    }
}

#[test]
fn completions_and_man_page_are_generated() {
    let completions = run(&["completions", "bash"]);
    assert!(stdout(&completions).contains("complete -F"));
    let man = run(&["man"]);
    assert!(stdout(&man).contains(".TH linfusion-run"));
}

#[test]
fn wrong_usage_has_its_own_code() {
    for arguments in [
        &["bench"][..],
        &["compare", "a"],
        &["doctor", "--report", "xml"],
    ] {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn export_triton_writes_a_repository_and_says_what_will_not_be_batched() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = scratch.path().join("sd15");
    linfusion_models::fixtures::pipeline("sd15", &pipeline).unwrap();
    let repository = scratch.path().join("models");
    let paths = [&pipeline, &repository].map(|p| p.to_str().unwrap());
    let export = ["export-triton", paths[0], "-o", paths[1]];
    let output = run(&export);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = stdout(&output);
    assert!(
        report.contains("unet\n    no batching across requests: `timestep`"),
        "{report}"
    );
    assert!(
        report.contains("vae_decoder, batches of up to 4"),
        "{report}"
    );
    assert!(repository.join("unet/1/model.onnx").is_file());

    let library = std::env::current_exe().unwrap();
    let unused = ["--force", "--op-library", library.to_str().unwrap()];
    let unused = run(&[&export[..], &unused].concat());
    assert_eq!(unused.status.code(), Some(0), "{}", stderr(&unused));
    assert!(
        stderr(&unused).contains("the library was not copied"),
        "{}",
        stderr(&unused)
    );

    let again = run(&export);
    assert_eq!(again.status.code(), Some(1));
    assert!(stderr(&again).contains("--force"), "{}", stderr(&again));
    let relative = run(&[&export[..], &["--served-at", "models"]].concat());
    assert_eq!(relative.status.code(), Some(2));
    let both = run(&[&export[..], &["--copy", "--link"]].concat());
    assert_eq!(both.status.code(), Some(2));
}
