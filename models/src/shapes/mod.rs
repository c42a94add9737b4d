//! Concrete shape propagation: the graph is walked once with one size for every
//! dynamic dimension, and the shape arithmetic that exporters leave behind is
//! evaluated on the way. What comes out is the exact shape of every value at
//! that size, the number behind every run-time scale, and which values are
//! constants. No weight is read beyond tensors of [`SMALL`] elements.

pub mod eval;
mod footprint;
mod probe;
mod rules;
pub use rules::einsum_terms;
pub mod value;
mod walk;
mod work;

use std::collections::{HashMap, HashSet};

use crate::onnx::proto::{
    self, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};
use bytes::Bytes;

pub use footprint::{Footprint, Halves, Runner};
pub use probe::{Probe, looks_like_text};
pub use value::{Elements, Fact};
pub use walk::Walk;
pub use work::operations;

use crate::graph::{Graph, default_opset, domain, op, subgraphs, tensor_name};

/// Tensors up to this many elements are evaluated, not only shaped.
pub const SMALL: i64 = 1024;

/// Reads the little-endian bytes of a tensor, wherever they are stored.
/// `None` where they cannot be had (the data file is not there).
pub type TensorReader<'a> = &'a dyn Fn(&TensorProto) -> Option<Bytes>;

/// The facts of every value of a graph, by name.
pub struct Shapes {
    facts: HashMap<String, Fact>,
    opset: i64,
    defaults: HashSet<String>,
    inside: HashMap<String, u64>,
}

static UNKNOWN: Fact = Fact {
    shape: None,
    element: None,
    elements: None,
    constant: false,
};

impl Shapes {
    /// Propagates `probe` through the main graph of `model`.
    #[must_use]
    pub fn propagate(model: &ModelProto, read: TensorReader<'_>, probe: &Probe) -> Self {
        Self::with(model, read, |graph, symbols, facts| {
            probe.bind(graph, symbols, facts);
        })
    }

    /// Propagates given shapes of the inputs; inputs that are not given keep their declared ones.
    #[must_use]
    pub fn at(model: &ModelProto, read: TensorReader<'_>, inputs: &[(&str, &[i64])]) -> Self {
        Self::with(model, read, |graph, symbols, facts| {
            for input in &graph.input {
                let name = input.name.as_deref().unwrap_or("");
                let Some((element, dims)) = tensor_type(input) else {
                    continue;
                };
                let dims = dims.unwrap_or_default();
                let declared = dims.iter().map(|d| match d {
                    Dim::Value(v) => Some(*v),
                    _ => None,
                });
                if let Some(shape) = declared.collect::<Option<Vec<i64>>>() {
                    facts.insert(name.to_owned(), Fact::shaped(shape, element));
                }
                if let Some((_, shape)) = inputs.iter().find(|(n, _)| *n == name) {
                    for (dim, size) in dims.iter().zip(*shape) {
                        if let Dim::Symbol(symbol) = dim {
                            symbols.insert((*symbol).to_owned(), *size);
                        }
                    }
                    facts.insert(name.to_owned(), Fact::shaped(shape.to_vec(), element));
                }
            }
        })
    }

    fn with(
        model: &ModelProto,
        read: TensorReader<'_>,
        bind: impl FnOnce(&GraphProto, &mut HashMap<String, i64>, &mut HashMap<String, Fact>),
    ) -> Self {
        let graph = &*model.graph;
        let mut env = Env {
            facts: HashMap::with_capacity(graph.node.len() * 2),
            symbols: HashMap::new(),
            functions: functions(model),
            read,
            depth: 0,
            inside: HashMap::new(),
        };
        bind(graph, &mut env.symbols, &mut env.facts);
        env.graph(graph);
        // From IR version 4 on, a stored tensor that is also an input is a default.
        let inputs: HashSet<&str> = (graph.input.iter())
            .filter(|_| model.ir_version.unwrap_or(0) >= 4)
            .filter_map(|v| v.name.as_deref())
            .collect();
        let stored = graph.initializer.iter().map(tensor_name);
        Shapes {
            facts: env.facts,
            opset: default_opset(model).unwrap_or(0),
            defaults: stored
                .filter(|n| inputs.contains(n))
                .map(str::to_owned)
                .collect(),
            inside: env.inside,
        }
    }

