//! Attention made of products: scores, Softmax and the weighted sum of the values as nodes of their own.

use linfusion_models::onnx::proto::NodeProto;

use super::masks::is_zero;
use super::{Core, Form, NotAttention, Operand, Role, not, shape_of};
use crate::attention::plain::from_integer;
use crate::graph::{Graph, NodeId, attr_float, attr_int, attr_str, domain, input, op};
use crate::shapes::{Shapes, einsum_terms};

/// Product → Softmax → product.
pub(super) fn products<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<Core<'m>, NotAttention> {
    let node = graph.node(anchor);
    let Some(input) = input(node, 0) else {
        return not("Softmax without an input");
    };
    let scores_shape = shape_of(shapes, input)?;
    // Before opset 13 the default is 1, and all axes from there on together.
    let default = if shapes.opset() < 13 { 1 } else { -1 };
    let axis = attr_int(node, "axis").unwrap_or(default);
    if axis != -1 && axis != scores_shape.len() as i64 - 1 {
        return not(format!(
            "Softmax over axis {axis} of {scores_shape:?}, not over the last one"
        ));
    }
    let scores = scores(graph, shapes, input)?;
    let (v, out) = weighted_sum(graph, shapes, anchor)?;
    Ok(Core {
        anchor,
        form: Form::Products,
        q: scores.q,
        k: scores.k,
        v,
        out,
        heads: None,
        mask: scores.mask,
        scale: scores.scale,
    })
}

struct Scores<'m> {
    q: Operand<'m>,
    k: Operand<'m>,
    mask: Option<String>,
    scale: f64,
}

/// Walks up from the Softmax to the product of queries and keys.
fn scores<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    from: &'m str,
) -> Result<Scores<'m>, NotAttention> {
    let (mut value, mut mask, mut scale) = (from, None::<String>, 1.0);
    for _ in 0..32 {
        let Some(port) = graph.producer(value) else {
            return not(format!(
                "Softmax of '{value}', which no product of queries and keys makes"
            ));
        };
        let node = graph.node(port.node);
        if let Some((q, k, factor)) = product_operands(graph, shapes, port.node)? {
            return Ok(Scores {
                q,
                k,
                mask,
                scale: scale * factor,
            });
        }
        value = match (domain(node), op(node)) {
            (_, "Reshape" | "Squeeze" | "Unsqueeze") => same_rows(shapes, node)?,
            (_, "Clip") => {
                if !is_whole_range(shapes, node) {
                    mask = Some(format!(
                        "the scores are clipped by '{}'",
                        crate::graph::label(node)
                    ));
                }
                input(node, 0).ok_or_else(|| NotAttention("Clip without an input".into()))?
            }
            (_, "Cast" | "Identity" | "Dropout" | "QuantizeLinear" | "DequantizeLinear")
                if is_inference(shapes, node) =>
            {
                match input(node, 0) {
                    Some(v) => v,
                    None => {
                        return not(format!(
                            "{} '{}' without an input",
                            op(node),
                            crate::graph::label(node)
                        ));
                    }
                }
            }
            (_, "Mul" | "Div") => {
                let (data, other) = split_small(shapes, node)?;
                let known = shapes.fact(other).scalar();
                // What undoes quantization is known at run time only.
                if shapes.is_default(other) || (known.is_none() && !from_integer(graph, data)) {
                    mask = Some(format!(
                        "the scores are scaled by '{other}', which is known at run time only"
                    ));
                }
                let factor = known.unwrap_or(1.0);
                scale *= if op(node) == "Mul" {
                    factor
                } else {
                    1.0 / factor
                };
                data
            }
            (_, "Sub") if is_row_max(graph, node) => {
                input(node, 0).ok_or_else(|| NotAttention("Sub without an input".into()))?
            }
            (_, "Add" | "Sub") => {
                let (data, other) = addends(graph, shapes, node)?;
                if !is_zero(graph, shapes, other) {
                    mask = Some(format!("a mask or bias '{other}' is added to the scores"));
                }
                data
            }
            (_, "Where") => {
                let (a, b) = (input(node, 1), input(node, 2));
                mask = Some(format!(
                    "the scores are masked by '{}'",
                    input(node, 0).unwrap_or("")
                ));
                match (a, b) {
                    (Some(a), Some(b)) if shapes.fact(a).constant => b,
                    (Some(a), Some(_)) => a,
                    _ => return not("Where with missing inputs"),
                }
            }
            (d, name) => {
                return not(format!(
                    "Softmax of the output of {}{name} '{}', not of a product of queries and keys",
                    if d.is_empty() {
                        String::new()
                    } else {
                        format!("{d}::")
                    },
                    crate::graph::label(node)
                ));
            }
        };
    }
    not("no product of queries and keys within 32 nodes above the Softmax")
}

