//! Teacher inputs that a pipeline makes itself: images are generated from prompts, and what the denoiser is given at some
//! time steps of each is kept. So latents, time steps and texts are those that the model meets in use.

use std::path::Path;

use linfusion_models::leftovers::TemporaryFolder;
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::random::SplitMix64;
use linfusion_runtime::image::Metadata;
use linfusion_runtime::pipeline::{
    Evaluated, Folder, Guidance, Init, Observer, Place, Progress, Request, SizeHints, generate,
};

use super::error::DistillError;
use super::inputs::Sample;
use linfusion_runtime::tensor::Tensor;

/// What images show where nobody says: many kinds of picture, as training sets have.
const PROMPTS: [&str; 24] = [
    "a photograph of an old lighthouse on a rocky coast at sunset",
    "a bowl of fruit on a wooden table, oil painting",
    "a busy street market in the rain, people with umbrellas",
    "portrait of an elderly man with a grey beard, studio light",
    "a red vintage car parked in front of a blue house",
    "snowy mountains reflected in a still lake",
    "a cat asleep on a stack of books",
    "an astronaut walking through a field of sunflowers",
    "the interior of a gothic cathedral, light through stained glass",
    "a plate of sushi, top view, food photography",
    "pencil drawing of a sailing ship",
    "a dense forest path in autumn fog",
    "a city skyline at night seen from a hill",
    "watercolour of a small village with a church",
    "a golden retriever running on a beach",
    "close-up of a dew drop on a green leaf",
    "an abstract composition of blue and orange shapes",
    "a steam locomotive crossing a stone bridge",
    "a cosy living room with a fireplace and plants",
    "a knight in armour beside a white horse",
    "satellite view of a river delta",
    "a child flying a kite over a meadow",
    "macro photograph of a butterfly on a purple flower",
    "a futuristic robot reading a newspaper in a café",
];
/// Samples that an image gives.
const OF_AN_IMAGE: usize = 4;
const GUIDANCE: f64 = 7.5;

/// How a pipeline is asked.
pub(super) struct Asked<'a> {
    pub folder: &'a Path,
    pub prompts: Option<&'a Path>,
    pub steps: usize,
    pub count: usize,
    pub seed: u64,
}

/// Generates images at the pipeline's own size until there are `count` samples that `fit` the model; `tick` hears of each.
///
/// # Errors
/// The prompts cannot be read or are none, the pipeline fails, or it is of another model.
pub(super) fn samples(
    asked: &Asked<'_>,
    place: &Place,
    fit: &dyn Fn(Sample) -> Result<Sample, DistillError>,
    tick: &dyn Fn(),
) -> Result<Vec<Sample>, DistillError> {
    let prompts = prompts(asked.prompts)?;
    let folder = Folder::open(asked.folder)?;
    let scratch = TemporaryFolder::new().map_err(|source| DistillError::Scratch {
        folder: std::env::temp_dir(),
        source,
    })?;
    let mut random = SplitMix64::new(asked.seed);
    let mut samples: Vec<Sample> = Vec::new();
    let mut image = 0;
    while samples.len() < asked.count {
        let wanted = OF_AN_IMAGE
            .min(asked.steps)
            .min(asked.count - samples.len());
        let prompt = prompts.get(image % prompts.len().max(1));
        let prompt = prompt.map_or("", String::as_str);
        let mut watch = Watch {
            wanted: spread(wanted, asked.steps, &mut random),
            inputs: Vec::new(),
        };
        let request = Request {
            prompt: prompt.to_owned(),
            negative: None,
            images: 1,
            seed: random.bits(),
            steps: asked.steps,
            guidance: GUIDANCE,
            size: None,
            init: Init::Noise,
            scheduler: None,
            eta: 0.0,
            upscale: Vec::new(),
            direct: true,
            vae_tile: 512,
            batching: Guidance::Together,
            control: None,
            control_scale: 1.0,
            sizes: SizeHints::default(),
            output: scratch.path().join("image.png"),
            overwrite: Overwrite::Force,
            force: false,
            preview: None,
        };
        generate(
            &folder,
            place,
            &request,
            &|_| Metadata::default(),
            &mut watch,
        )?;
        if watch.inputs.is_empty() {
            return Err(DistillError::Inputs {
                place: asked.folder.display().to_string(),
                problem: format!("its denoiser was not run within {} steps", asked.steps),
            });
        }
        for (step, inputs) in watch.inputs {
            samples.push(fit(Sample {
                origin: format!(
                    "{}: step {step} of image {}, \"{prompt}\"",
                    asked.folder.display(),
                    image + 1
                ),
                inputs,
                truth: None,
            })?);
            tick();
        }
        image += 1;
    }
    samples.truncate(asked.count);
    Ok(samples)
}

fn prompts(file: Option<&Path>) -> Result<Vec<String>, DistillError> {
    let Some(path) = file else {
        return Ok(PROMPTS.iter().map(|p| (*p).to_owned()).collect());
    };
    let fault = |problem: String| DistillError::Inputs {
        place: path.display().to_string(),
        problem,
    };
    let text = std::fs::read_to_string(path).map_err(|e| fault(format!("cannot be read: {e}")))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let prompts: Vec<String> = lines.map(str::to_owned).collect();
    match prompts.is_empty() {
        true => Err(fault("has no prompt; one a line is expected".to_owned())),
        false => Ok(prompts),
    }
}

/// One step at random of each of `count` equal spans of the steps 1 … `steps`.
fn spread(count: usize, steps: usize, random: &mut SplitMix64) -> Vec<usize> {
    let end = |span: usize| span * steps / count.max(1);
    (0..count)
        .map(|span| end(span) + 1 + random.below(end(span + 1) - end(span)))
        .collect()
}

struct Watch {
    wanted: Vec<usize>,
    /// What the denoiser was given at some steps.
    inputs: Vec<(usize, Vec<(String, Tensor)>)>,
}

impl Observer for Watch {
    fn progress(&mut self, _: Progress) {}

    fn wants_inputs(&self, step: usize, _: usize) -> bool {
        self.wanted.contains(&step)
    }

    fn evaluated(&mut self, evaluated: Evaluated<'_>) {
        let step = evaluated.step;
        self.inputs
            .extend(evaluated.inputs.map(|inputs| (step, inputs)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_spread_over_the_whole_way() {
        let mut random = SplitMix64::new(1);
        for (count, steps) in [(4, 20), (4, 4), (3, 7), (1, 1)] {
            let found = spread(count, steps, &mut random);
            assert_eq!(found.len(), count);
            for (span, step) in found.into_iter().enumerate() {
                assert!(step > span * steps / count && step <= (span + 1) * steps / count);
            }
        }
    }
}
