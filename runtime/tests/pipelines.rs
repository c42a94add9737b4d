//! Tiny pipelines against diffusers' own images (models/scripts/export_pipelines.py).

use std::path::Path;

use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Location, SessionOptions, load_library};
use linfusion_runtime::image::{Metadata, read};
use linfusion_runtime::npz;
use linfusion_runtime::pipeline::{
    Folder, Generated, Guidance, Init, Observer, Place, Progress, Request, Size, generate,
};
use linfusion_runtime::tensor::Tensor;
use ndarray::{ArrayD, ArrayView};
use rstest::rstest;
use serde::Deserialize;

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
    seed: u64,
}

#[derive(Default)]
struct Notes(Vec<String>);

impl Observer for Notes {
    fn progress(&mut self, progress: Progress) {
        if let Progress::Note(text) = progress {
            self.0.push(text);
        }
    }
}

fn place(shared: Location) -> Option<Place> {
    if load_library(None).is_err() {
        println!("skipped: no ONNX Runtime library");
        return None;
    }
    Some(Place {
        engine: Engine::Ort,
        options: SessionOptions {
            shared: Some(shared),
            ..SessionOptions::default()
        },
    })
}

fn request(root: &Path, case: &Case) -> Request {
    let size = case.width.zip(case.height);
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
        ..Request::new(case.prompt.clone(), root.join("out.png"))
    }
}

fn run(folder: &Folder, place: &Place, request: &Request) -> Generated {
    let mut notes = Notes::default();
    generate(folder, place, request, &|_| Metadata::default(), &mut notes).unwrap()
}

fn array(golden: &[(String, Tensor)], name: &str) -> Option<ArrayD<f64>> {
    golden
        .iter()
        .find(|(n, _)| n == name)
        .map(|(_, t)| t.to_f64())
}

/// Largest difference of the latents, as a share of the largest latent, that single precision makes over these steps:
/// exported graphs and PyTorch sum in other orders.
const LATENTS: f64 = 2e-4;

#[rstest]
fn images_are_those_of_diffusers(
    #[values("sd15", "sd21", "sdxl", "pixart")] name: &str,
    #[values("t2i", "two", "plain", "i2i")] case: &str,
    #[values(Guidance::Together, Guidance::Split)] batching: Guidance,
    #[values(Location::Host, Location::Device)] shared: Location,
) {
    let Some(place) = place(shared) else { return };
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().join(name);
    fixtures::pipeline(name, &root).unwrap();
    let folder = Folder::open(&root).unwrap();
    let cases = std::fs::read_to_string(root.join("cases.json")).unwrap();
    let cases: std::collections::BTreeMap<String, Case> = serde_json::from_str(&cases).unwrap();
    let golden = npz::read(&root.join("golden.npz")).unwrap();
    let mut request = request(&root, &cases[case]);
    request.batching = batching;
    let generated = run(&folder, &place, &request);

    let expected = array(&golden, &format!("{case}.latents")).unwrap();
    let found = generated.latents.mapv(f64::from).into_dyn();
    assert_eq!(found.shape(), expected.shape());
    let largest = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    let worst = (&found - &expected)
        .iter()
        .fold(0.0_f64, |m, d| m.max(d.abs()));
    assert!(
        worst <= LATENTS * largest,
        "latents: {worst:e} of {largest:e}"
    );

    assert_eq!(generated.images.len(), request.images);
    if let Some(expected) = array(&golden, &format!("{case}.image")) {
        let image = read(&generated.images[0]).unwrap();
        let shape = (image.height() as usize, image.width() as usize, 3);
        let found = ArrayView::from_shape(shape, image.bytes()).unwrap();
        let expected = expected.into_shape_with_order(shape).unwrap();
        let worst = found
            .iter()
            .zip(&expected)
            .fold(0.0_f64, |m, (a, b)| m.max((f64::from(*a) - b).abs()));
        assert!(worst <= 1.0, "a pixel is {worst} off");
    }
}
