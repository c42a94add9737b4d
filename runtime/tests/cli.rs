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

/// The model of a fixture that is compressed.
fn unpacked(name: &str, folder: &Path) -> String {
    let path = folder.join(format!("{name}.onnx"));
    let bytes = linfusion_models::fixtures::bytes(&format!("{name}/model.onnx.gz")).unwrap();
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
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
    let pixels =
        |height: usize, width: usize| serde_json::json!({"height": height, "width": width});
    assert_eq!(sizes[1]["pixels"], pixels(128, 128));
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
        assert!(results[0]["speedup"].is_null());
        // Two runs each tell nothing.
        assert!(results[1]["speedup"]["verdict"].is_null());
    }
    assert!(std::fs::read_to_string(plot).unwrap().contains("copy.onnx"));
}

/// What is said of two models is what their runs allow.
#[test]
fn bench_judges_by_the_range_of_the_ratios() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    let copy = copy_of(&model, folder.path());
    let usual = [
        "--sizes",
        "64",
        "--batch",
        "1",
        "--sequence",
        "7",
        "--report",
        "json",
    ];
    for repeats in ["5", "9"] {
        let models = [
            "bench",
            &model,
            copy.to_str().unwrap(),
            "--repeats",
            repeats,
        ];
        let output = run(&[&models[..], &usual].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let speedup = json(&output)["sizes"][0]["results"][1]["speedup"].clone();
        let [low, high] = [0, 1].map(|i| speedup["range"][i].as_f64().unwrap());
        let expected = if low > 1.0 {
            "faster"
        } else if high < 1.0 {
            "slower"
        } else {
            "unclear"
        };
        assert_eq!(speedup["verdict"], expected, "{low} {high}");
    }
}