/// The operands of a matrix product of two activations: (a, b, factor), with a
/// `[…, N, D]` and b `[…, D, M]` in meaning. `None` if the node is no product.
fn product_operands<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    id: NodeId,
) -> Result<Option<(Operand<'m>, Operand<'m>, f64)>, NotAttention> {
    let node = graph.node(id);
    let (slot_a, slot_b) = match (domain(node), op(node)) {
        ("", "MatMul" | "MatMulInteger") | ("com.microsoft", "FusedMatMul" | "TransposeMatMul") => {
            (0, 1)
        }
        ("com.microsoft", "MatMulIntegerToFloat" | "DynamicQuantizeMatMul") => (0, 1),
        ("", "QLinearMatMul") => (0, 3),
        ("", "Einsum") => return einsum_product(graph, shapes, id),
        _ => return Ok(None),
    };
    let (Some(a), Some(b)) = (input(node, slot_a), input(node, slot_b)) else {
        return Ok(None);
    };
    let flag = |name: &str| attr_int(node, name).unwrap_or(0) == 1;
    if flag("transBatchA") || flag("transBatchB") {
        return not(format!(
            "'{}' moves its batch axes (transBatch)",
            crate::graph::label(node)
        ));
    }
    let operand =
        |value: &'m str, swapped: bool, last: [Role; 2]| -> Result<Operand<'m>, NotAttention> {
            let shape = shape_of(shapes, value)?;
            if shape.len() < 3 {
                return not(format!(
                    "'{value}' has shape {shape:?}; attention needs a batch axis"
                ));
            }
            let mut roles: Vec<Role> = (0..shape.len() - 2).map(Role::Batch).collect();
            roles.extend(if swapped { [last[1], last[0]] } else { last });
            let batch = shape[..shape.len() - 2].to_vec();
            Ok(Operand {
                value,
                shape,
                roles,
                batch,
            })
        };
    Ok(Some((
        operand(a, flag("transA"), [Role::Token, Role::Channel])?,
        operand(b, flag("transB"), [Role::Channel, Role::Token])?,
        f64::from(attr_float(node, "alpha").unwrap_or(1.0)),
    )))
}

/// A two-operand Einsum as a product; the last letter of the result is the key.
fn einsum_product<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    id: NodeId,
) -> Result<Option<(Operand<'m>, Operand<'m>, f64)>, NotAttention> {
    let node = graph.node(id);
    let Some((terms, out)) = attr_str(node, "equation").and_then(einsum_terms) else {
        return Ok(None);
    };
    let ([ta, tb], [va, vb]) = (&terms[..], &node.input[..]) else {
        return Ok(None);
    };
    let [batch_letters @ .., row, col] = &out[..] else {
        return Ok(None);
    };
    let (q, k) = match (ta.contains(row), tb.contains(row)) {
        (true, false) => ((ta, va), (tb, vb)),
        (false, true) => ((tb, vb), (ta, va)),
        _ => return Ok(None),
    };
    if q.0.contains(col) || !k.0.contains(col) {
        return Ok(None);
    }
    let operand = |(term, value): (&Vec<char>, &'m String), token: char| {
        letters(shapes, value, term, batch_letters, token)
    };
    Ok(match (operand(q, *row)?, operand(k, *col)?) {
        (Some(q), Some(k)) => Some((q, k, 1.0)),
        _ => None,
    })
}

