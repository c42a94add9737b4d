//! Shape propagation driven from outside, node by node: for passes that decide on the way what a
//! constant of the graph means.

use std::collections::HashMap;

use super::{Env, Fact, TensorReader, UNKNOWN, functions, tensor_fact, tensor_type};
use crate::graph::tensor_name;
use crate::onnx::proto::{ModelProto, NodeProto};

/// The facts of a graph's values so far. Declared shapes of inner values are not consulted: they
/// hold at the size of the export only.
pub struct Walk<'m> {
    env: Env<'m>,
}

impl<'m> Walk<'m> {
    /// Begins with the stored tensors of `model`'s graph and `inputs`, by name; inputs that are not
    /// given are unknown.
    #[must_use]
    pub fn new(
        model: &'m ModelProto,
        read: TensorReader<'m>,
        inputs: &[(String, Vec<i64>)],
    ) -> Self {
        let mut env = Env {
            facts: HashMap::with_capacity(model.graph.node.len() * 2),
            symbols: HashMap::new(),
            functions: functions(model),
            read,
            depth: 0,
            inside: HashMap::new(),
        };
        for tensor in &model.graph.initializer {
            let fact = tensor_fact(tensor, read);
            env.facts.insert(tensor_name(tensor).to_owned(), fact);
        }
        for info in &model.graph.input {
            let name = info.name.as_deref().unwrap_or("");
            if let Some((_, shape)) = inputs.iter().find(|(n, _)| n == name) {
                let element = tensor_type(info).and_then(|(element, _)| element);
                env.facts
                    .insert(name.to_owned(), Fact::shaped(shape.clone(), element));
            }
        }
        Walk { env }
    }

    /// Evaluates `node`, whose inputs were made before.
    pub fn step(&mut self, node: &NodeProto) {
        self.env.node(node, &HashMap::new());
    }

    /// Says what `value` is, whatever was known of it.
    pub fn assume(&mut self, value: &str, fact: Fact) {
        self.env.facts.insert(value.to_owned(), fact);
    }

    /// What is known of `value`.
    #[must_use]
    pub fn fact(&self, value: &str) -> &Fact {
        self.env.facts.get(value).unwrap_or(&UNKNOWN)
    }
}
