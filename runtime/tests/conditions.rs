//! What a model is told beside the prompt: a ControlNet's residuals, an inpainting mask, SD-XL's sizes. The models are the tiny pipelines',
//! changed so that what the addition does is known.

mod support;

use std::path::Path;

use linfusion_models::onnx::proto::{GraphProto, ModelProto, TensorProto};
use linfusion_models::onnx::{ElementType, make};
use linfusion_runtime::engine::{Device, Engine, Operators, SessionOptions};
use linfusion_runtime::image::{Metadata, RowWriter, read};
use linfusion_runtime::pipeline::{Folder, Guidance, Init, Place, Request, expected};
use support::{Bench, LATENTS, apart, edit, latents, said};

/// Makes an image of two steps and reads it.
fn image(bench: &Bench, arguments: &[&str]) -> Vec<u8> {
    let usual = [
        "--prompt",
        "x",
        "--steps",
        "2",
        "--scheduler",
        "ddim",
        "--overwrite",
        "-o",
        "out.png",
    ];
    let output = bench.run(&[&usual[..], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", said(&output));
    read(&bench.path("out.png")).unwrap().bytes().to_vec()
}

fn refusal(bench: &Bench, arguments: &[&str]) -> String {
    let usual = ["--prompt", "x", "--steps", "1", "-o", "no.png"];
    let output = bench.run(&[&usual[..], arguments].concat());
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(!bench.path("no.png").exists());
    said(&output)
}

/// A picture of one grey.
fn grey(path: &Path, value: u8) {
    let mut writer = RowWriter::create(path, 128, 128, &Metadata::default()).unwrap();
    writer.write_rows(&[value; 3 * 128 * 128]).unwrap();
    writer
        .finish(linfusion_models::onnx::write::Overwrite::Force)
        .unwrap();
}

/// Gives the first convolution of a UNet five channels more, of which the mask's has this weight and the others none.
fn inpainting(bench: &Bench, mask_weight: f32) {
    edit(&bench.pipeline.join("unet/model.onnx"), |file, model| {
        let graph = model.graph.get_or_insert_default();
        let weight = |t: &&mut TensorProto| {
            let name = t.name.as_deref().unwrap_or_default();
            name.ends_with("conv_in.weight")
        };
        let tensor = graph.initializer.iter_mut().find(weight).unwrap();
        let stored = file.tensor_bytes(tensor).unwrap();
        let stored: Vec<f32> = stored
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let area = usize::try_from(tensor.dims[2] * tensor.dims[3]).unwrap();
        let mut values = Vec::new();
        for kernel in stored.chunks_exact(4 * area) {
            values.extend_from_slice(kernel);
            values.extend(vec![mask_weight; area]);
            values.extend(vec![0.0; 4 * area]);
        }
        let mut dims = tensor.dims.clone();
        dims[1] = 9;
        let name = tensor.name.clone().unwrap();
        *tensor = make::tensor_f32(&name, &dims, &values);
        let sample = graph
            .input
            .iter_mut()
            .find(|v| v.name.as_deref() == Some("sample"))
            .unwrap();
        let open = ["batch_size", "height", "width"].map(|n| make::Dim::Named(n.into()));
        let [batch, height, width] = open;
        let dims = [batch, make::Dim::Fixed(9), height, width];
        *sample = make::value_info("sample", ElementType::F32, &dims);
    });
    let config = bench.pipeline.join("unet/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["in_channels"] = 9.into();
    std::fs::write(&config, json.to_string()).unwrap();
}

#[test]
fn an_inpainting_model_is_told_mask_and_image() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    for (name, value) in [("white.png", 255), ("black.png", 0), ("picture.png", 90)] {
        grey(&bench.path(name), value);
    }
    let with_mask =
        |mask: &'static str| ["--image", "picture.png", "--mask", mask, "--strength", "1"];
    let plain = image(&bench, &[]);
    let refused = refusal(&bench, &with_mask("white.png"));
    assert!(
        refused.contains("--mask") && refused.contains("4 channels"),
        "{refused}"
    );
    // A model that gives no weight to what it is told paints what it would have without.
    inpainting(&bench, 0.0);
    assert_eq!(image(&bench, &with_mask("white.png")), plain);
    let refused = refusal(&bench, &[]);
    assert!(refused.contains("needs --image and --mask"), "{refused}");
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    for (name, value) in [("white.png", 255), ("black.png", 0), ("picture.png", 90)] {
        grey(&bench.path(name), value);
    }
    inpainting(&bench, 0.5);
    assert_eq!(image(&bench, &with_mask("black.png")), plain);
    assert_ne!(image(&bench, &with_mask("white.png")), plain);
    for batching in [Guidance::Together, Guidance::Split] {
        for strength in [0.5, 1.0] {
            let with = |mask: &str| Request {
                batching,
                init: Init::Inpaint {
                    image: read(&bench.path("picture.png")).unwrap(),
                    mask: read(&bench.path(mask)).unwrap(),
                    strength,
                },
                ..two_steps(&bench)
            };
            let [black, white] = ["black.png", "white.png"]
                .map(|mask| latents(&bench.pipeline, &with(mask), LATENTS));
            assert!(apart(&black, &white) > 0.01);
        }
    }
}

fn two_steps(bench: &Bench) -> Request {
    Request {
        steps: 2,
        scheduler: Some("ddim".to_owned()),
        ..Request::new("x".to_owned(), bench.path("out.png"))
    }
}

/// Adds what a ControlNet gives to the middle block of the UNet, and puts a ControlNet beside it whose only residual is the mean of
/// its hint.
fn controlled(bench: &Bench) {
    const RESIDUAL: &str = "mid_block_additional_residual";
    let open = |names: [&str; 4]| names.map(|n| make::Dim::Named(n.into()));
    edit(&bench.pipeline.join("unet/model.onnx"), |_, model| {
        let graph = model.graph.get_or_insert_default();
        let in_middle = |n: &str| n.contains("mid_block");
        let last = graph
            .node
            .iter()
            .rposition(|n| n.name.as_deref().is_some_and(in_middle))
            .unwrap();
        let value = graph.node[last].output[0].clone();
        let sum = format!("{value}_controlled");
        for node in &mut graph.node[last + 1..] {
            for input in node.input.iter_mut().filter(|i| **i == value) {
                *input = sum.clone();
            }
        }
        let add = make::node("Add", "add_residual", &[&value, RESIDUAL], &[&sum], vec![]);
        graph.node.insert(last + 1, add);
        let dims = open(["r0", "r1", "r2", "r3"]);
        graph
            .input
            .push(make::value_info(RESIDUAL, ElementType::F32, &dims));
    });
    let value = |name: &str, dims: &[make::Dim]| make::value_info(name, ElementType::F32, dims);
    let text = ["batch_size", "sequence", "width_of_text"].map(|n| make::Dim::Named(n.into()));
    let image = |h: &'static str, w: &'static str| open(["batch_size", "channels", h, w]);
    let graph = GraphProto {
        name: Some("controlnet".to_owned()),
        node: vec![make::node(
            "ReduceMean",
            "mean",
            &["controlnet_cond"],
            &["residual"],
            vec![],
        )],
        input: vec![
            value("sample", &image("height", "width")),
            value("encoder_hidden_states", &text),
            value("controlnet_cond", &image("hint_height", "hint_width")),
        ],
        output: vec![value("residual", &open(["r0", "r1", "r2", "r3"]))],
        ..GraphProto::default()
    };
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![make::opset("", 17)],
        graph: buffa::MessageField::some(graph),
        ..ModelProto::default()
    };
    let folder = bench.pipeline.join("controlnet");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(
        folder.join("model.onnx"),
        buffa::Message::encode_to_vec(&model),
    )
    .unwrap();
}

#[test]
fn a_controlnet_is_shown_the_image_and_its_residuals_are_scaled() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let plain = image(&bench, &[]);
    controlled(&bench);
    for (name, value) in [("white.png", 255), ("black.png", 0)] {
        grey(&bench.path(name), value);
    }
    let refused = refusal(&bench, &[]);
    assert!(refused.contains("--control-image"), "{refused}");
    assert_eq!(image(&bench, &["--control-image", "black.png"]), plain);
    let full = image(&bench, &["--control-image", "white.png"]);
    assert_ne!(full, plain);
    let scaled = |scale: &'static str| ["--control-image", "white.png", "--control-scale", scale];
    assert_eq!(image(&bench, &scaled("0")), plain);
    assert_eq!(image(&bench, &scaled("1")), full);
    assert_ne!(image(&bench, &scaled("0.5")), full);
    for batching in [Guidance::Together, Guidance::Split] {
        let [none, half, whole] = [0.0, 0.5, 1.0].map(|scale| {
            let asked = Request {
                batching,
                control: Some(read(&bench.path("white.png")).unwrap()),
                control_scale: scale,
                ..two_steps(&bench)
            };
            latents(&bench.pipeline, &asked, LATENTS)
        });
        assert!(apart(&none, &half) > LATENTS && apart(&half, &whole) > LATENTS);
    }
}

