//! How much a model may ask of us before we refuse it.

use super::ReadError;
use super::proto::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto};

/// Bounds on what a decoded model may hold.
///
/// A protobuf message can expand in memory to a hundred times its size on disk,
/// and every later pass is at least linear in these numbers. The defaults are an
/// order of magnitude above the largest diffusion graphs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nesting of protobuf messages. A subgraph costs three levels.
    pub message_depth: u32,
    /// Nesting of graphs (`If`, `Loop`, `Scan` bodies); the main graph is level 1.
    pub graph_depth: usize,
    /// Nodes in the graph, its subgraphs and all functions together.
    pub nodes: usize,
    /// Length in bytes of one name (value, node, operator, domain, attribute).
    pub name_bytes: usize,
    /// Memory, in bytes, of the decoded structure without tensor contents.
    pub structure_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_depth: 100,
            graph_depth: 24,
            nodes: 1_000_000,
            name_bytes: 16 * 1024,
            structure_bytes: 1 << 30,
        }
    }
}

impl Limits {
    /// Checks the counts that the protobuf decoder cannot bound itself.
    pub(super) fn check(&self, model: &ModelProto) -> Result<(), ReadError> {
        let mut tally = Tally {
            limits: self,
            nodes: 0,
        };
        if let Some(graph) = model.graph.as_option() {
            tally.graph(graph, 1)?;
        }
        for function in &model.functions {
            tally.function(function)?;
        }
        for training in &model.training_info {
            for graph in [&training.initialization, &training.algorithm] {
                if let Some(graph) = graph.as_option() {
                    tally.graph(graph, 1)?;
                }
            }
        }
        Ok(())
    }
}

struct Tally<'a> {
    limits: &'a Limits,
    nodes: usize,
}

impl Tally<'_> {
    fn graph(&mut self, graph: &GraphProto, depth: usize) -> Result<(), ReadError> {
        if depth > self.limits.graph_depth {
            return Err(ReadError::TooDeep {
                limit: self.limits.graph_depth,
            });
        }
        for tensor in &graph.initializer {
            self.name(tensor.name.as_deref())?;
        }
        for value in graph
            .input
            .iter()
            .chain(&graph.output)
            .chain(&graph.value_info)
        {
            self.name(value.name.as_deref())?;
        }
        self.node_list(&graph.node, depth)
    }

    fn function(&mut self, function: &FunctionProto) -> Result<(), ReadError> {
        self.name(function.name.as_deref())?;
        self.name(function.domain.as_deref())?;
        for name in function.input.iter().chain(&function.output) {
            self.name(Some(name))?;
        }
        self.node_list(&function.node, 1)
    }

    fn node_list(&mut self, nodes: &[NodeProto], depth: usize) -> Result<(), ReadError> {
        self.nodes = self.nodes.saturating_add(nodes.len());
        if self.nodes > self.limits.nodes {
            return Err(ReadError::TooManyNodes {
                limit: self.limits.nodes,
            });
        }
        for node in nodes {
            self.name(node.name.as_deref())?;
            self.name(node.op_type.as_deref())?;
            self.name(node.domain.as_deref())?;
            for name in node.input.iter().chain(&node.output) {
                self.name(Some(name))?;
            }
            for attribute in &node.attribute {
                self.attribute(attribute, depth)?;
            }
        }
        Ok(())
    }

    fn attribute(&mut self, attribute: &AttributeProto, depth: usize) -> Result<(), ReadError> {
        self.name(attribute.name.as_deref())?;
        for graph in attribute.g.as_option().into_iter().chain(&attribute.graphs) {
            self.graph(graph, depth + 1)?;
        }
        Ok(())
    }

    fn name(&self, name: Option<&str>) -> Result<(), ReadError> {
        match name {
            Some(name) if name.len() > self.limits.name_bytes => Err(ReadError::NameTooLong {
                start: name.chars().take(40).collect(),
                length: name.len(),
                limit: self.limits.name_bytes,
            }),
            _ => Ok(()),
        }
    }
}
