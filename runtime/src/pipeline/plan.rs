//! What a request comes to with a pipeline: the sizes of all stages, whether it is guided; or why it is impossible.

use super::error::PipelineError;
use super::folder::{DenoiserConfig, Folder, VaeConfig};
use super::ladder::{Size, stages};
use super::request::{Init, Request};

/// A request that was found possible.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Sizes of the stages, the last the wanted one.
    pub sizes: Vec<Size>,
    /// Whether the model is asked for the negative side too.
    pub guided: bool,
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
        asked.images_and_tiles()?;
        asked.strengths()?;
        asked.channels()?;
        let wanted = asked.size()?;
        // Only noise starts small: latents and images are taken at their size.
        let sizes = match request.direct || !matches!(request.init, Init::Noise) {
            true => vec![wanted],
            false => stages(wanted, asked.native(), asked.multiple()),
        };
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

    /// [images, channels, height, width] of the latents of an image.
    pub fn latent_shape(&self, size: Size) -> (usize, usize, usize, usize) {
        let (height, width) = (size.height / self.factor, size.width / self.factor);
        (self.images, self.channels, height, width)
    }
}

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
    fn images_and_tiles(&self) -> Result<(), PipelineError> {
        if self.request.images == 0 {
            return refuse("--num-images", "0, expected at least 1".to_owned());
        }
        let factor = self.vae.factor();
        let tile = self.request.vae_tile;
        let least = 8 * factor;
        if tile < least || !tile.is_multiple_of(factor) {
            return refuse(
                "--vae-tile",
                format!("{tile}, expected a multiple of {factor} and at least {least}"),
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
        self.config.sample_size.map_or(64, |side| side.longest()) * self.vae.factor()
    }

    fn size(&self) -> Result<Size, PipelineError> {
        let multiple = self.multiple();
        let size = match (&self.request.init, self.request.size) {
            (Init::Latents(latents), asked) => return self.size_of(latents, asked),
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
