//! `linfusion-run generate` as its users call it.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use linfusion_runtime::engine::Location;
use linfusion_runtime::image::{Metadata, RowWriter, read};
use linfusion_runtime::pipeline::{Init, Request};
use support::{Bench, Blind, edit, make, said};

fn text_of(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()
}

#[test]
fn a_prompt_becomes_an_image_that_says_how_it_was_made() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let output = bench.run(&[
        "--prompt",
        "a horse",
        "--steps",
        "2",
        "--seed",
        "4",
        "--report",
        "json",
        "-o",
        "horse.png",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let image = read(&bench.path("horse.png")).unwrap();
    assert_eq!((image.width(), image.height()), (128, 128));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report[0]["seed"], 4);
    assert_eq!(
        report[0]["stages"][1]["steps"], 3,
        "PNDM takes one step twice: {report}"
    );
    let text = text_of(&bench.path("horse.png"));
    assert!(text.contains("a horse\nSteps: 2") && text.contains("Size: 128x128"));
    let hash = |key: &str| {
        let (_, rest) = text.split_once(&format!("{key} hash: ")).unwrap();
        rest.get(..10).unwrap().to_owned()
    };
    let (_, rest) = text.split_once(", Hashes: ").unwrap();
    let object = rest.split_inclusive('}').next().unwrap();
    let hashes: serde_json::Value = serde_json::from_str(object).unwrap();
    assert_eq!(hashes["model"], hash("Model"));
    assert_eq!(hashes["vae"], hash("VAE"));
    // Each model has its own.
    let hashes = hashes.as_object().unwrap();
    assert_eq!(hashes.len(), 3, "{object}");
    let own: BTreeSet<&str> = hashes.values().filter_map(|h| h.as_str()).collect();
    assert_eq!(own.len(), 3, "{object}");
    assert!(hashes.contains_key("text_encoder"), "{object}");
    assert_eq!(bench.files(), ["horse.png"]);
    // The same seed, the same image; another, another.
    bench.run(&[
        "--prompt",
        "a horse",
        "--steps",
        "2",
        "--seed",
        "4",
        "-o",
        "again.png",
    ]);
    bench.run(&[
        "--prompt",
        "a horse",
        "--steps",
        "2",
        "--seed",
        "5",
        "-o",
        "other.png",
    ]);
    let bytes = |name: &str| read(&bench.path(name)).unwrap().bytes().to_vec();
    assert_eq!(bytes("again.png"), image.bytes());
    assert_ne!(bytes("other.png"), image.bytes());
}

#[test]
fn a_large_image_is_reached_in_stages_and_tiles() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let output = bench.run(&[
        "--prompt",
        "mars",
        "--steps",
        "5",
        "--size",
        "512x256",
        "--vae-tile",
        "128",
        "-o",
        "mars.tiff",
        "--report",
        "json",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    let image = read(&bench.path("mars.tiff")).unwrap();
    assert_eq!((image.width(), image.height()), (512, 256));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let stages: Vec<&str> = report[0]["stages"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|s| s["stage"].as_str())
        .collect();
    assert_eq!(
        stages,
        [
            "text",
            "denoise 192x64",
            "decode 192x64",
            "encode 384x192",
            "denoise 384x192",
            "decode 384x192",
            "encode 512x256",
            "denoise 512x256",
            "decode 512x256",
        ]
    );
    assert_eq!(
        bench.files(),
        ["mars.tiff"],
        "images between stages are gone in the end"
    );
}

#[test]
fn a_file_of_prompts_takes_a_seed_each() {
    let Some(bench) = Bench::new("sd21") else {
        return;
    };
    std::fs::write(bench.path("prompts.txt"), "a horse\n\nmars\n").unwrap();
    let output = bench.run(&[
        "--prompts",
        "prompts.txt",
        "--steps",
        "1",
        "-o",
        "p.png",
        "--num-images",
        "2",
        "--cfg-split",
    ]);
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        bench.files(),
        [
            "p-001-1.png",
            "p-001-2.png",
            "p-002-1.png",
            "p-002-2.png",
            "prompts.txt"
        ]
    );
    assert!(text_of(&bench.path("p-002-1.png")).contains("Seed: 1"));
}

