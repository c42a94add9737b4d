//! A tiny pipeline and `linfusion-run generate` on it.
#![allow(dead_code)] // Each test file uses its part.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::ModelProto;
use linfusion_runtime::engine::load_library;

/// A tiny pipeline in a folder of its own; nothing where there is no ONNX Runtime.
pub struct Bench {
    pub scratch: tempfile::TempDir,
    pub pipeline: PathBuf,
}

impl Bench {
    pub fn new(name: &str) -> Option<Self> {
        if load_library(None).is_err() {
            println!("skipped: no ONNX Runtime library");
            return None;
        }
        let scratch = tempfile::tempdir().unwrap();
        let pipeline = scratch.path().join(name);
        fixtures::pipeline(name, &pipeline).unwrap();
        Some(Self { scratch, pipeline })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_linfusion-run"))
            .arg("generate")
            .arg(&self.pipeline)
            .args(["--engine", "ort"])
            .args(arguments)
            .current_dir(self.scratch.path())
            .output()
            .unwrap()
    }

    /// Files beside the pipeline.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.scratch.path()).unwrap().flatten();
        let mut names: Vec<String> = entries
            .filter(|e| e.path().is_file())
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// What a command wrote to standard error, with its line breaks taken out.
pub fn said(output: &Output) -> String {
    // The report wraps lines to the terminal's width.
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let words: Vec<&str> = text.split_whitespace().filter(|w| *w != "│").collect();
    words.join(" ")
}

/// Changes a model in its file.
pub fn edit(path: &Path, change: impl FnOnce(&OnnxFile, &mut ModelProto)) {
    let file = OnnxFile::open(path).unwrap();
    let mut model = file.model.clone();
    change(&file, &mut model);
    let bytes = buffa::Message::encode_to_vec(&model);
    drop(file);
    std::fs::write(path, bytes).unwrap();
}
