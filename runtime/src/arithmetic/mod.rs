//! Arithmetic on tensors where they are: on the host, or in graphs on the device that the models run on. What a sampler does
//! between two runs of a model, and what joins and cuts the model's inputs and outputs, is written once, on top of this.

mod graphs;
mod host;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use graphs::Graphs;
pub use host::Host;

use crate::engine::{Device, Engine, EngineError, Location, SessionOptions, Value};
use crate::tensor::{DType, Tensor};

/// What is done to tensors between two runs of a model. Sums are computed in single precision at least, whatever the types.
pub trait Arithmetic {
    /// Where tensors are that this computes with; models leave their outputs there.
    fn location(&self) -> Location;

    /// Brings a tensor there.
    ///
    /// # Errors
    /// The engine fails, or has no memory for it.
    fn upload(&mut self, tensor: Tensor) -> Result<Value, EngineError>;

    /// Brings a value to the host.
    ///
    /// # Errors
    /// The engine fails.
    fn download(&mut self, value: &Value) -> Result<Tensor, EngineError>;

    /// Σ coefficient · value, of one value or more of equal shape.
    ///
    /// # Errors
    /// The shapes differ, a type is not of floating-point numbers, or the engine fails.
    fn sum(&mut self, terms: &[(f64, &Value)], form: Form) -> Result<Value, EngineError>;

    /// Values of one type behind one another along an axis, where their sizes may differ.
    ///
    /// # Errors
    /// Types or other sizes differ, or the engine fails.
    fn join(&mut self, axis: usize, parts: &[&Value]) -> Result<Value, EngineError>;

    /// A range of a value's axis.
    ///
    /// # Errors
    /// The axis is shorter, or the engine fails.
    fn part(
        &mut self,
        value: &Value,
        axis: usize,
        range: Range<usize>,
    ) -> Result<Value, EngineError>;

    /// Whether no element of any value is infinite or not a number.
    ///
    /// # Errors
    /// The engine fails.
    fn finite(&mut self, values: &[&Value]) -> Result<bool, EngineError>;
}

/// What becomes of a sum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Form {
    /// The largest magnitude that an element keeps; larger ones are cut to it.
    pub bound: Option<f64>,
    /// The type that it is rounded to.
    pub dtype: DType,
}

impl Form {
    /// All of it, as that type.
    pub fn of(dtype: DType) -> Self {
        Self { bound: None, dtype }
    }
}

/// Where tensors that runs share stay with these options.
pub fn location(engine: Engine, options: &SessionOptions) -> Location {
    match (engine, options.shared, options.device) {
        (Engine::Tract, _, _) => Location::Host,
        (Engine::Ort, Some(location), _) => location,
        (Engine::Ort, None, Device::Cuda(_)) => Location::Device,
        (Engine::Ort, None, Device::Cpu) => Location::Host,
    }
}

/// Arithmetic at [`location`].
pub fn arithmetic(engine: Engine, options: &SessionOptions) -> Box<dyn Arithmetic> {
    match location(engine, options) {
        Location::Host => Box::new(Host),
        Location::Device => Box::new(Graphs::new(options)),
    }
}

/// Of these values, in the words of an error.
fn unfit(operation: &'static str, values: &[&Value]) -> EngineError {
    let shown = values
        .iter()
        .map(|v| format!("{}{:?}", v.dtype(), v.shape()));
    EngineError::Operands {
        operation,
        operands: shown.collect::<Vec<_>>().join(", "),
    }
}

/// The values of a sum, if they can be added.
fn summands<'v>(terms: &[(f64, &'v Value)]) -> Result<Vec<&'v Value>, EngineError> {
    let values: Vec<&Value> = terms.iter().map(|(_, value)| *value).collect();
    let equal = values.windows(2).all(|pair| match pair {
        [a, b] => a.shape() == b.shape(),
        _ => true,
    });
    match !values.is_empty() && equal && values.iter().all(|v| v.dtype().is_float()) {
        true => Ok(values),
        false => Err(unfit("add", &values)),
    }
}

/// The value of a sum that is one of its terms as it is.
fn unchanged(terms: &[(f64, &Value)], form: Form) -> Option<Value> {
    match terms {
        [(1.0, value)] if form == Form::of(value.dtype()) => Some((*value).clone()),
        _ => None,
    }
}

fn joinable(axis: usize, parts: &[&Value]) -> Result<(), EngineError> {
    let rest = |value: &Value| {
        let mut shape = value.shape().to_vec();
        (axis < shape.len()).then(|| shape.remove(axis))?;
        Some((value.dtype(), shape))
    };
    let first = parts.first().and_then(|v| rest(v));
    match first.is_some() && parts.iter().all(|v| rest(v) == first) {
        true => Ok(()),
        false => Err(unfit("join", parts)),
    }
}

fn cuttable(value: &Value, axis: usize, range: &Range<usize>) -> Result<(), EngineError> {
    let length = value.shape().get(axis).copied().unwrap_or(0);
    match range.start < range.end && range.end <= length {
        true => Ok(()),
        false => Err(unfit("cut a part beyond the end of", &[value])),
    }
}
