//! Tiny pipelines against diffusers' own images (models/scripts/export_pipelines.py).

mod support;

use std::collections::BTreeMap;
use std::path::Path;

use linfusion_models::onnx::proto::GraphProto;
use linfusion_models::onnx::{ElementType, make as proto};
use linfusion_runtime::engine::Location;
use linfusion_runtime::image::read;
use linfusion_runtime::npz;
use linfusion_runtime::pipeline::{Evaluated, Guidance, Init, Observer, Progress, Request, Size};
use linfusion_runtime::scheduler::NAMES;
use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{Array4, ArrayD, ArrayView};
use rstest::rstest;
use serde::Deserialize;
use support::{Bench, Blind, LATENTS, apart, edit, latents, make};

#[derive(Deserialize)]
struct Case {
    prompt: String,
    negative_prompt: String,
    guidance_scale: f64,
    num_inference_steps: usize,
    width: Option<usize>,
    height: Option<usize>,
    num_images_per_prompt: Option<usize>,
    image: Option<String>,
    strength: Option<f64>,
    vae_tile: Option<usize>,
    seed: u64,
}

fn request(root: &Path, case: &Case) -> Request {
    let size = case.width.zip(case.height);
    let usual = Request::new(case.prompt.clone(), root.join("out.png"));
    Request {
        negative: Some(case.negative_prompt.clone()),
        images: case.num_images_per_prompt.unwrap_or(1),
        seed: case.seed,
        steps: case.num_inference_steps,
        guidance: case.guidance_scale,
        size: size.map(|(width, height)| Size { width, height }),
        init: match &case.image {
            Some(file) => Init::Image {
                image: read(&root.join(file)).unwrap(),
                // diffusers' own, of both image-to-image pipelines; PixArt's case names it.
                strength: case.strength.unwrap(),
            },
            None => Init::Noise,
        },
        vae_tile: case.vae_tile.unwrap_or(usual.vae_tile),
        ..usual
    }
}

fn cases(root: &Path) -> BTreeMap<String, Case> {
    let cases = std::fs::read_to_string(root.join("cases.json")).unwrap();
    serde_json::from_str(&cases).unwrap()
}

fn array(golden: &[(String, Tensor)], name: &str) -> Option<ArrayD<f64>> {
    golden
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, t)| t.to_f64())
}

#[rstest]
fn images_are_those_of_diffusers(
    #[values("sd15", "sd21", "sdxl", "pixart")] name: &str,
    #[values("t2i", "two", "plain", "i2i")] case: &str,
    #[values(Guidance::Together, Guidance::Split)] batching: Guidance,
    #[values(Location::Host, Location::Device)] shared: Location,
) {
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let root = &bench.pipeline;
    let golden = npz::read(&root.join("golden.npz")).unwrap();
    let mut request = request(root, &cases(root)[case]);
    request.batching = batching;
    let generated = make(root, &request, shared, &mut Blind).unwrap();

    assert_latents(
        &generated.latents,
        &array(&golden, &format!("{case}.latents")).unwrap(),
    );
    assert_eq!(generated.images.len(), request.images);
    if let Some(expected) = array(&golden, &format!("{case}.image")) {
        assert_pixels(&generated.images[0], expected);
    }
}

fn assert_latents(found: &Array4<f32>, expected: &ArrayD<f64>) {
    let found = found.mapv(f64::from).into_dyn();
    assert_eq!(found.shape(), expected.shape());
    let largest = largest_of(expected);
    let worst = largest_of(&(&found - expected));
    assert!(
        worst <= LATENTS * largest,
        "latents: {worst:e} of {largest:e}"
    );
}

