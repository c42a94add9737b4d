//! Names, order and scopes of graphs.

use std::collections::{HashMap, HashSet};

use super::{Fault, Imports, Place, Report};
use crate::onnx::attrs::AttributeKind;
use crate::onnx::proto::__buffa::oneof::tensor_shape_proto::dimension::Value as DimValue;
use crate::onnx::proto::__buffa::oneof::type_proto::Value as TypeValue;
use crate::onnx::proto::{AttributeProto, GraphProto, NodeProto, ValueInfoProto};

pub(super) fn check_main(graph: &GraphProto, imports: &Imports, report: &mut Report) {
    let context = Context {
        imports,
        function_attributes: None,
    };
    check_graph(graph, &context, None, report);
}

/// What the nodes of one graph or function have in common.
pub(super) struct Context<'a> {
    pub imports: &'a Imports<'a>,
    /// Inside a function: the attributes that its nodes may refer to.
    pub function_attributes: Option<&'a HashSet<&'a str>>,
}

/// The values visible at one point of a graph.
pub(super) struct Scope<'a> {
    defined: HashSet<&'a str>,
    /// The outputs of all nodes of this graph, the later ones too.
    computed: HashSet<&'a str>,
    outer: Option<&'a Scope<'a>>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(nodes: &'a [NodeProto], outer: Option<&'a Scope<'a>>) -> Self {
        Self {
            defined: HashSet::new(),
            computed: nodes
                .iter()
                .flat_map(|n| &n.output)
                .map(String::as_str)
                .collect(),
            outer,
        }
    }

    pub(super) fn has_own(&self, name: &str) -> bool {
        self.defined.contains(name)
    }

    fn sees(&self, name: &str) -> bool {
        self.has_own(name) || self.outer.is_some_and(|outer| outer.sees(name))
    }

    fn will_see(&self, name: &str) -> bool {
        self.computed.contains(name) || self.outer.is_some_and(|outer| outer.will_see(name))
    }

    pub(super) fn define(&mut self, name: &'a str, place: &Place, report: &mut Report) {
        if !self.defined.insert(name) {
            report.add(place.clone(), Fault::Redefined(name.to_owned()));
        } else if self.outer.is_some_and(|outer| outer.sees(name)) {
            report.add(place.clone(), Fault::Shadows(name.to_owned()));
        }
    }
}

fn check_graph(graph: &GraphProto, context: &Context, outer: Option<&Scope>, report: &mut Report) {
    let place = Place::Graph(graph.name.clone().unwrap_or_default());
    let mut scope = Scope::new(&graph.node, outer);
    let mut inputs = HashSet::new();
    for value in &graph.input {
        let name = value.name.as_deref().unwrap_or_default();
        check_declared(value, &place, report);
        inputs.insert(name);
        scope.define(name, &place, report);
    }
    let sparse = graph
        .sparse_initializer
        .iter()
        .filter_map(|s| s.values.as_option());
    let mut initializers = HashSet::new();
    for tensor in graph.initializer.iter().chain(sparse) {
        let name = tensor.name.as_deref().unwrap_or_default();
        let is_first = initializers.insert(name);
        // An initializer with the name of an input is that input's default.
        if !(is_first && inputs.contains(name)) {
            scope.define(name, &place, report);
        }
    }
    check_nodes(&graph.node, context, &mut scope, &place, report);
    let mut outputs = HashSet::new();
    for value in &graph.output {
        let name = value.name.as_deref().unwrap_or_default();
        check_declared(value, &place, report);
        if !outputs.insert(name) {
            report.add(place.clone(), Fault::DuplicateOutput(name.to_owned()));
        } else if !scope.has_own(name) {
            let fault = if scope.sees(name) {
                Fault::OuterOutput(name.to_owned())
            } else {
                Fault::OutputNotProduced(name.to_owned())
            };
            report.add(place.clone(), fault);
        }
    }
    for value in &graph.value_info {
        check_sizes(value, &place, report);
    }
}

