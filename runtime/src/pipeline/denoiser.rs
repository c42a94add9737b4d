//! One evaluation of the UNet or transformer: guidance, a ControlNet beside it, what it predicts. Inputs that stay the same are
//! brought to where the arithmetic is once.

use super::conditions::{Changing, Conditions, Control, Known, scalar, timestep, unknown_input};
use super::error::PipelineError;
use super::folder::{DenoiserConfig, Folder};
use super::model::{Model, Place};
use super::sizes::Side;
use crate::arithmetic::{Arithmetic, Form};
use crate::engine::{EngineError, Port, Value};
use crate::tensor::{DType, Tensor};

/// How the guided and the unguided prediction are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Guidance {
    /// In one batch of twice the size.
    #[default]
    Together,
    /// One after the other, with half the memory.
    Split,
}

impl Guidance {
    /// The sides of each run of the model.
    fn passes(self, guided: bool) -> &'static [&'static [Side]] {
        match (guided, self) {
            (false, _) => &[&[Side::Positive]],
            (true, Self::Together) => &[&[Side::Negative, Side::Positive]],
            (true, Self::Split) => &[&[Side::Negative], &[Side::Positive]],
        }
    }
}

/// The model that takes the steps, and a ControlNet beside it, with everything that they are told at all steps of a run.
pub struct Denoiser {
    model: Model,
    control: Option<Network>,
    passes: Vec<Pass>,
    inpaint: Option<Value>,
    /// How far guidance goes.
    scale: f64,
}

/// A ControlNet.
struct Network {
    model: Model,
    /// The image that it follows, if it takes one, for each row of a batch.
    hint: Option<Value>,
    scale: f64,
}

/// A run of the models at an evaluation.
struct Pass {
    /// Sides of guidance in its batch.
    sides: usize,
    /// Inputs that stay the same, by name.
    model: Vec<(String, Value)>,
    control: Vec<(String, Value)>,
}

/// The latents and the time step of an evaluation.
struct Input<'a> {
    /// Scaled for the model, as many times as there are sides.
    sample: &'a Value,
    timestep: f64,
}

