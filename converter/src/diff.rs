//! What a rewrite changed, site by site: nodes and initializers that went and
//! that came, grouped by the module path in their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto};

use crate::attention::names::{attention_module, scope_of_metadata, scope_of_node_name};
use crate::graph::{label, qualified_op};

/// Compares two models by node and initializer names, as text: a paragraph for
/// each module that changed. Names shared by both with other contents are listed
/// as changed.
#[must_use]
pub fn diff(before: &ModelProto, after: &ModelProto) -> String {
    let (old, new) = (Index::of(&before.graph), Index::of(&after.graph));
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut note = |scope: String, line: String| groups.entry(scope).or_default().push(line);
    for (key, node) in &old.nodes {
        match new.nodes.get(key) {
            None => note(
                scope(node),
                format!("- {} '{}'", qualified_op(node), label(node)),
            ),
            Some(other) if other != node => note(
                scope(node),
                format!("~ {} '{}'", qualified_op(node), label(node)),
            ),
            Some(_) => {}
        }
    }
    for (_, node) in new
        .nodes
        .iter()
        .filter(|(k, _)| !old.nodes.contains_key(*k))
    {
        note(
            scope(node),
            format!("+ {} '{}'", qualified_op(node), label(node)),
        );
    }
    let mut text = String::new();
    for (scope, mut lines) in groups {
        lines.sort();
        let _ = writeln!(
            text,
            "{}",
            if scope.is_empty() {
                "(no module)"
            } else {
                &scope
            }
        );
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
    }
    for (sign, from, other) in [("-", &old, &new), ("+", &new, &old)] {
        for (name, what) in from
            .tensors
            .iter()
            .filter(|(n, _)| !other.tensors.contains_key(*n))
        {
            let _ = writeln!(text, "{sign} initializer '{name}' {what}");
        }
    }
    let functions = |m: &ModelProto| -> BTreeSet<String> {
        m.functions
            .iter()
            .map(|f| {
                format!(
                    "{}::{}",
                    f.domain.as_deref().unwrap_or(""),
                    f.name.as_deref().unwrap_or("")
                )
            })
            .collect()
    };
    for added in functions(after).difference(&functions(before)) {
        let _ = writeln!(text, "+ function {added}");
    }
    if text.is_empty() {
        "no difference in nodes, initializers and functions\n".to_owned()
    } else {
        text
    }
}

struct Index<'m> {
    nodes: BTreeMap<String, &'m NodeProto>,
    tensors: BTreeMap<&'m str, String>,
}

impl<'m> Index<'m> {
    fn of(graph: &'m GraphProto) -> Self {
        Index {
            // A node is known by its first output: names may be missing, outputs
            // are unique. An operator that now makes the same value is another node.
            nodes: graph
                .node
                .iter()
                .map(|n| {
                    let made = n.output.first().map_or("", String::as_str);
                    (format!("{made} {}", qualified_op(n)), n)
                })
                .collect(),
            tensors: graph
                .initializer
                .iter()
                .filter_map(|t| Some((t.name.as_deref()?, format!("{:?}", t.dims))))
                .collect(),
        }
    }
}

fn scope(node: &NodeProto) -> String {
    scope_of_metadata(node)
        .or_else(|| scope_of_node_name(node.name.as_deref()?))
        .map(|s| attention_module(&s))
        .unwrap_or_default()
}
