//! The parameters of linear layers around an attention, where a checkpoint brings others.

use std::collections::{HashSet, VecDeque};

use super::layout::Move;
use super::plain::{Layout, Matrix, bias_slot, whole_layer};
use super::projection::{Linear, linear};
use crate::graph::{Graph, NodeId, attr_float, attr_int, domain, input, label, op, qualified_op};
use crate::shapes::Shapes;

/// An input of a node.
pub type Slot = (NodeId, usize);

/// Where a linear layer has its parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Its weight.
    pub weight: Slot,
    /// Whether the weight is `[out, in]`, as PyTorch has it, and not `[in, out]`.
    pub out_first: bool,
    /// Channels out and in.
    pub channels: [i64; 2],
    /// Its bias, where it has one of its own.
    pub bias: Option<Slot>,
}

/// The parameters of `layer`.
///
/// # Errors
/// One sentence on why they cannot be replaced by others: the layer is quantized or a
/// convolution, or its weight stands in another order.
pub fn parameters(
    graph: &Graph<'_>,
    shapes: &Shapes,
    layer: Linear<'_>,
) -> Result<Parameters, String> {
    let node = graph.node(layer.node);
    let plain = |name: &str| attr_float(node, name).is_none_or(|v| v == 1.0);
    let turned = |name: &str| attr_int(node, name).unwrap_or(0) != 0;
    let out_first = match (domain(node), op(node)) {
        ("", "MatMul") if layer.slot == 0 => false,
        ("", "Gemm") if !turned("transA") && plain("alpha") && plain("beta") => turned("transB"),
        _ => {
            return Err(format!(
                "the weight of {} '{}' cannot be replaced by another",
                qualified_op(node),
                label(node)
            ));
        }
    };
    let dims = input(node, 1).and_then(|w| shapes.shape(w)).unwrap_or(&[]);
    let &[a, b] = dims else {
        return Err(format!(
            "the weight of '{}' has shape {dims:?}, not two axes",
            label(node)
        ));
    };
    let bias = whole_layer(graph, shapes, layer.node, &Layout::Tokens).and_then(|whole| {
        let own = bias_slot(node).filter(|&slot| input(node, slot).is_some());
        let added = || {
            let add = graph.producer(whole.result)?.node;
            let constant = |v: &String| shapes.fact(v).constant;
            let slot = graph.node(add).input.iter().position(constant)?;
            (add != layer.node).then_some((add, slot))
        };
        let free = whole.obstacle.is_none();
        own.map(|slot| (layer.node, slot))
            .or(whole.later_bias)
            .or_else(|| if free { added() } else { None })
    });
    Ok(Parameters {
        weight: (layer.node, 1),
        out_first,
        channels: if out_first { [a, b] } else { [b, a] },
        bias,
    })
}

/// The linear layer over `rows` tokens that reads the attention's output, or these tokens
/// of it.
///
/// # Errors
/// One sentence: there is none, or there are several.
pub fn out_layer<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    merged: &'m str,
    batch: i64,
    rows: i64,
) -> Result<Linear<'m>, String> {
    let matrix = Matrix {
        batch,
        tokens: rows,
        heads: 0,
    };
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    let mut queue = VecDeque::from([merged]);
    while let Some(value) = queue.pop_front() {
        if !seen.insert(value) {
            continue;
        }
        for reader in graph.readers(value) {
            if let Some(layer) = linear(graph, shapes, reader.node) {
                let shape = shapes.shape(layer.source).unwrap_or(&[]);
                if layer.source == value && matrix.layout(shape, false).is_some() {
                    found.push(layer);
                }
                continue;
            }
            if reader.slot != 0 {
                continue;
            }
            for (i, output) in graph.node(reader.node).output.iter().enumerate() {
                if Move::of(graph, shapes, reader.node, i).is_some() {
                    queue.push_back(output);
                }
            }
        }
    }
    match found[..] {
        [layer] => Ok(layer),
        [] => Err(format!(
            "no linear layer of its own reads the {rows} tokens of the attention's output '{merged}'"
        )),
        _ => Err(format!(
            "several linear layers read the attention's output '{merged}'"
        )),
    }
}
