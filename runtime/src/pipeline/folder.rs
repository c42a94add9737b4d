//! The folder of a pipeline as diffusers and optimum lay it out.

use std::path::{Path, PathBuf};

use linfusion_models::json;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::PipelineError;
use crate::scheduler::SchedulerError;

const EXPORT_HINT: &str =
    "a pipeline is the folder that `optimum-cli export onnx --task text-to-image` writes";

/// What the parts of a pipeline say to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Stable Diffusion 1 and 2: one CLIP text encoder.
    StableDiffusion,
    /// Stable Diffusion XL: two CLIP text encoders, pooled text, sizes as inputs.
    StableDiffusionXl,
    /// PixArt-α and Σ: T5 with a mask, a transformer that also predicts variances.
    PixArt,
}

/// A pipeline's folder, its index read.
#[derive(Debug, Clone)]
pub struct Folder {
    root: PathBuf,
    /// The kind of pipeline.
    pub family: Family,
    /// Zeros instead of the encoded empty prompt where no negative prompt is given (SD-XL).
    pub force_zeros_for_empty_prompt: bool,
    /// Tokens of T5's context: 120 of PixArt-α, 300 of PixArt-Σ, whose pipelines ask for as many.
    pub t5_tokens: usize,
}

#[derive(Deserialize)]
struct Index {
    #[serde(rename = "_class_name")]
    class: Option<String>,
    #[serde(default = "yes")]
    force_zeros_for_empty_prompt: bool,
}

fn yes() -> bool {
    true
}

impl Folder {
    /// Reads `model_index.json`.
    ///
    /// # Errors
    /// It is missing or damaged, or names a pipeline of another kind.
    pub fn open(root: &Path) -> Result<Self, PipelineError> {
        let path = root.join("model_index.json");
        let index: Index = read_json(&path, EXPORT_HINT)?;
        let class = index.class.unwrap_or_default();
        Ok(Self {
            root: root.to_owned(),
            t5_tokens: if class.contains("PixArtAlpha") {
                120
            } else {
                300
            },
            family: family(&class).ok_or_else(|| PipelineError::Field {
                path,
                field: "_class_name",
                found: format!("`{class}`"),
                expected: "a pipeline of Stable Diffusion 1, 2, XL, of latent consistency models or of PixArt"
                    .to_owned(),
            })?,
            force_zeros_for_empty_prompt: index.force_zeros_for_empty_prompt,
        })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder of a component, which may be missing.
    pub fn component(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Whether there is such a component.
    pub fn has(&self, name: &str) -> bool {
        self.component(name).is_dir()
    }

    /// The folder of the model that takes a step: `transformer` or `unet`.
    pub fn denoiser(&self) -> &'static str {
        match self.family {
            Family::PixArt => "transformer",
            _ => "unet",
        }
    }

    /// The model file of a component: `model.onnx`, else the only ONNX file there.
    ///
    /// # Errors
    /// There is none, or no single one.
    pub fn model(&self, component: &str) -> Result<PathBuf, PipelineError> {
        let folder = self.component(component);
        let usual = folder.join("model.onnx");
        if usual.is_file() {
            return Ok(usual);
        }
        let entries = std::fs::read_dir(&folder).map_err(|source| PipelineError::Read {
            path: folder.clone(),
            source,
            hint: EXPORT_HINT,
        })?;
        let mut found: Vec<PathBuf> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|e| e == "onnx"))
            .collect();
        match (found.pop(), found.is_empty()) {
            (Some(only), true) => Ok(only),
            (Some(_), false) => Err(PipelineError::ModelFile {
                path: folder,
                found: format!("{} ONNX files", found.len() + 1),
            }),
            (None, _) => Err(PipelineError::ModelFile {
                path: folder,
                found: "no ONNX file".to_owned(),
            }),
        }
    }

    /// A JSON file of a component.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn json<T: DeserializeOwned>(
        &self,
        component: &str,
        file: &str,
    ) -> Result<T, PipelineError> {
        read_json(&self.component(component).join(file), EXPORT_HINT)
    }

    /// A text file of a component.
    ///
    /// # Errors
    /// It is missing or no UTF-8.
    pub fn text(&self, component: &str, file: &str) -> Result<String, PipelineError> {
        read_text(&self.component(component).join(file), EXPORT_HINT)
    }

    /// The sampler's configuration: its file and what `read` makes of the text.
    ///
    /// # Errors
    /// It is missing, or `read` refuses it.
    pub fn scheduler<T>(
        &self,
        read: impl FnOnce(&str) -> Result<T, SchedulerError>,
    ) -> Result<T, PipelineError> {
        let path = self.scheduler_config();
        read(&read_text(&path, EXPORT_HINT)?)
            .map_err(|source| PipelineError::Scheduler { path, source })
    }

    /// Where the sampler's configuration is.
    pub fn scheduler_config(&self) -> PathBuf {
        self.component("scheduler").join("scheduler_config.json")
    }
}

pub(super) fn read_text(path: &Path, hint: &'static str) -> Result<String, PipelineError> {
    std::fs::read_to_string(path).map_err(|source| PipelineError::Read {
        path: path.to_owned(),
        source,
        hint,
    })
}

pub(super) fn read_json<T: DeserializeOwned>(
    path: &Path,
    hint: &'static str,
) -> Result<T, PipelineError> {
    let text = read_text(path, hint)?;
    serde_json::from_str(&text).map_err(|error| PipelineError::Json {
        path: path.to_owned(),
        problem: json::problem_in(&text, &error),
    })
}

