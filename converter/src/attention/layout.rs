//! Layout steps: nodes that move or rename elements without computing. Each maps
//! an index of its output to the index of the input element that lies there, so
//! that a whole chain can be checked exactly, element by element, whatever mix
//! of Reshape, Transpose, Split, … an exporter or optimizer left.

use crate::graph::{Graph, NodeId, attr_int, op};
use crate::shapes::value::axis;
use crate::shapes::{Fact, Shapes, eval};

/// How a node's output index maps to its input index.
#[derive(Clone, Debug, PartialEq)]
pub enum Move {
    /// The flat index stays (Reshape, Squeeze, Unsqueeze, Flatten).
    Refold {
        /// Shape of the input.
        from: Vec<i64>,
        /// Shape of the output.
        to: Vec<i64>,
    },
    /// Output axis `i` is input axis `perm[i]`.
    Permute(Vec<usize>),
    /// Every axis takes `start + i·step` (Split, Slice).
    Window(Vec<(i64, i64)>),
    /// One axis is dropped at a fixed index (Gather with a scalar).
    Pick {
        /// The dropped axis.
        axis: usize,
        /// The index taken on it.
        index: i64,
    },
    /// The index stays (Cast, Identity, a scale, …).
    Same,
}

impl Move {
    /// The input index of the element at output index `at`; `None` if it lies
    /// outside.
    #[must_use]
    pub fn back(&self, at: &[i64]) -> Option<Vec<i64>> {
        match self {
            Move::Refold { from, to } => unravel(ravel(at, to)?, from),
            Move::Permute(perm) => {
                let mut index = vec![0; perm.len()];
                for (&p, &i) in perm.iter().zip(at) {
                    *index.get_mut(p)? = i;
                }
                Some(index)
            }
            Move::Window(axes) => axes
                .iter()
                .zip(at)
                .map(|((start, step), &i)| start.checked_add(i.checked_mul(*step)?))
                .collect(),
            Move::Pick { axis, index } => {
                let mut full = at.to_vec();
                if *axis > full.len() {
                    return None;
                }
                full.insert(*axis, *index);
                Some(full)
            }
            Move::Same => Some(at.to_vec()),
        }
    }

    /// What output `slot` of a node does with its input 0, if the node only
    /// moves elements.
    #[must_use]
    pub fn of(graph: &Graph<'_>, shapes: &Shapes, node: NodeId, slot: usize) -> Option<Move> {
        let proto = graph.node(node);
        let from = shapes.shape(proto.input.first()?)?;
        let to = shapes.shape(proto.output.get(slot)?)?;
        match op(proto) {
            "Identity" | "Cast" | "Dropout" | "CastLike" => (slot == 0).then_some(Move::Same),
            "QuantizeLinear" | "DequantizeLinear" | "DynamicQuantizeLinear" => {
                (slot == 0).then_some(Move::Same)
            }
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => Some(Move::Refold {
                from: from.to_vec(),
                to: to.to_vec(),
            }),
            "Transpose" => eval::permutation(proto, from.len()).map(Move::Permute),
            "Split" => {
                let a = axis(attr_int(proto, "axis").unwrap_or(0), from.len())?;
                let start = proto.output[..slot]
                    .iter()
                    .map(|o| shapes.shape(o).and_then(|s| s.get(a).copied()))
                    .sum::<Option<i64>>()?;
                let mut window = vec![(0, 1); from.len()];
                window[a].0 = start;
                Some(Move::Window(window))
            }
            "Slice" => {
                let facts: Vec<&Fact> = proto.input.iter().map(|i| shapes.fact(i)).collect();
                let ranges = eval::slice_ranges(proto, &facts)?;
                Some(Move::Window(
                    ranges.iter().map(|r| (r.start, r.step)).collect(),
                ))
            }
            "Gather" => {
                let indices = shapes.fact(proto.input.get(1)?);
                if !indices.shape.as_ref()?.is_empty() {
                    return None;
                }
                let a = axis(attr_int(proto, "axis").unwrap_or(0), from.len())?;
                let i = *indices.ints()?.first()?;
                Some(Move::Pick {
                    axis: a,
                    index: if i < 0 { i + from[a] } else { i },
                })
            }
            _ => None,
        }
    }
}

/// The row-major flat index of `at` in `shape`; `None` if outside.
#[must_use]
pub fn ravel(at: &[i64], shape: &[i64]) -> Option<i64> {
    if at.len() != shape.len() {
        return None;
    }
    at.iter().zip(shape).try_fold(0i64, |flat, (&i, &d)| {
        if (0..d).contains(&i) {
            flat.checked_mul(d)?.checked_add(i)
        } else {
            None
        }
    })
}

/// The index in `shape` of row-major flat index `flat`; `None` if outside.
#[must_use]
pub fn unravel(mut flat: i64, shape: &[i64]) -> Option<Vec<i64>> {
    let mut at = vec![0; shape.len()];
    for (slot, &d) in at.iter_mut().zip(shape).rev() {
        if d <= 0 {
            return None;
        }
        *slot = flat % d;
        flat /= d;
    }
    (flat == 0).then_some(at)
}
