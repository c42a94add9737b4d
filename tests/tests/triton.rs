//! Model repositories for Triton Inference Server: their configurations, held against Triton's schema and against the rules of
//! its ONNX Runtime backend by `scripts/check_triton.py`, and the client of `examples/python` on a stand-in for the server.
//!
//! `make test` sets `LINFUSION_TEST_PYTHON_DIR` and `LINFUSION_TEST_TRITON_DIR`, folders of Python packages, and
//! `LINFUSION_OPS_LIBRARY`.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::Command;

use linfusion_convert::convert::{Request as Conversion, WeightsFrom, convert_pipeline};
use linfusion_convert::rewrite::Emit;
use linfusion_models::checkpoint::MlpWidth;
use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::write::{ExternalData, WriteOptions, stage};
use linfusion_runtime::engine::{Engine, SessionOptions};
use linfusion_runtime::image::{Metadata, read};
use linfusion_runtime::pipeline::{self, Folder, Init, Observer, Place, Progress, generate};
use linfusion_runtime::torch_random;
use linfusion_runtime::triton::{
    Existing, Exported, InstanceKind, Placing, Request, TritonError, export,
};
use linfusion_tests::{checkpoint_for, has_ort};
use ndarray::Array4;
use rstest::rstest;
use serde_json::Value;

fn request(pipeline: &Path, repository: &Path) -> Request {
    Request {
        pipeline: pipeline.to_owned(),
        repository: repository.to_owned(),
        served_at: "/models".to_owned(),
        operator_library: None,
        max_batch: NonZeroU32::new(4).unwrap(),
        instances: NonZeroU32::MIN,
        kind: InstanceKind::Auto,
        gpu_memory: None,
        placing: Placing::Copy,
        existing: Existing::Refuse,
    }
}

fn write(request: &Request) -> Result<Exported, TritonError> {
    export(request, &mut |_| ControlFlow::Continue(()))
}

fn unpacked(name: &str, folder: &Path) -> PathBuf {
    let pipeline = folder.join(name);
    fixtures::pipeline(name, &pipeline).unwrap();
    pipeline
}

fn converted(name: &str, folder: &Path, emit: Emit) -> PathBuf {
    let original = unpacked(name, folder);
    let weights = checkpoint_for(
        &original.join("unet/model.onnx"),
        folder,
        MlpWidth::Width(4),
    )
    .unwrap();
    let out = folder.join(format!("{name}.linfusion"));
    let request = Conversion {
        model: original,
        out: Some(out.clone()),
        weights: WeightsFrom::Path(weights),
        emit,
        ..Conversion::default()
    };
    convert_pipeline(&request, &mut |_| {}).unwrap();
    out
}

/// Some library for Linux, where only its being there matters.
fn any_library() -> PathBuf {
    std::env::current_exe().unwrap()
}

/// All configurations of a repository, by model.
fn configurations(repository: &Path) -> String {
    let mut models: Vec<PathBuf> = std::fs::read_dir(repository)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    models.sort();
    let text = |model: &PathBuf| std::fs::read_to_string(model.join("config.pbtxt")).unwrap();
    models.iter().map(text).collect::<Vec<_>>().join("\n")
}

#[test]
fn configurations_of_a_converted_pipeline() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = converted("sdxl", scratch.path(), Emit::Function);
    let repository = scratch.path().join("repository");
    let exported = write(&Request {
        served_at: "/mnt/models/".to_owned(),
        operator_library: Some(any_library()),
        instances: NonZeroU32::new(2).unwrap(),
        kind: InstanceKind::Gpu,
        gpu_memory: Some(20_000_000_000),
        ..request(&pipeline, &repository)
    })
    .unwrap();
    insta::assert_snapshot!("triton_sdxl", configurations(&repository));
    insta::assert_json_snapshot!("triton_sdxl_report", exported.models);
    let library = std::fs::read(repository.join("unet/liblinfusion_ops.so")).unwrap();
    assert!(library == std::fs::read(any_library()).unwrap());
}

