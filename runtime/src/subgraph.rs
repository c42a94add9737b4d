//! Parts of a graph: what leads from some of its values to others.

use std::collections::{HashMap, HashSet};

use linfusion_models::graph::{domain, op, reads, tensor_name};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use linfusion_models::onnx::{ElementType, OnnxFile, is_external, make};
use linfusion_models::shapes::Shapes;

use crate::engine::{Engine, EngineError, Session, SessionOptions};
use crate::tensor::{DType, Tensor};

/// A value at which a part of a graph begins or ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its shape, where a part begins; ONNX Runtime takes no input of unknown rank.
    pub shape: Option<Vec<i64>>,
}

/// Why a part cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// A stored tensor cannot be read.
    #[error("{path}: tensor `{tensor}`: {problem}")]
    Weight {
        /// The model.
        path: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The engine refuses the part, or fails.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// The nodes of `file`'s graph that lead from its inputs, and from the values `fed`, to the values `wanted`. Inputs that the part
/// doesn't need are left out; weights stay where they are stored.
pub fn part(file: &OnnxFile, fed: &[Cut], wanted: &[Cut]) -> ModelProto {
    let graph = &*file.model.graph;
    let makers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(i, n)| n.output.iter().map(move |o| (o.as_str(), i)))
        .collect();
    let is_fed: HashSet<&str> = fed.iter().map(|f| f.name.as_str()).collect();
    let mut nodes = HashSet::new();
    let mut needed: HashSet<&str> = HashSet::new();
    let mut queue: Vec<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
    while let Some(value) = queue.pop() {
        if value.is_empty() || !needed.insert(value) || is_fed.contains(value) {
            continue;
        }
        if let Some(node) = makers.get(value).filter(|i| nodes.insert(**i))
            && let Some(node) = graph.node.get(*node)
        {
            queue.extend(reads(node));
        }
    }
    let declared = |cut: &Cut| {
        let dims = cut.shape.as_ref().map(|dims| {
            let fixed = dims.iter().map(|d| make::Dim::Fixed(*d));
            fixed.collect::<Vec<_>>()
        });
        ValueInfoProto {
            name: Some(cut.name.clone()),
            r#type: buffa::MessageField::some(make::tensor_type(cut.element, dims.as_deref())),
            ..Default::default()
        }
    };
    let mut node: Vec<NodeProto> = Vec::with_capacity(nodes.len());
    for (index, original) in graph.node.iter().enumerate() {
        if nodes.contains(&index) {
            node.push(original.clone());
        }
    }
    let inputs = graph.input.iter().filter(|v| {
        let name = v.name.as_deref().unwrap_or("");
        needed.contains(name) && !is_fed.contains(name)
    });
    let used_fed = fed.iter().filter(|f| needed.contains(f.name.as_str()));
    let sub = GraphProto {
        name: Some("part".to_owned()),
        node,
        initializer: graph
            .initializer
            .iter()
            .filter(|t| needed.contains(tensor_name(t)) && !is_fed.contains(tensor_name(t)))
            .cloned()
            .collect(),
        input: inputs.cloned().chain(used_fed.map(declared)).collect(),
        output: wanted.iter().map(declared).collect(),
        ..GraphProto::default()
    };
    ModelProto {
        ir_version: file.model.ir_version,
        opset_import: file.model.opset_import.clone(),
        functions: file.model.functions.clone(),
        graph: buffa::MessageField::some(sub),
        ..ModelProto::default()
    }
}

/// Loads a part of `file` that [`part`] cut out. Weights in data files are given to ONNX Runtime from memory.
///
/// # Errors
/// A weight cannot be read, or the engine refuses the part.
pub fn load(
    file: &OnnxFile,
    mut part: ModelProto,
    engine: Engine,
    options: &SessionOptions,
) -> Result<Session, PartError> {
    let mut weights = Vec::new();
    for tensor in &mut part.graph.get_or_insert_default().initializer {
        if !is_external(tensor) {
            continue;
        }
        let failed = |problem: String| PartError::Weight {
            path: file.path().display().to_string(),
            tensor: tensor_name(tensor).to_owned(),
            problem,
        };
        let bytes = file
            .tensor_bytes(tensor)
            .map_err(|e| failed(e.to_string()))?;
        let dims: Option<Vec<usize>> = tensor
            .dims
            .iter()
            .map(|d| usize::try_from(*d).ok())
            .collect();
        let dtype = tensor.data_type.and_then(DType::from_onnx);
        let value = dtype
            .zip(dims)
            .and_then(|(dtype, dims)| Tensor::from_le_bytes(dtype, &dims, &bytes));
        match value {
            Some(value) if engine == Engine::Ort => {
                weights.push((tensor_name(tensor).to_owned(), value));
            }
            // Types that no tensor here has, such as 4-bit integers, are small.
            _ => {
                tensor.raw_data = Some(bytes);
                tensor.external_data.clear();
                tensor.data_location = None;
            }
        }
    }
    let bytes = buffa::Message::encode_to_vec(&part);
    Ok(Session::from_parts(engine, &bytes, weights, options)?)
}

/// Shapes of all values of `file`'s graph for these inputs.
pub fn shapes(file: &OnnxFile, inputs: &[(String, Tensor)]) -> Shapes {
    let sizes: Vec<(&str, Vec<i64>)> = inputs
        .iter()
        .map(|(name, tensor)| {
            let dims = tensor.shape().iter().map(|d| *d as i64);
            (name.as_str(), dims.collect())
        })
        .collect();
    let given: Vec<(&str, &[i64])> = sizes.iter().map(|(n, s)| (*n, s.as_slice())).collect();
    Shapes::at(&file.model, &|t| file.tensor_bytes(t).ok(), &given)
}

/// What a node is called in messages: its name, and the operator.
pub fn title(node: &NodeProto) -> String {
    let kind = match domain(node) {
        "" => op(node).to_owned(),
        domain => format!("{domain}::{}", op(node)),
    };
    match node.name.as_deref().filter(|n| !n.is_empty()) {
        Some(name) => format!("`{name}` ({kind})"),
        None => format!(
            "{kind} that makes `{}`",
            node.output.first().map_or("", String::as_str)
        ),
    }
}
