//! Whether a node's inputs fit each other. Shape rules are lenient where a graph is only looked at;
//! here a misfit is what disproves a reading.

use linfusion_models::onnx::proto::NodeProto;

use crate::graph::{attr_int, attr_ints, attr_str, domain, op};
use crate::shapes::value::{axis, broadcast};
use crate::shapes::{Fact, einsum_terms};

/// Checks what `node`'s operator demands of the shapes of its inputs. Unknown shapes agree.
///
/// # Errors
/// What does not fit.
pub fn agree(node: &NodeProto, inputs: &[&Fact]) -> Result<(), String> {
    let shape = |slot: usize| inputs.get(slot).and_then(|f| f.shape.as_deref());
    if !matches!(domain(node), "" | "com.microsoft") {
        return Ok(());
    }
    match op(node) {
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" | "Mod" | "Equal" | "Less"
        | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "Xor" | "Mean" | "Sum"
        | "Where" => together(inputs),
        "PRelu" | "LayerNormalization" | "RMSNormalization" => {
            let (Some(x), Some(scale)) = (shape(0), shape(1)) else {
                return Ok(());
            };
            match broadcast(x, scale) {
                Some(both) if both == x => Ok(()),
                _ => Err(format!("{scale:?} does not fit {x:?}")),
            }
        }
        "InstanceNormalization" | "BatchNormalization" => match (shape(0), shape(1)) {
            (Some([_, channels, ..]), Some([scale])) if channels != scale => {
                Err(format!("a scale of {scale} for {channels} channels"))
            }
            _ => Ok(()),
        },
        "Conv" | "FusedConv" => {
            let (Some([_, channels, ..]), Some([_, per_group, ..])) = (shape(0), shape(1)) else {
                return Ok(());
            };
            let expected = per_group.checked_mul(attr_int(node, "group").unwrap_or(1));
            if expected == Some(*channels) {
                Ok(())
            } else {
                Err(format!("{channels} channels for weights of {expected:?}"))
            }
        }
        "Gemm" => match (shape(0), shape(1)) {
            (Some([m, k]), Some([l, n])) => {
                let k = if attr_int(node, "transA") == Some(1) {
                    m
                } else {
                    k
                };
                let l = if attr_int(node, "transB") == Some(1) {
                    n
                } else {
                    l
                };
                if k == l {
                    Ok(())
                } else {
                    Err(format!("{k} columns for {l} rows"))
                }
            }
            _ => Ok(()),
        },
        "Concat" => concat(node, inputs),
        "Split" => split(node, inputs),
        "Einsum" => einsum(node, inputs),
        _ => Ok(()),
    }
}

fn together(inputs: &[&Fact]) -> Result<(), String> {
    let mut all: Option<Vec<i64>> = None;
    for shape in inputs.iter().filter_map(|f| f.shape.as_deref()) {
        all = match all {
            None => Some(shape.to_vec()),
            Some(so_far) => match broadcast(&so_far, shape) {
                Some(both) => Some(both),
                None => return Err(format!("{so_far:?} and {shape:?} do not fit")),
            },
        };
    }
    Ok(())
}

fn concat(node: &NodeProto, inputs: &[&Fact]) -> Result<(), String> {
    let mut shapes = inputs.iter().filter_map(|f| f.shape.as_deref());
    let Some(first) = shapes.next() else {
        return Ok(());
    };
    let along = attr_int(node, "axis").and_then(|a| axis(a, first.len()));
    for shape in shapes {
        let same = shape.len() == first.len()
            && (0..first.len()).all(|i| Some(i) == along || shape.get(i) == first.get(i));
        if !same {
            return Err(format!("{first:?} and {shape:?} cannot be joined"));
        }
    }
    Ok(())
}

fn split(node: &NodeProto, inputs: &[&Fact]) -> Result<(), String> {
    let Some(shape) = inputs.first().and_then(|f| f.shape.as_deref()) else {
        return Ok(());
    };
    let along = axis(attr_int(node, "axis").unwrap_or(0), shape.len());
    let sizes = attr_ints(node, "split").or(inputs.get(1).and_then(|f| f.ints()));
    let (Some(&size), Some(sizes)) = (along.and_then(|a| shape.get(a)), sizes) else {
        return Ok(());
    };
    if sizes.iter().try_fold(0i64, |sum, s| sum.checked_add(*s)) == Some(size) {
        Ok(())
    } else {
        Err(format!("parts of {sizes:?} of a dimension of {size}"))
    }
}

fn einsum(node: &NodeProto, inputs: &[&Fact]) -> Result<(), String> {
    let Some((terms, _)) = attr_str(node, "equation").and_then(einsum_terms) else {
        return Ok(());
    };
    let mut sizes: Vec<(char, i64)> = Vec::new();
    for (term, fact) in terms.iter().zip(inputs) {
        let Some(shape) = fact.shape.as_deref() else {
            continue;
        };
        for (&letter, &size) in term.iter().zip(shape) {
            match sizes.iter_mut().find(|(l, _)| *l == letter) {
                None => sizes.push((letter, size)),
                Some((_, known)) if *known == 1 => *known = size,
                Some((_, known)) if *known == size || size == 1 => {}
                Some((_, known)) => {
                    return Err(format!("'{letter}' is {known} and {size}"));
                }
            }
        }
    }
    Ok(())
}
