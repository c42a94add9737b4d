//! What a rewrite changed: nodes and initializers that went and that came, by
//! the converted module they belong to, and everything else that differs.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt::Write;

use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_ops::schema::DOMAIN;
use serde::Serialize;

use crate::attention::names::{attention_module, scope_of_metadata, scope_of_node_name};
use crate::convert::CONVERTED_KEY;
use crate::graph::{Graph, label, qualified_op, tensor_name};

/// The differences of two models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// By module path: those that the second model's metadata names as converted.
    pub sites: BTreeMap<String, SiteDifference>,
    /// What no converted site explains, a line each.
    pub outside: Vec<String>,
}

/// What changed at one site: `Op 'name'` or `initializer 'name' [dims]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SiteDifference {
    /// What went.
    pub removed: Vec<String>,
    /// What came.
    pub added: Vec<String>,
    /// Nodes that read something else now.
    pub changed: Vec<String>,
}

/// Compares `before` with `after`, its converted form.
#[must_use]
pub fn diff(before: &OnnxFile, after: &OnnxFile) -> Difference {
    let (old, new) = (Side::of(&before.model), Side::of(&after.model));
    let mut sorter = Sorter {
        modules: converted_modules(&after.model),
        result: Difference::default(),
    };
    let removed: HashSet<&str> = old.nodes.keys().copied().collect::<HashSet<_>>();
    let removed: HashSet<&str> = removed
        .into_iter()
        .filter(|key| !same_operator(old.nodes.get(key), new.nodes.get(key)))
        .collect();
    let added: HashSet<&str> = (new.nodes.keys().copied())
        .filter(|key| !same_operator(old.nodes.get(key), new.nodes.get(key)))
        .collect();

    let mut scope_of_removed: HashMap<&str, Option<String>> = HashMap::new();
    for &key in &removed {
        scope_of_removed.insert(key, sorter.scope_of_removed(key, &old, &new, &removed));
    }
    let mut scope_of_changed: HashMap<&str, String> = HashMap::new();
    for (key, node) in &old.nodes {
        if let Some(scope) = scope_of_removed.get(key) {
            sorter.note(scope.as_deref(), Change::Removed, describe(node));
        } else if let Some(other) = new.nodes.get(key).filter(|other| *other != node) {
            let scope = scope_of_change(node, other, &scope_of_removed, &sorter, &new);
            if let Some(scope) = &scope {
                scope_of_changed.insert(key, scope.clone());
            }
            sorter.note(scope.as_deref(), Change::Changed, describe(other));
        }
    }
    for (key, node) in &new.nodes {
        if added.contains(key) {
            let scope = sorter.scope_of_added(node);
            sorter.note(scope.as_deref(), Change::Added, describe(node));
        }
    }
    for (name, tensor) in &old.tensors {
        match new.tensors.get(name) {
            None => {
                let readers = old.graph.readers(name).iter();
                let scope = readers
                    .filter_map(|r| old.graph.node(r.node).output.first())
                    .find_map(|key| {
                        let key = key.as_str();
                        let gone = scope_of_removed.get(key).cloned().flatten();
                        gone.or_else(|| scope_of_changed.get(key).cloned())
                    })
                    .or_else(|| sorter.by_name(name));
                sorter.note(scope.as_deref(), Change::Removed, describe_tensor(tensor));
            }
            Some(other) if !same_tensor(before, tensor, after, other) => {
                sorter.note(None, Change::Changed, describe_tensor(other));
            }
            Some(_) => {}
        }
    }
    for (name, tensor) in &new.tensors {
        if !old.tensors.contains_key(name) {
            let readers = new.graph.readers(name).iter();
            let scope = readers
                .filter_map(|r| sorter.scope_of_added(new.graph.node(r.node)))
                .next()
                .or_else(|| sorter.by_name(name));
            sorter.note(scope.as_deref(), Change::Added, describe_tensor(tensor));
        }
    }
    let mut result = sorter.result;
    for site in result.sites.values_mut() {
        site.removed.sort();
        site.added.sort();
        site.changed.sort();
    }
    result.outside.sort();
    outside_the_graph(&before.model, &after.model, &mut result.outside);
    result
}

