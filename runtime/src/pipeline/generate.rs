//! A generation, stage by stage.

use std::path::{Path, PathBuf};
use std::time::Instant;

use linfusion_models::onnx::write::Overwrite;
use ndarray::{Array4, ArrayD, ArrayView3, Axis, Ix4};
use serde::Serialize;

use super::conditions::{Conditions, Control};
use super::denoiser::Denoiser;
use super::error::PipelineError;
use super::files::{bytes, finite, numbered, planes, preview, unused};
use super::folder::{DenoiserConfig, Folder, VaeConfig};
use super::ladder::Size;
use super::memory::StageMemory;
use super::model::Place;
use super::opened::{Opened, scheduler};
use super::plan::Plan;
use super::prompt::{Encoded, Texts, encode};
use super::request::{Evaluated, Init, Observer, Progress, Request};
use super::start::Start;
use super::vae::Decoder;
use crate::arithmetic::{Arithmetic, arithmetic};
use crate::engine::{EngineError, Value};
use crate::image::{Metadata, Rgb, RowWriter, resize};
use crate::memory;
use crate::scheduler::{Evaluation, Recipe, Scheduler, Slot, State};
use crate::tensor::Tensor;
use crate::torch_random::TorchRandom;

/// What came of a request.
#[derive(Debug, Serialize)]
pub struct Generated {
    /// The images, in order.
    pub images: Vec<PathBuf>,
    /// Their size.
    pub size: Size,
    /// What took how long.
    pub stages: Vec<StageReport>,
    /// The last latents, for tests and tools: [images, channels, height, width].
    #[serde(skip)]
    pub latents: Array4<f32>,
}

/// An image that is written, to say what it tells of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Made {
    /// Its size.
    pub size: Size,
    /// How much each enlarging stage up to it changed; empty for one that was not enlarged.
    pub upscaled: Vec<f64>,
}

/// One stage's time.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// What it did.
    pub stage: String,
    /// How long it took, loading of its models included.
    pub seconds: f64,
    /// Evaluations of the denoising model, or 0.
    pub steps: usize,
    /// How long each of them took.
    pub step_seconds: Vec<f64>,
    /// Bytes of memory that were expected; `None` where nothing was counted.
    pub expected_bytes: Option<u64>,
    /// Bytes that the process had at most meanwhile, where the system tells.
    pub peak_bytes: Option<u64>,
}

/// Everything that the stages share.
pub(super) struct Work<'a> {
    pub folder: &'a Folder,
    pub place: &'a Place,
    pub request: &'a Request,
    pub observer: &'a mut dyn Observer,
    metadata: &'a dyn Fn(&Made) -> Metadata,
    pub vae: VaeConfig,
    pub config: DenoiserConfig,
    pub plan: Plan,
    pub memory: Vec<StageMemory>,
    pub random: TorchRandom,
    pub reports: Vec<StageReport>,
    /// Evaluations of the stage that is under way.
    step_seconds: Vec<f64>,
    /// The image of the last finished stage, until the last is done.
    kept: Option<PathBuf>,
}

/// Makes the images of a request; files appear when they are whole, with the texts that `metadata` gives.
///
/// # Errors
/// The request is impossible with this pipeline, a model fails, a value isn't finite, a file cannot be written, or the
/// observer stops it.
pub fn generate(
    folder: &Folder,
    place: &Place,
    request: &Request,
    metadata: &dyn Fn(&Made) -> Metadata,
    observer: &mut dyn Observer,
) -> Result<Generated, PipelineError> {
    let opened = Opened::new(folder, place, request)?;
    let sizes = opened.plan.sizes.clone();
    let wanted = opened.plan.wanted();
    let memory = opened.stages()?;
    if let (Init::Image { image, .. } | Init::Inpaint { image, .. }, None) =
        (&request.init, request.size)
        && (image.width() as usize, image.height() as usize) != (wanted.width, wanted.height)
    {
        let (width, height) = (image.width(), image.height());
        observer.progress(Progress::Note(format!(
            "the image of {width}x{height} is resized to {wanted}, which the model can take"
        )));
    }
    observer.progress(Progress::Memory(memory.clone()));
    opened.check(&memory)?;
    let mut work = Work {
        folder,
        place,
        request,
        observer,
        metadata,
        vae: opened.vae,
        config: opened.config,
        plan: opened.plan,
        memory,
        random: TorchRandom::new(request.seed),
        reports: Vec::new(),
        step_seconds: Vec::new(),
        kept: None,
    };
    work.rehearse(&sizes)?;
    let made = work.stages(&sizes).and_then(|latents| {
        let images = work.write(&latents, wanted)?;
        Ok((latents, images))
    });
    let (latents, images) = match made {
        Ok(made) => made,
        Err(error) => {
            if let (Some(kept), false) = (&work.kept, error.is_stop()) {
                let note = format!("the last finished stage is in {}", kept.display());
                work.observer.progress(Progress::Note(note));
            }
            return Err(error);
        }
    };
    if let Some(kept) = work.kept.take() {
        // It was for the case that this is not reached.
        let _ = std::fs::remove_file(kept);
    }
    Ok(Generated {
        images,
        size: wanted,
        stages: work.reports,
        latents,
    })
}

