//! A generation, stage by stage.

use std::path::{Path, PathBuf};
use std::time::Instant;

use ndarray::{Array4, ArrayView3, Axis};
use serde::Serialize;

use super::denoiser::{Conditions, Control, Denoiser, Sizes};
use super::error::PipelineError;
use super::files::{beside, bytes, finite, numbered, planes};
use super::folder::{DenoiserConfig, Folder, VaeConfig};
use super::ladder::{Size, stages};
use super::model::Place;
use super::prompt::{Encoded, Texts, encode};
use super::request::{Init, Observer, Progress, Request};
use super::start::Start;
use super::vae::Decoder;
use crate::image::{Metadata, Rgb, RowWriter, resize};
use crate::scheduler::{self, Run, Scheduler};
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

/// One stage's time.
#[derive(Debug, Clone, Serialize)]
pub struct StageReport {
    /// What it did.
    pub stage: String,
    /// How long it took, loading of its models included.
    pub seconds: f64,
    /// Evaluations of the denoising model, or 0.
    pub steps: usize,
}

/// Everything that the stages share.
pub(super) struct Work<'a> {
    pub folder: &'a Folder,
    pub place: &'a Place,
    pub request: &'a Request,
    pub observer: &'a mut dyn Observer,
    pub vae: VaeConfig,
    pub config: DenoiserConfig,
    pub random: TorchRandom,
    pub reports: Vec<StageReport>,
    /// The image of the last finished stage, until the last is done.
    kept: Option<PathBuf>,
}

