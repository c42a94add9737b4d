//! What is asked of a pipeline, and what it tells while it works.

use std::path::PathBuf;

use linfusion_models::onnx::write::Overwrite;
use ndarray::Array4;

use super::denoiser::Guidance;
use super::ladder::Size;
use super::memory::StageMemory;
use super::sizes::SizeHints;
use crate::image::Rgb;
use crate::tensor::Tensor;

/// One generation.
#[derive(Clone)]
pub struct Request {
    /// What to show.
    pub prompt: String,
    /// What not to; `None` leaves it to the pipeline.
    pub negative: Option<String>,
    /// Images of that prompt, in one batch.
    pub images: usize,
    /// Seed of PyTorch's CPU generator.
    pub seed: u64,
    /// Steps of the sampler.
    pub steps: usize,
    /// Guidance; 1 and less is none.
    pub guidance: f64,
    /// Size in pixels; that of the first image or the model's own if `None`.
    pub size: Option<Size>,
    /// What to begin with.
    pub init: Init,
    /// A sampler's name; `None` for the pipeline's.
    pub scheduler: Option<String>,
    /// Noise of DDIM: 0 for none, 1 for DDPM's.
    pub eta: f64,
    /// Strengths of the enlarging stages; the last holds for all further ones.
    pub upscale: Vec<f64>,
    /// Everything at the wanted size, with no enlarging.
    pub direct: bool,
    /// Side of the VAE's tiles in pixels.
    pub vae_tile: usize,
    /// How guidance is batched.
    pub batching: Guidance,
    /// An image for a ControlNet.
    pub control: Option<Rgb>,
    /// Factor on what the ControlNet adds.
    pub control_scale: f64,
    /// What SD-XL is told about sizes.
    pub sizes: SizeHints,
    /// Where images go; several get numbers before the extension.
    pub output: PathBuf,
    /// Whether images that are there are replaced.
    pub overwrite: Overwrite,
    /// Begin even if the memory that is counted on isn't there.
    pub force: bool,
    /// Steps between previews; none if `None`.
    pub preview: Option<usize>,
}

impl Request {
    /// One image of `prompt` from noise, with everything else as `linfusion-run generate` has it by default.
    pub fn new(prompt: String, output: PathBuf) -> Self {
        Self {
            prompt,
            negative: None,
            images: 1,
            seed: 0,
            steps: 30,
            guidance: 7.5,
            size: None,
            init: Init::Noise,
            scheduler: None,
            eta: 0.0,
            upscale: vec![0.4, 0.3, 0.2, 0.1],
            direct: false,
            vae_tile: 1024,
            batching: Guidance::Together,
            control: None,
            control_scale: 1.0,
            sizes: SizeHints::default(),
            output,
            overwrite: Overwrite::Refuse,
            force: false,
            preview: None,
        }
    }
}

/// What a generation begins with.
#[derive(Clone)]
pub enum Init {
    /// Noise from the seed.
    Noise,
    /// These latents: standard normal, [images, channels, height, width].
    Latents(Array4<f32>),
    /// An image, noised by a strength from 0 to 1 (SDEdit, Meng et al. 2022).
    Image {
        /// The image.
        image: Rgb,
        /// Share of the steps that run.
        strength: f64,
    },
    /// An image of which the white parts of a mask are painted anew, by a model made for it.
    Inpaint {
        /// The image.
        image: Rgb,
        /// White where to paint.
        mask: Rgb,
        /// Share of the steps that run.
        strength: f64,
    },
}

/// What happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// What the stages will take, before the first begins.
    Memory(Vec<StageMemory>),
    /// A stage begins, with so many steps.
    Begin {
        /// Its name.
        stage: String,
        /// How many.
        steps: usize,
    },
    /// A step of it is done.
    Step,
    /// The stage is done.
    End {
        /// Its name.
        stage: String,
        /// How long it took.
        seconds: f64,
    },
    /// Something to tell the user: a prompt that was cut, a preview written.
    Note(String),
}

/// A step that was taken.
pub struct Evaluated<'a> {
    /// The stage.
    pub stage: &'a str,
    /// The step, from 1.
    pub step: usize,
    /// The latents after it, if they were wanted.
    pub latents: Option<&'a Array4<f32>>,
    /// What the model was given, if it was wanted: the last evaluation of the step.
    pub inputs: Option<Vec<(String, Tensor)>>,
}

/// Who watches.
pub trait Observer {
    /// Something happened.
    fn progress(&mut self, progress: Progress);

    /// Whether to keep the model's inputs at this step, of so many, from 1.
    fn wants_inputs(&self, step: usize, steps: usize) -> bool {
        let _ = (step, steps);
        false
    }

    /// Whether to bring the latents to the host at this step, of so many, from 1.
    fn wants_latents(&self, step: usize, steps: usize) -> bool {
        let _ = (step, steps);
        false
    }

    /// A step was taken.
    fn evaluated(&mut self, evaluated: Evaluated<'_>) {
        let _ = evaluated;
    }

    /// Whether to stop.
    fn stopped(&self) -> bool {
        false
    }
}
