//! What is added to scores, or hides keys.

use linfusion_models::onnx::proto::NodeProto;

use crate::graph::{Graph, input, op};
use crate::shapes::eval::element::BOOL;
use crate::shapes::{Elements, Shapes};

/// Whether a value is zero everywhere: a stored tensor of zeros, or anything
/// times zero (what is left of `baddbmm` with beta 0).
pub(super) fn is_zero(graph: &Graph<'_>, shapes: &Shapes, value: &str) -> bool {
    if shapes.is_default(value) {
        return false;
    }
    let fact = shapes.fact(value);
    if let Some(e) = &fact.elements {
        return (0..e.len()).all(|i| e.float(i) == Some(0.0));
    }
    if let Some(t) = graph.constant(value) {
        let typed = t.float_data.iter().all(|&x| x == 0.0)
            && t.double_data.iter().all(|&x| x == 0.0)
            && t.int32_data.iter().all(|&x| x == 0)
            && t.int64_data.iter().all(|&x| x == 0);
        let stored_inline = t.external_data.is_empty();
        return stored_inline
            && typed
            && t.raw_data
                .as_deref()
                .is_none_or(|b| b.iter().all(|&x| x == 0));
    }
    let Some(port) = graph.producer(value) else {
        return false;
    };
    let node = graph.node(port.node);
    match op(node) {
        "Mul" => node.input.iter().any(|i| is_zero(graph, shapes, i)),
        "ConstantOfShape" => crate::graph::attribute(node, "value")
            .and_then(|a| a.t.as_option())
            .is_none_or(|t| {
                t.raw_data
                    .as_deref()
                    .is_some_and(|b| b.iter().all(|&x| x == 0))
            }),
        "Cast" | "Identity" | "Expand" | "Reshape" | "Unsqueeze" | "Tile" => {
            input(node, 0).is_some_and(|i| is_zero(graph, shapes, i))
        }
        _ => false,
    }
}

/// Whether a mask hides nothing: zeros to be added, or truth.
pub(super) fn lets_all_through(graph: &Graph<'_>, shapes: &Shapes, mask: &str) -> bool {
    let fact = shapes.fact(mask);
    if fact.element == Some(BOOL) {
        let all = |e: &Elements| (0..e.len()).all(|i| e.float(i) == Some(1.0));
        return !shapes.is_default(mask) && fact.elements.as_ref().is_some_and(all);
    }
    is_zero(graph, shapes, mask)
}

/// The first of these inputs that a node has, by what it is.
pub(super) fn named_mask(node: &NodeProto, slots: &[(usize, &str)]) -> Option<String> {
    slots
        .iter()
        .find_map(|&(slot, what)| input(node, slot).map(|v| format!("{what} '{v}'")))
}