/// Checks nodes in order and adds their outputs to `scope`.
pub(super) fn check_nodes<'a>(
    nodes: &'a [NodeProto],
    context: &Context,
    scope: &mut Scope<'a>,
    owner: &Place,
    report: &mut Report,
) {
    let mut is_out_of_order = false;
    for (index, node) in nodes.iter().enumerate() {
        let place = Place::node(node, index);
        if node.op_type.as_deref().unwrap_or_default().is_empty() {
            report.add(place.clone(), Fault::NoOpType);
        }
        if !context.imports.has(node) {
            let domain = node.domain.clone().unwrap_or_default();
            report.add(place.clone(), Fault::DomainNotImported(domain));
        }
        for input in node.input.iter().filter(|i| !i.is_empty()) {
            if scope.sees(input) {
                continue;
            }
            let fault = if scope.will_see(input) {
                is_out_of_order = true;
                Fault::OutOfOrder(input.clone())
            } else {
                Fault::Undefined(input.clone())
            };
            report.add(place.clone(), fault);
        }
        check_attributes(node, context, scope, &place, report);
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            scope.define(output, &place, report);
        }
    }
    if is_out_of_order && let Some(name) = find_cycle(nodes) {
        report.add(owner.clone(), Fault::Cycle(name));
    }
}

fn check_attributes(
    node: &NodeProto,
    context: &Context,
    scope: &Scope,
    place: &Place,
    report: &mut Report,
) {
    let mut names = HashSet::new();
    for attribute in &node.attribute {
        let name = attribute.name.as_deref().unwrap_or_default();
        if !names.insert(name) {
            report.add(place.clone(), Fault::DuplicateAttribute(name.to_owned()));
        }
        check_attribute(attribute, context.function_attributes, place, report);
        for graph in attribute.g.as_option().into_iter().chain(&attribute.graphs) {
            check_graph(graph, context, Some(scope), report);
        }
    }
}

pub(super) fn check_attribute(
    attribute: &AttributeProto,
    function_attributes: Option<&HashSet<&str>>,
    place: &Place,
    report: &mut Report,
) {
    let name = attribute.name.clone().unwrap_or_default();
    let number = attribute.r#type.unwrap_or_default();
    let Some(kind) = AttributeKind::from_onnx(number) else {
        report.add(place.clone(), Fault::AttributeType { name, kind: number });
        return;
    };
    let filled = filled(attribute);
    let reference = attribute.ref_attr_name.as_deref().unwrap_or_default();
    if !reference.is_empty() {
        let is_known = function_attributes.is_some_and(|a| a.contains(reference));
        if !is_known || !filled.is_empty() {
            report.add(
                place.clone(),
                Fault::AttributeReference {
                    name,
                    reference: reference.to_owned(),
                },
            );
        }
        return;
    }
    // Writers that drop zeros leave numbers, strings and lists out, messages never.
    let must_be_there = matches!(
        kind,
        AttributeKind::Tensor
            | AttributeKind::Graph
            | AttributeKind::SparseTensor
            | AttributeKind::TypeProto
    );
    let is_right = match filled.as_slice() {
        [] => !must_be_there,
        [only] => *only == kind,
        _ => false,
    };
    if !is_right {
        report.add(
            place.clone(),
            Fault::AttributeValue {
                name,
                kind: kind.name(),
            },
        );
    }
}

