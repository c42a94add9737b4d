//! The nodes that replace one attention site.

use std::collections::BTreeSet;

use linfusion_models::checkpoint::{Checkpoint, CheckpointError, CheckpointModule};
use linfusion_models::onnx::ElementType;
use linfusion_models::onnx::proto::{NodeProto, TensorProto, ValueInfoProto};

use super::builder::Builder;
use super::emit::Emit;
use super::window::WindowPart;
use crate::attention::plain::{Layout, Plain};
use crate::graph::{Graph, NodeId, label};
use crate::shapes::Shapes;

/// What a site's rewrite takes from the model and from the caller.
pub struct Context<'a, 'm> {
    /// The model's graph.
    pub graph: &'a Graph<'m>,
    /// Its shapes under the probe.
    pub shapes: &'a Shapes,
    /// Opset of the default domain.
    pub opset: i64,
    /// How the operator is written.
    pub emit: Emit,
    /// Every name in the model: none may be given a second time.
    pub names: &'a BTreeSet<&'m str>,
}

impl Context<'_, '_> {
    /// `/module`, or that with a suffix under which the model has nothing yet.
    pub(super) fn prefix(&self, module: &str) -> String {
        let below = |prefix: &str| {
            let folder = format!("{prefix}/");
            let next = self.names.range(folder.as_str()..).next();
            next.is_some_and(|n| n.starts_with(&folder))
        };
        let mut prefix = format!("/{module}");
        while below(&prefix) {
            prefix += SUFFIX;
        }
        prefix
    }

    /// `name`, or that with a suffix if the model has it already.
    pub(super) fn fresh(&self, mut name: String) -> String {
        while self.names.contains(name.as_str()) {
            name += SUFFIX;
        }
        name
    }
}

/// Tells new names from those that the model has.
pub(crate) const SUFFIX: &str = ".linfusion";

/// Where a site's weights come from.
pub enum Weights<'a> {
    /// A checkpoint's module replaces projections and MLPs.
    Module {
        /// The checkpoint.
        checkpoint: &'a Checkpoint,
        /// The module in it.
        module: &'a CheckpointModule,
    },
    /// The graph's own projections, F = 0: for measuring speed only.
    Graph,
}

/// A site's replacement, to be applied as one.
pub struct Patch {
    /// New nodes in topological order; they make the value that `replaced` made.
    pub nodes: Vec<NodeProto>,
    /// New weights.
    pub initializers: Vec<TensorProto>,
    /// Declared types of new values.
    pub value_info: Vec<ValueInfoProto>,
    /// The node whose output the new nodes make instead; they go to its place.
    pub replaced: NodeId,
    /// Inputs of other nodes that change: node, slot, value.
    pub inputs: Vec<(NodeId, usize, String)>,
    /// Values that have the shape of x, whose Shape may be read from x instead.
    pub shape_source: String,
    /// The LinFusion attention in it.
    pub linear: Option<LinearPart>,
    /// The window attention in it.
    pub window: Option<WindowPart>,
    /// The value that the new nodes make.
    pub target: String,
    /// Weights that left the range of the element type: name and how many values.
    pub overflows: Vec<(String, usize)>,
}

/// A LinFusion attention of a patch, by the names of its values.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearPart {
    /// What its projections read, as `[B, N, C]`.
    pub tokens: String,
    /// q, k and v of the operator.
    pub qkv: [String; 3],
    /// Its output.
    pub attended: String,
    /// The out projection's result as `[B, N, C]`, where it was replaced, and
    /// whether its bias is in it.
    pub projected: Option<(String, bool)>,
    /// Heads.
    pub heads: i64,
    /// The module of the checkpoint that its weights come from.
    pub weights: Option<CheckpointModule>,
}

/// Why a site cannot be rewritten.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// Checkpoint and site disagree.
    #[error(
        "{module}: the checkpoint has width {found_dim} with {found_heads} heads, the graph has width {dim} with {heads} heads ({anchor}); is the checkpoint for this model?"
    )]
    Mismatch {
        /// The module.
        module: String,
        /// The site's anchor.
        anchor: String,
        /// Width in the graph.
        dim: i64,
        /// Heads in the graph.
        heads: i64,
        /// Width in the checkpoint.
        found_dim: usize,
        /// Heads in the checkpoint.
        found_heads: usize,
    },
    /// The checkpoint's tensors cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The opset cannot express the operator.
    #[error(transparent)]
    Body(#[from] linfusion_ops::body::BodyError),
    /// The graph around the site is not as needed.
    #[error("{anchor}: {reason}")]
    Graph {
        /// The site's anchor.
        anchor: String,
        /// What is missing.
        reason: String,
    },
}

