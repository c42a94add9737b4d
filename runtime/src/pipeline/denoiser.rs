//! One evaluation of the UNet or transformer: its inputs by name, guidance, what it predicts.

use ndarray::{Array1, Array2, Array4, ArrayD, Axis, IxDyn, concatenate, s};

use super::error::PipelineError;
use super::folder::{DenoiserConfig, Folder};
use super::model::{Model, Place};
use super::prompt::Text;
use crate::engine::Dim;
use crate::tensor::Tensor;

/// How the guided and the unguided prediction are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guidance {
    /// In one batch of twice the size.
    #[default]
    Together,
    /// One after the other, with half the memory.
    Split,
}

/// What a generation is conditioned on, one row an image.
pub struct Conditions {
    /// The prompts.
    pub positive: Text,
    /// What guidance leads away from; `None` without guidance.
    pub negative: Option<Text>,
    /// How far guidance goes, w of Ho and Salimans 2022: 1 is no guidance.
    pub scale: f32,
    /// Sizes that SD-XL and PixArt-α are told.
    pub sizes: Sizes,
    /// A ControlNet's hint, [1, 3, height, width] in 0 … 1.
    pub control: Option<Control>,
    /// Mask and masked image of an inpainting model, [images, 5, height, width] of the latent image.
    pub inpaint: Option<Array4<f32>>,
}

/// A ControlNet's input.
pub struct Control {
    /// [1, 3, height, width] in 0 … 1, in pixels.
    pub hint: Array4<f32>,
    /// Factor on what the ControlNet adds.
    pub scale: f32,
}

/// What to tell SD-XL about sizes instead of the image's own: pixels, each as height and width. What is left out on the negative
/// side is as on the positive.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SizeHints {
    /// Of the image before it was resized.
    pub original: Option<[usize; 2]>,
    /// Of what was cut off its top and left.
    pub crop: Option<[usize; 2]>,
    /// Of the image.
    pub target: Option<[usize; 2]>,
    /// `original` on the negative side.
    pub negative_original: Option<[usize; 2]>,
    /// `crop` on the negative side.
    pub negative_crop: Option<[usize; 2]>,
    /// `target` on the negative side.
    pub negative_target: Option<[usize; 2]>,
}

impl SizeHints {
    /// For an image of that size.
    pub fn at(&self, height: usize, width: usize) -> Sizes {
        Sizes {
            original: self.original.unwrap_or([height, width]),
            crop: self.crop.unwrap_or([0, 0]),
            target: self.target.unwrap_or([height, width]),
            negative_original: self.negative_original,
            // As diffusers has it: a negative side of its own is not cropped unless it is said to be.
            negative_crop: self.negative_crop.or_else(|| {
                self.negative_original.and(self.negative_target)?;
                Some([0, 0])
            }),
            negative_target: self.negative_target,
        }
    }
}

/// The sizes that SD-XL was trained to be told, in pixels, each as height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Of the image before it was resized.
    pub original: [usize; 2],
    /// Of what was cut off its top and left.
    pub crop: [usize; 2],
    /// Of the image.
    pub target: [usize; 2],
    /// `original` on the negative side.
    pub negative_original: Option<[usize; 2]>,
    /// `crop` on the negative side.
    pub negative_crop: Option<[usize; 2]>,
    /// `target` on the negative side.
    pub negative_target: Option<[usize; 2]>,
}

impl Sizes {
    fn time_ids(&self, side: Side) -> [f32; 6] {
        let pick = |usual: [usize; 2], negative: Option<[usize; 2]>| match side {
            Side::Negative => negative.unwrap_or(usual),
            Side::Positive => usual,
        };
        let [a, b] = pick(self.original, self.negative_original);
        let [c, d] = pick(self.crop, self.negative_crop);
        let [e, f] = pick(self.target, self.negative_target);
        [a, b, c, d, e, f].map(|v| v as f32)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Negative,
    Positive,
}

/// The model that takes the steps, and a ControlNet beside it.
pub struct Denoiser {
    model: Model,
    control: Option<Model>,
    config: DenoiserConfig,
    guidance: Guidance,
}

impl Denoiser {
    /// Loads the model, and the pipeline's ControlNet if the model takes its residuals.
    ///
    /// # Errors
    /// A model is missing or refused.
    pub fn load(
        folder: &Folder,
        config: DenoiserConfig,
        place: &Place,
        guidance: Guidance,
    ) -> Result<Self, PipelineError> {
        let model = Model::load(folder, folder.denoiser(), place)?;
        let control = if model.inputs().iter().any(|p| is_residual(&p.name)) {
            Some(Model::load(folder, "controlnet", place)?)
        } else {
            None
        };
        Ok(Self {
            model,
            control,
            config,
            guidance,
        })
    }

    /// The model, without the ControlNet beside it.
    pub fn model(&mut self) -> &mut Model {
        &mut self.model
    }

