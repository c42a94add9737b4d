//! A read-only index over one ONNX graph: who makes a value, who reads it, and
//! which values are constants.

use std::collections::{HashMap, HashSet};

use crate::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
pub use crate::onnx::{
    attr as attribute, attr_f as attr_float, attr_i as attr_int, attr_ints, attr_s as attr_str,
};

/// Position of a node in `GraphProto.node` (which ONNX requires to be in
/// topological order).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub usize);

/// One output slot of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Port {
    /// The node.
    pub node: NodeId,
    /// Index into its inputs or outputs.
    pub slot: usize,
}

/// The opset of the default domain that `model` imports.
#[must_use]
pub fn default_opset(model: &ModelProto) -> Option<i64> {
    model
        .opset_import
        .iter()
        .find(|o| matches!(o.domain.as_deref().unwrap_or(""), "" | "ai.onnx"))
        .and_then(|o| o.version)
}

/// Index over a graph. Borrows the protobuf; build it anew after a rewrite.
pub struct Graph<'m> {
    /// The graph that is indexed.
    pub proto: &'m GraphProto,
    producers: HashMap<&'m str, Port>,
    readers: HashMap<&'m str, Vec<Port>>,
    captured: HashSet<&'m str>,
    initializers: HashMap<&'m str, &'m TensorProto>,
    outputs: HashSet<&'m str>,
}

impl<'m> Graph<'m> {
    /// Indexes `proto`.
    #[must_use]
    pub fn new(proto: &'m GraphProto) -> Self {
        let mut graph = Graph {
            proto,
            producers: HashMap::with_capacity(proto.node.len()),
            readers: HashMap::with_capacity(proto.node.len()),
            captured: HashSet::new(),
            initializers: proto
                .initializer
                .iter()
                .map(|t| (tensor_name(t), t))
                .collect(),
            outputs: proto
                .output
                .iter()
                .filter_map(|v| v.name.as_deref())
                .collect(),
        };
        for (i, node) in proto.node.iter().enumerate() {
            let id = NodeId(i);
            for (slot, name) in node
                .output
                .iter()
                .enumerate()
                .filter(|(_, n)| !n.is_empty())
            {
                graph.producers.insert(name, Port { node: id, slot });
            }
            for (slot, name) in node.input.iter().enumerate().filter(|(_, n)| !n.is_empty()) {
                graph
                    .readers
                    .entry(name)
                    .or_default()
                    .push(Port { node: id, slot });
            }
            for sub in subgraphs(node) {
                collect_captures(sub, &mut graph.captured);
            }
        }
        graph
    }

    /// All nodes with their ids, in file order.
    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &'m NodeProto)> {
        self.proto
            .node
            .iter()
            .enumerate()
            .map(|(i, n)| (NodeId(i), n))
    }

    /// The node at `id`.
    #[must_use]
    pub fn node(&self, id: NodeId) -> &'m NodeProto {
        &self.proto.node[id.0]
    }

    /// The node and slot that make `value`; `None` for inputs and initializers.
    #[must_use]
    pub fn producer(&self, value: &str) -> Option<Port> {
        self.producers.get(value).copied()
    }

    /// The nodes that read `value` directly (not from inside a subgraph).
    #[must_use]
    pub fn readers(&self, value: &str) -> &[Port] {
        self.readers.get(value).map_or(&[], Vec::as_slice)
    }

    /// Whether something besides the graph's own nodes needs `value`: it is a
    /// graph output or a subgraph captures it.
    #[must_use]
    pub fn is_observed(&self, value: &str) -> bool {
        self.outputs.contains(value) || self.captured.contains(value)
    }

    /// The initializer called `name`.
    #[must_use]
    pub fn initializer(&self, name: &str) -> Option<&'m TensorProto> {
        self.initializers.get(name).copied()
    }

    /// The tensor behind `value` if it is an initializer or the output of a
    /// `Constant` node with a tensor attribute.
    #[must_use]
    pub fn constant(&self, value: &str) -> Option<&'m TensorProto> {
        if let Some(t) = self.initializer(value) {
            return Some(t);
        }
        let node = self.node(self.producer(value)?.node);
        if op(node) != "Constant" {
            return None;
        }
        attribute(node, "value").and_then(|a| a.t.as_option())
    }

    /// The value at input `slot` of `node`, `None` if absent or empty.
    #[must_use]
    pub fn input(&self, node: NodeId, slot: usize) -> Option<&'m str> {
        input(self.node(node), slot)
    }
}

