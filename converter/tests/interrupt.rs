//! Ctrl-C while weights are learned.
#![cfg(feature = "distill")]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use linfusion_models::fixtures;
use linfusion_models::fixtures::signals::{interrupt, library_with_destructor, wait_until};

const SPEC: &str = r#"{"sample": {"normal": {}, "shape": [1, 4, 16, 16]},
    "timestep": {"integers": {"min": 0, "max": 999}},
    "encoder_hidden_states": {"normal": {}, "shape": [1, 7, 12]}}"#;

fn distill(folder: &Path, steps: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-convert"));
    command
        .args(["distill", "unet.onnx", "-o", "w", "--random", "spec.json"])
        .args([
            "--samples",
            "2",
            "--holdout",
            "1",
            "--no-refine",
            "--steps",
            steps,
        ])
        .current_dir(folder);
    command
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs until the condition holds, then sends SIGINT.
fn interrupted(command: &mut Command, holds: impl Fn() -> bool) -> Output {
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("a site that is kept", holds);
    interrupt(&child);
    child.wait_with_output().unwrap()
}

/// A folder with a model and what its inputs are drawn from.
fn with_model() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("unet.onnx");
    std::fs::copy(fixtures::path("sd15-tiny/unet.onnx"), model).unwrap();
    std::fs::write(folder.path().join("spec.json"), SPEC).unwrap();
    folder
}

#[test]
fn an_interruption_runs_no_destructors_and_says_what_is_kept() {
    let folder = with_model();
    let root = folder.path();
    let library = library_with_destructor(root);
    let kept = root.join("w.unfinished");
    // Others are still being written.
    let is_whole =
        |file: &std::fs::DirEntry| file.path().extension().is_some_and(|e| e == "safetensors");
    let sites = || {
        let files = kept.read_dir().into_iter().flatten().flatten();
        files.filter(is_whole).count()
    };

    let output = interrupted(distill(root, "400").env("LD_PRELOAD", &library), || {
        sites() > 0
    });
    assert_eq!(
        output.status.code(),
        Some(130),
        "{:?} {}",
        output.status,
        said(&output)
    );
    assert!(
        said(&output).contains("w.unfinished, and the same command goes on"),
        "{}",
        said(&output)
    );
    assert!(sites() > 0 && !root.join("w").exists());

    let output = distill(root, "400").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    assert!(
        said(&output).contains("of 16 sites are taken over"),
        "{}",
        said(&output)
    );
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(report.contains("dB untrained"), "{report}");
    assert!(!kept.exists());
}

#[test]
fn weights_that_are_no_good_are_warned_of_and_no_steps_refused() {
    let folder = with_model();
    let root = folder.path();
    let none = distill(root, "0").output().unwrap();
    assert_eq!(none.status.code(), Some(2), "{}", said(&none));
    assert!(
        said(&none).contains("nothing is learned"),
        "{}",
        said(&none)
    );
    let few = distill(root, "1").output().unwrap();
    assert_eq!(few.status.code(), Some(0), "{}", said(&few));
    let warning = "of 16 sites leave more than 15.00 % of their output's variance unexplained";
    assert!(said(&few).contains(warning), "{}", said(&few));
}
