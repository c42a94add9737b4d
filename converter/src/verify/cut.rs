//! Cutting a site out of a model, to be run alone.

use std::collections::{HashMap, HashSet};

use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, ValueInfoProto};
use linfusion_models::onnx::{ElementType, OnnxFile, is_external, make};
use linfusion_models::random::SplitMix64;
use linfusion_runtime::tensor::{DType, Tensor};
use ndarray::{ArrayD, IxDyn};

use super::Converted;
use crate::graph::reads;
use crate::grid::GridSize;
use crate::rewrite::site::LinearPart;
use crate::rewrite::window::{Mixed, WindowPart};

/// A value that a site is cut off at, and what it is fed there.
#[derive(Clone, Debug, PartialEq)]
pub struct CutInput {
    /// The value.
    pub name: String,
    /// What it is fed.
    pub feed: Feed,
}

/// What a cut value is fed.
#[derive(Clone, Debug, PartialEq)]
pub enum Feed {
    /// Noise.
    Noise {
        /// Shape.
        shape: Vec<i64>,
        /// Element type.
        element: ElementType,
    },
    /// Rows and columns, as int64 `[2]`.
    Grid(GridSize),
}

impl CutInput {
    pub(super) fn elements(&self) -> i64 {
        match &self.feed {
            Feed::Noise { shape, .. } => shape.iter().product(),
            Feed::Grid(_) => 2,
        }
    }

    pub(super) fn tensor(&self, seed: u64) -> Option<Tensor> {
        match &self.feed {
            Feed::Grid(size) => Some(Tensor::I64(
                ndarray::arr1(&[size.rows, size.cols]).into_dyn(),
            )),
            Feed::Noise { shape, element } => {
                let shape: Option<Vec<usize>> =
                    shape.iter().map(|&d| usize::try_from(d).ok()).collect();
                let dtype = DType::from_onnx(element.onnx())?;
                Some(Tensor::from_f64(noise(&shape?, seed), dtype))
            }
        }
    }

    fn declared(&self) -> ValueInfoProto {
        let (shape, element) = match &self.feed {
            Feed::Noise { shape, element } => (shape.clone(), *element),
            Feed::Grid(_) => (vec![2], ElementType::I64),
        };
        let dims: Vec<make::Dim> = shape.into_iter().map(make::Dim::Fixed).collect();
        make::value_info(&self.name, element, &dims)
    }
}

/// The model of one site: from x to its operands and result.
pub(super) fn cut(file: &OnnxFile, site: &Converted) -> Result<ModelProto, String> {
    let graph = &*file.model.graph;
    let producers: HashMap<&str, usize> = graph
        .node
        .iter()
        .enumerate()
        .flat_map(|(i, n)| n.output.iter().map(move |o| (o.as_str(), i)))
        .collect();
    let stored: HashMap<&str, usize> = graph
        .initializer
        .iter()
        .enumerate()
        .filter_map(|(i, t)| Some((t.name.as_deref()?, i)))
        .collect();
    let given: HashSet<&str> = graph
        .input
        .iter()
        .filter_map(|v| v.name.as_deref())
        .collect();
    let mut nodes = HashSet::new();
    let mut weights = HashSet::new();
    let mut wanted: Vec<&str> = vec![&site.target];
    if let Some(linear) = &site.linear {
        let LinearPart {
            tokens,
            attended,
            qkv,
            projected,
            ..
        } = linear;
        wanted.extend(qkv.iter().chain([tokens, attended]).map(String::as_str));
        wanted.extend(projected.iter().map(|(value, _)| value.as_str()));
    }
    if let Some(window) = &site.window {
        let WindowPart {
            attended,
            qkv,
            mixed,
            ..
        } = window;
        wanted.extend(qkv.iter().chain([attended]).map(String::as_str));
        if let Some(Mixed {
            window,
            linear,
            value,
            ..
        }) = mixed
        {
            wanted.extend([window.as_str(), linear, value]);
        }
    }
    let is_fed = |value: &str| site.inputs.iter().any(|i| i.name == value);
    let mut queue = wanted.clone();
    while let Some(value) = queue.pop() {
        if is_fed(value) || value.is_empty() {
            continue;
        }
        if let Some(&i) = producers.get(value) {
            if nodes.insert(i) {
                // What the body of a loop or branch makes itself is none of the graph's.
                queue.extend(reads(&graph.node[i]).filter(|name| {
                    producers.contains_key(name)
                        || stored.contains_key(name)
                        || given.contains(name)
                }));
            }
        } else if let Some(&i) = stored.get(value) {
            weights.insert(i);
        } else {
            return Err(format!("it also reads the graph input '{value}'"));
        }
        if nodes.len() > 400 {
            return Err("it reaches far beyond its own nodes".to_owned());
        }
    }
    let sorted = |set: HashSet<usize>| {
        let mut v: Vec<usize> = set.into_iter().collect();
        v.sort_unstable();
        v
    };
    let node: Vec<NodeProto> = sorted(nodes)
        .into_iter()
        .map(|i| graph.node[i].clone())
        .collect();
    let mut initializer = Vec::new();
    for i in sorted(weights) {
        let mut tensor = graph.initializer[i].clone();
        if is_external(&tensor) {
            tensor.raw_data = Some(file.tensor_bytes(&tensor).map_err(|e| e.to_string())?);
            tensor.external_data.clear();
            tensor.data_location = None;
        }
        initializer.push(tensor);
    }
    let output = |name: &str| ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: buffa::MessageField::some(make::tensor_type(site.element, None)),
        ..Default::default()
    };
    let mut outputs: Vec<&str> = wanted;
    outputs.sort_unstable();
    outputs.dedup();
    outputs.retain(|o| !is_fed(o));

    let sub = GraphProto {
        name: Some("site".to_owned()),
        node,
        initializer,
        input: site.inputs.iter().map(CutInput::declared).collect(),
        output: outputs.into_iter().map(output).collect(),
        ..GraphProto::default()
    };
    Ok(ModelProto {
        ir_version: file.model.ir_version,
        opset_import: file.model.opset_import.clone(),
        functions: file.model.functions.clone(),
        graph: buffa::MessageField::some(sub),
        ..ModelProto::default()
    })
}

/// Noise in −2 … 2, the same at every run.
fn noise(shape: &[usize], seed: u64) -> ArrayD<f64> {
    let mut random = SplitMix64::new(seed);
    ArrayD::from_shape_simple_fn(IxDyn(shape), || 2.0 * random.symmetric())
}
