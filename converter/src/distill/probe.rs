//! The weights of linear layers, read off what they do: whatever form an exporter or quantizer gave them, a linear layer
//! is what it makes of zero and of each unit vector.

use std::collections::HashMap;

use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{Array2, Array3};

use super::capture::{Teacher, Whether, given};
use super::error::DistillError;
use super::student::Layer;
use super::target::{Target, Value};
use crate::attention::plain::Columns;

/// The layers of a site as the graph has them.
#[derive(Clone, Debug)]
pub struct Layers {
    /// q, k and v.
    pub projections: [Layer; 3],
    /// The out projection, where the target has one.
    pub out: Option<Layer>,
}

/// Finds the weights of a site's layers; `sample` feeds what else the nodes between read.
///
/// # Errors
/// A part of the model does not run, or the layers have other sizes than the analysis says.
pub fn layers(
    teacher: &Teacher<'_>,
    target: &Target,
    sample: &[(String, Tensor)],
) -> Result<Layers, DistillError> {
    let values: Vec<&Value> = target.operands.iter().map(|o| &o.value).collect();
    let answers = answers(teacher, target, &target.x, &values, sample)?;
    let mut projections = target
        .operands
        .iter()
        .map(|o| layer(target, &o.value, answers.get(&o.value.name), &o.columns));
    let mut next = || {
        projections
            .next()
            .unwrap_or_else(|| Err(target.fault(&target.x.name, "has too few layers")))
    };
    let projections = [next()?, next()?, next()?];
    let Some(value) = &target.out else {
        return Ok(Layers {
            projections,
            out: None,
        });
    };
    let answers = self::answers(teacher, target, &target.merged, &[value], sample)?;
    let mut out = layer(target, value, answers.get(&value.name), &Columns::All)?;
    if let Some(name) = &target.out_bias {
        out.bias = Some(stored(teacher, target, name)?);
    }
    Ok(Layers {
        projections,
        out: Some(out),
    })
}

/// What the nodes between `from` and `to` make of zero (the last row) and of each unit vector.
fn answers(
    teacher: &Teacher<'_>,
    target: &Target,
    from: &Value,
    to: &[&Value],
    sample: &[(String, Tensor)],
) -> Result<HashMap<String, Array2<f32>>, DistillError> {
    let dim = target.shape.dim;
    let fed = teacher.cut(target, &from.name, Whether::Known)?;
    let shape: Option<Vec<usize>> = fed
        .shape
        .iter()
        .flatten()
        .map(|d| usize::try_from(*d).ok())
        .collect();
    let shape = shape
        .filter(|s| !s.is_empty())
        .ok_or_else(|| target.fault(&from.name, "has no known shape"))?;
    let elements: usize = shape.iter().product();
    let batch = elements / (dim * from.all(target.tokens)).max(1);
    let dtype = DType::from_onnx(fed.element.onnx())
        .ok_or_else(|| target.fault(&from.name, "has an element type that is not supported"))?;
    let mut wanted = Vec::new();
    for value in to {
        if !wanted
            .iter()
            .any(|w: &linfusion_runtime::subgraph::Cut| w.name == value.name)
        {
            wanted.push(teacher.cut(target, &value.name, Whether::Open)?);
        }
    }
    let mut session = teacher.part(&[fed], &wanted)?;
    let mut answers: HashMap<String, Array2<f32>> = HashMap::new();
    let rows = (batch * target.tokens).max(1);
    for first in (0..=dim).step_by(rows) {
        let mut units = Array3::<f32>::zeros((batch, target.tokens, dim));
        for row in 0..rows {
            let at = [row / target.tokens, row % target.tokens, first + row];
            if let Some(one) = units.get_mut(at) {
                *one = 1.0;
            }
        }
        let fault = |problem| target.fault(&from.name, problem);
        let tensor = from.tensor(units, &shape).map_err(fault)?;
        let mut inputs = given(&session, sample);
        inputs.retain(|(name, _)| *name != from.name);
        inputs.push((from.name.clone(), Tensor::F32(tensor).cast(dtype)));
        let made = session.run(&inputs)?;
        for value in to {
            let tensor = made.iter().find(|(name, _)| *name == value.name);
            let (_, tensor) = tensor.ok_or_else(|| target.fault(&value.name, "is not computed"))?;
            let matrix = value
                .matrix(tensor, target.tokens)
                .map_err(|problem| target.fault(&value.name, problem))?;
            let width = matrix.shape().get(2).copied().unwrap_or_default();
            let into = answers
                .entry(value.name.clone())
                .or_insert_with(|| Array2::zeros((dim + 1, width)));
            for row in 0..rows.min(dim + 1 - first) {
                for column in 0..width {
                    let found = matrix.get([row / target.tokens, row % target.tokens, column]);
                    if let (Some(to), Some(found)) = (into.get_mut([first + row, column]), found) {
                        *to = *found;
                    }
                }
            }
        }
    }
    Ok(answers)
}

/// The layer whose answers these are.
fn layer(
    target: &Target,
    value: &Value,
    answers: Option<&Array2<f32>>,
    columns: &Columns,
) -> Result<Layer, DistillError> {
    let dim = target.shape.dim;
    let answers = answers.ok_or_else(|| target.fault(&value.name, "is not computed"))?;
    let width = answers.ncols();
    let listed: Vec<usize> = match columns {
        Columns::All => (0..width).collect(),
        Columns::Range { start, len } => (*start..start + len)
            .filter_map(|c| usize::try_from(c).ok())
            .collect(),
        Columns::Listed(list) => list
            .iter()
            .filter_map(|c| usize::try_from(*c).ok())
            .collect(),
    };
    if listed.len() != dim || listed.iter().any(|c| *c >= width) {
        let problem = format!("gives {} of {width} channels, not {dim}", listed.len());
        return Err(target.fault(&value.name, problem));
    }
    let at = |row: usize, column: usize| answers.get([row, column]).copied().unwrap_or(f32::NAN);
    let bias: Vec<f32> = listed.iter().map(|c| at(dim, *c)).collect();
    let weight: Vec<f32> = listed
        .iter()
        .flat_map(|c| (0..dim).map(move |row| at(row, *c) - at(dim, *c)))
        .collect();
    if weight.iter().chain(&bias).any(|v| !v.is_finite()) {
        return Err(target.fault(&value.name, "has weights that are not finite"));
    }
    Ok(Layer {
        weight,
        bias: Some(bias).filter(|b| b.iter().any(|v| *v != 0.0)),
    })
}

/// A stored vector of the model.
fn stored(teacher: &Teacher<'_>, target: &Target, name: &str) -> Result<Vec<f32>, DistillError> {
    let graph = &teacher.file.model.graph;
    let tensor = graph
        .initializer
        .iter()
        .find(|t| t.name.as_deref() == Some(name))
        .ok_or_else(|| target.fault(name, "is not stored in the file"))?;
    let bytes = teacher
        .file
        .tensor_bytes(tensor)
        .map_err(|e| target.fault(name, e.to_string()))?;
    let dtype = tensor.data_type.and_then(DType::from_onnx);
    let values = dtype.and_then(|d| Tensor::from_le_bytes(d, &[target.shape.dim], &bytes));
    match values.map(|v| v.cast(DType::F32)) {
        Some(Tensor::F32(values)) => Ok(values.iter().copied().collect()),
        _ => Err(target.fault(name, format!("is no vector of {}", target.shape.dim))),
    }
}