#[test]
fn bad_input_is_named_and_leaves_nothing() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    std::fs::write(bench.path("bad.txt"), b"fine\n\xff\n").unwrap();
    std::fs::write(bench.path("no.png"), "no image").unwrap();
    let before = bench.files();
    let cases: [(&[&str], &str); 13] = [
        (
            &["--prompt", "x", "--size", "100x128"],
            "--size: 100x128, expected multiples of 64 up to 1048576, such as 128x128",
        ),
        (&["--prompt", "x", "--size", "0x64"], "--size: 0x64"),
        (
            &["--prompt", "x", "--steps", "2000"],
            "2000 steps, expected 1 to 1000",
        ),
        (
            &["--prompt", "x", "--scheduler", "magic"],
            "there is no sampler `magic`",
        ),
        (&["--prompt", "x", "--vae-tile", "100"], "--vae-tile: 100"),
        (&["--prompt", "x", "--image", "no.png"], "no.png"),
        (
            &["--prompt", "x", "--image", "no.png", "--strength", "0"],
            "no.png",
        ),
        (&["--prompts", "bad.txt"], "bad.txt is no UTF-8 (line 2)"),
        (&["--prompt", "x", "--steps", "0"], "--steps: 0"),
        (&["--prompt", "x", "--guidance", "nan"], "--guidance: NaN"),
        (
            &["--prompt", "x", "--size", "18446744073709551614x64"],
            "up to 1048576, such as 1048576x64",
        ),
        (&["--prompt", "x", "-o", "out.gif"], "gif"),
        (
            &["--prompt", "x", "--steps", "1", "-o", "none/out.png"],
            "none",
        ),
    ];
    for (arguments, expected) in cases {
        let output = bench.run(arguments);
        let of_a_file = ["no.png", "bad.txt is no UTF-8 (line 2)", "none"].contains(&expected);
        let code = if of_a_file { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
        assert!(
            said(&output).contains(expected),
            "{arguments:?}: {}",
            said(&output)
        );
    }
    std::fs::write(bench.pipeline.join("unet/model.onnx"), "damaged").unwrap();
    let output = bench.run(&["--prompt", "x", "--steps", "1"]);
    assert!(
        said(&output).contains("unet/model.onnx"),
        "{}",
        said(&output)
    );
    assert_eq!(bench.files(), before);
}

#[test]
fn a_device_is_taken_or_refused() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let output = bench.run(&["--prompt", "x", "--device", "gpu"]);
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    let providers = linfusion_runtime::engine::execution_providers(None).unwrap();
    if !providers.iter().any(|p| p == "CUDAExecutionProvider") {
        let output = bench.run(&["--prompt", "x", "--device", "cuda:1"]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(
            said.contains("cuda:1 cannot be used: this ONNX Runtime has no"),
            "{said}"
        );
    }
}

#[test]
fn the_node_that_makes_a_nan_is_named() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let path = bench.pipeline.join("unet/model.onnx");
    let mut node = String::new();
    edit(&path, |file, model| {
        let graph = model.graph.get_or_insert_default();
        let is_middle = |name: &str| name.contains("mid_block") && name.contains("conv1");
        let conv = graph.node.iter().find(|n| {
            n.op_type.as_deref() == Some("Conv") && is_middle(n.name.as_deref().unwrap_or(""))
        });
        let conv = conv.unwrap();
        node = conv.name.clone().unwrap();
        let weight = conv.input[1].clone();
        let tensor = graph.initializer.iter_mut();
        let tensor = tensor
            .into_iter()
            .find(|t| t.name.as_ref() == Some(&weight));
        let tensor = tensor.unwrap();
        let mut bytes = file.tensor_bytes(tensor).unwrap().to_vec();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        tensor.raw_data = Some(bytes.into());
    });
    let output = bench.run(&["--prompt", "x", "--steps", "2", "--scheduler", "ddim"]);
    let said = said(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for part in [
        "unet, output `",
        "infinite or not a number",
        &format!("the first is made by `{node}` (Conv)"),
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert!(!bench.files().contains(&"out.png".to_owned()));
    // Found by one number where the latents stay on the device, and named as well.
    let asked = Request {
        steps: 2,
        ..Request::new("x".to_owned(), bench.path("out.png"))
    };
    let error = make(&bench.pipeline, &asked, Location::Device, &mut Blind);
    let error = error.err().unwrap().to_string();
    for part in ["unet, output `", &format!("made by `{node}` (Conv)")] {
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// A latent consistency model takes all steps from a part of its schedule, as diffusers' pipeline of these has it; another model with
/// LCM's sampler takes a part of the steps.
#[test]
fn lcm_takes_all_steps_of_a_part() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let picture = bench.path("picture.png");
    let mut writer = RowWriter::create(&picture, 128, 128, &Metadata::default()).unwrap();
    writer.write_rows(&[90; 3 * 128 * 128]).unwrap();
    writer
        .finish(linfusion_models::onnx::write::Overwrite::Force)
        .unwrap();
    let asked = Request {
        steps: 4,
        scheduler: Some("lcm".to_owned()),
        init: Init::Image {
            image: read(&picture).unwrap(),
            strength: 0.5,
        },
        ..Request::new("x".to_owned(), bench.path("out.png"))
    };
    let steps = |asked: &Request| {
        let made = make(&bench.pipeline, asked, Location::Host, &mut Blind);
        made.map(|made| made.stages.iter().map(|s| s.steps).max())
    };
    assert_eq!(steps(&asked).unwrap(), Some(2));
    let config = bench.pipeline.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["time_cond_proj_dim"] = 32.into();
    std::fs::write(&config, json.to_string()).unwrap();
    assert_eq!(steps(&asked).unwrap(), Some(4));
    let many = Request { steps: 26, ..asked };
    let error = steps(&many).unwrap_err().to_string();
    assert!(error.contains("26 steps, expected 1 to 25"), "{error}");
}

/// Only an image that was enlarged tells how much that changed.
#[test]
fn upscale_strengths_are_those_of_the_image() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    for (size, told) in [
        ("128x128", None),
        ("384x192", Some("Upscale strengths: 0.9, ")),
    ] {
        let more = ["--steps", "3", "--upscale", "0.9,0.8", "--overwrite"];
        let output = bench.run(&[&["--prompt", "x", "--size", size][..], &more].concat());
        assert!(output.status.success(), "{}", said(&output));
        let bytes = std::fs::read(bench.path("out.png")).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains(&format!("Size: {size}")), "{size}");
        assert_eq!(text.contains("Upscale strengths"), told.is_some(), "{size}");
        assert!(told.is_none_or(|told| text.contains(told)), "{size}");
    }
}

