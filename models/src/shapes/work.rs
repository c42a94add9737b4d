//! How many floating-point operations a graph takes at given sizes, by counting: 2·M·N·K for a product of matrices, one an
//! element for all else.

use crate::graph::{attr_int, attr_str, op};
use crate::onnx::proto::{ModelProto, NodeProto};

use super::{Shapes, einsum_terms};

/// Operations of one run of `model` at the sizes of `shapes`. Nodes of unknown shape count nothing.
#[must_use]
pub fn operations(model: &ModelProto, shapes: &Shapes) -> f64 {
    let nodes = &model.graph.node;
    nodes.iter().map(|node| of(node, shapes)).sum()
}

fn of(node: &NodeProto, shapes: &Shapes) -> f64 {
    let output = node.output.first().map_or("", String::as_str);
    if shapes.fact(output).constant {
        return 0.0;
    }
    let elements = shapes.shape(output).map_or(0.0, product);
    let input = |i: usize| node.input.get(i).and_then(|name| shapes.shape(name));
    let known = match op(node) {
        "MatMul" | "FusedMatMul" | "MatMulInteger" | "QLinearMatMul" => {
            let from_end = 1 + usize::from(attr_int(node, "transA") == Some(1));
            input(0)
                .and_then(|a| a.get(a.len().checked_sub(from_end)?))
                .map(|k| 2.0 * elements * *k as f64)
        }
        "Gemm" => {
            let axis = usize::from(attr_int(node, "transA") != Some(1));
            input(0)
                .and_then(|a| a.get(axis))
                .map(|k| 2.0 * elements * *k as f64)
        }
        "Conv" | "FusedConv" | "ConvInteger" | "NhwcConv" => {
            input(1).and_then(|w| Some(2.0 * elements * product(w.get(1..)?)))
        }
        "ConvTranspose" => input(0)
            .zip(input(1))
            .and_then(|(x, w)| Some(2.0 * product(x) * product(w.get(1..)?))),
        "Einsum" => einsum(node, shapes),
        "Softmax" => Some(5.0 * elements),
        "MultiHeadAttention" | "Attention" => {
            // The output is as long as the queries; keys are as many as the second input says, or the queries.
            let keys = input(1).filter(|s| s.len() >= 3).or_else(|| input(0));
            keys.and_then(|s| s.get(s.len().checked_sub(2)?))
                .map(|n| 4.0 * elements * *n as f64)
        }
        "LinFusionAttention" => input(0).and_then(|q| {
            let width = *q.last()?;
            let heads = attr_int(node, "num_heads").unwrap_or(1).max(1);
            let head = if q.len() == 4 { width } else { width / heads };
            Some(4.0 * elements * head as f64)
        }),
        _ => None,
    };
    known.unwrap_or(elements)
}

/// Twice the product of the sizes of all letters.
fn einsum(node: &NodeProto, shapes: &Shapes) -> Option<f64> {
    let (terms, _) = einsum_terms(attr_str(node, "equation")?)?;
    let mut sizes = std::collections::BTreeMap::new();
    for (term, name) in terms.iter().zip(&node.input) {
        for (letter, size) in term.iter().zip(shapes.shape(name)?) {
            sizes.insert(*letter, *size);
        }
    }
    Some(sizes.values().fold(2.0, |all, size| all * *size as f64))
}

fn product(dims: &[i64]) -> f64 {
    dims.iter().fold(1.0, |all, d| all * *d as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::{GraphProto, OperatorSetIdProto, TensorProto};
    use crate::onnx::{ElementType, make};

    #[test]
    fn products_count_twice_their_inner_size() {
        let value = |name: &str, dims: &[i64]| {
            let dims: Vec<_> = dims.iter().map(|d| make::Dim::Fixed(*d)).collect();
            make::value_info(name, ElementType::F32, &dims)
        };
        let node = |op: &str, inputs: &[&str], output: &str, attributes| {
            make::node(op, output, inputs, &[output], attributes)
        };
        let graph = GraphProto {
            input: vec![
                value("x", &[2, 5, 7]),
                value("w", &[7, 11]),
                value("i", &[1, 6, 8, 9]),
                value("k", &[4, 3, 3, 3]),
            ],
            node: vec![
                node("MatMul", &["x", "w"], "a", vec![]),
                node(
                    "Conv",
                    &["i", "k"],
                    "b",
                    vec![make::int("group", 2), make::ints("pads", &[1, 1, 1, 1])],
                ),
                node(
                    "Einsum",
                    &["x", "x"],
                    "c",
                    vec![make::string("equation", "bnd,bmd->bnm")],
                ),
                node("Sigmoid", &["a"], "d", vec![]),
            ],
            ..GraphProto::default()
        };
        let model = ModelProto {
            graph: buffa::MessageField::some(graph),
            opset_import: vec![OperatorSetIdProto {
                version: Some(17),
                ..Default::default()
            }],
            ..ModelProto::default()
        };
        let shapes = Shapes::at(&model, &|_: &TensorProto| None, &[]);
        let counted: Vec<f64> = model.graph.node.iter().map(|n| of(n, &shapes)).collect();
        let expected = [
            2.0 * 2.0 * 5.0 * 7.0 * 11.0,
            2.0 * 4.0 * 8.0 * 9.0 * 27.0,
            2.0 * 2.0 * 5.0 * 5.0 * 7.0,
            2.0 * 5.0 * 11.0,
        ];
        assert_eq!(counted, expected);
        assert_eq!(operations(&model, &shapes), expected.iter().sum::<f64>());
    }
}
