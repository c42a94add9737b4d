//! Two pipelines on the same prompts, seeds and sampler: how far latents and images drift apart.

use std::path::{Path, PathBuf};

use linfusion_models::leftovers::TemporaryFolder;
use linfusion_models::onnx::write::Overwrite;
use ndarray::Array4;
use serde::Serialize;

use super::sites::{SiteDifference, SitesError, check, sites};
use crate::image::{self, ImageError, Metadata};
use crate::pipeline::{
    Evaluated, Folder, Generated, Observer, PipelineError, Place, Progress, Request, generate,
};
use crate::scheduler;
use crate::tensor::Tensor;

/// One image of both pipelines.
#[derive(Debug, Clone, Serialize)]
pub struct ImageDifference {
    /// What was to be shown.
    pub prompt: String,
    /// The seed.
    pub seed: u64,
    /// How far the latents are apart after each step of each stage.
    pub steps: Vec<StepDifference>,
    /// Peak signal-to-noise ratio in dB; `None` for equal images.
    pub psnr_db: Option<f64>,
    /// Structural similarity: 1 for equal images.
    pub ssim: f64,
    /// Reference, other, and their difference brightened, side by side; `None` where nobody asked for it.
    pub picture: Option<PathBuf>,
    /// Seconds of both.
    pub seconds: [f64; 2],
}

/// The latents of both pipelines after a step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepDifference {
    /// The stage.
    pub stage: String,
    /// The step, from 1.
    pub step: usize,
    /// ‖other − reference‖ / ‖reference‖.
    pub relative: f64,
    /// The largest |other − reference|.
    pub max_abs: f64,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct PipelineComparison {
    /// One entry a prompt.
    pub images: Vec<ImageDifference>,
    /// Each attention that was replaced, on inputs of the reference's own steps; empty if it wasn't asked for.
    pub sites: Vec<SiteDifference>,
}

/// Why pipelines cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// A pipeline doesn't run.
    #[error("{}: {source}", pipeline.display())]
    Pipeline {
        /// Which one.
        pipeline: PathBuf,
        /// Why.
        r#source: Box<PipelineError>,
    },
    /// They don't take the same steps.
    #[error("{} and {} differ; compare with one of them in both pipelines", reference.display(), other.display())]
    Samplers {
        /// The first one's configuration.
        reference: PathBuf,
        /// The second one's.
        other: PathBuf,
    },
    /// An image cannot be read or written.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The attentions cannot be compared.
    #[error(transparent)]
    Sites(#[from] SitesError),
    /// There is no folder to work in.
    #[error("cannot make a temporary folder: {0}")]
    Scratch(std::io::Error),
}

/// Brightness of the difference's picture.
const GAIN: f32 = 4.0;
/// Steps of the reference whose inputs the attentions are compared on, over all prompts.
const SAMPLES: usize = 3;

/// Runs both pipelines on every request and compares them. Pictures of both go where `pictures` has a path for the request,
/// and are replaced as the request says; its own output is not used.
///
/// # Errors
/// One doesn't run, or a picture cannot be written.
pub fn pipelines(
    reference: &Folder,
    other: &Folder,
    place: &Place,
    requests: &[Request],
    pictures: &[PathBuf],
    with_sites: bool,
    observer: &mut dyn Observer,
) -> Result<PipelineComparison, CompareError> {
    same_sampler(reference, other)?;
    for (request, picture) in requests.iter().zip(pictures) {
        image::check_output(picture, request.overwrite)?;
    }
    let models = match with_sites {
        true => Some(models(reference, other)?),
        false => None,
    };
    let scratch = TemporaryFolder::new().map_err(CompareError::Scratch)?;
    let mut images = Vec::new();
    let mut samples = Vec::new();
    for (number, request) in requests.iter().enumerate() {
        let mut run = |folder: &Folder, name: &str, wanted: usize| {
            let mut asked = request.clone();
            asked.output = scratch.path().join(name);
            asked.overwrite = Overwrite::Force;
            let mut watch = Watch {
                inner: observer,
                latents: Vec::new(),
                wanted,
                samples: Vec::new(),
            };
            let made = generate(folder, place, &asked, &|_| Metadata::default(), &mut watch)
                .map_err(|source| failed(folder, source))?;
            Ok::<_, CompareError>((made, watch.latents, watch.samples))
        };
        let missing = match with_sites {
            true => SAMPLES
                .saturating_sub(samples.len())
                .div_ceil(requests.len().max(1)),
            false => 0,
        };
        let (first, ours, taken) = run(reference, "reference.png", missing)?;
        let (second, theirs, _) = run(other, "other.png", 0)?;
        samples.extend(taken);
        images.push(image_difference(
            request,
            pictures.get(number).map(PathBuf::as_path),
            [&first, &second],
            &ours,
            &theirs,
        )?);
    }
    let sites = match models {
        Some([a, b]) => sites(&a, &b, &samples, place.engine, &place.options)?,
        None => Vec::new(),
    };
    Ok(PipelineComparison { images, sites })
}