impl Difference {
    /// As text: a paragraph a site, what lies outside, and a line that sums it up.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (module, site) in &self.sites {
            let _ = writeln!(
                text,
                "{module}: {} removed, {} added, {} changed",
                site.removed.len(),
                site.added.len(),
                site.changed.len()
            );
            for (sign, lines) in [
                ('-', &site.removed),
                ('+', &site.added),
                ('~', &site.changed),
            ] {
                for line in lines {
                    let _ = writeln!(text, "  {sign} {line}");
                }
            }
        }
        if !self.outside.is_empty() {
            let _ = writeln!(text, "outside converted sites:");
            for line in &self.outside {
                let _ = writeln!(text, "  {line}");
            }
        }
        let count = |of: fn(&SiteDifference) -> &Vec<String>| -> usize {
            self.sites.values().map(|site| of(site).len()).sum()
        };
        let _ = writeln!(
            text,
            "{} converted sites: {} removed, {} added, {} changed; {}",
            self.sites.len(),
            count(|s| &s.removed),
            count(|s| &s.added),
            count(|s| &s.changed),
            match self.outside.len() {
                0 => "nothing else differs".to_owned(),
                1 => "1 difference outside them".to_owned(),
                more => format!("{more} differences outside them"),
            }
        );
        text
    }
}

/// A graph by what its nodes make: names may be missing, outputs are unique.
struct Side<'m> {
    graph: Graph<'m>,
    nodes: BTreeMap<&'m str, &'m NodeProto>,
    tensors: BTreeMap<&'m str, &'m TensorProto>,
}

impl<'m> Side<'m> {
    fn of(model: &'m ModelProto) -> Self {
        let proto: &GraphProto = &model.graph;
        Side {
            graph: Graph::new(proto),
            nodes: proto
                .node
                .iter()
                .filter_map(|n| Some((n.output.first()?.as_str(), n)))
                .collect(),
            tensors: proto
                .initializer
                .iter()
                .map(|t| (tensor_name(t), t))
                .collect(),
        }
    }
}

enum Change {
    Removed,
    Added,
    Changed,
}

struct Sorter {
    /// Paths of the converted modules.
    modules: BTreeSet<String>,
    result: Difference,
}

impl Sorter {
    fn note(&mut self, scope: Option<&str>, change: Change, line: String) {
        let Some(module) = scope else {
            let sign = match change {
                Change::Removed => '-',
                Change::Added => '+',
                Change::Changed => '~',
            };
            self.result.outside.push(format!("{sign} {line}"));
            return;
        };
        let site = self.result.sites.entry(module.to_owned()).or_default();
        match change {
            Change::Removed => site.removed.push(line),
            Change::Added => site.added.push(line),
            Change::Changed => site.changed.push(line),
        }
    }

    /// The module in the name of a node or tensor that the rewrite made.
    fn by_name(&self, name: &str) -> Option<String> {
        let name = name.trim_start_matches('/');
        let ends = |rest: &str| rest.starts_with(['/', '.']);
        let module = (self.modules.iter())
            .filter(|m| name.strip_prefix(m.as_str()).is_some_and(ends))
            .max_by_key(|m| m.len())?;
        Some(module.clone())
    }

    fn scope_of_added(&self, node: &NodeProto) -> Option<String> {
        self.by_name(node.name.as_deref()?)
    }

    /// The module by the exporter's own names.
    fn scope_of_old(&self, node: &NodeProto) -> Option<String> {
        let scope = scope_of_metadata(node)
            .or_else(|| scope_of_node_name(node.name.as_deref()?))
            .map(|s| attention_module(&s))?;
        self.modules.contains(&scope).then_some(scope)
    }

    /// The converted module that the removed node served: its own, or that of the
    /// nearest removed node below it, down to the value that new nodes make now.
    fn scope_of_removed(
        &self,
        key: &str,
        old: &Side<'_>,
        new: &Side<'_>,
        removed: &HashSet<&str>,
    ) -> Option<String> {
        let mut queue = VecDeque::from([key]);
        let mut seen = HashSet::new();
        while let Some(key) = queue.pop_front() {
            if !seen.insert(key) {
                continue;
            }
            let node = old.nodes.get(key)?;
            let scope = self
                .scope_of_old(node)
                .or_else(|| self.scope_of_added(new.nodes.get(key)?));
            if scope.is_some() {
                return scope;
            }
            let outputs = node.output.iter();
            let below = outputs
                .flat_map(|o| old.graph.readers(o))
                .filter_map(|r| old.graph.node(r.node).output.first())
                .map(String::as_str)
                .filter(|key| removed.contains(key));
            queue.extend(below);
        }
        None
    }
}