/// The node's operator, domain-qualified unless it is the default domain:
/// `MatMul`, `com.microsoft::FusedMatMul`.
#[must_use]
pub fn qualified_op(node: &NodeProto) -> String {
    match domain(node) {
        "" => op(node).to_owned(),
        d => format!("{d}::{}", op(node)),
    }
}

/// The node's `op_type`.
#[must_use]
pub fn op(node: &NodeProto) -> &str {
    node.op_type.as_deref().unwrap_or("")
}

/// The node's domain, with `ai.onnx` spelled as the empty default domain.
#[must_use]
pub fn domain(node: &NodeProto) -> &str {
    match node.domain.as_deref().unwrap_or("") {
        "ai.onnx" => "",
        d => d,
    }
}

/// The node's name for messages: its own, else that of its first output.
#[must_use]
pub fn label(node: &NodeProto) -> &str {
    match node.name.as_deref() {
        Some(n) if !n.is_empty() => n,
        _ => node.output.first().map_or("(unnamed)", String::as_str),
    }
}

/// The value at input `slot`, `None` if absent or empty.
#[must_use]
pub fn input(node: &NodeProto, slot: usize) -> Option<&str> {
    node.input
        .get(slot)
        .map(String::as_str)
        .filter(|n| !n.is_empty())
}

/// The subgraphs (If, Loop, Scan bodies) of a node.
pub fn subgraphs(node: &NodeProto) -> impl Iterator<Item = &GraphProto> {
    node.attribute
        .iter()
        .flat_map(|a| a.g.as_option().into_iter().chain(a.graphs.iter()))
}

/// What a node and the graphs in it read, values of those graphs included.
pub fn reads(node: &NodeProto) -> Box<dyn Iterator<Item = &str> + '_> {
    let own = node.input.iter().map(String::as_str);
    // The output of a body may be a value around it.
    let nested = subgraphs(node).flat_map(|graph| {
        let outputs = graph.output.iter().filter_map(|v| v.name.as_deref());
        graph.node.iter().flat_map(reads).chain(outputs)
    });
    Box::new(own.chain(nested))
}

/// Every value a graph reads from outside itself, nested graphs included.
/// Over-approximates by names it also defines, which is safe: such a name
/// cannot be defined outside as well.
pub fn collect_captures<'m>(graph: &'m GraphProto, into: &mut HashSet<&'m str>) {
    into.extend(graph.node.iter().flat_map(reads));
    into.extend(graph.output.iter().filter_map(|v| v.name.as_deref()));
}

/// Every name of a value, node or initializer in `graph` and the graphs inside it.
pub fn collect_names<'m>(graph: &'m GraphProto, into: &mut HashSet<&'m str>) {
    let values = graph.input.iter().filter_map(|v| v.name.as_deref());
    into.extend(values.chain(graph.initializer.iter().map(tensor_name)));
    into.extend(
        graph
            .sparse_initializer
            .iter()
            .filter_map(|t| t.values.as_option().map(tensor_name)),
    );
    for node in &graph.node {
        into.extend(node.name.as_deref());
        into.extend(node.output.iter().map(String::as_str));
        for sub in subgraphs(node) {
            collect_names(sub, into);
        }
    }
}

/// The tensor's name, empty if it has none.
#[must_use]
pub fn tensor_name(tensor: &TensorProto) -> &str {
    tensor.name.as_deref().unwrap_or("")
}
