//! Self, cross or joint: told apart by where q, k and v come from, never by name.

use std::collections::BTreeSet;

use serde::Serialize;

use super::core::{Core, Form};
use super::projection::{Roots, canonical, linear, roots};
use crate::graph::Graph;
use crate::shapes::Shapes;

/// What attends to what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// q, k and v are projections of one tensor.
    #[serde(rename = "self")]
    SelfAttention,
    /// k and v come from another tensor than q.
    Cross,
    /// Several token streams (image and text) attend to all of them.
    Joint,
    /// No attention, or one whose data flow is not understood.
    Other,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::SelfAttention => "self",
            Kind::Cross => "cross",
            Kind::Joint => "joint",
            Kind::Other => "other",
        })
    }
}

/// The kind of an attention and, for self-attention, the tensor it reads.
#[derive(Clone, Debug)]
pub struct Flow<'m> {
    /// The kind.
    pub kind: Kind,
    /// The one tensor behind q, k and v.
    pub source: Option<&'m str>,
}

/// Tells the kind of `core`.
#[must_use]
pub fn flow<'m>(graph: &Graph<'m>, shapes: &Shapes, core: &Core<'m>) -> Flow<'m> {
    if core.form == Form::MergedWeights {
        return Flow {
            kind: Kind::SelfAttention,
            source: Some(canonical(graph, core.q.value)),
        };
    }
    let operands = [&core.q, &core.k, &core.v].map(|o| roots(graph, shapes, o.value));
    let [q, k, v] = operands.each_ref().map(|r| sources(graph, shapes, r));
    let none = |kind| Flow { kind, source: None };
    if q.is_empty() || k.is_empty() || v.is_empty() {
        return none(Kind::Other);
    }
    if operands.iter().any(|r| r.joins_tokens) && (q.len() > 1 || k.len() > 1) {
        return none(Kind::Joint);
    }
    if q == k && k == v {
        return match q.first() {
            Some(source) if q.len() == 1 => Flow {
                kind: Kind::SelfAttention,
                source: Some(source),
            },
            _ => none(Kind::Other),
        };
    }
    none(if q != k && q != v {
        Kind::Cross
    } else {
        Kind::Other
    })
}

/// The distinct tensors behind an operand. A low-rank branch beside a linear
/// layer (an unmerged LoRA) counts as what it reads.
fn sources<'m>(graph: &Graph<'m>, shapes: &Shapes, roots: &Roots<'m>) -> BTreeSet<&'m str> {
    let mut set: BTreeSet<&str> = roots
        .linears
        .iter()
        .map(|l| canonical(graph, l.source))
        .collect();
    if set.len() > 1 && !roots.joins_tokens {
        set = set
            .into_iter()
            .map(|value| {
                graph
                    .producer(value)
                    .and_then(|p| linear(graph, shapes, p.node))
                    .map_or(value, |down| canonical(graph, down.source))
            })
            .collect();
    }
    set
}
