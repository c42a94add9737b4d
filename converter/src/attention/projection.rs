//! Linear layers: products of an activation with a constant weight, in every
//! form that exporters, optimizers and quantizers give them.

use std::collections::HashSet;

use linfusion_models::onnx::proto::NodeProto;

use crate::graph::{Graph, NodeId, domain, input, op};
use crate::shapes::Shapes;

/// A linear layer and the activation it reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear<'m> {
    /// The product's node.
    pub node: NodeId,
    /// The activation.
    pub source: &'m str,
    /// Which input of the node the activation is.
    pub slot: usize,
}

/// The linear layer at `node`, if it is one.
#[must_use]
pub fn linear<'m>(graph: &Graph<'m>, shapes: &Shapes, node: NodeId) -> Option<Linear<'m>> {
    let proto = graph.node(node);
    let (a, b) = match (domain(proto), op(proto)) {
        ("", "MatMul" | "Gemm" | "Conv" | "MatMulInteger" | "ConvInteger" | "Einsum") => (0, 1),
        (
            "com.microsoft",
            "FusedMatMul"
            | "TransposeMatMul"
            | "FusedGemm"
            | "FusedConv"
            | "MatMulNBits"
            | "MatMulBnb4"
            | "NhwcConv"
            | "MatMulIntegerToFloat"
            | "DynamicQuantizeMatMul"
            | "GemmFastGelu",
        )
        | ("com.microsoft.nchwc", "Conv") => (0, 1),
        ("", "QLinearMatMul" | "QLinearConv") | ("com.microsoft", "QGemm") => (0, 3),
        _ => return None,
    };
    let (va, vb) = (input(proto, a)?, input(proto, b)?);
    let weight = |v: &str| {
        let f = shapes.fact(v);
        f.constant && f.shape.as_ref().is_some_and(|s| s.len() >= 2)
    };
    match (weight(va), weight(vb)) {
        (false, true) => Some(Linear {
            node,
            source: va,
            slot: a,
        }),
        (true, false) if matches!(op(proto), "MatMul" | "Einsum") => Some(Linear {
            node,
            source: vb,
            slot: b,
        }),
        _ => None,
    }
}

/// What lies above an operand of an attention.
#[derive(Clone, Debug, Default)]
pub struct Roots<'m> {
    /// The linear layers that make the operand, nearest first.
    pub linears: Vec<Linear<'m>>,
    /// Whether token sequences are joined between them and the operand.
    pub joins_tokens: bool,
}

/// How far above an operand its linear layers may lie: rotary embeddings and
/// decomposed norms take some dozens of nodes, a whole block hundreds.
const REACH: usize = 400;

/// Follows the data (not the shape arithmetic) up from `value` to the nearest
/// linear layers.
#[must_use]
pub fn roots<'m>(graph: &Graph<'m>, shapes: &Shapes, value: &'m str) -> Roots<'m> {
    let mut roots = Roots::default();
    let mut seen = HashSet::new();
    let mut queue = std::collections::VecDeque::from([value]);
    while let Some(value) = queue.pop_front() {
        let fact = shapes.fact(value);
        // A one-element value is a scale or zero point, not data.
        if !seen.insert(value) || seen.len() > REACH || fact.constant || fact.count() == Some(1) {
            continue;
        }
        let Some(port) = graph.producer(value) else {
            continue;
        };
        if let Some(linear) = linear(graph, shapes, port.node) {
            if !roots.linears.iter().any(|l| l.node == port.node) {
                roots.linears.push(linear);
            }
            continue;
        }
        let node = graph.node(port.node);
        if super::core::is_anchor(node) || matches!(op(node), "Shape" | "Size") {
            continue;
        }
        if op(node) == "Concat" {
            let big = node
                .input
                .iter()
                .filter(|i| !shapes.fact(i).constant)
                .count();
            let rank = shapes.shape(value).map_or(0, <[i64]>::len);
            roots.joins_tokens |= big >= 2 && joins_on_tokens(node, rank);
        }
        queue.extend(data_inputs(node));
    }
    roots
}

/// A Concat on the last axis joins channels (rotary halves), not tokens.
fn joins_on_tokens(node: &NodeProto, rank: usize) -> bool {
    let axis = crate::graph::attr_int(node, "axis").unwrap_or(-1);
    rank >= 3 && axis != -1 && axis != rank as i64 - 1
}

/// The inputs that carry data, not sizes or indices.
pub(super) fn data_inputs(node: &NodeProto) -> Vec<&str> {
    let only_first = matches!(
        op(node),
        "Reshape"
            | "Expand"
            | "Tile"
            | "Slice"
            | "Gather"
            | "Split"
            | "Squeeze"
            | "Unsqueeze"
            | "Resize"
            | "Pad"
            | "QuantizeLinear"
            | "DequantizeLinear"
            | "DynamicQuantizeLinear"
            | "ReduceMean"
            | "ReduceSum"
            | "GatherND"
            | "GatherElements"
    );
    let inputs = node
        .input
        .iter()
        .map(String::as_str)
        .filter(|i| !i.is_empty());
    match op(node) {
        _ if only_first => inputs.take(1).collect(),
        "Where" => inputs.skip(1).collect(),
        _ => inputs.collect(),
    }
}

/// The tensor that `value` is a copy of: looks through casts, quantization and
/// changes of rank.
#[must_use]
pub fn canonical<'m>(graph: &Graph<'m>, value: &'m str) -> &'m str {
    let mut value = value;
    for _ in 0..32 {
        let Some(port) = graph.producer(value) else {
            break;
        };
        let node = graph.node(port.node);
        let through = port.slot == 0
            && matches!(
                op(node),
                "Identity"
                    | "Cast"
                    | "Reshape"
                    | "Squeeze"
                    | "Unsqueeze"
                    | "Flatten"
                    | "Transpose"
                    | "QuantizeLinear"
                    | "DequantizeLinear"
                    | "DynamicQuantizeLinear"
                    | "Dropout"
                    | "ReorderInput"
                    | "ReorderOutput"
            );
        match input(node, 0) {
            Some(above) if through => value = above,
            _ => break,
        }
    }
    value
}
