//! What a run of the sampler is conditioned on, as inputs of a model by name.

use ndarray::{Array1, Array2, Array4, ArrayD, IxDyn};

use super::folder::DenoiserConfig;
use super::prompt::Text;
use super::sizes::{Side, Sizes};
use crate::engine::{Dim, Port};
use crate::tensor::Tensor;

/// What a generation is conditioned on, one row an image.
pub struct Conditions {
    /// The prompts.
    pub positive: Text,
    /// What guidance leads away from; `None` without guidance.
    pub negative: Option<Text>,
    /// How far guidance goes, w of Ho and Salimans 2022: 1 is no guidance.
    pub scale: f64,
    /// Sizes that SD-XL and PixArt-α are told.
    pub sizes: Sizes,
    /// A ControlNet's hint.
    pub control: Option<Control>,
    /// Mask and masked image of an inpainting model, [images, 5, height, width] of the latent image.
    pub inpaint: Option<Array4<f32>>,
}

/// A ControlNet's input.
pub struct Control {
    /// [1, 3, height, width] in 0 … 1, in pixels.
    pub hint: Array4<f32>,
    /// Factor on what the ControlNet adds.
    pub scale: f64,
}

impl Conditions {
    /// The texts of sides in one batch.
    pub(super) fn text(&self, sides: &[Side]) -> Text {
        match (&self.negative, sides) {
            (Some(negative), [Side::Negative, Side::Positive]) => negative.above(&self.positive),
            (Some(negative), [Side::Negative]) => negative.clone(),
            _ => self.positive.clone(),
        }
    }
}

/// What changes from one evaluation to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changing {
    /// The latents.
    Sample,
    /// The time step.
    Timestep,
    /// What a ControlNet adds.
    Residual,
}

impl Changing {
    /// What the input of that name is, if it changes.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "sample" | "hidden_states" | "latent_model_input" => Some(Self::Sample),
            "timestep" | "timesteps" | "t" => Some(Self::Timestep),
            _ => is_residual(name).then_some(Self::Residual),
        }
    }
}

/// The residuals of a ControlNet are the model's inputs named after the blocks that they are added to.
pub(super) fn is_residual(name: &str) -> bool {
    name.contains("residual") || name.contains("down_block") || name.contains("mid_block")
}

/// What stays the same at all evaluations of a run.
pub(super) struct Known<'a> {
    pub config: &'a DenoiserConfig,
    pub conditions: &'a Conditions,
    pub text: &'a Text,
    /// The parts of the batch, of equal size.
    pub sides: &'a [Side],
    /// Rows of the batch.
    pub batch: usize,
}

impl Known<'_> {
    /// The input that a port takes; `None` for one that isn't known.
    pub fn input(&self, port: &Port) -> Option<Tensor> {
        Some(match port.name.as_str() {
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
                let w = (self.conditions.scale - 1.0) as f32;
                Tensor::from(guidance_embedding(w, width, self.batch))
            }
            "resolution" => {
                let [height, width] = self.conditions.sizes.target.map(|v| v as f32);
                Tensor::from(rows(&[height, width], self.batch))
            }
            "aspect_ratio" => {
                let [height, width] = self.conditions.sizes.target.map(|v| v as f32);
                Tensor::from(rows(&[height / width], self.batch))
            }
            _ => return None,
        })
    }

    fn time_ids(&self) -> Array2<f32> {
        let images = self.batch / self.sides.len().max(1);
        let mut table = Array2::zeros((self.batch, 6));
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

/// A time step: a number, or one for each row of the batch, as the model declares it.
pub(super) fn timestep(port: &Port, timestep: f64, batch: usize) -> Tensor {
    let shape: Vec<usize> = match port.shape.as_deref() {
        Some([Dim::Fixed(count)]) => vec![*count],
        Some([_]) => vec![batch],
        _ => vec![],
    };
    Tensor::from_f64(ArrayD::from_elem(IxDyn(&shape), timestep), port.dtype)
}

/// One number, in as many dimensions as the port has.
pub(super) fn scalar(port: &Port, value: f64) -> Tensor {
    let shape = port
        .shape
        .as_ref()
        .map_or(vec![], |dims| vec![1; dims.len()]);
    Tensor::from_f64(ArrayD::from_elem(IxDyn(&shape), value), port.dtype)
}

/// What is said of an input that nothing is known for.
pub(super) fn unknown_input(port: &Port) -> String {
    format!(
        "it takes `{}` {port}, which this pipeline has nothing for; known are sample, timestep, encoder_hidden_states, \
         encoder_attention_mask, text_embeds, time_ids, timestep_cond, resolution, aspect_ratio and a ControlNet's \
         residuals",
        port.name
    )
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
