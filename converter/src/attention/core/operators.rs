//! Attention that is one node: ONNX `Attention`, and `MultiHeadAttention`, `Attention` and `QAttention` of ONNX Runtime.

use super::masks::{is_zero, lets_all_through, named_mask};
use super::{Core, Form, NotAttention, Operand, Role, not, shape_of};
use crate::graph::{Graph, NodeId, attr_float, attr_int, input, op};
use crate::shapes::Shapes;

/// ONNX `Attention`-23 and later.
pub(super) fn standard<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<Core<'m>, NotAttention> {
    let node = graph.node(anchor);
    let operand = |slot: usize, heads: Option<i64>| operand_4d(graph, shapes, anchor, slot, heads);
    let (hq, hk) = (
        attr_int(node, "q_num_heads"),
        attr_int(node, "kv_num_heads"),
    );
    let (q, k, v) = (operand(0, hq)?, operand(1, hk)?, operand(2, hk)?);
    if q.batch.get(1) != k.batch.get(1) {
        return not(format!(
            "grouped queries: {:?} query heads, {:?} key heads",
            q.batch.get(1),
            k.batch.get(1)
        ));
    }
    let mut mask = named_mask(
        node,
        &[
            (3, "an attention mask"),
            (4, "a key cache"),
            (5, "a value cache"),
            (6, "lengths of the sequences"),
        ],
    );
    let only_a_mask = [4, 5, 6].iter().all(|&slot| input(node, slot).is_none());
    if only_a_mask && input(node, 3).is_some_and(|m| lets_all_through(graph, shapes, m)) {
        mask = None;
    }
    if attr_int(node, "is_causal") == Some(1) {
        mask = Some("causal attention".into());
    }
    if attr_float(node, "softcap").is_some_and(|c| c != 0.0) {
        mask = Some("softcap on the scores".into());
    }
    let heads = q.batch.get(1).copied();
    let out = output_like(graph, shapes, anchor, heads)?;
    let scale = attr_float(node, "scale").map_or(f64::NAN, f64::from);
    Ok(Core {
        anchor,
        form: Form::Standard,
        q,
        k,
        v,
        out,
        heads,
        mask,
        scale,
    })
}

/// `com.microsoft::MultiHeadAttention`: separate, or packed q/k/v or k/v.
pub(super) fn multi_head<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<Core<'m>, NotAttention> {
    let node = graph.node(anchor);
    let heads = attr_int(node, "num_heads");
    if input(node, 3).is_some_and(|b| !is_zero(graph, shapes, b)) {
        return not("MultiHeadAttention with a bias input on q, k, v");
    }
    let q = operand_4d(graph, shapes, anchor, 0, heads)?;
    let (k, v) = match (input(node, 1), input(node, 2)) {
        (None, None) => (part(&q, 1), part(&q, 2)),
        (Some(_), None) => {
            let kv = operand_4d(graph, shapes, anchor, 1, heads)?;
            (kv.clone(), part(&kv, 1))
        }
        _ => (
            operand_4d(graph, shapes, anchor, 1, heads)?,
            operand_4d(graph, shapes, anchor, 2, heads)?,
        ),
    };
    let mut mask = named_mask(
        node,
        &[
            (4, "a key padding mask"),
            (5, "an attention bias"),
            (6, "a key cache"),
            (7, "a value cache"),
        ],
    );
    if attr_int(node, "unidirectional") == Some(1) {
        mask = Some("causal attention".into());
    }
    let out = output_like(graph, shapes, anchor, heads)?;
    let scale = attr_float(node, "scale")
        .filter(|s| *s != 0.0)
        .map_or(f64::NAN, f64::from);
    Ok(Core {
        anchor,
        form: Form::MultiHead,
        q,
        k,
        v,
        out,
        heads,
        mask,
        scale,
    })
}

/// `com.microsoft::Attention`: x and the merged weights.
pub(super) fn merged<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<Core<'m>, NotAttention> {
    let node = graph.node(anchor);
    let heads = attr_int(node, "num_heads");
    let x = operand_4d(graph, shapes, anchor, 0, heads)?;
    let quantized = op(node) == "QAttention";
    let mut mask = if quantized {
        named_mask(node, &[(5, "a mask"), (8, "a cache")])
    } else {
        named_mask(
            node,
            &[(3, "a mask"), (4, "a cache"), (5, "an attention bias")],
        )
    };
    if attr_int(node, "unidirectional") == Some(1) {
        mask = Some("causal attention".into());
    }
    if attr_int(node, "do_rotary") == Some(1) {
        mask = Some("rotary embeddings that the node makes itself".into());
    }
    let out = output_like(graph, shapes, anchor, heads)?;
    let scale = attr_float(node, "scale")
        .filter(|s| *s != 0.0)
        .map_or(f64::NAN, f64::from);
    Ok(Core {
        anchor,
        form: Form::MergedWeights,
        q: x.clone(),
        k: x.clone(),
        v: x,
        out,
        heads,
        mask,
        scale,
    })
}

fn part<'m>(packed: &Operand<'m>, index: i64) -> Operand<'m> {
    let mut operand = packed.clone();
    for role in &mut operand.roles {
        if matches!(role, Role::Part(_)) {
            *role = Role::Part(index);
        }
    }
    operand
}

/// An operand of an attention operator: `[B,N,H·D]`, `[B,H,N,D]` or packed
/// `[B,N,H,parts,D]`.
fn operand_4d<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    node: NodeId,
    slot: usize,
    heads: Option<i64>,
) -> Result<Operand<'m>, NotAttention> {
    let Some(value) = graph.input(node, slot) else {
        return not(format!(
            "input {slot} of '{}' is missing",
            crate::graph::label(graph.node(node))
        ));
    };
    let shape = shape_of(shapes, value)?;
    operand_by_rank(value, shape, heads)
}

fn operand_by_rank(
    value: &str,
    shape: Vec<i64>,
    heads: Option<i64>,
) -> Result<Operand<'_>, NotAttention> {
    let (roles, batch) = match (&shape[..], heads) {
        ([b, h, _, _], _) => (
            vec![Role::Batch(0), Role::Batch(1), Role::Token, Role::Channel],
            vec![*b, *h],
        ),
        ([b, _, _], Some(h)) => (
            vec![Role::Batch(0), Role::Token, Role::HeadChannel],
            vec![*b, h],
        ),
        ([b, _, h, _, _], _) => (
            vec![
                Role::Batch(0),
                Role::Token,
                Role::Batch(1),
                Role::Part(0),
                Role::Channel,
            ],
            vec![*b, *h],
        ),
        _ => {
            return not(format!(
                "'{value}' has shape {shape:?}, which is no attention operand"
            ));
        }
    };
    Ok(Operand {
        value,
        shape,
        roles,
        batch,
    })
}

fn output_like<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    node: NodeId,
    heads: Option<i64>,
) -> Result<Operand<'m>, NotAttention> {
    let Some(value) = graph.node(node).output.first().map(String::as_str) else {
        return not("an attention node without an output");
    };
    let shape = shape_of(shapes, value)?;
    operand_by_rank(value, shape, heads)
}
