//! What a request comes to with a pipeline: the sizes of all stages, whether it is guided; or why it is impossible.

use linfusion_models::onnx::OnnxFile;

use super::conditions::is_residual;
use super::error::PipelineError;
use super::files::{outputs, preview};
use super::folder::{DenoiserConfig, Folder, VaeConfig};
use super::generate::Made;
use super::ladder::{Size, stages};
use super::request::{Init, Request};
use super::sizes::SizeHints;
use crate::image::{MAX_PIXELS, check_output};

/// A request that was found possible.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Sizes of the stages, the last the wanted one.
    pub sizes: Vec<Size>,
    /// Whether the model is asked for the negative side too.
    pub guided: bool,
    /// Whether the model is a latent consistency model, told its guidance.
    pub distilled: bool,
    /// Pixels along a side of one token.
    pub token: usize,
    images: usize,
    channels: usize,
    factor: usize,
    upscale: Vec<f64>,
}

impl Plan {
    /// Looks whether `request` is possible.
    ///
    /// # Errors
    /// It is not, and names the option or the field that says otherwise.
    pub fn new(
        folder: &Folder,
        request: &Request,
        vae: &VaeConfig,
        config: &DenoiserConfig,
    ) -> Result<Self, PipelineError> {
        let asked = Asked {
            folder,
            request,
            vae,
            config,
        };
        asked.numbers()?;
        asked.strengths()?;
        asked.fields()?;
        asked.told()?;
        for path in outputs(&request.output, request.images) {
            check_output(&path, request.overwrite)?;
        }
        if request.preview.is_some() {
            check_output(&preview(&request.output), request.overwrite)?;
        }
        asked.channels()?;
        let wanted = asked.size()?;
        // Only noise starts small: latents and images are taken at their size.
        let sizes = match request.direct || !matches!(request.init, Init::Noise) {
            true => vec![wanted],
            false => stages(wanted, asked.native(), asked.multiple()),
        };
        let mut between = sizes.iter().rev().skip(1);
        if let Some(large) = between.find(|s| s.area() > MAX_PIXELS as f64) {
            refuse(
                "--size",
                format!(
                    "{wanted} goes through {large}, and images of more than {MAX_PIXELS} pixels are not read back"
                ),
            )?;
        }
        if request.images > 1 && sizes.len() > 1 {
            return Err(PipelineError::Request {
                option: "--num-images",
                problem: "more than one image of a size that is reached in stages; run once a seed"
                    .to_owned(),
            });
        }
        Ok(Self {
            sizes,
            // Models with an embedding of the guidance were distilled to need one evaluation only.
            guided: request.guidance > 1.0 && config.time_cond_proj_dim.is_none(),
            distilled: config.time_cond_proj_dim.is_some(),
            token: asked.token(),
            images: request.images,
            channels: vae.latent_channels,
            factor: vae.factor(),
            upscale: request.upscale.clone(),
        })
    }

    /// The size that was asked for.
    pub fn wanted(&self) -> Size {
        self.sizes.last().copied().unwrap_or(Size {
            width: 0,
            height: 0,
        })
    }

    /// How much the stage `rung`, counted from 0, changes the enlarged image of the one before.
    pub fn upscale_strength(&self, rung: usize) -> f64 {
        let list = &self.upscale;
        list.get(rung.saturating_sub(1))
            .or(list.last())
            .copied()
            .unwrap_or(0.3)
    }

    /// The image of the stage `rung`.
    pub fn made(&self, rung: usize) -> Made {
        let size = self.sizes.get(rung).copied();
        Made {
            size: size.unwrap_or_else(|| self.wanted()),
            upscaled: (1..=rung).map(|rung| self.upscale_strength(rung)).collect(),
        }
    }

    /// [images, channels, height, width] of the latents of an image.
    pub fn latent_shape(&self, size: Size) -> (usize, usize, usize, usize) {
        let (height, width) = (size.height / self.factor, size.width / self.factor);
        (self.images, self.channels, height, width)
    }
}

/// Pixels along an edge that no image has, so that sizes can be multiplied.
const MAX_SIDE: usize = 1 << 20;
/// More than any training schedule has.
const MAX_STEPS: usize = 10_000;
/// The most images in one batch.
pub const MAX_IMAGES: usize = 1 << 12;
/// Channels of a latent image, and pixels along an edge of a patch.
const MAX_CHANNELS: usize = 1 << 12;

struct Asked<'a> {
    folder: &'a Folder,
    request: &'a Request,
    vae: &'a VaeConfig,
    config: &'a DenoiserConfig,
}

fn refuse(option: &'static str, problem: String) -> Result<(), PipelineError> {
    Err(PipelineError::Request { option, problem })
}