/// The roles of an Einsum operand's letters; a letter that is neither batch nor
/// token is the channel.
fn letters<'m>(
    shapes: &Shapes,
    value: &'m str,
    term: &[char],
    batch_letters: &[char],
    token: char,
) -> Result<Option<Operand<'m>>, NotAttention> {
    let shape = shape_of(shapes, value)?;
    let roles: Vec<Role> = term
        .iter()
        .map(|l| match batch_letters.iter().position(|b| b == l) {
            Some(k) => Role::Batch(k),
            None if *l == token => Role::Token,
            None => Role::Channel,
        })
        .collect();
    let batch: Option<Vec<i64>> = (0..batch_letters.len())
        .map(|k| {
            roles
                .iter()
                .position(|r| *r == Role::Batch(k))
                .and_then(|i| shape.get(i).copied())
        })
        .collect();
    let channels = roles.iter().filter(|r| **r == Role::Channel).count();
    Ok(match batch {
        Some(batch) if channels == 1 && roles.len() == shape.len() => Some(Operand {
            value,
            shape,
            roles,
            batch,
        }),
        _ => None,
    })
}

/// Walks down from the Softmax to the product with the values: (v, output).
fn weighted_sum<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<(Operand<'m>, Operand<'m>), NotAttention> {
    let Some(mut value) = graph.node(anchor).output.first().map(String::as_str) else {
        return not("Softmax without an output");
    };
    for _ in 0..32 {
        if graph.is_observed(value) {
            return not(format!(
                "the attention weights '{value}' are an output of the graph or used in a subgraph"
            ));
        }
        let readers: Vec<NodeId> = graph
            .readers(value)
            .iter()
            .map(|p| p.node)
            .filter(|&n| !matches!(op(graph.node(n)), "Shape" | "IsNaN" | "Size"))
            .collect();
        let &[reader] = &readers[..] else {
            return not(format!(
                "the attention weights '{value}' are read by {} nodes",
                readers.len()
            ));
        };
        let node = graph.node(reader);
        match op(node) {
            "Reshape" | "Squeeze" | "Unsqueeze" => {
                same_rows(shapes, node)?;
                value = node.output.first().map_or("", String::as_str);
            }
            "Where" if is_nan_to_zero(graph, shapes, node, value) => {
                value = node.output.first().map_or("", String::as_str);
            }
            "Cast"
            | "Identity"
            | "Dropout"
            | "QuantizeLinear"
            | "DequantizeLinear"
            | "DynamicQuantizeLinear"
                if is_inference(shapes, node) =>
            {
                value = node.output.first().map_or("", String::as_str);
            }
            "Einsum" => return einsum_sum(graph, shapes, reader, value),
            _ => {
                let Some((p, v, factor)) = product_operands(graph, shapes, reader)? else {
                    return not(format!(
                        "Softmax is followed by {} '{}', not by a product with values",
                        op(node),
                        crate::graph::label(node)
                    ));
                };
                if p.value != value {
                    return not(format!(
                        "the Softmax is the right operand of '{}'",
                        crate::graph::label(node)
                    ));
                }
                let rows_first = matches!(p.roles[..], [.., Role::Token, Role::Channel]);
                if factor != 1.0 || !rows_first {
                    return not(format!(
                        "the product with values '{}' is scaled by {factor} or takes the weights transposed",
                        crate::graph::label(node)
                    ));
                }
                let mut v = v;
                for role in &mut v.roles {
                    *role = match *role {
                        Role::Token => Role::Channel,
                        Role::Channel => Role::Token,
                        r => r,
                    };
                }
                let out = node.output.first().map_or("", String::as_str);
                let shape = shape_of(shapes, out)?;
                let n = shape.len().saturating_sub(2);
                let roles = (0..n)
                    .map(Role::Batch)
                    .chain([Role::Token, Role::Channel])
                    .collect();
                let batch = shape[..n].to_vec();
                return Ok((
                    v,
                    Operand {
                        value: out,
                        shape,
                        roles,
                        batch,
                    },
                ));
            }
        }
    }
    not("no product with values within 32 nodes below the Softmax")
}

