//! Numbers that are right at one size only, though every shape fits: the 1/N of a sum over the image.

use linfusion_models::onnx::proto::{ModelProto, NodeProto};

use super::ResizeError;
use super::columns::{Columns, describe};
use crate::graph::{Graph, attr_ints, input, op};
use crate::shapes::value::axis;

/// Refuses stored scalars that multiply or divide a sum over the image, and are N, √N or their
/// reciprocals for its N elements: in a mean they are, elsewhere they may be chance.
pub fn refuse(model: &ModelProto, columns: &Columns<'_>) -> Result<(), ResizeError> {
    let graph = Graph::new(&model.graph);
    for (_, node) in graph.nodes().filter(|(_, n)| op(n) == "ReduceSum") {
        let Some(count) = summed(node, columns) else {
            continue;
        };
        let mut queue: Vec<&str> = node.output.iter().map(String::as_str).collect();
        while let Some(value) = queue.pop() {
            for reader in graph.readers(value) {
                let reader = graph.node(reader.node);
                match op(reader) {
                    "Cast" | "Reshape" | "Squeeze" | "Unsqueeze" | "Transpose" | "Identity" => {
                        queue.extend(reader.output.iter().map(String::as_str));
                    }
                    "Mul" | "Div" => {
                        if let Some((constant, number)) = scalar(reader, columns)
                            && normalises(number, count)
                        {
                            let (name, op) = describe(reader);
                            return Err(ResizeError::Normaliser {
                                node: name,
                                op,
                                constant,
                                value: number,
                                count,
                                sum: describe(node).0,
                            });
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// How many elements of the image a sum is over at the size of the export; `None` if it is over none.
fn summed(node: &NodeProto, columns: &Columns<'_>) -> Option<i64> {
    let shape = columns.shape(input(node, 0)?)?;
    let given = input(node, 1).and_then(|axes| columns.fact(axes)?.ints());
    let axes: Vec<usize> = match attr_ints(node, "axes").or(given) {
        None | Some([]) => (0..shape.len()).collect(),
        Some(axes) => axes
            .iter()
            .map(|&a| axis(a, shape.len()))
            .collect::<Option<_>>()?,
    };
    let over = || axes.iter().filter_map(|&a| shape.get(a));
    if !over().any(|n| columns.varies(n)) {
        return None;
    }
    over().try_fold(1i64, |count, n| count.checked_mul(*n.first()?))
}

fn scalar(node: &NodeProto, columns: &Columns<'_>) -> Option<(String, f64)> {
    node.input.iter().find_map(|name| {
        let fact = columns.fact(name).filter(|f| f.constant)?;
        Some((name.clone(), fact.scalar()?))
    })
}

/// Whether `number` is N, √N, 1/N or 1/√N, as far as float32 or float16 can say it.
fn normalises(number: f64, count: i64) -> bool {
    let n = count as f64;
    let near = |x: f64| (number / x - 1.0).abs() < f64::from(half::f16::EPSILON);
    count > 1
        && [n, n.sqrt(), n.recip(), n.sqrt().recip()]
            .into_iter()
            .any(near)
}
