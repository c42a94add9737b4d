//! Removing what only the replaced nodes used, and nothing else.

use std::collections::{HashMap, HashSet};

use linfusion_models::onnx::proto::GraphProto;

use crate::graph::{collect_captures, subgraphs};

/// What pruning took away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Nodes.
    pub nodes: usize,
    /// Initializers.
    pub initializers: usize,
}

/// Removes the nodes above `orphans` (values that lost a reader) that nothing
/// needs any more, and the initializers that only they used. Nodes and
/// initializers that were unused before stay: they are not ours.
pub fn prune(graph: &mut GraphProto, orphans: impl IntoIterator<Item = String>) -> Pruned {
    let mut needed: HashSet<&str> = graph
        .output
        .iter()
        .filter_map(|v| v.name.as_deref())
        .collect();
    for node in &graph.node {
        for sub in subgraphs(node) {
            collect_captures(sub, &mut needed);
        }
    }
    let mut readers: HashMap<&str, usize> = HashMap::new();
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (i, node) in graph.node.iter().enumerate() {
        for name in &node.input {
            *readers.entry(name).or_default() += 1;
        }
        for name in &node.output {
            producer.insert(name, i);
        }
    }
    let orphans: Vec<String> = orphans.into_iter().collect();
    let mut queue: Vec<&str> = orphans.iter().map(String::as_str).collect();
    let mut dead = HashSet::new();
    let mut touched: HashSet<&str> = HashSet::new();
    while let Some(value) = queue.pop() {
        touched.insert(value);
        let Some(&index) = producer.get(value) else {
            continue;
        };
        let node = &graph.node[index];
        let unused = |name: &String| {
            readers.get(name.as_str()).is_none_or(|&n| n == 0) && !needed.contains(name.as_str())
        };
        if dead.contains(&index) || !node.output.iter().all(unused) {
            continue;
        }
        dead.insert(index);
        for name in &node.input {
            if let Some(n) = readers.get_mut(name.as_str()) {
                *n -= 1;
            }
            queue.push(name);
        }
    }
    let gone: HashSet<String> = graph
        .initializer
        .iter()
        .filter_map(|t| t.name.as_deref())
        .filter(|n| {
            touched.contains(n) && readers.get(n).is_none_or(|&c| c == 0) && !needed.contains(n)
        })
        .map(str::to_owned)
        .collect();
    let dead_values: HashSet<String> = dead
        .iter()
        .flat_map(|&i| graph.node[i].output.iter().cloned())
        .chain(gone.iter().cloned())
        .collect();
    let pruned = Pruned {
        nodes: dead.len(),
        initializers: gone.len(),
    };
    let mut index = 0;
    graph.node.retain(|_| {
        index += 1;
        !dead.contains(&(index - 1))
    });
    graph
        .initializer
        .retain(|t| !gone.contains(t.name.as_deref().unwrap_or("")));
    // Before IR version 4 an initializer is an input as well.
    graph
        .input
        .retain(|v| !gone.contains(v.name.as_deref().unwrap_or("")));
    graph
        .value_info
        .retain(|v| !dead_values.contains(v.name.as_deref().unwrap_or("")));
    graph
        .quantization_annotation
        .retain(|a| !dead_values.contains(a.tensor_name.as_deref().unwrap_or("")));
    pruned
}

#[cfg(test)]
mod tests {
    use linfusion_models::onnx::ElementType;
    use linfusion_models::onnx::make;

    use super::*;

    fn graph() -> GraphProto {
        GraphProto {
            node: vec![
                make::node("Relu", "a", &["x"], &["a"], vec![]),
                make::node("Mul", "b", &["a", "w"], &["b"], vec![]),
                make::node("Mul", "unused", &["x", "u"], &["unused"], vec![]),
                make::node("Relu", "c", &["a"], &["y"], vec![]),
            ],
            initializer: ["w", "u"]
                .map(|n| make::tensor_f32(n, &[1], &[1.0]))
                .to_vec(),
            input: vec![make::value_info("x", ElementType::F32, &[])],
            output: vec![make::value_info("y", ElementType::F32, &[])],
            ..GraphProto::default()
        }
    }

    #[test]
    fn takes_what_only_the_orphan_used() {
        let mut g = graph();
        assert_eq!(
            prune(&mut g, ["b".to_owned()]),
            Pruned {
                nodes: 1,
                initializers: 1
            }
        );
        let names: Vec<_> = g.node.iter().filter_map(|n| n.name.as_deref()).collect();
        assert_eq!(
            names,
            ["a", "unused", "c"],
            "what was unused before is not ours to remove"
        );
    }

    #[test]
    fn keeps_what_others_read() {
        let mut g = graph();
        assert_eq!(prune(&mut g, ["a".to_owned()]), Pruned::default());
        assert_eq!(g, graph());
    }
}