fn einsum_sum<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    id: NodeId,
    weights: &str,
) -> Result<(Operand<'m>, Operand<'m>), NotAttention> {
    let node = graph.node(id);
    let unclear = || {
        NotAttention(format!(
            "the Einsum '{}' is no product with values",
            crate::graph::label(node)
        ))
    };
    let (terms, out) = attr_str(node, "equation")
        .and_then(einsum_terms)
        .ok_or_else(unclear)?;
    let ([ta, tb], [va, vb]) = (&terms[..], &node.input[..]) else {
        return Err(unclear());
    };
    let (p, v, v_value) = if va == weights {
        (ta, tb, vb)
    } else {
        (tb, ta, va)
    };
    let [batch_letters @ .., row, key] = &p[..] else {
        return Err(unclear());
    };
    if out.contains(key) || v.contains(row) {
        return Err(unclear());
    }
    let v = letters(shapes, v_value, v, batch_letters, *key)?.ok_or_else(unclear)?;
    let out_value = node.output.first().map_or("", String::as_str);
    let out = letters(shapes, out_value, &out, batch_letters, *row)?.ok_or_else(unclear)?;
    Ok((v, out))
}

/// Splits a two-input node into (data, one-element operand).
fn split_small<'m>(
    shapes: &Shapes,
    node: &'m NodeProto,
) -> Result<(&'m str, &'m str), NotAttention> {
    if let (Some(a), Some(b)) = (input(node, 0), input(node, 1)) {
        // One score, multiplied by a stored number, is told from it by that.
        let stored = |v: &str| shapes.fact(v).constant;
        if shapes.fact(b).count() == Some(1) && (stored(b) || !stored(a) || op(node) == "Div") {
            return Ok((a, b));
        }
        if shapes.fact(a).count() == Some(1) && op(node) == "Mul" {
            return Ok((b, a));
        }
    }
    not(format!(
        "the scores are multiplied by a tensor in '{}'",
        crate::graph::label(node)
    ))
}

/// The input of a node that folds the scores, if it leaves their rows whole.
fn same_rows<'m>(shapes: &Shapes, node: &'m NodeProto) -> Result<&'m str, NotAttention> {
    let row = |v: Option<&str>| v.and_then(|v| shapes.shape(v)?.last().copied());
    match (input(node, 0), node.output.first()) {
        (Some(from), Some(to)) if row(Some(from)).is_some() && row(Some(from)) == row(Some(to)) => {
            Ok(from)
        }
        _ => not(format!(
            "'{}' folds the rows of the scores",
            crate::graph::label(node)
        )),
    }
}

/// Whether a Clip only keeps infinities out: its bounds are those of a type, the
/// narrowest of which is fp16.
fn is_whole_range(shapes: &Shapes, node: &NodeProto) -> bool {
    const HALF: f64 = 65_000.0;
    let bound = |slot: usize, name: &str| {
        let stored = crate::graph::attribute(node, name).and_then(|a| a.f);
        match input(node, slot) {
            Some(v) => shapes.fact(v).scalar(),
            None => Some(stored.map_or(f64::INFINITY, |f| f64::from(f).abs())),
        }
    };
    let wide = |v: Option<f64>| v.is_some_and(|v| v.abs() >= HALF);
    wide(bound(1, "min")) && wide(bound(2, "max"))
}

