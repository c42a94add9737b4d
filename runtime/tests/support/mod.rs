//! A tiny pipeline and `linfusion-run generate` on it.
#![allow(dead_code)] // Each test file uses its part.

mod device;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::ModelProto;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::engine::{self, Engine, Location, SessionOptions, load_library};
use linfusion_runtime::image::Metadata;
use linfusion_runtime::pipeline::{
    Folder, Generated, Observer, PipelineError, Place, Progress, Request, generate,
};
use ndarray::{Array4, Zip};

pub use device::device;

/// A tiny pipeline in a folder of its own; nothing where there is no ONNX Runtime.
pub struct Bench {
    pub scratch: tempfile::TempDir,
    pub pipeline: PathBuf,
}

impl Bench {
    pub fn new(name: &str) -> Option<Self> {
        // Fails where a device is asked for that cannot be used.
        device();
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
        self.command(arguments).output().unwrap()
    }

    /// `generate` on the device that tests run on, if `arguments` don't name one.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
        command.arg("generate").arg(&self.pipeline);
        command.args(["--engine", "ort"]).args(arguments);
        if !arguments.contains(&"--device") {
            command.args(["--device", &device().to_string()]);
        }
        command.current_dir(self.scratch.path());
        command
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

/// What a command wrote to standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
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

/// Largest difference of the latents, as a share of the largest latent, that single precision makes over these steps:
/// graphs, loops and PyTorch sum in other orders.
pub const LATENTS: f64 = 2e-4;

/// ONNX Runtime on the device that tests run on, with tensors that runs share kept there.
pub fn place(shared: Location) -> Place {
    Place {
        engine: Engine::Ort,
        options: SessionOptions {
            device: device(),
            shared: Some(shared),
            ..SessionOptions::default()
        },
    }
}

/// Nobody watches.
pub struct Blind;

impl Observer for Blind {
    fn progress(&mut self, _: Progress) {}
}

/// Makes the images of a request, over those that are there.
pub fn make(
    pipeline: &Path,
    request: &Request,
    shared: Location,
    observer: &mut dyn Observer,
) -> Result<Generated, PipelineError> {
    let folder = Folder::open(pipeline).unwrap();
    let request = Request {
        overwrite: Overwrite::Force,
        ..request.clone()
    };
    generate(
        &folder,
        &place(shared),
        &request,
        &|_| Metadata::default(),
        observer,
    )
}

/// The latents of a request, which are the same wherever they are between the steps.
pub fn latents(pipeline: &Path, request: &Request, tolerance: f64) -> Array4<f32> {
    let [on_host, on_device] = [Location::Host, Location::Device].map(|shared| {
        let made = make(pipeline, request, shared, &mut Blind);
        made.unwrap().latents
    });
    let worst = apart(&on_host, &on_device);
    assert!(worst <= tolerance, "{worst:e} above {tolerance:e}");
    on_host
}

/// The largest difference as a share of the largest value.
pub fn apart(a: &Array4<f32>, b: &Array4<f32>) -> f64 {
    assert_eq!(a.dim(), b.dim());
    let largest = a.iter().fold(0.0_f64, |m, v| m.max(f64::from(v.abs())));
    let worst = Zip::from(a).and(b).fold(0.0_f64, |m, a, b| {
        m.max((f64::from(*a) - f64::from(*b)).abs())
    });
    worst / largest
}
