//! One model of a pipeline, loaded for as long as its stage lasts.

use std::path::PathBuf;

use ndarray::{ArrayD, Ix3, Ix4};

use super::error::PipelineError;
use super::folder::Folder;
use super::suspect::first_not_finite;
use crate::arithmetic::{Arithmetic, Host};
use crate::engine::{Engine, EngineError, Port, Session, SessionOptions, Value};
use crate::tensor::Tensor;

/// Where models run.
#[derive(Debug, Clone)]
pub struct Place {
    /// What runs them.
    pub engine: Engine,
    /// How.
    pub options: SessionOptions,
}

/// A loaded model; errors name its stage.
pub struct Model {
    path: PathBuf,
    stage: String,
    session: Session,
    place: Place,
    keeps: bool,
    kept: Option<Vec<(String, Tensor)>>,
}

impl Model {
    /// Loads a component's model.
    ///
    /// # Errors
    /// There is none, or the engine refuses it.
    pub fn load(folder: &Folder, component: &str, place: &Place) -> Result<Self, PipelineError> {
        let path = folder.model(component)?;
        let session =
            Session::from_file(place.engine, &path, &place.options).map_err(|source| {
                PipelineError::Engine {
                    stage: component.to_owned(),
                    source,
                }
            })?;
        Ok(Self {
            path,
            stage: component.to_owned(),
            session,
            place: place.clone(),
            keeps: false,
            kept: None,
        })
    }

    /// Whether to keep the inputs of a run, for [`Self::kept`].
    pub fn keep(&mut self, keeps: bool) {
        self.keeps = keeps;
    }

    /// The inputs of the last run that were to be kept.
    pub fn kept(&mut self) -> Option<Vec<(String, Tensor)>> {
        self.kept.take()
    }

    /// What it takes.
    pub fn inputs(&self) -> &[Port] {
        self.session.inputs()
    }

    /// Whether it has such an input.
    pub fn takes(&self, name: &str) -> bool {
        self.inputs().iter().any(|port| port.name == name)
    }

    /// Runs it on named tensors, which are cast to the types that it takes.
    ///
    /// # Errors
    /// They don't fit, the engine fails, or an output isn't finite.
    pub fn run(&mut self, inputs: Vec<(String, Tensor)>) -> Result<Outputs, PipelineError> {
        let cast: Vec<(String, Value)> = inputs
            .into_iter()
            .map(|(name, tensor)| {
                let port = self.inputs().iter().find(|port| port.name == name);
                let dtype = port.map_or(tensor.dtype(), |port| port.dtype);
                let tensor = if tensor.dtype() == dtype {
                    tensor
                } else {
                    tensor.cast(dtype)
                };
                (name, tensor.into())
            })
            .collect();
        let values = self.run_values(cast, &mut Host)?;
        let tensors = values.into_iter();
        Ok(Outputs {
            path: self.path.clone(),
            outputs: tensors
                .filter_map(|(name, value)| Some((name, value.into_host()?)))
                .collect(),
        })
    }

