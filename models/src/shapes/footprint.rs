//! How much memory a graph takes at given sizes: its weights, and the most that its values take at once.
//!
//! Counted as ONNX Runtime runs a graph: node after node in order, a value freed after its last reader, reshapes
//! without a copy, elementwise results in place of an operand that nobody reads afterwards. Scratch memory within an operator
//! is not counted, but for the attention operators, whose scores are as large as a value.

use std::collections::{HashMap, HashSet};

use crate::graph::{attr_int, domain, op, reads};
use crate::onnx::proto::{ModelProto, NodeProto, TensorProto};
use crate::onnx::{ElementType, is_external};

use super::{Fact, Shapes, execution_order};

/// What runs a graph, as far as it decides what that takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runner {
    /// Whether model-local functions of the LinFusion operators are run by kernels, which keep nothing of size; else their
    /// bodies count.
    pub kernels: bool,
    /// What becomes of float16.
    pub halves: Halves,
}

/// How numbers of float16 are computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// As they are.
    Kept,
    /// As float32, with casts around: values take what they take in float32, and of weights there are both. ONNX Runtime's CPU
    /// provider does so, which has hardly an operator for float16.
    Widened,
}

/// What a graph takes at given sizes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of stored tensors, while they are loaded.
    pub weights: u64,
    /// Bytes of values, where they are most.
    pub values: u64,
    /// Name of the node during which they are; empty if it has none.
    pub node: String,
    /// Values whose size the graph does not tell, and which count nothing.
    pub unknown: usize,
}

impl Footprint {
    /// Weights and values.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.values)
    }

    /// Counts `model` at the sizes of `shapes`.
    #[must_use]
    pub fn of(model: &ModelProto, shapes: &Shapes, runner: Runner) -> Self {
        let graph = &*model.graph;
        let widened =
            |element: i32| runner.halves == Halves::Widened && element == ElementType::F16.onnx();
        let weights = graph
            .initializer
            .iter()
            .filter_map(|t| weight(t, runner.halves));
        let weights = weights.fold(0_u64, u64::saturating_add);
        let order = execution_order(graph);
        let nodes: Vec<&NodeProto> = order.iter().filter_map(|&i| graph.node.get(i)).collect();
        let outputs = graph.output.iter().filter_map(|o| o.name.as_deref());
        let fact = |name: &str| {
            let mut fact = shapes.fact(name).clone();
            if fact.element.is_some_and(widened) {
                fact.element = Some(ElementType::F32.onnx());
            }
            fact
        };
        let inside = |node: &NodeProto| match runner.kernels && domain(node) == KERNELS {
            true => 0,
            false => {
                let takes_halves = node.input.iter().any(|name| {
                    let element = shapes.fact(name).element;
                    element.is_some_and(widened)
                });
                (shapes.inside(node)).saturating_mul(if takes_halves { 2 } else { 1 })
            }
        };
        let given = graph.input.iter().filter_map(|v| v.name.as_deref());
        let peak = peak(&nodes, given, outputs, &fact, &inside);
        Self {
            weights,
            values: peak.bytes,
            node: peak.node,
            unknown: peak.unknown,
        }
    }
}

/// Bytes that a stored tensor takes while a model is loaded, where they are most. Measured with ONNX Runtime 1.20, 1.24 and 1.32 on
/// ten matrices of 8 Mi numbers: float32 in a data file takes what is stored; in the model's own file, which 1.20 holds until all
/// tensors are made of it, twice that. Float16 that is widened takes 2.4 to 3.2 times what is stored in either: the tensor, and
/// one of float32; counted as 3.25 times.
fn weight(tensor: &TensorProto, halves: Halves) -> Option<u64> {
    let element = tensor.data_type?;
    let stored = bytes(&tensor.dims, element)?;
    let quarters = match halves {
        Halves::Widened if element == ElementType::F16.onnx() => 13,
        _ if tensor.raw_data.is_some() && !is_external(tensor) => 8,
        _ => 4,
    };
    Some(stored.saturating_mul(quarters).div_ceil(4))
}

/// The domain of operators that this project has kernels for.
const KERNELS: &str = "ai.linfusion";

pub(super) struct Peak {
    pub bytes: u64,
    node: String,
    unknown: usize,
}