    /// Bytes that the values within a call of a model-local function take at most.
    fn inside(&self, node: &NodeProto) -> u64 {
        let output = node.output.first().map_or("", String::as_str);
        self.inside.get(output).copied().unwrap_or(0)
    }

    /// Learns what is unknown here from the graph that this one's graph was made of, at the same sizes: a value that has kept its
    /// name has kept its shape, and its numbers where those follow from sizes.
    pub fn learn_from(&mut self, original: &Shapes) {
        for (name, fact) in &mut self.facts {
            if let (None, Some(known)) = (&fact.shape, original.facts.get(name)) {
                *fact = known.clone();
            }
        }
    }

    /// Forgets the numbers that depend on the sizes of the probe, which `other` has other
    /// ones of: a scale or a mask that is known at one size is not known.
    pub fn forget_what_varies(&mut self, graph: &Graph<'_>, other: &Shapes) {
        let differs = |v: &str| match (&self.fact(v).elements, &other.fact(v).elements) {
            (None, _) => false,
            (here, there) => here != there,
        };
        let mut decided: HashSet<&str> = HashSet::new();
        let mut varies: Vec<&str> = Vec::new();
        for index in execution_order(graph.proto) {
            let Some(node) = graph.proto.node.get(index) else {
                continue;
            };
            let inputs = || node.input.iter().map(String::as_str);
            // A comparison may come out alike at both probes and not at others.
            let decides = matches!(
                op(node),
                "Equal"
                    | "Less"
                    | "LessOrEqual"
                    | "Greater"
                    | "GreaterOrEqual"
                    | "Where"
                    | "Min"
                    | "Max"
                    | "Clip"
                    | "Sign"
                    | "Floor"
                    | "Ceil"
                    | "Round"
                    | "Mod"
            );
            let taints = inputs().any(|v| decided.contains(v) || (decides && differs(v)));
            for output in node.output.iter().map(String::as_str) {
                // Large values are data: only their shapes are known, by value.
                if taints && self.fact(output).elements.is_some() {
                    decided.insert(output);
                }
                if taints || differs(output) {
                    varies.push(output);
                }
            }
        }
        for name in varies {
            if let Some(fact) = self.facts.get_mut(name)
                && fact
                    .element
                    .is_none_or(|e| eval::element::is_float(e) || e == eval::element::BOOL)
            {
                fact.elements = None;
            }
        }
    }

    /// Opset of the default domain; 0 if the model imports none.
    #[must_use]
    pub fn opset(&self) -> i64 {
        self.opset
    }

    /// Whether `value` is stored in the model, but a caller may give another.
    #[must_use]
    pub fn is_default(&self, value: &str) -> bool {
        self.defaults.contains(value)
    }

    /// What is known of `value`; an empty fact if nothing is.
    #[must_use]
    pub fn fact(&self, value: &str) -> &Fact {
        self.facts.get(value).unwrap_or(&UNKNOWN)
    }

    /// The shape of `value`, if known.
    #[must_use]
    pub fn shape(&self, value: &str) -> Option<&[i64]> {
        self.fact(value).shape.as_deref()
    }

    /// The shape a value has under `Shapes` that does not list it in
    /// `value_info`: every name with a fact, for tests and listings.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.facts.keys().map(String::as_str)
    }
}

/// The model-local functions, by domain and name.
fn functions(model: &ModelProto) -> HashMap<(&str, &str), &FunctionProto> {
    (model.functions.iter())
        .map(|f| {
            let domain = f.domain.as_deref().unwrap_or("");
            ((domain, f.name.as_deref().unwrap_or("")), f)
        })
        .collect()
}

/// Nesting limit for subgraphs and functions: deeper models are malformed.
const MAX_DEPTH: usize = 16;