#[test]
fn a_pipeline_equals_itself() {
    let Some(bench) = Bench::new("sd21") else {
        return;
    };
    let compare = |more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_linfusion-run"))
            .arg("compare")
            .args([&bench.pipeline, &bench.pipeline])
            .args(["--engine", "ort", "--report", "json"])
            .args(more)
            .current_dir(bench.scratch.path())
            .output()
            .unwrap()
    };
    let arguments = ["--prompt", "x", "--steps", "3", "-o", "both.png"];
    let output = compare(&arguments);
    assert!(output.status.success(), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let image = &report["images"][0];
    assert_eq!(image["psnr_db"], serde_json::Value::Null);
    assert_eq!(image["ssim"], 1.0);
    let steps = image["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3, "{report}");
    assert!(steps.iter().all(|s| s["max_abs"] == 0.0));
    let picture = read(&bench.path("both.png")).unwrap();
    assert_eq!((picture.width(), picture.height()), (3 * 128, 128));
    let again = compare(&["--prompt", "y", "-o", "both.png"]);
    assert_eq!(again.status.code(), Some(1), "{}", said(&again));
    assert!(
        said(&again).contains("both.png exists already"),
        "{}",
        said(&again)
    );
    assert_eq!(read(&bench.path("both.png")).unwrap(), picture);
    // A picture that nobody asked for is not written.
    let before = bench.files();
    let output = compare(&["--prompt", "x", "--steps", "1"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["images"][0]["picture"], serde_json::Value::Null);
    assert_eq!(bench.files(), before);
    let output = compare(&["--prompt", "x", "--steps", "1", "--sites"]);
    assert!(
        said(&output).contains("has no operator of ai.linfusion"),
        "{}",
        said(&output)
    );
    let output = compare(&[]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        said(&output).contains("give --prompt TEXT, or --prompts FILE"),
        "{}",
        said(&output)
    );
}

/// What was refused before any work: nothing is said of a stage, nothing is written.
#[test]
fn what_cannot_end_well_does_not_begin() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    std::fs::write(bench.path("taken"), "").unwrap();
    let before = bench.files();
    let cases: [(&[&str], &str); 12] = [
        (&["-o", "out.gif"], "gif"),
        (&["-o", "none/out.png"], "none"),
        (&["--steps", "2000"], "2000 steps"),
        (
            &["--scheduler", "flow-euler", "--steps", "1001"],
            "1001 steps",
        ),
        (
            &["--vae-tile", "72"],
            "--vae-tile: 72, expected a multiple of 32",
        ),
        // Not options.
        (&["--eta", "-1"], "--eta: -1"),
        (&["--upscale", "-0.4,0.3"], "--upscale: -0.4"),
        (&["--control-scale", "2"], "--control-image"),
        (
            &["--eta", "0.5", "--scheduler", "euler"],
            "EulerDiscreteScheduler doesn't take it",
        ),
        (&["--original-size", "64x64"], "no input `time_ids`"),
        (
            &[
                "--size",
                "512x256",
                "--steps",
                "4",
                "--scheduler",
                "ddim",
                "--upscale",
                "0.2",
            ],
            "--upscale: 0.2 of 4 steps is none",
        ),
        (&["--num-images", "9223372036854775808"], "--num-images"),
    ];
    for (arguments, expected) in cases {
        let output = bench.run(&[&["--prompt", "x"][..], arguments].concat());
        let said = said(&output);
        let code = if expected == "none" { 1 } else { 2 };
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
        assert!(!said.contains("text: "), "{arguments:?}: {said}");
        assert_eq!(bench.files(), before, "{arguments:?}");
    }
    for (file, field, value, expected) in [
        ("unet", "sample_size", "0", "`sample_size` is 0"),
        (
            "vae_decoder",
            "latent_channels",
            "18446744073709551615",
            "`latent_channels`",
        ),
        (
            "text_encoder",
            "max_position_embeddings",
            "4611686018427387904",
            "`max_position_embeddings`",
        ),
        ("text_encoder", "", "", "text_encoder/config.json"),
    ] {
        let path = bench.pipeline.join(file).join("config.json");
        let whole = std::fs::read_to_string(&path).unwrap();
        let mut changed: serde_json::Value = serde_json::from_str(&whole).unwrap();
        changed[field] = serde_json::from_str(value).unwrap_or_default();
        let text = match field {
            "" => "{broken".to_owned(),
            _ => changed.to_string(),
        };
        std::fs::write(&path, text).unwrap();
        let output = bench.run(&["--prompt", "x", "--size", "128x128"]);
        let said = said(&output);
        assert_eq!(output.status.code(), Some(1), "{field}: {said}");
        assert!(said.contains(expected), "{field}: {said}");
        std::fs::write(&path, whole).unwrap();
    }
}

#[test]
fn latents_of_either_order_are_the_same() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let rows = ndarray::Array4::from_shape_fn((1, 4, 16, 16), |(_, c, y, x)| {
        (c * 31 + y * 7 + x * 3) as f32 % 5.0 - 2.0
    });
    let mut columns = ndarray::Array4::zeros(ndarray::ShapeBuilder::f(rows.dim()));
    columns.assign(&rows);
    let images = [("rows", rows), ("columns", columns)].map(|(name, latents)| {
        let file = std::fs::File::create(bench.path("latents.npy")).unwrap();
        ndarray_npy::WriteNpyExt::write_npy(&latents, file).unwrap();
        let arguments = ["--prompt", "x", "--steps", "2", "--scheduler", "ddim"];
        let files = ["--latents", "latents.npy", "-o", "out.png", "--overwrite"];
        let output = bench.run(&[&arguments[..], &files].concat());
        assert!(output.status.success(), "{name}: {}", said(&output));
        read(&bench.path("out.png")).unwrap()
    });
    assert_eq!(images[0], images[1]);
}