/// A model that does not get through the smallest size does not keep the others from it.
#[test]
fn bench_goes_on_without_what_does_not_get_through() {
    let folder = tempfile::tempdir().unwrap();
    let pixart = unpacked("hybrid-pixart", folder.path());
    let (unet, pixart) = (fixture("sd15-tiny/unet.onnx"), pixart.as_str());
    // Nine latents, which the UNet cannot halve.
    let usual = ["--sizes", "72", "--repeats", "1", "--report", "json"];
    let output = run(&[&["bench", &unet, pixart], &usual[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let report = json(&output);
    let [first, second] = [0, 1].map(|i| report["sizes"][0]["results"][i].clone());
    let failure = first["failure"].as_str().unwrap_or_default();
    assert!(failure.contains("unet.onnx at 72 × 72"), "{first}");
    assert!(second["median_ms"].as_f64().is_some(), "{second}");
    // Nobody wants a table that says nothing but that.
    let output = run(&[&["bench", &unet], &usual[..]].concat());
    assert_eq!(output.status.code(), Some(1));
    let missing = run(&[&["bench", pixart, "/nowhere/x.onnx"], &usual[..]].concat());
    assert_eq!(missing.status.code(), Some(1));
}

/// Files that are there are replaced only by request, and that is said before anything is measured.
#[test]
fn bench_replaces_no_file_unasked() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    for option in ["--json", "--plot"] {
        let path = folder.path().join("mine");
        std::fs::write(&path, "mine").unwrap();
        let file = [option, path.to_str().unwrap()];
        let usual = ["--sizes", "64", "--repeats", "1", "--batch", "1"];
        let bench = [&["bench", &model], &usual[..], &file].concat();
        let output = run(&bench);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("--overwrite"),
            "{}",
            stderr(&output)
        );
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "mine");
        let output = run(&[&bench[..], &["--overwrite"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_ne!(std::fs::read_to_string(&path).unwrap(), "mine");
    }
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

/// A model of pixels has as many rows as the image, latents an eighth; a graph of one size is measured at it.
#[test]
fn bench_tells_pixels_from_latents() {
    let digits = fixture("digits/digits-dit.onnx");
    let unet = fixture("sd15-tiny/unet.onnx");
    let sizes = |arguments: &[&str]| {
        let usual = [
            "--repeats",
            "1",
            "--batch",
            "1",
            "--sequence",
            "7",
            "--report",
            "json",
        ];
        let output = run(&[&["bench"], arguments, &usual].concat());
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let report = json(&output);
        let sizes = report["sizes"].as_array().unwrap();
        let side = |size: &serde_json::Value, side: &str| size["pixels"][side].as_u64().unwrap();
        sizes
            .iter()
            .map(|s| [side(s, "height"), side(s, "width")])
            .collect::<Vec<_>>()
    };
    assert_eq!(sizes(&[&digits]), [[16, 16]]);
    assert_eq!(sizes(&[&digits, "--sizes", "16"]), [[16, 16]]);
    assert_eq!(sizes(&[&digits, "--pixels-per-latent", "4"]), [[64, 64]]);
    assert_eq!(sizes(&[&unet, "--set", "sample=1,4,8,16"]), [[64, 128]]);

    for (arguments, expected) in [
        (&[&*digits, "--sizes", "64"][..], "--resize dynamic"),
        (
            &[&unet, "--sizes", "64,100"],
            "100 pixels are not divisible by 8",
        ),
        (
            &[&unet, "--sizes", "64", "--set", "sample=1,4,8,8"],
            "the shape of `sample` gives the size",
        ),
        (
            &[&unet, "--sizes", "64", "--set", "smaple=1,4,8,8"],
            "`smaple`",
        ),
    ] {
        let output = run(&[&["bench"], arguments].concat());
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}

/// A shape of tokens is a size.
#[test]
fn bench_is_not_given_two_sizes() {
    let folder = tempfile::tempdir().unwrap();
    let flux = unpacked("hybrid-flux", folder.path());
    let flux = flux.as_str();
    let shape = ["--set", "hidden_states=1,16,8"];
    let both = run(&[&["bench", flux, "--sizes", "32"][..], &shape].concat());
    assert_eq!(both.status.code(), Some(2), "{}", stderr(&both));
    assert!(stderr(&both).contains("the shape of `hidden_states` gives the size"));
    let one = ["bench", flux, "--repeats", "1", "--report", "json"];
    let output = run(&[&one[..], &shape].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let sizes = &json(&output)["sizes"];
    // 4 x 4 tokens of 16 x 16 pixels.
    assert_eq!(sizes.as_array().unwrap().len(), 1);
    assert_eq!(sizes[0]["pixels"]["height"], 64);
}

/// One that does not load is said before the others have run in vain.
#[test]
fn bench_does_not_run_beside_what_does_not_load() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.onnx");
    std::fs::write(&broken, "no model").unwrap();
    let unet = fixture("sd15-tiny/unet.onnx");
    let models = ["bench", &unet, broken.to_str().unwrap()];
    // Runs of hours.
    let rest = ["--sizes", "512", "--repeats", "100000"];
    let output = run(&[&models[..], &rest].concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("broken.onnx"),
        "{}",
        stderr(&output)
    );
}

/// Shapes that cannot be are wrong usage; what only the engine finds is told once, with file and inputs, its reason last.
#[test]
fn given_shapes_are_checked_before_an_engine_sees_them() {
    let folder = tempfile::tempdir().unwrap();
    let flux = unpacked("hybrid-flux", folder.path());
    let (flux, unet) = (flux.as_str(), fixture("sd15-tiny/unet.onnx"));
    let tokens = ["hidden_states=1,8,8", "img_ids=9,3"];
    let ids =
        "`img_ids` [9, 3] has the position ids of 9 tokens, but `hidden_states` [1, 8, 8] has 8";
    for (model, shapes, code, says) in [
        (flux, &tokens[..], 1, ids),
        (&unet, &["sample=1,4"], 2, "[1, 4] was given for `sample`"),
        (
            &unet,
            &["sample=1,3,8,8"],
            2,
            "the graph takes f32[batch, 4, height, width]",
        ),
        (
            &unet,
            &["sample=1,4,9,9"],
            1,
            "on `sample` f32[1, 4, 9, 9], `timestep`",
        ),
    ] {
        let shapes = shapes.iter().flat_map(|shape| ["--set", shape]);
        let shapes: Vec<&str> = shapes.collect();
        for command in [&["compare", model, model][..], &["bench", model]] {
            let output = run(&[command, &shapes].concat());
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
            assert_eq!(said.matches(says).count(), 1, "{command:?}: {said}");
            assert!(said.contains(model) || code == 2, "{command:?}: {said}");
            assert_eq!(
                said.matches("failed while running").count(),
                usize::from(code == 1),
                "{said}"
            );
            assert!(!said.contains("ERROR"), "{said}");
        }
    }
    // As many image tokens as ids.
    let output = run(&[
        "compare",
        flux,
        flux,
        "--set",
        "img_ids=24,3",
        "--report",
        "json",
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(json(&output)["outputs"][0]["shape"][1], 24);
}

#[test]
fn compare_tells_what_is_not_finite_from_what_is_far_apart() {
    let folder = tempfile::tempdir().unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    let huge = folder.path().join("huge.npz");
    // Finite in single precision, until something is multiplied with it; and not even that.
    for (factor, hint) in [
        (1e37, "order of magnitude"),
        (f64::MAX, "2048 values of `sample` in"),
    ] {
        let mut inputs =
            linfusion_runtime::npz::read(fixture("sd15-tiny/inputs.npz").as_ref()).unwrap();
        for (name, tensor) in &mut inputs {
            if name == "sample" {
                *tensor = linfusion_runtime::tensor::Tensor::from_f64(
                    tensor.to_f64() * factor,
                    tensor.dtype(),
                );
            }
        }
        linfusion_runtime::npz::write(&huge, &inputs).unwrap();
        let huge = huge.to_str().unwrap();
        let output = run(&["compare", &model, &model, "--inputs", huge]);
        assert_eq!(output.status.code(), Some(5), "{}", stderr(&output));
        let said = stderr(&output);
        assert!(
            said.contains("hint:") && said.contains("huge.npz"),
            "{said}"
        );
        assert!(said.contains(hint), "{said}");
    }

    let noise = [
        "--latent",
        "8",
        "--tolerance",
        "0",
        "--batch",
        "1",
        "--sequence",
        "7",
    ];
    let other = fixture("sd15-identity/unet.onnx");
    if Path::new(&other).is_file() {
        let output = run(&[&["compare", &model, &other], &noise[..]].concat());
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    }
}

/// What stands in the way is told once.
#[test]
fn no_error_repeats_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(path("broken.npz"), "PK").unwrap();
    std::fs::write(path("broken.onnx"), "no model").unwrap();
    let pipeline = folder.path().join("sd15");
    linfusion_models::fixtures::pipeline("sd15", &pipeline).unwrap();
    std::fs::write(pipeline.join("vae_decoder/config.json"), "{}").unwrap();
    let index = folder.path().join("empty");
    std::fs::create_dir(&index).unwrap();
    std::fs::write(index.join("model_index.json"), "{").unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    let missing = path("missing.onnx");
    let (npz, broken, empty) = (path("broken.npz"), path("broken.onnx"), path("empty"));
    let pipeline = pipeline.to_str().unwrap();
    for (arguments, says) in [
        (&["compare", &model, &missing][..], "No such file"),
        (&["compare", &model, &broken], "broken.onnx"),
        (&["compare", &model, &model, "--inputs", &npz], "broken.npz"),
        (
            &["compare", &model, &model, "--inputs", &missing],
            "No such file",
        ),
        (&["generate", &empty, "--prompt", "x"], "EOF while parsing"),
        (
            &["generate", pipeline, "--prompt", "x"],
            "field `block_out_channels` is missing",
        ),
        (&["generate", &missing, "--prompt", "x"], "No such file"),
        (
            &["generate", pipeline, "--prompts", &missing],
            "No such file",
        ),
        (
            &["export-triton", &empty, "-o", &missing],
            "EOF while parsing",
        ),
        (&["bench", &missing], "No such file"),
        (
            &[
                "compare",
                &model,
                &model,
                "--ort-library",
                &missing,
                "--engine",
                "ort",
            ],
            "does not load",
        ),
    ] {
        let output = run(arguments);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {said}");
        assert_eq!(said.matches(says).count(), 1, "{arguments:?}: {said}");
        let parts = said.split("╰─▶").flat_map(|part| part.split(": "));
        for part in parts.filter(|p| p.len() > 12 && !p.contains(".onnx")) {
            assert_eq!(
                said.matches(part).count(),
                1,
                "{arguments:?} says '{part}' twice: {said}"
            );
        }
    }
}

/// Which library, who asked for it, and the loader's own reason.
#[test]
fn a_library_that_does_not_load_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let [missing, junk] = ["missing.so", "junk.so"].map(|name| {
        let path = folder.path().join(name);
        path.to_str().unwrap().to_owned()
    });
    std::fs::write(&junk, "no library").unwrap();
    let model = fixture("sd15-tiny/unet.onnx");
    for (library, reason) in [
        (&*missing, "cannot open shared object file: No such file"),
        (&*junk, "file too short"),
        ("libm.so.6", "it has no OrtGetApiBase"),
    ] {
        let option = ["--ort-library", library];
        let given = run(&[&["compare", &model, &model], &option[..]].concat());
        let variable = Command::new(env!("CARGO_BIN_EXE_linfusion-run"))
            .args(["compare", &model, &model])
            .env("ORT_DYLIB_PATH", library)
            .output()
            .unwrap();
        for (output, setting) in [(given, "--ort-library"), (variable, "ORT_DYLIB_PATH")] {
            let said = stderr(&output);
            assert_eq!(output.status.code(), Some(1), "{said}");
            let told = format!("library {library} (from {setting}) does not load: {reason}");
            assert!(said.contains(&told), "{told}: {said}");
            assert!(said.contains("help: "), "{said}");
        }
    }
}

/// Nobody hears: the exit code stays what it is. A report that finds no place is an error.
#[test]
fn what_cannot_be_told_is_no_panic() {
    use std::process::Stdio;
    let full = || {
        std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap()
    };
    let closed = || std::io::pipe().unwrap().1;
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
        command.args(arguments);
        command
    };
    for deaf in [Stdio::from(full()), Stdio::from(closed())] {
        let status = command(&["bench", "a"]).stderr(deaf).status().unwrap();
        assert_eq!(status.code(), Some(1));
    }
    // What is logged as well, by ONNX Runtime's threads among others.
    let unet = fixture("sd15-tiny/unet.onnx");
    let status = command(&["compare", &unet, &unet, "--latent", "8"])
        .env("LINFUSION_LOG", "trace")
        .stdout(Stdio::null())
        .stderr(full())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    let output = command(&["doctor"]).stdout(full()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(said.contains("standard output: No space left"), "{said}");
    let left = command(&["man"]).stdout(closed()).output().unwrap();
    assert_eq!(
        (left.status.code(), stderr(&left)),
        (Some(0), String::new())
    );
}

/// Each JSON file of a pipeline that is none, or holds what it should not.
#[test]
fn a_broken_file_of_a_pipeline_is_named_with_its_field() {
    let folder = tempfile::tempdir().unwrap();
    let pipeline = folder.path().join("sd15");
    linfusion_models::fixtures::pipeline("sd15", &pipeline).unwrap();
    let word = r#"{"sample_size": 8, "block_out_channels": "x", "in_channels": 4}"#;
    for (file, text, says) in [
        ("model_index.json", "{", "EOF while parsing"),
        (
            "model_index.json",
            r#"{"_class_name": 1}"#,
            "field `_class_name`: invalid type",
        ),
        ("scheduler/scheduler_config.json", "{", "EOF while parsing"),
        (
            "scheduler/scheduler_config.json",
            "[]",
            "invalid type: sequence",
        ),
        ("unet/config.json", "{,", "key must be a string"),
        (
            "unet/config.json",
            word,
            "field `block_out_channels`: invalid type: string",
        ),
        (
            "vae_decoder/config.json",
            word,
            "field `block_out_channels`: invalid type: string",
        ),
        ("tokenizer/tokenizer_config.json", "{", "EOF while parsing"),
        (
            "tokenizer/tokenizer_config.json",
            r#"{"model_max_length": []}"#,
            "field `model_max_length`: invalid type",
        ),
    ] {
        let path = pipeline.join(file);
        let good = std::fs::read(&path).unwrap();
        std::fs::write(&path, text).unwrap();
        let output = run(&[
            "generate",
            pipeline.to_str().unwrap(),
            "--prompt",
            "x",
            "--steps",
            "1",
        ]);
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{file}: {said}");
        assert!(said.contains(&format!("{file}: {says}")), "{file}: {said}");
        std::fs::write(&path, good).unwrap();
    }
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
    let text = stdout(&run(&[
        "doctor",
        "--ort-library",
        "/nowhere/libonnxruntime.so",
    ]));
    assert_eq!(text.matches("/nowhere/").count(), 1, "{text}");
    // Called as other commands call it, too; and what it does not use is not accepted.
    for (option, value, code) in [
        ("--operator-library", "/nowhere/liblinfusion_ops.so", 4),
        ("--operators", "/nowhere/liblinfusion_ops.so", 4),
        ("--device", "cpu", 2),
    ] {
        let output = run(&["doctor", option, value]);
        assert_eq!(output.status.code(), Some(code), "{option}");
    }
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
        // Found after the parser is done.
        &["generate", "."],
        &["bench", ".", "Cargo.toml"],
        &["compare", ".", "Cargo.toml"],
        &["compare", "a", "b", "--prompt", "x"],
        &["compare", ".", ".", "--prompt", "x", "--latent", "8"],
        &[
            "compare",
            "a",
            "b",
            "--engine",
            "tract",
            "--gpu-memory",
            "1GB",
        ],
        &["generate", ".", "--prompt", "x", "--scheduler", "magic"],
        &["generate", ".", "--prompt", "x", "-o", "x.gif"],
    ] {
        assert_eq!(run(arguments).status.code(), Some(2), "{arguments:?}");
    }
    // The file is at fault, not the command line.
    for arguments in [&["bench", "a"][..], &["generate", "a", "--prompt", "x"]] {
        assert_eq!(run(arguments).status.code(), Some(1), "{arguments:?}");
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