#[test]
fn configurations_of_a_transformer_that_is_batched() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked("pixart", scratch.path());
    let repository = scratch.path().join("repository");
    write(&Request {
        kind: InstanceKind::Cpu,
        ..request(&pipeline, &repository)
    })
    .unwrap();
    insta::assert_snapshot!("triton_pixart", configurations(&repository));
}

#[test]
fn nothing_is_written_on_an_error_and_nothing_foreign_replaced() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = converted("sd15", scratch.path(), Emit::Op);
    let place = scratch.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let left = || std::fs::read_dir(&place).unwrap().count();
    let plain = request(&pipeline, &place.join("repository"));

    let error = write(&plain).unwrap_err();
    assert!(matches!(error, TritonError::NeedsLibrary { .. }), "{error}");
    assert!(error.to_string().contains("unet/model.onnx"), "{error}");
    assert_eq!(left(), 0);

    let text = Request {
        operator_library: Some(pipeline.join("model_index.json")),
        ..plain.clone()
    };
    let error = write(&text).unwrap_err().to_string();
    assert!(
        error.contains("--op-library") && error.contains("model_index.json is no shared library"),
        "{error}"
    );
    assert_eq!(left(), 0);

    let stopped = export(
        &Request {
            operator_library: Some(any_library()),
            ..plain.clone()
        },
        &mut |model| match model {
            "vae_decoder" => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        },
    );
    assert!(matches!(stopped, Err(TritonError::Stopped)));
    assert_eq!(left(), 0);

    let good = Request {
        operator_library: Some(any_library()),
        ..plain
    };
    write(&good).unwrap();
    let error = write(&good).unwrap_err().to_string();
    assert!(
        error.contains("exists already") && error.contains("--force"),
        "{error}"
    );
    let forced = Request {
        existing: Existing::Replace,
        ..good
    };
    write(&forced).unwrap();
    assert_eq!(left(), 1);

    let foreign = place.join("repository/notes");
    std::fs::create_dir(&foreign).unwrap();
    let error = write(&forced).unwrap_err().to_string();
    assert!(
        error.contains("no model repository") && error.contains("`notes`"),
        "{error}"
    );
    assert!(foreign.is_dir());
    let around = Request {
        repository: scratch.path().to_owned(),
        ..forced
    };
    assert!(matches!(write(&around), Err(TritonError::Nested { .. })));
}

#[test]
fn a_pipeline_without_a_part_names_it() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked("sd15", scratch.path());
    std::fs::remove_dir_all(pipeline.join("vae_decoder")).unwrap();
    let error = write(&request(&pipeline, &scratch.path().join("r"))).unwrap_err();
    assert!(
        error.to_string().contains("sd15 has no folder vae_decoder"),
        "{error}"
    );
    std::fs::create_dir(pipeline.join("vae_decoder")).unwrap();
    std::fs::write(
        pipeline.join("vae_decoder/model.onnx"),
        "version https://git-lfs",
    )
    .unwrap();
    let error = write(&request(&pipeline, &scratch.path().join("r"))).unwrap_err();
    assert!(
        error.to_string().contains("vae_decoder/model.onnx"),
        "{error}"
    );
}

#[test]
fn links_lead_to_the_pipelines_files() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked("sd15", scratch.path());
    let repository = scratch.path().join("repository");
    let linked = Request {
        placing: Placing::Link,
        ..request(&pipeline, &repository)
    };
    write(&linked).unwrap();
    let model = repository.join("unet/1/model.onnx");
    let target = std::fs::read_link(&model).unwrap();
    assert_eq!(
        target,
        std::fs::canonicalize(pipeline.join("unet/model.onnx")).unwrap()
    );
    if let Some(report) = check(&repository, None, &[]) {
        assert!(report.get("failed").is_none(), "{report}");
    }
}