    /// What the model predicts for latents [images, channels, height, width], scaled for it, at a time step, with
    /// guidance.
    ///
    /// # Errors
    /// The model takes something that isn't known, or fails.
    pub fn predict(
        &mut self,
        latents: &Array4<f32>,
        timestep: f64,
        conditions: &Conditions,
    ) -> Result<Array4<f32>, PipelineError> {
        let channels = latents.shape()[1];
        let latents = match &conditions.inpaint {
            Some(inpaint) => stack(Axis(1), latents, inpaint),
            None => latents.clone(),
        };
        let Some(negative) = &conditions.negative else {
            let text = conditions.positive.clone();
            return self.evaluate(
                &latents,
                timestep,
                conditions,
                &text,
                &[Side::Positive],
                channels,
            );
        };
        let (away, toward) = match self.guidance {
            Guidance::Together => {
                let both = stack(Axis(0), &latents, &latents);
                let text = negative.above(&conditions.positive);
                let sides = [Side::Negative, Side::Positive];
                let both = self.evaluate(&both, timestep, conditions, &text, &sides, channels)?;
                let half = both.shape()[0] / 2;
                (
                    both.slice(s![..half, .., .., ..]).to_owned(),
                    both.slice(s![half.., .., .., ..]).to_owned(),
                )
            }
            Guidance::Split => {
                let text = conditions.positive.clone();
                (
                    self.evaluate(
                        &latents,
                        timestep,
                        conditions,
                        negative,
                        &[Side::Negative],
                        channels,
                    )?,
                    self.evaluate(
                        &latents,
                        timestep,
                        conditions,
                        &text,
                        &[Side::Positive],
                        channels,
                    )?,
                )
            }
        };
        let mut guided = toward;
        guided.zip_mut_with(&away, |toward, away| {
            *toward = away + conditions.scale * (*toward - away);
        });
        Ok(guided)
    }

    /// One run; `sides` are the parts of the batch, of equal size.
    fn evaluate(
        &mut self,
        latents: &Array4<f32>,
        timestep: f64,
        conditions: &Conditions,
        text: &Text,
        sides: &[Side],
        channels: usize,
    ) -> Result<Array4<f32>, PipelineError> {
        let known = Known {
            config: &self.config,
            latents,
            timestep,
            conditions,
            text,
            sides,
        };
        let mut residuals = match &mut self.control {
            Some(control) => control_residuals(control, &known)?,
            None => Vec::new(),
        };
        let expected = self
            .model
            .inputs()
            .iter()
            .filter(|p| is_residual(&p.name))
            .count();
        if residuals.len() != expected {
            return Err(self.model.ports(format!(
                "it takes {expected} residuals of a ControlNet, and the pipeline's gives {}",
                residuals.len()
            )));
        }
        residuals.reverse();
        let mut inputs = Vec::new();
        for port in self.model.inputs() {
            let tensor = if is_residual(&port.name) {
                residuals.pop().map(Tensor::F32)
            } else {
                known.input(port)
            };
            let tensor = tensor.ok_or_else(|| self.model.ports(unknown_input(port)))?;
            inputs.push((port.name.clone(), tensor));
        }
        let predicted = self.model.run(inputs)?.image()?;
        // PixArt predicts variances too, which no sampler here uses.
        if predicted.shape()[1] == 2 * channels {
            return Ok(predicted.slice(s![.., ..channels, .., ..]).to_owned());
        }
        if predicted.shape()[1] != channels || predicted.shape()[2..] != latents.shape()[2..] {
            return Err(self.model.ports(format!(
                "its output is {:?} for latents {:?}",
                predicted.shape(),
                latents.shape()
            )));
        }
        Ok(predicted)
    }
}

fn unknown_input(port: &crate::engine::Port) -> String {
    format!(
        "it takes `{}` {port}, which this pipeline has nothing for; known are sample, timestep, encoder_hidden_states, \
         encoder_attention_mask, text_embeds, time_ids, timestep_cond, resolution, aspect_ratio and a ControlNet's \
         residuals",
        port.name
    )
}

/// The residuals of a ControlNet are the model's inputs named after the blocks that they are added to.
pub(super) fn is_residual(name: &str) -> bool {
    name.contains("residual") || name.contains("down_block") || name.contains("mid_block")
}

/// What is known at an evaluation.
struct Known<'a> {
    config: &'a DenoiserConfig,
    latents: &'a Array4<f32>,
    timestep: f64,
    conditions: &'a Conditions,
    text: &'a Text,
    sides: &'a [Side],
}