/// What the stages of a request will take, counted from the models' graphs.
///
/// # Errors
/// The request is impossible with this pipeline, or a model cannot be read.
pub fn expected(
    folder: &Folder,
    place: &Place,
    request: &Request,
) -> Result<Vec<StageMemory>, PipelineError> {
    Opened::new(folder, place, request)?.stages()
}

impl Work<'_> {
    pub(super) fn timed<T>(
        &mut self,
        stage: String,
        steps: usize,
        work: impl FnOnce(&mut Self) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        self.stopped()?;
        let started = Instant::now();
        memory::reset_peak();
        self.observer.progress(Progress::Begin {
            stage: stage.clone(),
            steps,
        });
        let result = work(self)?;
        let seconds = started.elapsed().as_secs_f64();
        self.observer.progress(Progress::End {
            stage: stage.clone(),
            seconds,
        });
        let expected = self.memory.iter().find(|m| m.stage == stage);
        self.reports.push(StageReport {
            expected_bytes: expected.map(StageMemory::total),
            peak_bytes: memory::peak(),
            step_seconds: std::mem::take(&mut self.step_seconds),
            stage,
            seconds,
            steps,
        });
        Ok(result)
    }

    /// What would fail in a later stage for want of steps, or for a field of the sampler, fails before the first.
    fn rehearse(&self, sizes: &[Size]) -> Result<(), PipelineError> {
        let strength = match self.request.init {
            Init::Image { strength, .. } | Init::Inpaint { strength, .. } => Some(strength),
            _ => None,
        };
        for (rung, size) in sizes.iter().enumerate() {
            let (option, strength) = match (rung, strength) {
                (0, None) => ("--strength", 1.0),
                (0, Some(strength)) => ("--strength", strength),
                _ => ("--upscale", self.plan.upscale_strength(rung)),
            };
            let scheduler = self.scheduler(*size, strength)?;
            self.first_evaluation(scheduler.as_ref(), strength, option)?;
        }
        Ok(())
    }

    /// All stages; gives the last latents.
    fn stages(&mut self, sizes: &[Size]) -> Result<Array4<f32>, PipelineError> {
        let encoded = self.encode_prompt()?;
        let mut latents = Array4::zeros((0, 0, 0, 0));
        let mut last = None;
        for (rung, size) in sizes.iter().enumerate() {
            let init = match &last {
                None => self.first_latents(*size)?,
                Some(image) => self.noised_image(image, *size, self.plan.upscale_strength(rung))?,
            };
            let conditions = self.conditions(&encoded, *size)?;
            latents = self.denoise(init, conditions, *size)?;
            if rung + 1 < sizes.len() {
                last = Some(self.intermediate(&latents, rung)?);
            }
        }
        Ok(latents)
    }

    fn stopped(&mut self) -> Result<(), PipelineError> {
        match self.observer.stopped() {
            true => Err(PipelineError::Stopped {
                kept: self.kept.clone(),
            }),
            false => Ok(()),
        }
    }

    fn encode_prompt(&mut self) -> Result<Encoded, PipelineError> {
        let prompts = [self.request.prompt.clone()];
        self.timed("text".to_owned(), 0, |work| {
            let texts = Texts {
                prompts: &prompts,
                negative: work.request.negative.as_deref(),
                guided: work.plan.guided,
            };
            let encoded = encode(work.folder, work.place, &texts)?;
            for cut in &encoded.cuts {
                work.observer.progress(Progress::Note(format!(
                    "the prompt is longer than {} tokens; this was cut off: {}",
                    cut.length, cut.text
                )));
            }
            Ok(encoded)
        })
    }

    fn conditions(&self, encoded: &Encoded, size: Size) -> Result<Conditions, PipelineError> {
        let hint = |image: &Rgb| -> Result<Array4<f32>, PipelineError> {
            let image = resize(image, size.width as u32, size.height as u32)?;
            Ok(planes(&image)?
                .mapv(|v| (v + 1.0) / 2.0)
                .insert_axis(Axis(0)))
        };
        Ok(Conditions {
            positive: encoded.positive.repeated(self.request.images),
            negative: encoded
                .negative
                .as_ref()
                .map(|text| text.repeated(self.request.images)),
            scale: self.request.guidance,
            sizes: {
                let mut hints = self.request.sizes;
                if !matches!(self.request.init, Init::Noise | Init::Latents(_)) {
                    // The default of diffusers' image-to-image pipeline, whatever the positive side's.
                    hints.negative_crop = hints.negative_crop.or(Some([0, 0]));
                }
                hints.at(size.height, size.width)
            },
            control: match &self.request.control {
                Some(image) => Some(Control {
                    hint: hint(image)?,
                    scale: self.request.control_scale,
                }),
                None => None,
            },
            inpaint: None,
        })
    }

    pub(super) fn scheduler(
        &self,
        size: Size,
        strength: f64,
    ) -> Result<Box<dyn Scheduler>, PipelineError> {
        scheduler(self.folder, self.request, &self.plan, size, strength)
    }

    /// Takes the sampler's steps. Everything that they read and write is where the arithmetic is; to the host come what
    /// the observer wants, previews, and the last latents.
    fn denoise(
        &mut self,
        start: Start,
        conditions: Conditions,
        size: Size,
    ) -> Result<Array4<f32>, PipelineError> {
        let Start {
            latents,
            scheduler,
            first,
            inpaint,
        } = start;
        let conditions = Conditions {
            inpaint,
            ..conditions
        };
        let timesteps: Vec<f64> = scheduler.timesteps().to_vec();
        let count = timesteps.len() - first;
        let stage = format!("denoise {size}");
        self.timed(stage.clone(), count, |work| {
            let mut arithmetic = arithmetic(work.place.engine, &work.place.options);
            let arithmetic = arithmetic.as_mut();
            let failed = |source| PipelineError::Engine {
                stage: stage.clone(),
                source,
            };
            let mut denoiser = Denoiser::load(
                work.folder,
                work.place,
                &work.config,
                work.request.batching,
                conditions,
                arithmetic,
            )?;
            let mut state = State::new(arithmetic.upload(latents.into()).map_err(failed)?);
            for (index, timestep) in timesteps.iter().enumerate().skip(first) {
                work.stopped()?;
                let started = Instant::now();
                let step = index + 1 - first;
                denoiser
                    .model()
                    .keep(work.observer.wants_inputs(step, count));
                let scale = scheduler.input_scale(index);
                let predicted = denoiser
                    .predict(state.sample(), scale, *timestep, arithmetic)
                    .map_err(|e| e.within(&format!("{stage}, step {step} of {count}")))?;
                let recipe = scheduler.step(Evaluation { index, first });
                let sampler = format!("{stage}, the sampler's step {step}");
                work.advance(&mut state, &recipe, predicted, arithmetic, sampler)?;
                work.step_seconds.push(started.elapsed().as_secs_f64());
                work.observer.progress(Progress::Step);
                let wanted = work.observer.wants_latents(step, count);
                let latents = wanted.then(|| downloaded(state.sample(), arithmetic));
                work.observer.evaluated(Evaluated {
                    stage: &stage,
                    step,
                    latents: latents.transpose().map_err(failed)?.as_ref(),
                    inputs: denoiser.model().kept(),
                });
                let every = work.request.preview.filter(|every| *every > 0);
                if every.is_some_and(|every| step.is_multiple_of(every)) {
                    let clean = state.clean().unwrap_or(state.sample());
                    let clean = downloaded(clean, arithmetic).map_err(failed)?;
                    work.preview(&clean, size)?;
                }
            }
            downloaded(state.sample(), arithmetic).map_err(failed)
        })
    }

    /// Moves the latents on by a sampler's step, named `stage`, with noise where it reads some.
    fn advance(
        &mut self,
        state: &mut State,
        recipe: &Recipe,
        predicted: Value,
        arithmetic: &mut dyn Arithmetic,
        stage: String,
    ) -> Result<(), PipelineError> {
        let moved = || {
            let noise = recipe.reads(Slot::Noise).then(|| {
                let shape = state.sample().shape();
                let normal = self.random.normal(shape.iter().product());
                // As many as the shape has.
                let noise = ArrayD::from_shape_vec(shape, normal);
                arithmetic.upload(noise.unwrap_or_else(|_| ArrayD::zeros(shape)).into())
            });
            state.step(recipe, predicted, noise.transpose()?, arithmetic)?;
            match arithmetic.finite(&[state.sample()])? {
                true => Ok(None),
                false => downloaded(state.sample(), arithmetic).map(Some),
            }
        };
        match moved() {
            Ok(None) => Ok(()),
            Ok(Some(latents)) => finite(latents.iter(), || stage),
            Err(source) => Err(PipelineError::Engine { stage, source }),
        }
    }

    /// Writes what the sampler thinks that the first image will be.
    fn preview(&mut self, clean: &Array4<f32>, size: Size) -> Result<(), PipelineError> {
        let path = preview(&self.request.output);
        self.decode(
            clean.index_axis(Axis(0), 0),
            size,
            &path,
            &Metadata::default(),
            Overwrite::Force,
        )?;
        self.observer
            .progress(Progress::Note(format!("preview: {}", path.display())));
        Ok(())
    }

    fn decode(
        &mut self,
        latents: ArrayView3<'_, f32>,
        size: Size,
        path: &Path,
        metadata: &Metadata,
        overwrite: Overwrite,
    ) -> Result<(), PipelineError> {
        let mut decoder = Decoder::load(
            self.folder,
            self.vae.clone(),
            self.place,
            self.request.vae_tile,
        )?;
        let mut writer = RowWriter::create(path, size.width as u32, size.height as u32, metadata)?;
        let (observer, kept) = (&*self.observer, &self.kept);
        decoder.decode(latents, &mut |band| {
            if observer.stopped() {
                return Err(PipelineError::Stopped { kept: kept.clone() });
            }
            finite(band.iter(), || "vae_decoder".to_owned())?;
            Ok(writer.write_rows(&bytes(band))?)
        })?;
        Ok(writer.finish(overwrite)?)
    }

    /// The image between two stages: whole, and in a file in case that the next is not finished.
    fn intermediate(&mut self, latents: &Array4<f32>, rung: usize) -> Result<Rgb, PipelineError> {
        let made = self.plan.made(rung);
        let size = made.size;
        let path = unused(&self.request.output, &size.to_string());
        self.timed(format!("decode {size}"), 0, |work| {
            let first = latents.index_axis(Axis(0), 0);
            let metadata = (work.metadata)(&made);
            work.decode(first, size, &path, &metadata, Overwrite::Force)?;
            if let Some(before) = work.kept.replace(path.clone()) {
                let _ = std::fs::remove_file(before);
            }
            Ok(())
        })?;
        Ok(crate::image::read(&path)?)
    }

    fn write(&mut self, latents: &Array4<f32>, size: Size) -> Result<Vec<PathBuf>, PipelineError> {
        let count = latents.shape()[0];
        let metadata = (self.metadata)(&self.plan.made(self.plan.sizes.len().saturating_sub(1)));
        self.timed(format!("decode {size}"), 0, |work| {
            let mut paths = Vec::new();
            for (number, latents) in latents.outer_iter().enumerate() {
                let path = numbered(&work.request.output, number, count);
                work.decode(latents, size, &path, &metadata, work.request.overwrite)?;
                paths.push(path);
            }
            Ok(paths)
        })
    }
}

/// Latents on the host.
fn downloaded(value: &Value, arithmetic: &mut dyn Arithmetic) -> Result<Array4<f32>, EngineError> {
    let shape = value.shape().to_vec();
    match arithmetic.download(value)? {
        Tensor::F32(array) => array.into_dimensionality::<Ix4>().ok(),
        _ => None,
    }
    .ok_or_else(|| EngineError::Operands {
        operation: "take as latents",
        operands: format!("{}{shape:?}", value.dtype()),
    })
}