#[test]
fn images_are_replaced_only_when_that_is_asked_for() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    std::fs::write(bench.path("two.txt"), "a horse\nmars\n").unwrap();
    // The last image of the last prompt: nothing is made before it is seen.
    std::fs::write(bench.path("p-002-2.png"), "mine").unwrap();
    let arguments = [
        "--prompts",
        "two.txt",
        "--steps",
        "1",
        "--num-images",
        "2",
        "-o",
        "p.png",
    ];
    let before = bench.files();
    let refused = bench.run(&arguments);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    let message = said(&refused);
    assert!(
        message.contains("p-002-2.png exists already") && message.contains("--overwrite"),
        "{message}"
    );
    assert_eq!(bench.files(), before);
    let replaced = bench.run(&[&arguments[..], &["--overwrite"]].concat());
    assert!(replaced.status.success(), "{}", said(&replaced));
    assert_eq!(read(&bench.path("p-002-2.png")).unwrap().width(), 128);
    let none = bench.run(&["--steps", "1"]);
    assert_eq!(none.status.code(), Some(2), "{}", said(&none));
}

/// What is to be copied out of a message is in one piece, however long.
#[test]
fn messages_are_not_broken() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let folder = format!("{0}/{0}", "a folder with a long name ".repeat(4).trim());
    let path = format!("{folder}/out.png");
    let output = bench.run(&["--prompt", "x", "--steps", "1", "-o", &path]);
    let said = said(&output);
    let expected = format!(
        "cannot write {path}: No such file or directory (os error 2); make its folder first"
    );
    assert!(said.contains(&expected), "{said}");
    let huge = ["--direct", "--size", "4096x4096", "--device", "cpu"];
    let output = bench.run(&[&["--prompt", "x"][..], &huge].concat());
    let said = support::said(&output);
    let (first, _) = said.split_once('\n').unwrap();
    assert!(
        first.starts_with("expected memory: text ") && first.ends_with(" are free"),
        "{said}"
    );
    assert!(said.contains("of memory, and "), "{said}");
}