/// The models of both pipelines, if the second was converted from the first.
fn models(reference: &Folder, other: &Folder) -> Result<[PathBuf; 2], CompareError> {
    let model = |folder: &Folder| {
        folder
            .model(folder.denoiser())
            .map_err(|source| failed(folder, source))
    };
    let models = [model(reference)?, model(other)?];
    check(&models[0], &models[1])?;
    Ok(models)
}

/// Steps can only be compared where both samplers take the same.
fn same_sampler(reference: &Folder, other: &Folder) -> Result<(), CompareError> {
    let read = |folder: &Folder| {
        let config = folder.scheduler(scheduler::config);
        let mut fields = config.map_err(|source| failed(folder, source))?;
        fields.remove("_diffusers_version");
        Ok::<_, CompareError>(fields)
    };
    if read(reference)? == read(other)? {
        return Ok(());
    }
    Err(CompareError::Samplers {
        reference: reference.scheduler_config(),
        other: other.scheduler_config(),
    })
}

fn failed(folder: &Folder, source: PipelineError) -> CompareError {
    CompareError::Pipeline {
        pipeline: folder.root().to_owned(),
        source: Box::new(source),
    }
}

fn image_difference(
    request: &Request,
    path: Option<&Path>,
    made: [&Generated; 2],
    ours: &[Latents],
    theirs: &[Latents],
) -> Result<ImageDifference, CompareError> {
    let read = |made: &Generated| {
        let path = made.images.first().map_or(Path::new(""), PathBuf::as_path);
        image::read(path)
    };
    let [a, b] = [read(made[0])?, read(made[1])?];
    if let Some(path) = path {
        let picture = image::side_by_side(&[&a, &b, &image::difference(&a, &b, GAIN)?])?;
        picture.write(path, &Metadata::default())?;
    }
    let psnr = image::psnr(&a, &b)?;
    Ok(ImageDifference {
        prompt: request.prompt.clone(),
        seed: request.seed,
        steps: ours.iter().zip(theirs).map(step_difference).collect(),
        psnr_db: psnr.is_finite().then_some(psnr),
        ssim: image::ssim(&a, &b)?,
        picture: path.map(Path::to_owned),
        seconds: made.map(|m| m.stages.iter().map(|s| s.seconds).sum()),
    })
}

struct Latents {
    stage: String,
    step: usize,
    values: Array4<f32>,
}

fn step_difference((ours, theirs): (&Latents, &Latents)) -> StepDifference {
    let (mut norm, mut error, mut most) = (0.0, 0.0, 0.0_f64);
    for (a, b) in ours.values.iter().zip(&theirs.values) {
        let (a, b) = (f64::from(*a), f64::from(*b));
        norm += a * a;
        error += (b - a) * (b - a);
        most = most.max((b - a).abs());
    }
    StepDifference {
        stage: ours.stage.clone(),
        step: ours.step,
        relative: (error / f64::max(norm, f64::MIN_POSITIVE)).sqrt(),
        max_abs: most,
    }
}

/// Keeps what is compared, and passes everything on.
struct Watch<'a> {
    inner: &'a mut dyn Observer,
    latents: Vec<Latents>,
    wanted: usize,
    samples: Vec<Vec<(String, Tensor)>>,
}

impl Observer for Watch<'_> {
    fn progress(&mut self, progress: Progress) {
        self.inner.progress(progress);
    }

    fn stopped(&self) -> bool {
        self.inner.stopped()
    }

    fn wants_inputs(&self, step: usize, steps: usize) -> bool {
        // The middle of as many equal spans.
        let place = |sample: usize| (2 * sample + 1) * steps / (2 * self.wanted) + 1;
        self.samples.len() < self.wanted && (0..self.wanted).any(|sample| place(sample) == step)
    }

    fn wants_latents(&self, _: usize, _: usize) -> bool {
        true
    }

    fn evaluated(&mut self, evaluated: Evaluated<'_>) {
        self.latents.extend(evaluated.latents.map(|values| Latents {
            stage: evaluated.stage.to_owned(),
            step: evaluated.step,
            values: values.clone(),
        }));
        if let Some(inputs) = evaluated.inputs {
            self.samples.push(inputs);
        }
        self.inner.evaluated(Evaluated {
            inputs: None,
            ..evaluated
        });
    }
}