/// What is counted for a GPU has nothing in it that changes from run to run.
#[test]
fn what_stays_between_steps_is_counted() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    controlled(&bench);
    grey(&bench.path("white.png"), 255);
    let folder = Folder::open(&bench.pipeline).unwrap();
    let place = Place {
        engine: Engine::Ort,
        options: SessionOptions {
            device: Device::Cuda(0),
            operators: Operators::None,
            ..SessionOptions::default()
        },
    };
    let counted = |change: &dyn Fn(&mut Request)| {
        let mut asked = Request {
            control: Some(read(&bench.path("white.png")).unwrap()),
            ..two_steps(&bench)
        };
        change(&mut asked);
        let stages = expected(&folder, &place, &asked).unwrap();
        let denoise = stages.iter().find(|s| s.stage.starts_with("denoise"));
        denoise.unwrap().values
    };
    let usual = counted(&|_| ());
    let latents = 4 * 4 * 16 * 16;
    // UniPC keeps two clean samples and the sample before more than DDIM.
    let unipc = counted(&|asked| asked.scheduler = Some("unipc".to_owned()));
    assert_eq!(unipc - usual, 3 * latents);
    // Residuals that are multiplied are there twice; the ControlNet's only one is a number.
    let scaled = counted(&|asked| asked.control_scale = 0.5);
    assert_eq!(scaled - usual, 4);
    let hint = 3 * 4 * 128 * 128;
    let without = counted(&|asked| asked.control = None);
    assert!(usual - without > 3 * hint, "{usual} {without}");
}

/// Its sampler's configuration has a bare `-Infinity`, which diffusers writes and JSON doesn't know.
#[test]
fn pixart_runs_with_its_own_sampler() {
    let Some(bench) = Bench::new("pixart") else {
        return;
    };
    let arguments = ["--prompt", "x", "--steps", "2", "-o", "out.png"];
    let output = bench.run(&arguments);
    assert!(output.status.success(), "{}", said(&output));
    assert!(bench.path("out.png").exists());
}

#[test]
fn sdxl_is_told_sizes() {
    let Some(bench) = Bench::new("sdxl") else {
        return;
    };
    let plain = image(&bench, &[]);
    let own = [
        "--original-size",
        "128x128",
        "--crop",
        "0,0",
        "--target-size",
        "128x128",
    ];
    assert_eq!(image(&bench, &own), plain);
    for other in [
        &["--original-size", "1024x512"][..],
        &["--negative-original-size", "64x64"],
        &["--negative-crop", "50,60"],
    ] {
        assert_ne!(image(&bench, other), plain, "{other:?}");
    }
}