/// The nodes so that each comes after those that make its inputs, and otherwise in file
/// order: some tools append what belongs to the front, and ONNX Runtime sorts as well.
#[must_use]
pub fn execution_order(graph: &GraphProto) -> Vec<usize> {
    let mut makers: HashMap<&str, usize> = HashMap::new();
    for (index, node) in graph.node.iter().enumerate() {
        let named = node.output.iter().filter(|o| !o.is_empty());
        makers.extend(named.map(|o| (o.as_str(), index)));
    }
    let above = |index: usize| {
        let inputs = graph.node.get(index).map_or(&[][..], |n| &n.input);
        inputs
            .iter()
            .filter_map(|i| makers.get(i.as_str()).copied())
    };
    if (0..graph.node.len()).all(|i| above(i).all(|m| m < i)) {
        return (0..graph.node.len()).collect();
    }
    let mut order = Vec::with_capacity(graph.node.len());
    let mut entered = vec![false; graph.node.len()];
    for start in 0..graph.node.len() {
        let mut stack = vec![(start, false)];
        while let Some((index, ready)) = stack.pop() {
            if ready {
                order.push(index);
                continue;
            }
            // In a cycle, which is no model, whatever was entered counts as made.
            if std::mem::replace(&mut entered[index], true) {
                continue;
            }
            stack.push((index, true));
            stack.extend(above(index).filter(|&m| !entered[m]).map(|m| (m, false)));
        }
    }
    order
}

struct Env<'m> {
    facts: HashMap<String, Fact>,
    symbols: HashMap<String, i64>,
    functions: HashMap<(&'m str, &'m str), &'m FunctionProto>,
    read: TensorReader<'m>,
    depth: usize,
    /// What the values of function calls take, by the call's first output.
    inside: HashMap<String, u64>,
}

impl Env<'_> {
    fn graph(&mut self, graph: &GraphProto) {
        let declared: HashMap<&str, &ValueInfoProto> = graph
            .value_info
            .iter()
            .chain(&graph.output)
            .filter_map(|v| Some((v.name.as_deref()?, v)))
            .collect();
        for tensor in &graph.initializer {
            let fact = tensor_fact(tensor, self.read);
            self.facts.insert(tensor_name(tensor).to_owned(), fact);
        }
        for index in execution_order(graph) {
            if let Some(node) = graph.node.get(index) {
                self.node(node, &declared);
            }
        }
    }

    fn node(&mut self, node: &NodeProto, declared: &HashMap<&str, &ValueInfoProto>) {
        let mut outputs = match (domain(node), op(node)) {
            ("", "If") => self.if_branch(node),
            ("", "Constant") => vec![rules::constant_node(node, self.read)],
            key => match self.functions.get(&key).copied() {
                Some(f) if rules::is_foreign(key.0) => self.call(f, node),
                _ => self.apply(node),
            },
        };
        outputs.resize(node.output.len(), Fact::default());
        for (name, mut fact) in node.output.iter().zip(outputs) {
            if name.is_empty() {
                continue;
            }
            if let Some(info) = declared.get(name.as_str()) {
                let (shape, element) = self.declared(info);
                fact.shape = fact.shape.or(shape);
                fact.element = fact.element.or(element);
            }
            self.facts.insert(name.clone(), fact);
        }
    }

    fn apply(&self, node: &NodeProto) -> Vec<Fact> {
        let inputs: Vec<&Fact> = node
            .input
            .iter()
            .map(|n| self.facts.get(n.as_str()).unwrap_or(&UNKNOWN))
            .collect();
        let mut outputs = rules::infer(node, &inputs);
        let constant = !inputs.is_empty()
            && node
                .input
                .iter()
                .zip(&inputs)
                .all(|(n, f)| n.is_empty() || f.constant);
        eval::evaluate(node, &inputs, &mut outputs);
        for out in &mut outputs {
            out.constant = constant;
        }
        outputs
    }

    /// The branch that is taken if the condition is known, else the first whose
    /// outputs have shapes.
    fn if_branch(&mut self, node: &NodeProto) -> Vec<Fact> {
        if self.depth >= MAX_DEPTH {
            return Vec::new();
        }
        let condition = node
            .input
            .first()
            .and_then(|n| self.facts.get(n.as_str())?.scalar());
        let wanted = condition.map(|c| {
            if c != 0.0 {
                "then_branch"
            } else {
                "else_branch"
            }
        });
        let mut best = Vec::new();
        for attr in &node.attribute {
            let Some(branch) = attr.g.as_option() else {
                continue;
            };
            if wanted.is_some() && attr.name.as_deref() != wanted {
                continue;
            }
            self.depth += 1;
            self.graph(branch);
            self.depth -= 1;
            let facts: Vec<Fact> = branch
                .output
                .iter()
                .map(|o| {
                    self.facts
                        .get(o.name.as_deref().unwrap_or(""))
                        .cloned()
                        .unwrap_or_default()
                })
                .collect();
            if best.is_empty() || facts.iter().all(|f| f.shape.is_some()) {
                best = facts;
            }
        }
        best
    }

    /// A model-local function, evaluated with its own names.
    fn call(&mut self, function: &FunctionProto, node: &NodeProto) -> Vec<Fact> {
        if self.depth >= MAX_DEPTH {
            return Vec::new();
        }
        let mut facts = HashMap::new();
        for (formal, actual) in function.input.iter().zip(&node.input) {
            if let Some(f) = self.facts.get(actual.as_str()) {
                facts.insert(formal.clone(), f.clone());
            }
        }
        let outer = std::mem::replace(&mut self.facts, facts);
        let outer_calls = std::mem::take(&mut self.inside);
        self.depth += 1;
        for inner in &function.node {
            self.node(
                &rules::bind_attributes(inner, function, node),
                &HashMap::new(),
            );
        }
        self.depth -= 1;
        let inner = std::mem::replace(&mut self.facts, outer);
        let calls = std::mem::replace(&mut self.inside, outer_calls);
        let nodes: Vec<&NodeProto> = function.node.iter().collect();
        let peak = footprint::peak(
            &nodes,
            std::iter::empty(),
            function.output.iter().map(String::as_str),
            &|name| inner.get(name).cloned().unwrap_or_default(),
            &|node| {
                node.output
                    .first()
                    .and_then(|o| calls.get(o))
                    .copied()
                    .unwrap_or(0)
            },
        );
        if let Some(output) = node.output.first() {
            self.inside.insert(output.clone(), peak.bytes);
        }
        function
            .output
            .iter()
            .map(|o| inner.get(o).cloned().unwrap_or_default())
            .collect()
    }

    fn declared(&self, info: &ValueInfoProto) -> (Option<Vec<i64>>, Option<i32>) {
        let Some((element, shape)) = tensor_type(info) else {
            return (None, None);
        };
        let dims = shape.map(|dims| {
            dims.iter()
                .map(|d| match d {
                    Dim::Value(v) => Some(*v),
                    Dim::Symbol(s) => self.symbols.get(*s).copied(),
                    Dim::Unknown => None,
                })
                .collect::<Option<Vec<_>>>()
        });
        (dims.flatten(), element)
    }
}