/// The most that the values of `nodes`, in order, take at once. `inside` is what a node takes while it runs.
pub(super) fn peak<'n>(
    nodes: &[&'n NodeProto],
    inputs: impl Iterator<Item = &'n str>,
    outputs: impl Iterator<Item = &'n str>,
    fact: &dyn Fn(&str) -> Fact,
    inside: &dyn Fn(&NodeProto) -> u64,
) -> Peak {
    let kept: HashSet<&str> = outputs.collect();
    let mut bases: HashMap<&str, &str> = HashMap::new();
    let mut last: HashMap<&str, usize> = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        if let (Some(from), Some(to), true) = (node.input.first(), node.output.first(), moves(node))
        {
            let base = bases.get(from.as_str()).copied().unwrap_or(from);
            bases.insert(to, base);
        }
        for name in reads(node) {
            let base = bases.get(name).copied().unwrap_or(name);
            last.insert(base, index);
        }
    }
    for name in &kept {
        let base = bases.get(name).copied().unwrap_or(name);
        last.insert(base, usize::MAX);
    }
    let mut unknown = 0;
    let mut size = |name: &str| {
        let fact = fact(name);
        if fact.constant {
            return 0;
        }
        let known = fact.shape.as_deref().zip(fact.element);
        known.and_then(|(s, e)| bytes(s, e)).unwrap_or_else(|| {
            unknown += 1;
            0
        })
    };
    let mut live: HashMap<&str, u64> = inputs.map(|name| (name, size(name))).collect();
    let mut sum: u64 = live.values().sum();
    let (mut most, mut place) = (sum, String::new());
    for (index, node) in nodes.iter().enumerate() {
        let base = |name: &'n str| bases.get(name).copied().unwrap_or(name);
        let dies = |name: &str| last.get(name).is_none_or(|l| *l <= index);
        for output in node.output.iter().map(String::as_str) {
            if output.is_empty() || base(output) != output {
                continue;
            }
            let bytes = size(output);
            let over = node.input.iter().map(|i| base(i)).find(|i| {
                in_place(node) && dies(i) && live.get(i).is_some_and(|b| *b == bytes && bytes > 0)
            });
            if let Some(over) = over {
                live.remove(over);
            } else {
                sum = sum.saturating_add(bytes);
            }
            live.insert(output, bytes);
        }
        let now = sum
            .saturating_add(inside(node))
            .saturating_add(scratch(node, fact));
        if now > most {
            most = now;
            place = node.name.clone().unwrap_or_default();
        }
        for name in reads(node).chain(node.output.iter().map(String::as_str)) {
            let name = base(name);
            if dies(name)
                && let Some(bytes) = live.remove(name)
            {
                sum -= bytes;
            }
        }
    }
    Peak {
        bytes: most,
        node: place,
        unknown,
    }
}

fn bytes(shape: &[i64], element: i32) -> Option<u64> {
    let bytes = ElementType::from_onnx(element)?.byte_len(shape).ok()??;
    u64::try_from(bytes).ok()
}

/// Nodes whose output is their input's memory.
fn moves(node: &NodeProto) -> bool {
    domain(node).is_empty()
        && matches!(
            op(node),
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Identity" | "Dropout"
        )
}

/// Nodes that may write over an operand.
fn in_place(node: &NodeProto) -> bool {
    matches!(
        op(node),
        "Add"
            | "Sub"
            | "Mul"
            | "Div"
            | "Pow"
            | "Sqrt"
            | "Neg"
            | "Exp"
            | "Erf"
            | "Sigmoid"
            | "Tanh"
            | "Relu"
            | "LeakyRelu"
            | "Elu"
            | "Clip"
            | "QuickGelu"
    )
}