fn largest_of(array: &ArrayD<f64>) -> f64 {
    array.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// Each level is at most 1 of 255 from the one expected.
fn assert_pixels(path: &Path, expected: ArrayD<f64>) {
    let image = read(path).unwrap();
    let shape = (image.height() as usize, image.width() as usize, 3);
    let found = ArrayView::from_shape(shape, image.bytes()).unwrap();
    let expected = expected.into_shape_with_order(shape).unwrap();
    let worst = found
        .iter()
        .zip(&expected)
        .fold(0.0_f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
    assert!(worst <= 1.0, "a pixel is {worst} off");
}

/// diffusers' tiled VAE cuts and joins as ours does, coming and going.
#[rstest]
fn tiles_are_those_of_diffusers(
    #[values("sd15", "sd21")] name: &str,
    #[values(Location::Host, Location::Device)] shared: Location,
) {
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let root = &bench.pipeline;
    let golden = npz::read(&root.join("golden.npz")).unwrap();
    let case = &cases(root)["tiled"];
    assert!(case.vae_tile.is_some());
    let generated = make(root, &request(root, case), shared, &mut Blind).unwrap();
    assert_latents(
        &generated.latents,
        &array(&golden, "tiled.latents").unwrap(),
    );
    let image = array(&golden, "tiled.image").unwrap();
    // Tiles are seen: attention in the VAE's middle and its norms are of a tile.
    let whole = array(&golden, "i2i.image").unwrap();
    assert!(largest_of(&(&image - &whole)) > 1.0);
    assert_pixels(&generated.images[0], image);
}

/// diffusers' text-to-image at the native size, then its image-to-image on that image, enlarged by Pillow.
#[rstest]
fn enlarged_images_are_those_of_diffusers(
    #[values("sd15", "sd21", "sdxl", "pixart")] name: &str,
    #[values(Location::Host, Location::Device)] shared: Location,
) {
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let root = &bench.pipeline;
    let golden = npz::read(&root.join("golden.npz")).unwrap();
    let request = request(root, &cases(root)["ladder"]);
    let generated = make(root, &request, shared, &mut Blind).unwrap();
    let denoised = generated.stages.iter().filter(|s| s.steps > 0).count();
    assert_eq!(denoised, 2);
    // The image between the stages is of 8 bits: a level there may be the next one, which the latents then show.
    assert_pixels(
        &generated.images[0],
        array(&golden, "ladder.image").unwrap(),
    );
}

#[test]
fn every_sampler_takes_the_same_steps_wherever_latents_are() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let cases = cases(&bench.pipeline);
    let mut results: Vec<Array4<f32>> = Vec::new();
    for name in NAMES {
        let asked = Request {
            scheduler: Some(name.to_owned()),
            steps: 5,
            eta: if name == "ddim" { 0.7 } else { 0.0 },
            ..request(&bench.pipeline, &cases["t2i"])
        };
        let made = latents(&bench.pipeline, &asked, LATENTS);
        // Two samplers that give the same would be one.
        assert!(
            results.iter().all(|other| apart(other, &made) > 1e-3),
            "{name}"
        );
        results.push(made);
    }
    // From within the schedule, where less is remembered.
    for name in ["pndm", "dpm++", "unipc"] {
        let asked = Request {
            scheduler: Some(name.to_owned()),
            ..request(&bench.pipeline, &cases["i2i"])
        };
        latents(&bench.pipeline, &asked, LATENTS);
    }
}

/// Makes some inputs and the output of a UNet half precision, with casts around what it was.
fn halved(graph: &mut GraphProto, inputs: &[&str]) {
    for name in inputs {
        let single = format!("{name}_single");
        for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
            if input == name {
                *input = single.clone();
            }
        }
        let to = proto::int("to", i64::from(ElementType::F32.onnx()));
        let cast = proto::node("Cast", &single, &[name], &[&single], vec![to]);
        graph.node.insert(0, cast);
    }
    let output = graph.output[0].name.clone().unwrap();
    let single = format!("{output}_single");
    for made in graph.node.iter_mut().flat_map(|node| &mut node.output) {
        if *made == output {
            *made = single.clone();
        }
    }
    let to = proto::int("to", i64::from(ElementType::F16.onnx()));
    let cast = proto::node("Cast", &single, &[&single], &[&output], vec![to]);
    graph.node.push(cast);
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        let name = value.name.clone().unwrap();
        if inputs.contains(&name.as_str()) || name == output {
            let (_, dims) = proto::tensor_type_of(value).unwrap();
            *value = proto::value_info(&name, ElementType::F16, &dims.unwrap());
        }
    }
}