/// A declared dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dim<'m> {
    /// A fixed size.
    Value(i64),
    /// A named size.
    Symbol(&'m str),
    /// Nothing said.
    Unknown,
}

/// Element type and declared dimensions of a tensor-typed value.
#[must_use]
pub fn tensor_type(info: &ValueInfoProto) -> Option<(Option<i32>, Option<Vec<Dim<'_>>>)> {
    use proto::__buffa::oneof::{
        tensor_shape_proto::dimension::Value as D, type_proto::Value as T,
    };
    let T::TensorType(tensor) = info.r#type.as_option()?.value.as_ref()? else {
        return None;
    };
    let dims = tensor.shape.as_option().map(|s| {
        s.dim
            .iter()
            .map(|d| match &d.value {
                Some(D::DimValue(v)) => Dim::Value(*v),
                Some(D::DimParam(p)) if !p.is_empty() => Dim::Symbol(p),
                _ => Dim::Unknown,
            })
            .collect()
    });
    Some((tensor.elem_type, dims))
}

/// The fact of a stored tensor; its elements are read if it is small.
fn tensor_fact(tensor: &TensorProto, read: TensorReader<'_>) -> Fact {
    let mut fact = Fact::shaped(tensor.dims.clone(), tensor.data_type);
    fact.constant = true;
    if fact.count().is_some_and(|n| n <= SMALL) {
        fact.elements = read(tensor).and_then(|b| eval::decode(tensor.data_type?, &b));
    }
    fact
}

/// Whether the node or anything nested in it could hide attention: it has
/// subgraphs.
#[must_use]
pub fn has_subgraphs(node: &NodeProto) -> bool {
    subgraphs(node).next().is_some()
}