    /// Runs it on named values of the types that it takes, and leaves its outputs, in the graph's order, where `arithmetic`
    /// is.
    ///
    /// # Errors
    /// They don't fit, the engine fails, or an output isn't finite.
    pub fn run_values(
        &mut self,
        inputs: Vec<(String, Value)>,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Vec<(String, Value)>, PipelineError> {
        let outputs = self
            .session
            .run_values(&inputs, arithmetic.location())
            .map_err(|source| self.failed(source))?;
        self.all_finite(&outputs, &inputs, arithmetic)?;
        if self.keeps {
            self.kept = Some(self.downloaded(&inputs, arithmetic)?);
        }
        Ok(outputs)
    }

    fn all_finite(
        &self,
        outputs: &[(String, Value)],
        inputs: &[(String, Value)],
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<(), PipelineError> {
        let values: Vec<&Value> = outputs.iter().map(|(_, value)| value).collect();
        let all = arithmetic.finite(&values);
        if all.map_err(|source| self.failed(source))? {
            return Ok(());
        }
        let outputs = self.downloaded(outputs, arithmetic)?;
        let Some((name, bad)) = outputs.iter().find(|(_, tensor)| !tensor.is_finite()) else {
            return Ok(());
        };
        let inputs = self.downloaded(inputs, arithmetic)?;
        let values = bad.to_f64();
        Err(PipelineError::NotFinite {
            stage: format!("{}, output `{name}`", self.stage),
            count: values.iter().filter(|v| !v.is_finite()).count(),
            total: values.len(),
            place: format!("; {}", first_not_finite(&self.path, &self.place, &inputs)),
        })
    }

    fn downloaded(
        &self,
        values: &[(String, Value)],
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Vec<(String, Tensor)>, PipelineError> {
        let tensors = values
            .iter()
            .map(|(name, value)| Ok((name.clone(), arithmetic.download(value)?)));
        tensors
            .collect::<Result<_, EngineError>>()
            .map_err(|source| self.failed(source))
    }

    /// An error of the engine while it works for this model.
    pub fn failed(&self, source: EngineError) -> PipelineError {
        PipelineError::Engine {
            stage: self.stage.clone(),
            source,
        }
    }

    /// An error about its inputs or outputs.
    pub fn ports(&self, problem: String) -> PipelineError {
        PipelineError::Ports {
            path: self.path.clone(),
            problem,
        }
    }
}

/// What a model gave, in the graph's order.
pub struct Outputs {
    path: PathBuf,
    outputs: Vec<(String, Tensor)>,
}

impl Outputs {
    /// The output of that name, in single precision.
    ///
    /// # Errors
    /// There is none.
    pub fn named(&mut self, name: &str) -> Result<ArrayD<f32>, PipelineError> {
        let place = self.outputs.iter().position(|(n, _)| n == name);
        let place = place.ok_or_else(|| self.missing(&format!("no output `{name}`")))?;
        Ok(single(self.outputs.swap_remove(place).1))
    }

    /// The first output that has `rank` dimensions, in single precision.
    ///
    /// # Errors
    /// There is none.
    fn of_rank(&mut self, rank: usize) -> Result<ArrayD<f32>, PipelineError> {
        let place = self
            .outputs
            .iter()
            .position(|(_, t)| t.shape().len() == rank);
        let place =
            place.ok_or_else(|| self.missing(&format!("no output of {rank} dimensions")))?;
        Ok(single(self.outputs.swap_remove(place).1))
    }

    /// The first image-like output, [batch, channels, height, width].
    ///
    /// # Errors
    /// There is none.
    pub fn image(&mut self) -> Result<ndarray::Array4<f32>, PipelineError> {
        self.of_rank(4)?
            .into_dimensionality::<Ix4>()
            .map_err(|e| self.missing(&e.to_string()))
    }

    /// The first sequence, [batch, tokens, width].
    ///
    /// # Errors
    /// There is none.
    pub fn sequence(&mut self) -> Result<ndarray::Array3<f32>, PipelineError> {
        self.of_rank(3)?
            .into_dimensionality::<Ix3>()
            .map_err(|e| self.missing(&e.to_string()))
    }

    /// The hidden states of the last layer but one: of `hidden_states.0`, `.1`, … the second-last; the graph's order
    /// may be any.
    ///
    /// # Errors
    /// There are fewer than two.
    pub fn penultimate_hidden_state(&mut self) -> Result<ndarray::Array3<f32>, PipelineError> {
        let mut states: Vec<usize> = self
            .outputs
            .iter()
            .filter_map(|(name, _)| name.strip_prefix("hidden_states.")?.parse().ok())
            .collect();
        states.sort_unstable();
        let Some(place) = states.len().checked_sub(2).and_then(|i| states.get(i)) else {
            return Err(self.missing(
                "no outputs `hidden_states.0`, `hidden_states.1`, …; SD-XL's text encoders must be exported with \
                 them, as optimum does",
            ));
        };
        self.named(&format!("hidden_states.{place}"))?
            .into_dimensionality::<Ix3>()
            .map_err(|e| self.missing(&e.to_string()))
    }

    fn missing(&self, what: &str) -> PipelineError {
        let names: Vec<String> = self
            .outputs
            .iter()
            .map(|(name, t)| format!("{name} {:?}", t.shape()))
            .collect();
        PipelineError::Ports {
            path: self.path.clone(),
            problem: format!("{what}; its outputs are {}", names.join(", ")),
        }
    }
}

fn single(tensor: Tensor) -> ArrayD<f32> {
    match tensor {
        Tensor::F32(array) => array,
        Tensor::F16(array) => array.mapv(f32::from),
        Tensor::BF16(array) => array.mapv(f32::from),
        other => other.to_f64().mapv(|v| v as f32),
    }
}