/// Whether a Dropout (or any other node) does nothing but pass its input on.
fn is_inference(shapes: &Shapes, node: &NodeProto) -> bool {
    op(node) != "Dropout"
        || input(node, 2).is_none_or(|training| shapes.fact(training).scalar() == Some(0.0))
}

/// `Where(IsNaN(p), 0, p)`: how PyTorch keeps a row that is masked as a whole.
fn is_nan_to_zero(graph: &Graph<'_>, shapes: &Shapes, node: &NodeProto, weights: &str) -> bool {
    let (Some(condition), Some(then), Some(other)) =
        (input(node, 0), input(node, 1), input(node, 2))
    else {
        return false;
    };
    let asks = graph.producer(condition).is_some_and(|p| {
        let n = graph.node(p.node);
        op(n) == "IsNaN" && input(n, 0) == Some(weights)
    });
    asks && other == weights && is_zero(graph, shapes, then)
}

/// Splits an Add on the scores into (scores, what is added): the scores are the
/// operand that a product makes.
fn addends<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    node: &'m NodeProto,
) -> Result<(&'m str, &'m str), NotAttention> {
    let (Some(a), Some(b)) = (input(node, 0), input(node, 1)) else {
        return not(format!("'{}' lacks an input", crate::graph::label(node)));
    };
    let is_score = |v: &str| !shapes.fact(v).constant && scores_above(graph, v, 12);
    Ok(if is_score(a) { (a, b) } else { (b, a) })
}

/// Whether a product lies above the anchor and one below: attention, or close to it.
#[must_use]
pub fn between_products(graph: &Graph<'_>, anchor: NodeId) -> bool {
    let Some(scores) = graph.input(anchor, 0) else {
        return false;
    };
    let below = || {
        let mut values: Vec<&str> = graph
            .node(anchor)
            .output
            .iter()
            .map(String::as_str)
            .collect();
        for _ in 0..8 {
            let readers = values.iter().flat_map(|v| graph.readers(v));
            let nodes: Vec<_> = readers.map(|p| graph.node(p.node)).collect();
            if nodes.iter().any(|n| is_product(n)) {
                return true;
            }
            let outputs = nodes.iter().flat_map(|n| n.output.iter());
            values = outputs.map(String::as_str).take(64).collect();
        }
        false
    };
    scores_above(graph, scores, 12) && below()
}

fn is_product(node: &NodeProto) -> bool {
    matches!(
        op(node),
        "MatMul" | "FusedMatMul" | "TransposeMatMul" | "Einsum" | "MatMulInteger" | "QLinearMatMul"
    )
}

/// Whether a product of two activations lies directly above `value`.
fn scores_above(graph: &Graph<'_>, value: &str, budget: usize) -> bool {
    let Some(port) = graph.producer(value) else {
        return false;
    };
    let node = graph.node(port.node);
    if is_product(node) {
        return true;
    }
    match op(node) {
        "Mul" | "Add" | "Sub" | "Where" if budget > 0 => node
            .input
            .iter()
            .any(|i| scores_above(graph, i, budget - 1)),
        "Div" | "Cast" | "Reshape" | "Identity" | "Clip" | "QuantizeLinear"
        | "DequantizeLinear" | "Squeeze" | "Unsqueeze"
            if budget > 0 =>
        {
            node.input
                .first()
                .is_some_and(|i| scores_above(graph, i, budget - 1))
        }
        _ => false,
    }
}

/// `scores − max(scores)`: softmax does not see it.
fn is_row_max(graph: &Graph<'_>, node: &NodeProto) -> bool {
    let (Some(data), Some(other)) = (input(node, 0), input(node, 1)) else {
        return false;
    };
    graph.producer(other).is_some_and(|p| {
        let n = graph.node(p.node);
        op(n) == "ReduceMax" && input(n, 0) == Some(data)
    })
}
