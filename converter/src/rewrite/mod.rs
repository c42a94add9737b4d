//! Rewriting: each planned site becomes a patch, all patches are applied to the
//! model at once, and what only the old nodes used is removed.

mod builder;
pub mod emit;
mod layers;
mod module;
mod prune;
pub mod site;
pub(crate) mod weights;
pub mod window;

use std::collections::{BTreeMap, HashMap, HashSet};

use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto};
use linfusion_models::onnx::{ElementType, make};
use linfusion_ops::body::WindowVariant;

pub use emit::Emit;
pub use prune::Pruned;
pub(crate) use prune::prune;
pub use site::{Patch, SiteError};

use crate::graph::{Graph, domain, op};
use crate::shapes::Shapes;

/// Applies `patches` to `model`. `old` and `again` are the shapes of the model
/// before, at two probes: a Shape of a value that is going away may be read from
/// x only where both have the same shape.
pub fn apply(model: &mut ModelProto, patches: Vec<Patch>, old: &Shapes, again: &Shapes) -> Pruned {
    let mut orphans: Vec<String> = Vec::new();
    let graph = model.graph.get_or_insert_default();
    let rerooted = reroot_shapes(graph, &patches, old, again);
    let mut insert: BTreeMap<usize, Vec<NodeProto>> = BTreeMap::new();
    for patch in patches {
        insert.insert(patch.replaced.0, patch.nodes);
        graph.initializer.extend(patch.initializers);
        graph.value_info.extend(patch.value_info);
        for (node, slot, value) in patch.inputs {
            if let Some(input) = graph
                .node
                .get_mut(node.0)
                .and_then(|n| n.input.get_mut(slot))
            {
                orphans.push(std::mem::replace(input, value));
            }
        }
    }
    let old_nodes = std::mem::take(&mut graph.node);
    for (index, node) in old_nodes.into_iter().enumerate() {
        match insert.remove(&index) {
            Some(new) => {
                orphans.extend(node.input);
                graph.node.extend(new);
            }
            None => graph.node.push(node),
        }
    }
    orphans.extend(rerooted);
    prune::prune(graph, orphans)
}

/// Shape arithmetic elsewhere in the graph may read tensors that are going
/// away (optimizers share it between sites) and would keep them alive: where
/// the old tensor had x's shape, the Shape is taken of x.
fn reroot_shapes(
    graph: &mut GraphProto,
    patches: &[Patch],
    old: &Shapes,
    again: &Shapes,
) -> Vec<String> {
    let mut moves: HashMap<usize, String> = HashMap::new();
    {
        let index = Graph::new(graph);
        for patch in patches {
            let replaced = index.node(patch.replaced);
            let x = patch.shape_source.as_str();
            let first_use = index.producer(x).map_or(0, |p| p.node.0 + 1);
            let mut queue: Vec<&str> = replaced.input.iter().map(String::as_str).collect();
            let mut seen = HashSet::new();
            while let Some(value) = queue.pop() {
                // x itself and what lies above it stay.
                if value == x || !seen.insert(value) || seen.len() > 600 {
                    continue;
                }
                let Some(port) = index.producer(value) else {
                    continue;
                };
                if port.node.0 < first_use {
                    continue;
                }
                let same = |s: &Shapes| s.shape(value).is_some() && s.shape(value) == s.shape(x);
                if same(old) && same(again) {
                    for reader in index.readers(value) {
                        if op(index.node(reader.node)) == "Shape"
                            && domain(index.node(reader.node)).is_empty()
                        {
                            moves.insert(reader.node.0, x.to_owned());
                        }
                    }
                }
                queue.extend(index.node(port.node).input.iter().map(String::as_str));
            }
        }
    }
    let mut orphans = Vec::new();
    for (node, x) in moves {
        if let Some(input) = graph.node.get_mut(node).and_then(|n| n.input.first_mut()) {
            orphans.push(std::mem::replace(input, x));
        }
    }
    orphans.sort();
    orphans
}

/// Before IR version 4 every stored tensor must be listed as an input as well, and
/// new ones are not: raises the version, and takes the stored tensors off the
/// inputs, where from then on a caller could replace them.
fn raise_ir(model: &mut ModelProto, version: i64) {
    let old = model.ir_version.unwrap_or(0);
    if old < 4 {
        let graph = model.graph.get_or_insert_default();
        let stored: HashSet<String> = graph
            .initializer
            .iter()
            .filter_map(|t| t.name.clone())
            .collect();
        graph
            .input
            .retain(|v| !stored.contains(v.name.as_deref().unwrap_or("")));
    }
    model.ir_version = Some(old.max(version));
}

/// Which of the operators a model uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// LinFusionAttention.
    pub linear: bool,
    /// WindowAttention, in the form that one function can have.
    pub window: Option<WindowVariant>,
}

/// Adds the operators' domain and, for [`Emit::Function`], their functions.
///
/// # Errors
/// The model's opset cannot express a function.
pub fn declare_operators(
    model: &mut ModelProto,
    emit: Emit,
    used: Used,
    opset: i64,
    element: ElementType,
) -> Result<(), linfusion_ops::body::BodyError> {
    // Model-local functions came with IR version 8.
    raise_ir(model, if emit == Emit::Function { 8 } else { 4 });
    if emit == Emit::Standard {
        return Ok(());
    }
    let (domain, version) = emit::domain_version();
    if !model
        .opset_import
        .iter()
        .any(|o| o.domain.as_deref() == Some(domain))
    {
        model.opset_import.push(make::opset(domain, version));
    }
    if emit == Emit::Function {
        if used.linear {
            model.functions.push(emit::linear_function(opset, element)?);
        }
        if let Some(variant) = used.window {
            model
                .functions
                .push(emit::window_function(variant, opset, element)?);
        }
    }
    Ok(())
}
