//! Model-local functions.

use std::collections::{HashMap, HashSet};

use super::graph::{Context, Scope, check_attribute, check_nodes};
use super::{Fault, Imports, Place, Report, domain};
use crate::onnx::proto::{AttributeProto, FunctionProto, GraphProto, NodeProto};

/// What a node names to call a function.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key<'a> {
    domain: &'a str,
    name: &'a str,
    overload: &'a str,
}

impl<'a> Key<'a> {
    fn of(function: &'a FunctionProto) -> Self {
        Self {
            domain: domain(function.domain.as_deref()),
            name: function.name.as_deref().unwrap_or_default(),
            overload: function.overload.as_deref().unwrap_or_default(),
        }
    }

    fn called_by(node: &'a NodeProto) -> Self {
        Self {
            domain: domain(node.domain.as_deref()),
            name: node.op_type.as_deref().unwrap_or_default(),
            overload: node.overload.as_deref().unwrap_or_default(),
        }
    }

    fn display(&self) -> String {
        let Self {
            domain,
            name,
            overload,
        } = self;
        match overload.is_empty() {
            true => format!("{domain}::{name}"),
            false => format!("{domain}::{name}:{overload}"),
        }
    }
}

pub(super) fn check_all(functions: &[FunctionProto], report: &mut Report) {
    let mut by_key: HashMap<Key, &FunctionProto> = HashMap::new();
    for function in functions {
        let key = Key::of(function);
        let place = Place::Function(key.display());
        if key.name.is_empty() {
            report.add(place.clone(), Fault::UnnamedFunction);
        }
        if by_key.insert(key, function).is_some() {
            report.add(place.clone(), Fault::DuplicateFunction);
        }
        check_one(function, &place, report);
    }
    check_calls(&by_key, report);
}

fn check_one(function: &FunctionProto, place: &Place, report: &mut Report) {
    let defaults = function
        .attribute_proto
        .iter()
        .filter_map(|a| a.name.as_deref());
    let names: Vec<&str> = function
        .attribute
        .iter()
        .map(String::as_str)
        .chain(defaults)
        .collect();
    let outputs = function.output.iter().map(String::as_str);
    for list in [names.clone(), outputs.collect()] {
        let mut seen = HashSet::new();
        for name in list {
            if !seen.insert(name) {
                report.add(place.clone(), Fault::DuplicateParameter(name.to_owned()));
            }
        }
    }
    for attribute in &function.attribute_proto {
        check_attribute(attribute, None, place, report);
    }
    let imports = Imports::of(&function.opset_import, place, report);
    let attributes = names.into_iter().collect();
    let context = Context {
        imports: &imports,
        function_attributes: Some(&attributes),
    };
    let mut scope = Scope::new(&function.node, None);
    for input in &function.input {
        scope.define(input, place, report);
    }
    check_nodes(&function.node, &context, &mut scope, place, report);
    for output in &function.output {
        if !scope.has_own(output) {
            report.add(place.clone(), Fault::OutputNotProduced(output.clone()));
        }
    }
}

/// Inlining a function that calls itself, by whatever way round, would never end.
fn check_calls(functions: &HashMap<Key, &FunctionProto>, report: &mut Report) {
    let mut keys: Vec<Key> = functions.keys().copied().collect();
    keys.sort();
    let calls: HashMap<Key, Vec<Key>> = functions
        .iter()
        .map(|(key, function)| {
            let mut called = Vec::new();
            collect_calls(&function.node, &mut called);
            called.retain(|c| functions.contains_key(c));
            called.sort();
            called.dedup();
            (*key, called)
        })
        .collect();
    let mut finished: HashSet<Key> = HashSet::new();
    for start in keys {
        if finished.contains(&start) {
            continue;
        }
        // Depth first with a stack of its own: a chain of calls can be long.
        let mut path: Vec<(Key, usize)> = vec![(start, 0)];
        let mut on_path = HashSet::from([start]);
        while let Some((key, next)) = path.last_mut() {
            let callee = calls.get(key).and_then(|c| c.get(*next)).copied();
            *next += 1;
            match callee {
                Some(callee) if on_path.contains(&callee) => {
                    let round = path.iter().map(|(k, _)| k.display());
                    let round: Vec<String> = round.chain([callee.display()]).collect();
                    report.add(
                        Place::Function(callee.display()),
                        Fault::Recursion(round.join(" → ")),
                    );
                }
                Some(callee) if finished.contains(&callee) => {}
                Some(callee) => {
                    on_path.insert(callee);
                    path.push((callee, 0));
                }
                None => {
                    if let Some((key, _)) = path.pop() {
                        on_path.remove(&key);
                        finished.insert(key);
                    }
                }
            }
        }
    }
}

fn collect_calls<'a>(nodes: &'a [NodeProto], calls: &mut Vec<Key<'a>>) {
    for node in nodes {
        calls.push(Key::called_by(node));
        for graph in node.attribute.iter().flat_map(graphs) {
            collect_calls(&graph.node, calls);
        }
    }
}

fn graphs(attribute: &AttributeProto) -> impl Iterator<Item = &GraphProto> {
    attribute.g.as_option().into_iter().chain(&attribute.graphs)
}