impl Known<'_> {
    fn batch(&self) -> usize {
        self.latents.shape()[0]
    }

    fn input(&self, port: &crate::engine::Port) -> Option<Tensor> {
        Some(match port.name.as_str() {
            "sample" | "hidden_states" | "latent_model_input" => Tensor::from(self.latents.clone()),
            "timestep" | "timesteps" | "t" => self.timestep(port),
            "encoder_hidden_states" | "prompt_embeds" => Tensor::from(self.text.hidden.clone()),
            "encoder_attention_mask" | "attention_mask" => Tensor::from(self.text.mask.clone()?),
            "text_embeds" => Tensor::from(self.text.pooled.clone()?),
            "time_ids" => Tensor::from(self.time_ids()),
            "timestep_cond" => {
                let width = self
                    .config
                    .time_cond_proj_dim
                    .or(match port.shape.as_deref() {
                        Some([_, Dim::Fixed(width)]) => Some(*width),
                        _ => None,
                    })?;
                Tensor::from(guidance_embedding(
                    self.conditions.scale - 1.0,
                    width,
                    self.batch(),
                ))
            }
            "resolution" => {
                let [height, width] = self.conditions.sizes.target.map(|v| v as f32);
                Tensor::from(rows(&[height, width], self.batch()))
            }
            "aspect_ratio" => {
                let [height, width] = self.conditions.sizes.target.map(|v| v as f32);
                Tensor::from(rows(&[height / width], self.batch()))
            }
            _ => return None,
        })
    }

    /// A number, or one for each image, as the model declares it.
    fn timestep(&self, port: &crate::engine::Port) -> Tensor {
        let shape: Vec<usize> = match port.shape.as_deref() {
            Some([Dim::Fixed(count)]) => vec![*count],
            Some([_]) => vec![self.batch()],
            _ => vec![],
        };
        Tensor::from_f64(ArrayD::from_elem(IxDyn(&shape), self.timestep), port.dtype)
    }

    fn time_ids(&self) -> Array2<f32> {
        let images = self.batch() / self.sides.len().max(1);
        let mut table = Array2::zeros((self.batch(), 6));
        for (row, mut ids) in table.outer_iter_mut().enumerate() {
            let side = self
                .sides
                .get(row / images.max(1))
                .copied()
                .unwrap_or(Side::Positive);
            ids.assign(&Array1::from_iter(self.conditions.sizes.time_ids(side)));
        }
        table
    }
}

fn rows(values: &[f32], count: usize) -> Array2<f32> {
    Array2::from_shape_fn((count, values.len()), |(_, i)| values[i])
}

/// Sines and cosines of w · 1000, as latent consistency models take their guidance (Luo et al. 2023).
fn guidance_embedding(w: f32, width: usize, count: usize) -> Array2<f32> {
    let half = width / 2;
    let step = 10_000.0_f32.ln() / (half.max(2) - 1) as f32;
    Array2::from_shape_fn((count, width), |(_, i)| {
        let angle = w * 1000.0 * (-step * (i % half.max(1)) as f32).exp();
        match i / half.max(1) {
            0 => angle.sin(),
            1 => angle.cos(),
            _ => 0.0,
        }
    })
}

fn control_residuals(
    control: &mut Model,
    known: &Known<'_>,
) -> Result<Vec<ArrayD<f32>>, PipelineError> {
    let Some(Control { hint, scale }) = &known.conditions.control else {
        return Err(PipelineError::Request {
            option: "--control-image",
            problem:
                "the model takes a ControlNet's residuals; give the image that it is to follow"
                    .to_owned(),
        });
    };
    let mut inputs = Vec::new();
    for port in control.inputs() {
        let tensor = match port.name.as_str() {
            "controlnet_cond" => {
                let hints = vec![hint.view(); known.batch()];
                concatenate(Axis(0), &hints).ok().map(Tensor::from)
            }
            "conditioning_scale" => Some(Tensor::from_f64(
                ArrayD::from_elem(IxDyn(&scalar_shape(port)), f64::from(*scale)),
                port.dtype,
            )),
            _ => known.input(port),
        };
        let tensor = tensor.ok_or_else(|| control.ports(unknown_input(port)))?;
        inputs.push((port.name.clone(), tensor));
    }
    let scaled_inside = control.takes("conditioning_scale");
    let mut residuals = control.run(inputs)?.all();
    if !scaled_inside {
        for residual in &mut residuals {
            residual.mapv_inplace(|v| v * scale);
        }
    }
    Ok(residuals)
}

fn scalar_shape(port: &crate::engine::Port) -> Vec<usize> {
    port.shape
        .as_ref()
        .map_or(vec![], |dims| vec![1; dims.len()])
}

fn stack(axis: Axis, a: &Array4<f32>, b: &Array4<f32>) -> Array4<f32> {
    // Only called with arrays that agree on the other axes.
    concatenate(axis, &[a.view(), b.view()]).unwrap_or_else(|_| a.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_negative_side_is_told_its_own_sizes() {
        let own = SizeHints::default().at(768, 1024);
        for side in [Side::Positive, Side::Negative] {
            assert_eq!(own.time_ids(side), [768.0, 1024.0, 0.0, 0.0, 768.0, 1024.0]);
        }
        let hints = SizeHints {
            original: Some([2000, 3000]),
            crop: Some([5, 6]),
            negative_original: Some([512, 513]),
            negative_target: Some([32, 33]),
            ..SizeHints::default()
        };
        let sizes = hints.at(768, 1024);
        let positive = [2000.0, 3000.0, 5.0, 6.0, 768.0, 1024.0];
        assert_eq!(sizes.time_ids(Side::Positive), positive);
        let negative = [512.0, 513.0, 0.0, 0.0, 32.0, 33.0];
        assert_eq!(sizes.time_ids(Side::Negative), negative);
    }
}