/// Builds the replacement of one site.
///
/// # Errors
/// [`SiteError`].
pub fn patch(
    context: &Context<'_, '_>,
    site: &Plain<'_>,
    anchor: &str,
    module: &str,
    weights: &Weights<'_>,
) -> Result<Patch, SiteError> {
    let fail = |reason: String| SiteError::Graph {
        anchor: anchor.to_owned(),
        reason,
    };
    let element = ElementType::from_onnx(site.element)
        .ok_or_else(|| fail(format!("element type {} is not supported", site.element)))?;
    let mut b = Builder::new(context, site, element, module);
    let (target, layout) = match (weights, &site.out) {
        (Weights::Graph, _) => (site.merged, &site.merged_layout),
        (Weights::Module { .. }, Some(out)) => (out.result, &out.layout),
        (Weights::Module { .. }, None) => {
            return Err(fail(format!(
                "no single linear layer reads the attention's output '{}'",
                site.merged
            )));
        }
    };
    if let (Weights::Module { .. }, Some(obstacle)) =
        (weights, site.out.as_ref().and_then(|o| o.obstacle.as_ref()))
    {
        return Err(fail(obstacle.clone()));
    }
    let port = context
        .graph
        .producer(target)
        .ok_or_else(|| fail(format!("no node makes '{target}'")))?;
    if context
        .graph
        .node(port.node)
        .output
        .iter()
        .filter(|o| !o.is_empty())
        .count()
        > 1
    {
        return Err(fail(format!(
            "'{}' has several outputs",
            label(context.graph.node(port.node))
        )));
    }
    let made = context.shapes.fact(target).element;
    if made != Some(site.element) {
        return Err(b.fail(format!(
            "'{target}' has element type {made:?}, x '{}' has {}: types change inside the attention module",
            site.x, site.element
        )));
    }
    let x = b.tokens(site.x, &site.x_layout, "x")?;
    let qkv = match weights {
        Weights::Graph => b.graph_projections(&x)?,
        Weights::Module { checkpoint, module } => {
            check_module(site, anchor, module)?;
            b.checkpoint_projections(&x, checkpoint, module)?
        }
    };
    let attended = b.attention(&qkv, Some(site.x))?;
    let mut out = attended.clone();
    let mut layout = layout;
    if let Weights::Module { checkpoint, module } = weights {
        if *layout == Layout::Rows {
            // Before the layer: engines want a 2-D layer as one Gemm.
            out = b.rows(&out);
            layout = &Layout::Tokens;
        }
        out = b.out_projection(&out, checkpoint, module)?;
    }
    b.finish(&out, target, layout)?;
    // The last node was given the replaced value's name.
    let named = |value: String| {
        if b.nodes.iter().any(|n| n.output.first() == Some(&value)) {
            value
        } else {
            target.to_owned()
        }
    };
    let attended = named(attended);
    let later_bias = site.out.as_ref().is_some_and(|o| o.later_bias.is_some());
    let projected = match weights {
        Weights::Module { .. } => Some((named(out), !later_bias)),
        Weights::Graph => None,
    };
    let weights = match weights {
        Weights::Module { module, .. } => Some((*module).clone()),
        Weights::Graph => None,
    };
    Ok(Patch {
        linear: Some(LinearPart {
            tokens: x,
            qkv,
            attended,
            projected,
            heads: site.heads,
            weights,
        }),
        window: None,
        target: target.to_owned(),
        nodes: b.nodes,
        initializers: b.initializers,
        value_info: b.value_info,
        replaced: port.node,
        inputs: b.inputs,
        shape_source: site.x.to_owned(),
        overflows: b.overflows,
    })
}

pub(super) fn check_module(
    site: &Plain<'_>,
    anchor: &str,
    module: &CheckpointModule,
) -> Result<(), SiteError> {
    let same = |a: i64, b: usize| i64::try_from(b).is_ok_and(|b| a == b);
    let out_width = site.out.as_ref().map_or(site.width, |o| o.width);
    if same(site.width, module.dim) && same(out_width, module.dim) && same(site.heads, module.heads)
    {
        return Ok(());
    }
    Err(SiteError::Mismatch {
        module: module.module_name.clone(),
        anchor: anchor.to_owned(),
        dim: site.width,
        heads: site.heads,
        found_dim: module.dim,
        found_heads: module.heads,
    })
}