/// A node that stayed and reads something else: that of a site, if what it read
/// before went with the site, or what it reads now came with it.
fn scope_of_change(
    before: &NodeProto,
    after: &NodeProto,
    removed: &HashMap<&str, Option<String>>,
    sorter: &Sorter,
    new: &Side<'_>,
) -> Option<String> {
    let only_inputs = NodeProto {
        input: before.input.clone(),
        ..after.clone()
    };
    if only_inputs != *before || before.input.len() != after.input.len() {
        return None;
    }
    let changed = before.input.iter().zip(&after.input);
    let scope = changed.filter(|(a, b)| a != b).find_map(|(was, is)| {
        let went = removed.get(was.as_str()).cloned().flatten();
        let came = || match new.nodes.get(is.as_str()) {
            Some(node) => sorter.scope_of_added(node),
            None => sorter.by_name(is),
        };
        went.or_else(came)
    });
    scope.or_else(|| sorter.scope_of_old(before))
}

fn same_operator(a: Option<&&NodeProto>, b: Option<&&NodeProto>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => a.name == b.name && qualified_op(a) == qualified_op(b),
        _ => false,
    }
}

fn same_tensor(before: &OnnxFile, a: &TensorProto, after: &OnnxFile, b: &TensorProto) -> bool {
    if a.dims != b.dims || a.data_type != b.data_type {
        return false;
    }
    match (before.tensor_bytes(a), after.tensor_bytes(b)) {
        (Ok(x), Ok(y)) => x == y,
        _ => false,
    }
}

/// Inputs, outputs, opsets and functions.
fn outside_the_graph(before: &ModelProto, after: &ModelProto, lines: &mut Vec<String>) {
    let kept: HashSet<&str> = (after.graph.initializer.iter())
        .chain(&before.graph.initializer)
        .map(tensor_name)
        .collect();
    for (what, old, new) in [
        ("input", &before.graph.input, &after.graph.input),
        ("output", &before.graph.output, &after.graph.output),
    ] {
        // Old files list initializers among the inputs: those go with their weights.
        let name = |v: &linfusion_models::onnx::proto::ValueInfoProto| {
            let name = v.name.clone().unwrap_or_default();
            (!kept.contains(name.as_str())).then_some(name)
        };
        let (had, has) = (
            old.iter()
                .filter_map(|v| Some((name(v)?, v)))
                .collect::<BTreeMap<_, _>>(),
            new.iter()
                .filter_map(|v| Some((name(v)?, v)))
                .collect::<BTreeMap<_, _>>(),
        );
        if had != has {
            lines.push(format!(
                "~ {what}s: {:?} became {:?}",
                had.keys(),
                has.keys()
            ));
        }
    }
    let imports = |m: &ModelProto| -> BTreeSet<String> {
        (m.opset_import.iter())
            .filter(|o| o.domain.as_deref() != Some(DOMAIN))
            .map(|o| {
                format!(
                    "'{}' version {}",
                    o.domain.as_deref().unwrap_or(""),
                    o.version.unwrap_or(0)
                )
            })
            .collect()
    };
    let functions = |m: &ModelProto| -> BTreeSet<String> {
        (m.functions.iter())
            .filter(|f| f.domain.as_deref() != Some(DOMAIN))
            .map(|f| {
                format!(
                    "{}::{}",
                    f.domain.as_deref().unwrap_or(""),
                    f.name.as_deref().unwrap_or("")
                )
            })
            .collect()
    };
    for (what, old, new) in [
        ("opset", imports(before), imports(after)),
        ("function", functions(before), functions(after)),
    ] {
        lines.extend(old.difference(&new).map(|x| format!("- {what} {x}")));
        lines.extend(new.difference(&old).map(|x| format!("+ {what} {x}")));
    }
}

fn converted_modules(model: &ModelProto) -> BTreeSet<String> {
    (model.metadata_props.iter())
        .filter(|p| p.key.as_deref() == Some(CONVERTED_KEY))
        .filter_map(|p| p.value.as_deref())
        .flat_map(|list| list.split(' '))
        .map(str::to_owned)
        .collect()
}

fn describe(node: &NodeProto) -> String {
    format!("{} '{}'", qualified_op(node), label(node))
}

fn describe_tensor(tensor: &TensorProto) -> String {
    format!("initializer '{}' {:?}", tensor_name(tensor), tensor.dims)
}
