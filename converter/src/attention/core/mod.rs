//! Anchors (Softmax and the attention operators) and the canonical form of the
//! attention around each.

use linfusion_models::onnx::proto::NodeProto;

pub use self::products::between_products;
use crate::graph::{Graph, NodeId, domain, op};
use crate::shapes::Shapes;

mod masks;
mod operators;
mod products;

/// What an axis of an operand means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Digit `k` of the batch index `b·H + h`, written in the operand's batch
    /// dimensions.
    Batch(usize),
    /// A token (a query for q and the output, a key for k and v).
    Token,
    /// A channel within the head.
    Channel,
    /// `head·D + channel`.
    HeadChannel,
    /// A fixed index: which of the tensors packed into one this operand is.
    Part(i64),
}

/// q, k, v or the output of an attention, as a value of the graph and the
/// meaning of its axes.
#[derive(Clone, Debug)]
pub struct Operand<'m> {
    /// The value.
    pub value: &'m str,
    /// Its shape under the probe.
    pub shape: Vec<i64>,
    /// The meaning of each axis.
    pub roles: Vec<Role>,
    /// The dimensions whose product is batch × heads.
    pub batch: Vec<i64>,
}

impl Operand<'_> {
    /// The size of the axis with `role`.
    #[must_use]
    pub fn size(&self, role: Role) -> Option<i64> {
        let i = self.roles.iter().position(|&r| r == role)?;
        self.shape.get(i).copied()
    }

    /// Index of element (`batch_head`, token, channel), for `channels` a head.
    #[must_use]
    pub fn index(
        &self,
        batch_head: i64,
        heads: i64,
        token: i64,
        channel: i64,
        channels: i64,
    ) -> Option<Vec<i64>> {
        let digits = super::layout::unravel(batch_head, &self.batch)?;
        self.roles
            .iter()
            .map(|role| match role {
                Role::Batch(k) => digits.get(*k).copied(),
                Role::Token => Some(token),
                Role::Channel => Some(channel),
                Role::HeadChannel => (batch_head % heads)
                    .checked_mul(channels)?
                    .checked_add(channel),
                Role::Part(j) => Some(*j),
            })
            .collect()
    }
}

/// How the attention is written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Product, Softmax, product.
    Products,
    /// `com.microsoft::MultiHeadAttention`.
    MultiHead,
    /// `com.microsoft::Attention`: the q, k, v projections are inside the node.
    MergedWeights,
    /// ONNX `Attention`, opset 23 and up.
    Standard,
}

/// The canonical form of one attention.
#[derive(Clone, Debug)]
pub struct Core<'m> {
    /// The Softmax or attention node.
    pub anchor: NodeId,
    /// How it is written down.
    pub form: Form,
    /// Queries. For [`Form::MergedWeights`] q, k and v are the node's input x.
    pub q: Operand<'m>,
    /// Keys.
    pub k: Operand<'m>,
    /// Values.
    pub v: Operand<'m>,
    /// Output, before heads are merged.
    pub out: Operand<'m>,
    /// Number of heads where the node says so.
    pub heads: Option<i64>,
    /// A mask or causality that changes the result, in words.
    pub mask: Option<String>,
    /// Factor on the scores, apart from factors on q and k further up.
    pub scale: f64,
}

/// Why an anchor is no attention that can be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotAttention(pub String);

fn not<T>(reason: impl Into<String>) -> Result<T, NotAttention> {
    Err(NotAttention(reason.into()))
}

/// Every node that is, or may be, the heart of an attention, in file order.
#[must_use]
pub fn anchors(graph: &Graph<'_>) -> Vec<NodeId> {
    graph
        .nodes()
        .filter(|(_, n)| is_anchor(n))
        .map(|(id, _)| id)
        .collect()
}

/// Whether a node is a Softmax or an attention operator.
#[must_use]
pub fn is_anchor(node: &NodeProto) -> bool {
    match domain(node) {
        "" => matches!(op(node), "Softmax" | "Attention"),
        "com.microsoft" => matches!(
            op(node),
            "Attention"
                | "QAttention"
                | "MultiHeadAttention"
                | "PackedMultiHeadAttention"
                | "PackedAttention"
                | "GroupQueryAttention"
                | "DecoderMaskedMultiHeadAttention"
                | "BiasSoftmax"
                | "QLinearSoftmax"
                | "SparseAttention"
                | "LongformerAttention"
                | "QOrderedAttention"
                | "PagedAttention"
                | "LinearAttention"
        ),
        _ => false,
    }
}

/// Brings the attention around `anchor` to its canonical form.
///
/// # Errors
/// [`NotAttention`] with one sentence if the anchor is no attention or cannot be
/// followed.
pub fn core<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    anchor: NodeId,
) -> Result<Core<'m>, NotAttention> {
    let node = graph.node(anchor);
    match (domain(node), op(node)) {
        ("", "Softmax") | ("com.microsoft", "QLinearSoftmax") => {
            products::products(graph, shapes, anchor)
        }
        ("", "Attention") => operators::standard(graph, shapes, anchor),
        ("com.microsoft", "MultiHeadAttention") => operators::multi_head(graph, shapes, anchor),
        ("com.microsoft", "Attention" | "QAttention") => operators::merged(graph, shapes, anchor),
        (d, name) => not(format!(
            "{d}::{name} is not an attention this tool rewrites"
        )),
    }
}

fn shape_of(shapes: &Shapes, value: &str) -> Result<Vec<i64>, NotAttention> {
    shapes
        .shape(value)
        .map(<[i64]>::to_vec)
        .ok_or_else(|| NotAttention(format!("the shape of '{value}' is unknown")))
}