#[test]
fn a_model_in_half_precision_is_given_and_gives_it() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let asked = Request {
        steps: 3,
        guidance: 2.0,
        scheduler: Some("dpm++".to_owned()),
        ..Request::new("x".to_owned(), bench.path("out.png"))
    };
    let single = latents(&bench.pipeline, &asked, LATENTS);
    edit(&bench.pipeline.join("unet/model.onnx"), |_, model| {
        let graph = model.graph.get_or_insert_default();
        halved(graph, &["sample", "encoder_hidden_states"]);
    });
    // Each step rounds latents and prediction to 11 bits, which guidance by 2 triples.
    let tolerance = 3.0 * 3.0 * 2.0 * 2.0_f64.powi(-11);
    for batching in [Guidance::Together, Guidance::Split] {
        let asked = Request {
            batching,
            ..asked.clone()
        };
        let half = latents(&bench.pipeline, &asked, tolerance);
        let worst = apart(&single, &half);
        assert!(
            worst > 0.0 && worst <= tolerance,
            "{worst:e} of {tolerance:e}"
        );
    }
    let mut watch = Watch::default();
    make(&bench.pipeline, &asked, Location::Device, &mut watch).unwrap();
    let (_, sample) = watch.inputs[0].iter().find(|(n, _)| n == "sample").unwrap();
    assert_eq!(sample.dtype(), DType::F16);
}

/// Keeps all that there is.
#[derive(Default)]
struct Watch {
    latents: Vec<Array4<f32>>,
    inputs: Vec<Vec<(String, Tensor)>>,
}

impl Observer for Watch {
    fn progress(&mut self, _: Progress) {}

    fn wants_inputs(&self, _: usize, _: usize) -> bool {
        true
    }

    fn wants_latents(&self, step: usize, _: usize) -> bool {
        step != 2
    }

    fn evaluated(&mut self, evaluated: Evaluated<'_>) {
        assert_eq!(evaluated.latents.is_none(), evaluated.step == 2);
        self.latents.extend(evaluated.latents.cloned());
        self.inputs.extend(evaluated.inputs);
    }
}

#[test]
fn who_watches_sees_the_same_wherever_latents_are() {
    let Some(bench) = Bench::new("sdxl") else {
        return;
    };
    let asked = Request {
        steps: 4,
        preview: Some(2),
        ..Request::new("x".to_owned(), bench.path("out.png"))
    };
    let preview = bench.path("out-preview.png");
    let [on_host, on_device] = [Location::Host, Location::Device].map(|shared| {
        let mut watch = Watch::default();
        let made = make(&bench.pipeline, &asked, shared, &mut watch).unwrap();
        assert_eq!(watch.latents.last(), Some(&made.latents));
        let shown = read(&preview).unwrap();
        std::fs::remove_file(&preview).unwrap();
        (watch, shown)
    });
    let ((host, shown), (device, shown_too)) = (on_host, on_device);
    assert_eq!((host.latents.len(), host.inputs.len()), (3, 4));
    for (a, b) in host.latents.iter().zip(&device.latents) {
        assert!(apart(a, b) <= LATENTS);
    }
    for (ours, theirs) in host.inputs.iter().zip(&device.inputs) {
        assert_eq!(ours.len(), theirs.len());
        assert!(ours.len() >= 5);
        for ((name, a), (same, b)) in ours.iter().zip(theirs) {
            assert_eq!((name, a.dtype(), a.shape()), (same, b.dtype(), b.shape()));
            let (a, b) = (a.to_f64(), b.to_f64());
            let largest = a.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            let worst = (a - b).iter().fold(0.0_f64, |m, v| m.max(v.abs()));
            assert!(worst <= LATENTS * largest, "{name}: {worst:e}");
        }
    }
    let levels = shown.bytes().iter().zip(shown_too.bytes());
    assert!(levels.into_iter().all(|(a, b)| a.abs_diff(*b) <= 1));
}