#[rstest]
fn weights_in_files_of_their_own_come_along(
    #[values(Placing::Copy, Placing::Link)] placing: Placing,
) {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked("sd15", scratch.path());
    let model = pipeline.join("unet/model.onnx");
    let packed = OnnxFile::open(&model).unwrap();
    let large = WriteOptions {
        external: ExternalData::Copy,
        max_model_bytes: 3 << 19,
        ..WriteOptions::default()
    };
    let apart = pipeline.join("unet/large.onnx");
    stage(&packed.model, Some(&packed), &apart, &large)
        .unwrap()
        .publish()
        .unwrap();
    std::fs::remove_file(&model).unwrap();
    let weights = pipeline.join("unet/large.onnx_data");
    assert!(weights.is_file());
    let repository = scratch.path().join("repository");
    let wanted = Request {
        placing,
        ..request(&pipeline, &repository)
    };
    write(&wanted).unwrap();
    let version = repository.join("unet/1");
    let name = match placing {
        Placing::Copy => "model.onnx_data",
        Placing::Link => "large.onnx_data",
    };
    assert_eq!(
        std::fs::metadata(version.join(name)).unwrap().len(),
        std::fs::metadata(&weights).unwrap().len()
    );
    if let Some(report) = check(&repository, None, &[]) {
        assert!(report.get("failed").is_none(), "{report}");
    }

    std::fs::remove_file(&weights).unwrap();
    let other = Request {
        repository: scratch.path().join("other"),
        ..wanted
    };
    let error = write(&other).unwrap_err().to_string();
    assert!(error.contains("large.onnx_data"), "{error}");
    assert!(!other.repository.exists());
}

/// What `check_triton.py` found; `None` where Triton's client is not there.
fn check(repository: &Path, operators: Option<&Path>, client: &[&str]) -> Option<Value> {
    let python = std::env::var_os("LINFUSION_TEST_PYTHON_DIR");
    let triton = std::env::var_os("LINFUSION_TEST_TRITON_DIR");
    let (Some(python), Some(triton)) = (python, triton) else {
        eprintln!(
            "skipped: LINFUSION_TEST_PYTHON_DIR and LINFUSION_TEST_TRITON_DIR are not set (make test sets them)"
        );
        return None;
    };
    let onnx_runtime = Path::new(&python).join("1.32.0");
    if !Path::new(&triton).join("tritonclient").is_dir()
        || !onnx_runtime.join("onnxruntime").is_dir()
    {
        eprintln!("skipped: Triton's client or onnxruntime could not be fetched");
        return None;
    }
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
    let program = std::env::var_os("PYTHON").unwrap_or_else(|| "python3".into());
    let packages = std::env::join_paths([Path::new(&triton), &onnx_runtime]).unwrap();
    let mut command = Command::new(program);
    command
        .env("PYTHONPATH", packages)
        .arg(scripts.join("check_triton.py"))
        .arg(repository);
    if let Some(path) = operators {
        command.arg("--operators").arg(path);
    }
    if !client.is_empty() {
        command.arg("--client").args(client);
    }
    let out = command.output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&out.stdout).unwrap();
    Some(report)
}

#[rstest]
fn triton_would_load_them(#[values("sd15", "sd21", "sdxl", "pixart")] name: &str) {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked(name, scratch.path());
    let repository = scratch.path().join("repository");
    let exported = write(&request(&pipeline, &repository)).unwrap();
    let Some(report) = check(&repository, None, &[]) else {
        return;
    };
    let mut names: Vec<_> = exported.models.into_iter().map(|m| m.name).collect();
    names.sort();
    assert_eq!(report["models"], serde_json::json!(names), "{report}");
}