/// Scores of the operators that are a whole attention: [batch, heads, queries, keys].
fn scratch(node: &NodeProto, fact: &dyn Fn(&str) -> Fact) -> u64 {
    if !matches!(op(node), "MultiHeadAttention" | "Attention") || domain(node) == KERNELS {
        return 0;
    }
    let shape = |i: usize| {
        let name = node.input.get(i).filter(|n| !n.is_empty())?;
        Some(fact(name))
    };
    let heads = attr_int(node, "num_heads").or(attr_int(node, "q_num_heads"));
    let Some((query, shape_q)) = shape(0).and_then(|f| Some((f.element?, f.shape?))) else {
        return 0;
    };
    let key = shape(1)
        .and_then(|f| f.shape)
        .filter(|_| op(node) == "MultiHeadAttention" || domain(node).is_empty());
    let tokens = |s: &[i64]| s.get(s.len().checked_sub(2)?).copied();
    let heads = heads.or_else(|| shape_q.get(1).copied().filter(|_| shape_q.len() == 4));
    let dims = [
        shape_q.first().copied(),
        heads,
        tokens(&shape_q),
        key.as_deref().map_or(tokens(&shape_q), tokens),
    ];
    let dims: Option<Vec<i64>> = dims.into_iter().collect();
    dims.and_then(|d| bytes(&d, query)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::GraphProto;
    use crate::onnx::{ElementType, make};

    fn graph(element: ElementType, nodes: Vec<NodeProto>, output: &str) -> ModelProto {
        let x = make::value_info(
            "x",
            element,
            &[make::Dim::Named("n".into()), make::Dim::Fixed(10)],
        );
        let y = make::value_info(
            output,
            element,
            &[make::Dim::Named("n".into()), make::Dim::Fixed(10)],
        );
        let weight = TensorProto {
            name: Some("w".to_owned()),
            dims: vec![10, 10],
            data_type: Some(element.onnx()),
            ..TensorProto::default()
        };
        let graph = GraphProto {
            node: nodes,
            input: vec![x],
            output: vec![y],
            initializer: vec![weight],
            ..GraphProto::default()
        };
        ModelProto {
            graph: buffa::MessageField::some(graph),
            opset_import: vec![crate::onnx::proto::OperatorSetIdProto {
                version: Some(17),
                ..Default::default()
            }],
            ..ModelProto::default()
        }
    }

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            name: Some(format!("make {output}")),
            op_type: Some(op.to_owned()),
            input: inputs.iter().map(|s| (*s).to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        }
    }

    fn count(nodes: Vec<NodeProto>, output: &str) -> Footprint {
        count_of(ElementType::F32, Halves::Kept, nodes, output)
    }

    fn count_of(
        element: ElementType,
        halves: Halves,
        nodes: Vec<NodeProto>,
        output: &str,
    ) -> Footprint {
        let read = |_: &TensorProto| None;
        let model = graph(element, nodes, output);
        let shapes = Shapes::at(&model, &read, &[("x", &[100, 10])]);
        let runner = Runner {
            kernels: true,
            halves,
        };
        Footprint::of(&model, &shapes, runner)
    }

    #[test]
    fn halves_that_are_widened_take_what_singles_do() {
        let found = |element, halves| {
            let nodes = vec![
                node("MatMul", &["x", "w"], "a"),
                node("MatMul", &["a", "w"], "y"),
            ];
            let found = count_of(element, halves, nodes, "y");
            (found.weights, found.values)
        };
        assert_eq!(found(ElementType::F32, Halves::Kept), (400, 8000));
        assert_eq!(found(ElementType::F32, Halves::Widened), (400, 8000));
        assert_eq!(found(ElementType::F16, Halves::Kept), (200, 4000));
        assert_eq!(found(ElementType::F16, Halves::Widened), (650, 8000));
    }

    #[test]
    fn weights_of_the_models_own_file_are_there_twice_and_widened_ones_not_more_often() {
        let stored = |element: ElementType, inline: bool, halves| {
            let tensor = TensorProto {
                dims: vec![10, 10],
                data_type: Some(element.onnx()),
                raw_data: inline.then(|| vec![0; 400].into()),
                ..TensorProto::default()
            };
            weight(&tensor, halves)
        };
        for (element, inline, halves, expected) in [
            (ElementType::F32, false, Halves::Widened, 400),
            (ElementType::F32, true, Halves::Widened, 800),
            (ElementType::F16, false, Halves::Kept, 200),
            (ElementType::F16, true, Halves::Kept, 400),
            (ElementType::F16, false, Halves::Widened, 650),
            (ElementType::F16, true, Halves::Widened, 650),
        ] {
            let found = stored(element, inline, halves);
            assert_eq!(found, Some(expected), "{element:?} {inline} {halves:?}");
        }
    }

    #[test]
    fn values_live_until_their_last_reader() {
        // 4,000 bytes each: x, a and b live together, then b alone with y.
        let chain = vec![
            node("MatMul", &["x", "w"], "a"),
            node("MatMul", &["a", "w"], "b"),
            node("MatMul", &["b", "w"], "y"),
        ];
        let found = count(chain, "y");
        assert_eq!((found.weights, found.values, found.unknown), (400, 8000, 0));
        let kept = vec![
            node("MatMul", &["x", "w"], "a"),
            node("MatMul", &["a", "w"], "b"),
            node("Concat2", &["x", "a"], "unknown"),
            node("Add", &["b", "a"], "y"),
        ];
        let found = count(kept, "y");
        // x, a and b; the sum is written over b or a.
        assert_eq!(
            (found.values, found.node.as_str(), found.unknown),
            (12000, "make b", 1)
        );
    }

    #[test]
    fn elementwise_nodes_reuse_what_nobody_reads_again() {
        let nodes = |last: &str| {
            vec![
                node("MatMul", &["x", "w"], "a"),
                node("Sigmoid", &["a"], "b"),
                node("Mul", &["b", last], "y"),
            ]
        };
        assert_eq!(count(nodes("b"), "y").values, 8000);
        // SiLU: a is needed again.
        assert_eq!(count(nodes("a"), "y").values, 8000);
        assert_eq!(count(nodes("x"), "y").values, 8000);
    }
}
