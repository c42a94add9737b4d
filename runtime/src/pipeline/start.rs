//! What a run of the sampler begins with: noise, given latents, or an image with noise.

use ndarray::{Array2, Array3, Array4, ArrayView3, Axis, concatenate};

use super::error::PipelineError;
use super::files::{finite, planes, repeat};
use super::generate::Work;
use super::ladder::Size;
use super::request::Init;
use super::vae::{Encoder, latent_mask};
use crate::image::{Rgb, resize};
use crate::scheduler::Scheduler;

/// Latents as a run of the sampler begins with them.
pub(super) struct Start {
    pub latents: Array4<f32>,
    pub scheduler: Box<dyn Scheduler>,
    /// The first evaluation.
    pub first: usize,
    /// The latents of an inpainting model's mask and image.
    pub inpaint: Option<Array4<f32>>,
}

impl Work<'_> {
    fn noise(&mut self, size: Size) -> Array4<f32> {
        let shape = self.plan.latent_shape(size);
        let count = shape.0 * shape.1 * shape.2 * shape.3;
        // As many as the shape has.
        Array4::from_shape_vec(shape, self.random.normal(count))
            .unwrap_or_else(|_| Array4::zeros(shape))
    }

    /// The first evaluation of a run that changes an image by so much.
    pub(super) fn first_evaluation(
        &self,
        scheduler: &dyn Scheduler,
        strength: f64,
        option: &'static str,
    ) -> Result<usize, PipelineError> {
        if scheduler.is_cut() {
            return Ok(0);
        }
        let steps = self.request.steps;
        let taken = ((steps as f64 * strength) as usize).min(steps);
        let first = (steps - taken) * scheduler.order();
        if first >= scheduler.timesteps().len() {
            return Err(PipelineError::Request {
                option,
                problem: format!(
                    "{strength} of {steps} steps is none; expected at least {:.3}, or more steps",
                    1.0 / steps as f64
                ),
            });
        }
        Ok(first)
    }

    pub(super) fn first_latents(&mut self, size: Size) -> Result<Start, PipelineError> {
        let request = self.request;
        match &request.init {
            Init::Noise | Init::Latents(_) => {
                let mut latents = match &request.init {
                    Init::Latents(latents) => {
                        let expected = self.plan.latent_shape(size);
                        if latents.dim() != expected {
                            return Err(PipelineError::Request {
                                option: "--latents",
                                problem: format!(
                                    "they are {:?}, expected {expected:?}",
                                    latents.dim()
                                ),
                            });
                        }
                        latents.as_standard_layout().into_owned()
                    }
                    _ => self.noise(size),
                };
                let scheduler = self.scheduler(size, 1.0)?;
                let sigma = scheduler.init_noise_sigma() as f32;
                latents.mapv_inplace(|v| v * sigma);
                Ok(Start {
                    latents,
                    scheduler,
                    first: 0,
                    inpaint: None,
                })
            }
            Init::Image { image, strength } => self.noised_image(image, size, *strength),
            Init::Inpaint {
                image,
                mask,
                strength,
            } => {
                let scheduler = self.scheduler(size, *strength)?;
                let first = self.first_evaluation(scheduler.as_ref(), *strength, "--strength")?;
                let mut start = match first {
                    0 if !scheduler.is_cut() => {
                        let mut latents = self.noise(size);
                        let sigma = scheduler.init_noise_sigma() as f32;
                        latents.mapv_inplace(|v| v * sigma);
                        Start {
                            latents,
                            scheduler,
                            first,
                            inpaint: None,
                        }
                    }
                    _ => self.noised_image(image, size, *strength)?,
                };
                start.inpaint = Some(self.masked(image, mask, size)?);
                Ok(start)
            }
        }
    }

    /// Mask and masked image as an inpainting model takes them.
    fn masked(
        &mut self,
        image: &Rgb,
        mask: &Rgb,
        size: Size,
    ) -> Result<Array4<f32>, PipelineError> {
        let mask = planes(&resize(mask, size.width as u32, size.height as u32)?)?;
        // White is 1, black −1 in every plane; the mask of a grey image is its mean.
        let mask: Array2<f32> = mask
            .mean_axis(Axis(0))
            .map_or_else(|| Array2::zeros((0, 0)), |m| (m + 1.0) / 2.0);
        let mut kept = planes(&resize(image, size.width as u32, size.height as u32)?)?;
        for mut plane in kept.outer_iter_mut() {
            plane.zip_mut_with(&mask, |v, m| *v = if *m >= 0.5 { 0.0 } else { *v });
        }
        let small = latent_mask(&mask, self.vae.factor()).insert_axis(Axis(0));
        let image = self.encode_image(kept.view(), "masked image")?;
        let joined = concatenate(Axis(0), &[small.view(), image.view()]).unwrap_or(image);
        Ok(repeat(&joined, self.request.images))
    }

    fn encode_image(
        &mut self,
        image: ArrayView3<'_, f32>,
        what: &str,
    ) -> Result<Array3<f32>, PipelineError> {
        self.timed(format!("encode {what}"), 0, |work| {
            let mut encoder = Encoder::load(
                work.folder,
                work.vae.clone(),
                work.place,
                work.request.vae_tile,
            )?;
            let latents = encoder.encode(image, &mut work.random)?;
            finite(latents.iter(), || "vae_encoder".to_owned())?;
            Ok(latents)
        })
    }

    /// An image as latents, with noise for a part of the steps (SDEdit).
    pub(super) fn noised_image(
        &mut self,
        image: &Rgb,
        size: Size,
        strength: f64,
    ) -> Result<Start, PipelineError> {
        let scheduler = self.scheduler(size, strength)?;
        let first = self.first_evaluation(scheduler.as_ref(), strength, "--strength")?;
        let image = planes(&resize(image, size.width as u32, size.height as u32)?)?;
        let encoded = self.encode_image(image.view(), &size.to_string())?;
        let mut latents = repeat(&encoded, self.request.images);
        let noise = self.noise(size);
        let [signal, level] = scheduler.noising(first).map(|v| v as f32);
        latents.zip_mut_with(&noise, |x, noise| *x = signal * *x + level * noise);
        Ok(Start {
            latents,
            scheduler,
            first,
            inpaint: None,
        })
    }
}