impl Denoiser {
    /// Loads the model, and the pipeline's ControlNet if the model takes its residuals, for a run with these conditions.
    ///
    /// # Errors
    /// A model is missing or refused, or takes something that isn't known.
    pub fn load(
        folder: &Folder,
        place: &Place,
        config: &DenoiserConfig,
        guidance: Guidance,
        mut conditions: Conditions,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Self, PipelineError> {
        let model = Model::load(folder, folder.denoiser(), place)?;
        let all = guidance.passes(conditions.negative.is_some());
        let images = conditions.positive.hidden.shape()[0];
        let batch = images * all.first().map_or(1, |sides| sides.len());
        let is_residual = |port: &Port| Changing::of(&port.name) == Some(Changing::Residual);
        let control = match (
            model.inputs().iter().any(is_residual),
            conditions.control.take(),
        ) {
            (false, _) => None,
            (true, Some(control)) => {
                let network = Model::load(folder, "controlnet", place)?;
                Some(Network::new(network, control, batch, arithmetic)?)
            }
            (true, None) => {
                return Err(PipelineError::Request {
                    option: "--control-image",
                    problem: "the model takes a ControlNet's residuals; give the image that it is to follow"
                        .to_owned(),
                });
            }
        };
        let inpaint = conditions.inpaint.take().map(Tensor::from);
        let inpaint = inpaint.map(|tensor| arithmetic.upload(tensor));
        let inpaint = inpaint.transpose().map_err(|e| model.failed(e))?;
        let mut passes = Vec::new();
        for sides in all {
            let text = conditions.text(sides);
            let known = Known {
                config,
                conditions: &conditions,
                text: &text,
                sides,
                batch,
            };
            passes.push(Pass {
                sides: sides.len(),
                model: constants(&model, &|port| known.input(port), arithmetic)?,
                control: match &control {
                    Some(network) => network.constants(&known, arithmetic)?,
                    None => Vec::new(),
                },
            });
        }
        Ok(Self {
            model,
            control,
            passes,
            inpaint,
            scale: conditions.scale,
        })
    }

    /// The model, without the ControlNet beside it.
    pub fn model(&mut self) -> &mut Model {
        &mut self.model
    }

    /// What the model predicts for latents [images, channels, height, width], times `scale`, at a time step, with guidance; in
    /// single precision.
    ///
    /// # Errors
    /// A model gives something else, or fails.
    pub fn predict(
        &mut self,
        latents: &Value,
        scale: f64,
        timestep: f64,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Value, PipelineError> {
        let single = Form::of(DType::F32);
        let mut input = arithmetic
            .sum(&[(scale, latents)], single)
            .map_err(|e| self.model.failed(e))?;
        if let Some(inpaint) = &self.inpaint {
            input = arithmetic
                .join(1, &[&input, inpaint])
                .map_err(|e| self.model.failed(e))?;
        }
        let mut sides = Vec::new();
        for pass in &self.passes {
            let sample = arithmetic
                .join(0, &vec![&input; pass.sides])
                .map_err(|e| self.model.failed(e))?;
            let input = Input {
                sample: &sample,
                timestep,
            };
            let residuals = match &mut self.control {
                Some(network) => network.residuals(pass, &input, arithmetic)?,
                None => Vec::new(),
            };
            let inputs = inputs(&self.model, &pass.model, &input, &residuals, arithmetic)?;
            drop(residuals);
            let outputs = self.model.run_values(inputs, arithmetic)?;
            let predicted = image(&self.model, outputs, latents, pass.sides, arithmetic)?;
            sides.extend(predicted);
        }
        let w = self.scale;
        let terms = match sides.as_slice() {
            [away, toward] => vec![(1.0 - w, away), (w, toward)],
            others => others.iter().map(|side| (1.0, side)).collect(),
        };
        arithmetic
            .sum(&terms, single)
            .map_err(|e| self.model.failed(e))
    }
}

/// The image that a ControlNet follows.
const HINT: &str = "controlnet_cond";
/// The factor on its residuals, where it is the ControlNet that applies it.
const SCALE: &str = "conditioning_scale";

impl Network {
    fn new(
        model: Model,
        control: Control,
        batch: usize,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Self, PipelineError> {
        let port = model.inputs().iter().find(|port| port.name == HINT);
        let hint = port.map(|port| {
            let one = placed(Tensor::from(control.hint), port.dtype, arithmetic)?;
            arithmetic.join(0, &vec![&one; batch])
        });
        Ok(Self {
            hint: hint.transpose().map_err(|e| model.failed(e))?,
            scale: control.scale,
            model,
        })
    }

    fn constants(
        &self,
        known: &Known<'_>,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Vec<(String, Value)>, PipelineError> {
        let input = |port: &Port| match port.name.as_str() {
            SCALE => Some(scalar(port, self.scale)),
            _ => known.input(port),
        };
        let mut inputs = constants(&self.model, &input, arithmetic)?;
        inputs.extend(self.hint.iter().map(|hint| (HINT.to_owned(), hint.clone())));
        Ok(inputs)
    }

    /// What it gives, and the factors that are still missing on it.
    fn residuals(
        &mut self,
        pass: &Pass,
        input: &Input<'_>,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Vec<(f64, Value)>, PipelineError> {
        let inputs = inputs(&self.model, &pass.control, input, &[], arithmetic)?;
        let outputs = self.model.run_values(inputs, arithmetic)?;
        let factor = match self.model.takes(SCALE) {
            true => 1.0,
            false => self.scale,
        };
        Ok(outputs.into_iter().map(|(_, v)| (factor, v)).collect())
    }
}

/// Inputs of a model that stay the same, but for the hint.
fn constants(
    model: &Model,
    known: &dyn Fn(&Port) -> Option<Tensor>,
    arithmetic: &mut dyn Arithmetic,
) -> Result<Vec<(String, Value)>, PipelineError> {
    let stays = |port: &&Port| Changing::of(&port.name).is_none() && port.name != HINT;
    let mut inputs = Vec::new();
    for port in model.inputs().iter().filter(stays) {
        let tensor = known(port).ok_or_else(|| model.ports(unknown_input(port)))?;
        let value = placed(tensor, port.dtype, arithmetic).map_err(|e| model.failed(e))?;
        inputs.push((port.name.clone(), value));
    }
    Ok(inputs)
}

/// The tensor where the arithmetic is, as another type.
fn placed(
    tensor: Tensor,
    dtype: DType,
    arithmetic: &mut dyn Arithmetic,
) -> Result<Value, EngineError> {
    if tensor.dtype().is_float() && dtype.is_float() {
        let value = arithmetic.upload(tensor)?;
        return arithmetic.sum(&[(1.0, &value)], Form::of(dtype));
    }
    arithmetic.upload(tensor.cast(dtype))
}

/// All inputs of a model at an evaluation, with residuals and their factors.
fn inputs(
    model: &Model,
    constants: &[(String, Value)],
    input: &Input<'_>,
    residuals: &[(f64, Value)],
    arithmetic: &mut dyn Arithmetic,
) -> Result<Vec<(String, Value)>, PipelineError> {
    let changing = |port: &Port| Changing::of(&port.name);
    let ports = model.inputs().iter();
    let expected = ports.filter(|p| changing(p) == Some(Changing::Residual));
    let (expected, given) = (expected.count(), residuals.len());
    if given != expected {
        return Err(model.ports(format!(
            "it takes {expected} residuals of a ControlNet, and the pipeline's gives {given}"
        )));
    }
    let batch = input.sample.shape().first().copied().unwrap_or(0);
    let mut residuals = residuals.iter();
    let mut inputs = constants.to_vec();
    for port in model.inputs() {
        let form = Form::of(port.dtype);
        let value = match changing(port) {
            Some(Changing::Timestep) => Ok(timestep(port, input.timestep, batch).into()),
            Some(Changing::Sample) => arithmetic.sum(&[(1.0, input.sample)], form),
            Some(Changing::Residual) => match residuals.next() {
                Some((factor, value)) => arithmetic.sum(&[(*factor, value)], form),
                None => continue,
            },
            None => continue,
        };
        inputs.push((port.name.clone(), value.map_err(|e| model.failed(e))?));
    }
    Ok(inputs)
}

/// The prediction of each side of guidance, shaped as the latents.
fn image(
    model: &Model,
    outputs: Vec<(String, Value)>,
    latents: &Value,
    sides: usize,
    arithmetic: &mut dyn Arithmetic,
) -> Result<Vec<Value>, PipelineError> {
    let shapes: Vec<String> = outputs
        .iter()
        .map(|(name, value)| format!("{name} {:?}", value.shape()))
        .collect();
    let refused = || {
        model.ports(format!(
            "its outputs are {} for latents {:?}",
            shapes.join(", "),
            latents.shape()
        ))
    };
    let image = outputs.into_iter().find(|(_, v)| v.shape().len() == 4);
    let Some((_, predicted)) = image else {
        return Err(refused());
    };
    let &[images, channels, height, width] = latents.shape() else {
        return Err(refused());
    };
    match *predicted.shape() {
        // PixArt predicts variances too, which no sampler here uses.
        [batch, found, h, w]
            if batch == sides * images
                && (found == channels || found == 2 * channels)
                && [h, w] == [height, width] => {}
        _ => return Err(refused()),
    }
    let cut = arithmetic.part(&predicted, 1, 0..channels);
    let cut = cut.map_err(|e| model.failed(e))?;
    (0..sides)
        .map(|side| {
            let rows = side * images..(side + 1) * images;
            let part = arithmetic.part(&cut, 0, rows);
            part.map_err(|e| model.failed(e))
        })
        .collect()
}