impl Asked<'_> {
    fn numbers(&self) -> Result<(), PipelineError> {
        for (option, value, most) in [
            ("--steps", self.request.steps, MAX_STEPS),
            ("--num-images", self.request.images, MAX_IMAGES),
        ] {
            if value == 0 || value > most {
                return refuse(option, format!("{value}, expected 1 to {most}"));
            }
        }
        for (option, value) in [
            ("--guidance", self.request.guidance),
            ("--control-scale", self.request.control_scale),
        ] {
            if !value.is_finite() {
                return refuse(option, format!("{value}, expected a number"));
            }
        }
        if !(0.0..=1.0).contains(&self.request.eta) {
            return refuse("--eta", format!("{}, expected 0 to 1", self.request.eta));
        }
        let factor = self.vae.factor();
        let tile = self.request.vae_tile;
        // A quarter of a tile, by which they overlap, is of whole latent pixels.
        let unit = 4 * factor;
        if tile < 2 * unit || !tile.is_multiple_of(unit) {
            return refuse(
                "--vae-tile",
                format!(
                    "{tile}, expected a multiple of {unit} and at least {}",
                    2 * unit
                ),
            );
        }
        Ok(())
    }

    fn strengths(&self) -> Result<(), PipelineError> {
        let strength = match &self.request.init {
            Init::Image { strength, .. } | Init::Inpaint { strength, .. } => Some(*strength),
            _ => None,
        };
        let named = strength.map(|s| ("--strength", s));
        let upscale = self.request.upscale.iter().map(|s| ("--upscale", *s));
        for (option, strength) in upscale.chain(named) {
            if !(strength > 0.0 && strength <= 1.0) {
                return refuse(
                    option,
                    format!("{strength}, expected above 0 and at most 1"),
                );
            }
        }
        Ok(())
    }

    /// Numbers of the configurations that sizes are computed from.
    fn fields(&self) -> Result<(), PipelineError> {
        let (vae, denoiser) = ("vae_decoder", self.folder.denoiser());
        let means = |list: &Option<Vec<f32>>| list.as_ref().map(Vec::len);
        let channels = self.vae.latent_channels;
        let sample = self.config.sample_size.map(|side| side.longest());
        for (component, field, found, least, most) in [
            (vae, "latent_channels", Some(channels), 1, MAX_CHANNELS),
            (
                vae,
                "latents_mean",
                means(&self.vae.latents_mean),
                channels,
                channels,
            ),
            (
                vae,
                "latents_std",
                means(&self.vae.latents_std),
                channels,
                channels,
            ),
            (
                denoiser,
                "patch_size",
                self.config.patch_size,
                1,
                MAX_CHANNELS,
            ),
            (denoiser, "sample_size", sample, 1, MAX_SIDE),
        ] {
            if let Some(found) = found.filter(|n| *n < least || *n > most) {
                return Err(PipelineError::Field {
                    path: self.folder.component(component).join("config.json"),
                    field,
                    found: found.to_string(),
                    expected: match field {
                        "latents_mean" | "latents_std" => format!("{least} numbers"),
                        _ => format!("{least} to {most}"),
                    },
                });
            }
        }
        Ok(())
    }

    /// What the model has no input for cannot be told it.
    fn told(&self) -> Result<(), PipelineError> {
        let hints = self.request.sizes != SizeHints::default();
        if self.request.control.is_none() && !hints {
            return Ok(());
        }
        let path = self.folder.model(self.folder.denoiser())?;
        let file = OnnxFile::open(&path).map_err(|e| PipelineError::Ports {
            path: path.clone(),
            problem: e.to_string(),
        })?;
        let inputs = &file.model.graph.input;
        let takes = |wanted: &dyn Fn(&str) -> bool| {
            inputs.iter().any(|v| v.name.as_deref().is_some_and(wanted))
        };
        if self.request.control.is_some() && !takes(&is_residual) {
            refuse(
                "--control-image",
                format!("{} takes no residuals of a ControlNet", path.display()),
            )?;
        }
        if hints && !takes(&|name| name == "time_ids") {
            refuse(
                "--original-size, --crop and --target-size",
                format!("{} has no input `time_ids`; SD-XL's has", path.display()),
            )?;
        }
        Ok(())
    }

    fn channels(&self) -> Result<(), PipelineError> {
        let channels = self.vae.latent_channels;
        let inpainting = 2 * channels + 1;
        let inpaints = matches!(self.request.init, Init::Inpaint { .. });
        match (self.config.in_channels, inpaints) {
            (found, false) if found == channels => Ok(()),
            (found, true) if found == inpainting => Ok(()),
            (found, true) => refuse(
                "--mask",
                format!(
                    "the model takes {found} channels, and only one of {inpainting} can paint parts of an image anew"
                ),
            ),
            (found, false) if found == inpainting => refuse(
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
                expected: format!("{channels}, as the VAE has, or {inpainting} for inpainting"),
            }),
        }
    }

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
        let latent = self.config.sample_size.map_or(64, |side| side.longest());
        latent.saturating_mul(self.vae.factor())
    }

    fn size(&self) -> Result<Size, PipelineError> {
        let multiple = self.multiple();
        let size = match (&self.request.init, self.request.size) {
            (Init::Latents(latents), asked) => {
                return self.fitting("--latents", self.size_of(latents, asked)?);
            }
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
        self.fitting("--size", size)
    }

    /// The size if the model can be run at it.
    fn fitting(&self, option: &'static str, size: Size) -> Result<Size, PipelineError> {
        let multiple = self.multiple();
        let fits = |side: usize| side > 0 && side.is_multiple_of(multiple) && side <= MAX_SIDE;
        if fits(size.width) && fits(size.height) {
            return Ok(size);
        }
        let near = |side: usize| {
            let steps = side.min(MAX_SIDE) as f64 / multiple as f64;
            steps.round().max(1.0) as usize * multiple
        };
        Err(PipelineError::Request {
            option,
            problem: format!(
                "{size}, expected multiples of {multiple} up to {MAX_SIDE}, such as {}",
                Size {
                    width: near(size.width),
                    height: near(size.height)
                }
            ),
        })
    }

    fn size_of(
        &self,
        latents: &ndarray::Array4<f32>,
        asked: Option<Size>,
    ) -> Result<Size, PipelineError> {
        let (_, _, height, width) = latents.dim();
        let factor = self.vae.factor();
        let size = Size {
            width: width * factor,
            height: height * factor,
        };
        match asked {
            Some(asked) if asked != size => Err(PipelineError::Request {
                option: "--size",
                problem: format!("{asked}, but the latents are of an image of {size}"),
            }),
            _ => Ok(size),
        }
    }
}