/// The kinds of values that an attribute holds; a zero in another field than its
/// own counts as absent, since some writers fill every field.
fn filled(attribute: &AttributeProto) -> Vec<AttributeKind> {
    use AttributeKind as K;
    let own = |kind: K| attribute.r#type == Some(kind.onnx());
    [
        (
            K::Float,
            attribute.f.is_some_and(|f| own(K::Float) || f != 0.0),
        ),
        (K::Int, attribute.i.is_some_and(|i| own(K::Int) || i != 0)),
        (
            K::String,
            attribute
                .s
                .as_ref()
                .is_some_and(|s| own(K::String) || !s.is_empty()),
        ),
        (K::Tensor, attribute.t.is_set()),
        (K::Graph, attribute.g.is_set()),
        (K::Floats, !attribute.floats.is_empty()),
        (K::Ints, !attribute.ints.is_empty()),
        (K::Strings, !attribute.strings.is_empty()),
        (K::Tensors, !attribute.tensors.is_empty()),
        (K::Graphs, !attribute.graphs.is_empty()),
        (K::SparseTensor, attribute.sparse_tensor.is_set()),
        (K::SparseTensors, !attribute.sparse_tensors.is_empty()),
        (K::TypeProto, attribute.tp.is_set()),
        (K::TypeProtos, !attribute.type_protos.is_empty()),
    ]
    .into_iter()
    .filter_map(|(kind, is_filled)| is_filled.then_some(kind))
    .collect()
}

fn check_declared(value: &ValueInfoProto, place: &Place, report: &mut Report) {
    if value.name.as_deref().unwrap_or_default().is_empty() {
        report.add(place.clone(), Fault::Unnamed);
    }
    check_sizes(value, place, report);
}

fn check_sizes(value: &ValueInfoProto, place: &Place, report: &mut Report) {
    let declared = value.r#type.as_option().and_then(|t| t.value.as_ref());
    let Some(TypeValue::TensorType(tensor)) = declared else {
        return;
    };
    for dim in tensor.shape.as_option().into_iter().flat_map(|s| &s.dim) {
        if let Some(DimValue::DimValue(size)) = dim.value
            && size < 0
        {
            let fault = Fault::NegativeSize {
                value: value.name.clone().unwrap_or_default(),
                size,
            };
            report.add(place.clone(), fault);
        }
    }
}

/// A value on a cycle, if the nodes have one: what remains after taking away, again
/// and again, every node that waits for nothing.
fn find_cycle(nodes: &[NodeProto]) -> Option<String> {
    let mut producer = HashMap::new();
    for (index, node) in nodes.iter().enumerate() {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            producer.entry(output.as_str()).or_insert(index);
        }
    }
    let mut waits_for = vec![0_usize; nodes.len()];
    let mut consumers: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    for (index, (node, waits)) in nodes.iter().zip(&mut waits_for).enumerate() {
        for input in &node.input {
            if let Some(consumers) = producer
                .get(input.as_str())
                .and_then(|p| consumers.get_mut(*p))
            {
                consumers.push(index);
                *waits += 1;
            }
        }
    }
    let ready = waits_for.iter().enumerate().filter(|(_, w)| **w == 0);
    let mut ready: Vec<usize> = ready.map(|(index, _)| index).collect();
    let mut done = 0;
    while let Some(index) = ready.pop() {
        done += 1;
        for &consumer in consumers.get(index).into_iter().flatten() {
            if let Some(waits) = waits_for.get_mut(consumer) {
                *waits -= 1;
                if *waits == 0 {
                    ready.push(consumer);
                }
            }
        }
    }
    if done == nodes.len() {
        return None;
    }
    let is_stuck = |index: &usize| waits_for.get(*index).is_some_and(|w| *w > 0);
    // Among the stuck nodes, walk backwards until one repeats: that is on the cycle,
    // and not merely behind it.
    let mut at = (0..nodes.len()).find(is_stuck)?;
    let mut seen = HashSet::new();
    loop {
        let inputs = nodes.get(at).into_iter().flat_map(|n| &n.input);
        let stuck = |name: &&String| producer.get(name.as_str()).is_some_and(is_stuck);
        let through = inputs.into_iter().find(stuck)?;
        if !seen.insert(at) {
            return Some(through.clone());
        }
        at = *producer.get(through.as_str())?;
    }
}