/// Tools put their own prefixes (`ORT`, `Onnx`) and tasks (`Img2Img`) around the names of diffusers.
fn family(class: &str) -> Option<Family> {
    let has = |part| class.contains(part);
    if has("PixArt") {
        Some(Family::PixArt)
    } else if has("StableDiffusion3") || has("Upscale") || has("Depth2Img") {
        None
    } else if has("StableDiffusionXL") || has("StableDiffusionControlNetXL") {
        Some(Family::StableDiffusionXl)
    } else if has("StableDiffusion") || has("LatentConsistency") {
        Some(Family::StableDiffusion)
    } else {
        None
    }
}

/// `vae_decoder/config.json`: how latents and pixels relate.
#[derive(Debug, Clone, Deserialize)]
pub struct VaeConfig {
    /// What latents are multiplied by after encoding.
    #[serde(default = "sd_scale")]
    pub scaling_factor: f32,
    /// What is subtracted before that.
    pub shift_factor: Option<f32>,
    /// Mean of a channel, with `latents_std`.
    pub latents_mean: Option<Vec<f32>>,
    /// Deviation of a channel.
    pub latents_std: Option<Vec<f32>>,
    /// Channels of the latent image.
    #[serde(default = "four")]
    pub latent_channels: usize,
    /// One width a level; each level but the first halves the image.
    pub block_out_channels: Vec<usize>,
}

fn sd_scale() -> f32 {
    0.18215
}

fn four() -> usize {
    4
}

impl VaeConfig {
    /// Pixels along a side of one latent pixel.
    pub fn factor(&self) -> usize {
        1 << (self.block_out_channels.len().clamp(1, 8) - 1)
    }
}

/// `unet/config.json` or `transformer/config.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct DenoiserConfig {
    /// Side of the latent image that the model was trained on.
    pub sample_size: Option<Side>,
    /// Channels of its input: 9 for inpainting.
    #[serde(default = "four")]
    pub in_channels: usize,
    /// Channels of its output: twice the latent's where variances are predicted too.
    #[serde(default = "four")]
    pub out_channels: usize,
    /// Width of the guidance embedding of distilled models.
    pub time_cond_proj_dim: Option<usize>,
    /// Whether PixArt takes sizes and aspect ratios.
    pub use_additional_conditions: Option<bool>,
    /// Latent pixels along a side of one token.
    pub patch_size: Option<usize>,
    /// Widths of the levels of a UNet.
    #[serde(default)]
    pub block_out_channels: Vec<usize>,
}

/// One side for both directions, or rows and columns.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(
    untagged,
    expecting = "`sample_size` is neither a number nor [height, width]"
)]
pub enum Side {
    /// Square.
    One(usize),
    /// Height and width.
    Two([usize; 2]),
}

impl Side {
    /// The longer one.
    pub fn longest(self) -> usize {
        match self {
            Self::One(side) => side,
            Self::Two([height, width]) => height.max(width),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipelines_are_known_by_their_class() {
        let cases = [
            ("StableDiffusionPipeline", Some(Family::StableDiffusion)),
            (
                "ORTStableDiffusionImg2ImgPipeline",
                Some(Family::StableDiffusion),
            ),
            (
                "LatentConsistencyModelPipeline",
                Some(Family::StableDiffusion),
            ),
            (
                "OnnxStableDiffusionInpaintPipeline",
                Some(Family::StableDiffusion),
            ),
            ("StableDiffusionXLPipeline", Some(Family::StableDiffusionXl)),
            ("PixArtSigmaPipeline", Some(Family::PixArt)),
            ("StableDiffusion3Pipeline", None),
            ("FluxPipeline", None),
            ("", None),
        ];
        for (class, expected) in cases {
            assert_eq!(family(class), expected, "{class}");
        }
    }

    #[test]
    fn a_folder_without_its_parts_says_which() {
        let root = tempfile::tempdir().unwrap();
        let missing = Folder::open(root.path()).unwrap_err().to_string();
        assert!(
            missing.contains("model_index.json") && missing.contains("optimum"),
            "{missing}"
        );
        let index = root.path().join("model_index.json");
        std::fs::write(&index, r#"{"_class_name": "FluxPipeline"}"#).unwrap();
        let other = Folder::open(root.path()).unwrap_err().to_string();
        assert!(other.contains("`_class_name` is `FluxPipeline`"), "{other}");
        std::fs::write(&index, r#"{"_class_name": "StableDiffusionPipeline"}"#).unwrap();
        let folder = Folder::open(root.path()).unwrap();
        assert!(matches!(
            folder.model("unet"),
            Err(PipelineError::Read { .. })
        ));
        std::fs::create_dir(root.path().join("unet")).unwrap();
        let none = folder.model("unet").unwrap_err().to_string();
        assert!(none.contains("no ONNX file"), "{none}");
        std::fs::write(root.path().join("unet/a.onnx"), "").unwrap();
        assert!(folder.model("unet").unwrap().ends_with("unet/a.onnx"));
        std::fs::write(root.path().join("unet/b.onnx"), "").unwrap();
        assert!(matches!(
            folder.model("unet"),
            Err(PipelineError::ModelFile { .. })
        ));
    }
}