/// Makes the images of a request; files appear when they are whole, with the texts that `metadata` gives for their size.
///
/// # Errors
/// The request is impossible with this pipeline, a model fails, a value isn't finite, a file cannot be written, or the
/// observer stops it.
pub fn generate(
    folder: &Folder,
    place: &Place,
    request: &Request,
    metadata: &dyn Fn(Size) -> Metadata,
    observer: &mut dyn Observer,
) -> Result<Generated, PipelineError> {
    let vae: VaeConfig = folder.json("vae_decoder", "config.json")?;
    let config: DenoiserConfig = folder.json(folder.denoiser(), "config.json")?;
    let mut work = Work {
        folder,
        place,
        request,
        observer,
        vae,
        config,
        random: TorchRandom::new(request.seed),
        reports: Vec::new(),
        kept: None,
    };
    work.check()?;
    let wanted = work.size()?;
    let sizes = work.stages(wanted)?;
    let encoded = work.encode_prompt()?;
    let mut latents = Array4::zeros((0, 0, 0, 0));
    let mut last = None;
    for (rung, size) in sizes.iter().enumerate() {
        let init = match &last {
            None => work.first_latents(*size)?,
            Some(image) => work.noised_image(image, *size, work.upscale_strength(rung))?,
        };
        let conditions = work.conditions(&encoded, *size)?;
        latents = work.denoise(init, &conditions, *size)?;
        if rung + 1 < sizes.len() {
            last = Some(work.intermediate(&latents, *size)?);
        }
    }
    let images = work.write(&latents, wanted, &metadata(wanted))?;
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

impl Work<'_> {
    fn check(&self) -> Result<(), PipelineError> {
        let refuse =
            |option: &'static str, problem: String| Err(PipelineError::Request { option, problem });
        if self.request.images == 0 {
            return refuse("--num-images", "0, expected at least 1".to_owned());
        }
        let factor = self.vae.factor();
        let tile = self.request.vae_tile;
        if tile < 8 * factor || !tile.is_multiple_of(factor) {
            return refuse(
                "--vae-tile",
                format!(
                    "{tile}, expected a multiple of {factor} and at least {}",
                    8 * factor
                ),
            );
        }
        let enlarged = self
            .size()
            .and_then(|size| self.stages(size))
            .is_ok_and(|stages| stages.len() > 1);
        if self.request.images > 1 && enlarged {
            return refuse(
                "--num-images",
                "more than one image of a size that is reached in stages; run once a seed"
                    .to_owned(),
            );
        }
        let strength = match &self.request.init {
            Init::Image { strength, .. } | Init::Inpaint { strength, .. } => Some(*strength),
            _ => None,
        };
        for strength in self.request.upscale.iter().copied().chain(strength) {
            if !(strength > 0.0 && strength <= 1.0) {
                return refuse(
                    "--strength",
                    format!("{strength}, expected above 0 and at most 1"),
                );
            }
        }
        let channels = self.vae.latent_channels;
        let inpaints = matches!(self.request.init, Init::Inpaint { .. });
        match (self.config.in_channels, inpaints) {
            (found, false) if found == channels => Ok(()),
            (found, true) if found == 2 * channels + 1 => Ok(()),
            (found, true) => refuse(
                "--mask",
                format!(
                    "the model takes {found} channels, and only one of {} can paint parts of an image anew",
                    2 * channels + 1
                ),
            ),
            (found, false) if found == 2 * channels + 1 => refuse(
                "--mask",
                "missing: the model is made for inpainting and needs --image and --mask".to_owned(),
            ),
            (found, false) => Err(PipelineError::Field {
                path: self
                    .folder
                    .component(self.folder.denoiser())
                    .join("config.json"),
                field: "in_channels",
                found: found.to_string(),
                expected: format!(
                    "{channels}, as the VAE has, or {} for inpainting",
                    2 * channels + 1
                ),
            }),
        }
    }

    /// Pixels along a side of one token.
    fn token(&self) -> usize {
        self.vae.factor() * self.config.patch_size.unwrap_or(1).max(1)
    }

    /// Pixels that both sides must be divisible by: an exported UNet doubles at each level of its way up what it halved
    /// on its way down.
    fn multiple(&self) -> usize {
        let levels = self.config.block_out_channels.len().clamp(1, 6) - 1;
        self.token() << levels
    }

    /// The side of the square image that the model was trained on.
    fn native(&self) -> usize {
        self.config.sample_size.map_or(64, |side| side.longest()) * self.vae.factor()
    }

    fn size(&self) -> Result<Size, PipelineError> {
        let multiple = self.multiple();
        if let Init::Latents(latents) = &self.request.init {
            let (_, _, height, width) = latents.dim();
            let factor = self.vae.factor();
            let size = Size {
                width: width * factor,
                height: height * factor,
            };
            return match self.request.size {
                Some(asked) if asked != size => Err(PipelineError::Request {
                    option: "--size",
                    problem: format!("{asked}, but the latents are of an image of {size}"),
                }),
                _ => Ok(size),
            };
        }
        let size = match (&self.request.init, self.request.size) {
            (_, Some(size)) => size,
            (Init::Image { image, .. } | Init::Inpaint { image, .. }, None) => {
                let whole = |side: u32| side as usize / multiple * multiple;
                Size {
                    width: whole(image.width()),
                    height: whole(image.height()),
                }
            }
            (_, None) => Size {
                width: self.native(),
                height: self.native(),
            },
        };
        let fits =
            |side: usize| side > 0 && side.is_multiple_of(multiple) && u32::try_from(side).is_ok();
        if fits(size.width) && fits(size.height) {
            return Ok(size);
        }
        let near =
            |side: usize| (side as f64 / multiple as f64).round().max(1.0) as usize * multiple;
        Err(PipelineError::Request {
            option: "--size",
            problem: format!(
                "{size}, expected multiples of {multiple}, such as {}",
                Size {
                    width: near(size.width),
                    height: near(size.height)
                }
            ),
        })
    }

    fn stages(&self, wanted: Size) -> Result<Vec<Size>, PipelineError> {
        // Only noise starts small: latents and images are taken at their size.
        if self.request.direct || !matches!(self.request.init, Init::Noise) {
            return Ok(vec![wanted]);
        }
        Ok(stages(wanted, self.native(), self.multiple()))
    }

    fn upscale_strength(&self, rung: usize) -> f64 {
        let list = &self.request.upscale;
        list.get(rung - 1).or(list.last()).copied().unwrap_or(0.3)
    }

    fn guided(&self) -> bool {
        // Models with an embedding of the guidance were distilled to need one evaluation only.
        self.request.guidance > 1.0 && self.config.time_cond_proj_dim.is_none()
    }

    pub(super) fn timed<T>(
        &mut self,
        stage: String,
        steps: usize,
        work: impl FnOnce(&mut Self) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        let started = Instant::now();
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
        self.reports.push(StageReport {
            stage,
            seconds,
            steps,
        });
        self.stopped()?;
        Ok(result)
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
        let alpha = self.config.use_additional_conditions.unwrap_or(false);
        self.timed("text".to_owned(), 0, |work| {
            let texts = Texts {
                prompts: &prompts,
                negative: work.request.negative.as_deref(),
                guided: work.guided(),
            };
            let encoded = encode(work.folder, work.place, &texts, alpha)?;
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
            scale: self.request.guidance as f32,
            sizes: self
                .request
                .sizes
                .unwrap_or_else(|| Sizes::of(size.height, size.width)),
            control: match &self.request.control {
                Some(image) => Some(Control {
                    hint: hint(image)?,
                    scale: self.request.control_scale as f32,
                }),
                None => None,
            },
            inpaint: None,
        })
    }

    pub(super) fn scheduler(&self, size: Size) -> Result<Box<dyn Scheduler>, PipelineError> {
        let text = self.folder.text("scheduler", "scheduler_config.json")?;
        let token = self.token();
        let run = Run {
            steps: self.request.steps,
            image_tokens: Some(size.width / token * (size.height / token)),
            eta: self.request.eta,
        };
        scheduler::from_config(&text, self.request.scheduler.as_deref(), &run).map_err(|source| {
            PipelineError::Scheduler {
                path: self
                    .folder
                    .component("scheduler")
                    .join("scheduler_config.json"),
                source,
            }
        })
    }

    pub(super) fn latent_shape(&self, size: Size) -> (usize, usize, usize, usize) {
        let factor = self.vae.factor();
        (
            self.request.images,
            self.vae.latent_channels,
            size.height / factor,
            size.width / factor,
        )
    }

    fn denoise(
        &mut self,
        start: Start,
        conditions: &Conditions,
        size: Size,
    ) -> Result<Array4<f32>, PipelineError> {
        let Start {
            mut latents,
            mut scheduler,
            first,
            inpaint,
        } = start;
        let conditions = &Conditions {
            positive: conditions.positive.clone(),
            negative: conditions.negative.clone(),
            control: conditions.control.as_ref().map(|c| Control {
                hint: c.hint.clone(),
                scale: c.scale,
            }),
            inpaint,
            ..*conditions
        };
        let timesteps: Vec<f64> = scheduler.timesteps().to_vec();
        let count = timesteps.len() - first;
        let stage = format!("denoise {size}");
        self.timed(stage.clone(), count, |work| {
            let mut denoiser = Denoiser::load(
                work.folder,
                work.config.clone(),
                work.place,
                work.request.batching,
            )?;
            for (index, timestep) in timesteps.iter().enumerate().skip(first) {
                work.stopped()?;
                let mut input = latents.clone();
                if let Some(values) = input.as_slice_mut() {
                    scheduler.scale_model_input(values, index);
                }
                let predicted = denoiser.predict(&input, *timestep, conditions)?;
                let place = || {
                    format!(
                        "{stage}, step {} of {count}, {}",
                        index + 1 - first,
                        denoiser.path().display()
                    )
                };
                finite(predicted.iter(), place)?;
                let predicted = predicted.as_standard_layout();
                let random = &mut work.random;
                if let (Some(output), Some(sample)) = (predicted.as_slice(), latents.as_slice_mut())
                {
                    scheduler.step(output, index, sample, &mut |n| random.normal(n));
                }
                finite(latents.iter(), || {
                    format!("{stage}, the sampler's step {}", index + 1 - first)
                })?;
                work.observer.progress(Progress::Step);
                if work
                    .request
                    .preview
                    .is_some_and(|every| every > 0 && (index + 1 - first).is_multiple_of(every))
                {
                    work.preview(scheduler.as_ref(), &latents, size)?;
                }
            }
            Ok(())
        })?;
        Ok(latents)
    }

    /// Writes what the sampler thinks that the first image will be.
    fn preview(
        &mut self,
        scheduler: &dyn Scheduler,
        latents: &Array4<f32>,
        size: Size,
    ) -> Result<(), PipelineError> {
        let mut clean = latents.clone();
        if let (Some(values), Some(predicted)) =
            (clean.as_slice_mut(), scheduler.predicted_original())
            && values.len() == predicted.len()
        {
            values.copy_from_slice(predicted);
        }
        let path = beside(&self.request.output, "preview");
        self.decode(
            clean.index_axis(Axis(0), 0),
            size,
            &path,
            &Metadata::default(),
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
    ) -> Result<(), PipelineError> {
        let mut decoder = Decoder::load(
            self.folder,
            self.vae.clone(),
            self.place,
            self.request.vae_tile,
        )?;
        let mut writer = RowWriter::create(path, size.width as u32, size.height as u32, metadata)?;
        decoder.decode(latents, &mut |band| {
            finite(band.iter(), || "vae_decoder".to_owned())?;
            Ok(writer.write_rows(&bytes(band))?)
        })?;
        Ok(writer.finish()?)
    }

    /// The image between two stages: whole, and in a file in case that the next is not finished.
    fn intermediate(&mut self, latents: &Array4<f32>, size: Size) -> Result<Rgb, PipelineError> {
        let path = beside(&self.request.output, &size.to_string());
        self.timed(format!("decode {size}"), 0, |work| {
            work.decode(
                latents.index_axis(Axis(0), 0),
                size,
                &path,
                &Metadata::default(),
            )
        })?;
        if let Some(before) = self.kept.replace(path.clone()) {
            let _ = std::fs::remove_file(before);
        }
        Ok(crate::image::read(&path)?)
    }

    fn write(
        &mut self,
        latents: &Array4<f32>,
        size: Size,
        metadata: &Metadata,
    ) -> Result<Vec<PathBuf>, PipelineError> {
        let count = latents.shape()[0];
        self.timed(format!("decode {size}"), 0, |work| {
            let mut paths = Vec::new();
            for (number, latents) in latents.outer_iter().enumerate() {
                let path = numbered(&work.request.output, number, count);
                work.decode(latents, size, &path, metadata)?;
                paths.push(path);
            }
            Ok(paths)
        })
    }
}