#[test]
fn the_check_finds_what_triton_would_refuse() {
    let scratch = tempfile::tempdir().unwrap();
    let pipeline = unpacked("sd15", scratch.path());
    let repository = scratch.path().join("repository");
    write(&request(&pipeline, &repository)).unwrap();
    let config = repository.join("vae_decoder/config.pbtxt");
    let good = std::fs::read_to_string(&config).unwrap();
    let spoiled = [
        ("name: \"sample\"", "name: \"image\"", "sample"),
        ("TYPE_FP32", "TYPE_FP16", "TYPE_FP16"),
        ("TYPE_FP32", "TYPE_FLOAT", "TYPE_FLOAT"),
        ("dims: [3, -1, -1]", "dims: [3, -1]", "sample"),
        ("dims: [3, -1, -1]", "dims: [-1, -1, -1]", "sample"),
        ("max_batch_size", "maximal_batch", "maximal_batch"),
    ];
    for (from, to, told) in spoiled {
        let bad = good.replace(from, to);
        assert_ne!(bad, good, "{from}");
        std::fs::write(&config, bad).unwrap();
        let Some(report) = check(&repository, None, &[]) else {
            return;
        };
        let failed = report["failed"].as_str().unwrap_or_default();
        assert!(failed.contains(told), "{to}: {report}");
    }
}

struct Silent;

impl Observer for Silent {
    fn progress(&mut self, _: Progress) {}
}

/// The client of `examples/python`, with the models behind a stand-in for the server, makes the image that `generate` makes.
#[rstest]
fn the_client_makes_the_same_image(#[values("sd15", "sd21", "sdxl")] name: &str) {
    if !has_ort() {
        println!("skipped: no ONNX Runtime library");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let library = std::env::var_os("LINFUSION_OPS_LIBRARY").map(PathBuf::from);
    let pipeline = match &library {
        Some(_) => converted(name, scratch.path(), Emit::Op),
        None => unpacked(name, scratch.path()),
    };
    let repository = scratch.path().join("repository");
    write(&Request {
        operator_library: library.clone(),
        ..request(&pipeline, &repository)
    })
    .unwrap();

    let latents = scratch.path().join("latents.npy");
    let noise = Array4::from_shape_vec(
        (1, 4, 16, 24),
        torch_random::TorchRandom::new(3).normal(4 * 16 * 24),
    )
    .unwrap();
    ndarray_npy::write_npy(&latents, &noise).unwrap();
    let served = scratch.path().join("served.png");
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/python/triton_client.py");
    let paths = [&client, &pipeline, &latents, &served].map(|p| p.to_str().unwrap());
    let [client, folder, noise_file, out] = paths;
    let prompt = "A photo of an astronaut riding a horse, it's 4k";
    let arguments = [
        client,
        folder,
        "--prompt",
        prompt,
        "--negative",
        "blurry, low quality",
        "--steps",
        "4",
        "--guidance",
        "6",
        "--latents",
        noise_file,
        "-o",
        out,
    ];
    let Some(report) = check(&repository, library.as_deref(), &arguments) else {
        return;
    };
    let text = if name == "sdxl" {
        "text"
    } else {
        "text_encoder"
    };
    assert_eq!(
        report["calls"],
        serde_json::json!([text, "unet", "unet", "unet", "unet", "vae_decoder"]),
        "{report}"
    );

    let place = Place {
        engine: Engine::Ort,
        options: SessionOptions {
            operators: linfusion_runtime::engine::Operators::InProcess,
            ..SessionOptions::default()
        },
    };
    let made = pipeline::Request {
        negative: Some("blurry, low quality".to_owned()),
        steps: 4,
        guidance: 6.0,
        init: Init::Latents(noise),
        scheduler: Some("ddim".to_owned()),
        direct: true,
        ..pipeline::Request::new(prompt.to_owned(), scratch.path().join("made.png"))
    };
    let opened = Folder::open(&pipeline).unwrap();
    let generated = generate(
        &opened,
        &place,
        &made,
        &|_| Metadata::default(),
        &mut Silent,
    )
    .unwrap();
    let (found, expected) = (read(&served).unwrap(), read(&generated.images[0]).unwrap());
    assert_eq!(
        (found.width(), found.height()),
        (expected.width(), expected.height())
    );
    let pairs = found.bytes().iter().zip(expected.bytes());
    let worst = pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap();
    // Single precision, summed in other orders, tips a value over to the next of 256.
    assert!(worst <= 1, "a pixel is {worst} off");
}
