//! Where the time of a step goes, from ONNX Runtime's own profile: operator by operator, and how much is attention.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use linfusion_models::graph::{Graph, label, op};
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::NodeProto;
use serde::{Deserialize, Serialize};

/// A step's time, taken apart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Milliseconds within nodes; what the engine does between them isn't in it.
    pub total_ms: f64,
    /// Part of it that is attention, 0 to 1: products, scaling, mask and softmax, or an operator that is all of it.
    /// Projections don't count.
    pub attention_share: f64,
    /// Operators, the most expensive first.
    pub operators: Vec<OperatorTime>,
}

/// All nodes of one operator on one provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OperatorTime {
    /// As `Conv` or `FusedMatMul`.
    pub operator: String,
    /// As `CPUExecutionProvider`.
    pub provider: String,
    /// How often one ran.
    pub calls: usize,
    /// Milliseconds of all.
    pub ms: f64,
    /// Those that belong to attention.
    pub attention_ms: f64,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// ONNX Runtime's file cannot be read.
    #[error("the profile {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// It isn't what ONNX Runtime writes.
    #[error("the profile {}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Where it is no JSON.
        r#source: serde_json::Error,
    },
    /// It tells of no node.
    #[error("the profile {} has no node's time", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the last run of a profile: the first of a session takes its memory and packs weights. `attention` has the names of nodes that belong to attention, see [`attention_nodes`].
///
/// # Errors
/// The file isn't a profile, or tells of no node.
pub fn read(path: &Path, attention: &HashSet<String>) -> Result<Profile, ProfileError> {
    let text = std::fs::read(path).map_err(|source| ProfileError::Io {
        path: path.to_owned(),
        source,
    })?;
    let events: Vec<Event> =
        serde_json::from_slice(&text).map_err(|source| ProfileError::Format {
            path: path.to_owned(),
            source,
        })?;
    of(&events, attention).ok_or_else(|| ProfileError::Empty {
        path: path.to_owned(),
    })
}

/// An entry of ONNX Runtime's profile; times in microseconds.
#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    ts: f64,
    #[serde(default)]
    dur: f64,
    #[serde(default)]
    args: Arguments,
}

#[derive(Deserialize, Default)]
struct Arguments {
    #[serde(default)]
    op_name: String,
    #[serde(default)]
    provider: String,
}

fn of(events: &[Event], attention: &HashSet<String>) -> Option<Profile> {
    let mut rows: BTreeMap<(&str, &str), OperatorTime> = BTreeMap::new();
    let runs = events.iter().filter(|e| e.name == "model_run");
    let begin = runs.map(|e| e.ts).fold(0.0, f64::max);
    for event in events.iter().filter(|e| e.cat == "Node" && e.ts >= begin) {
        let Some(node) = event.name.strip_suffix("_kernel_time") else {
            continue;
        };
        let Arguments { op_name, provider } = &event.args;
        let row = rows
            .entry((op_name, provider))
            .or_insert_with(|| OperatorTime {
                operator: op_name.clone(),
                provider: provider.clone(),
                calls: 0,
                ms: 0.0,
                attention_ms: 0.0,
            });
        let ms = event.dur / 1e3;
        row.calls += 1;
        row.ms += ms;
        if is_attention(node, op_name, attention) {
            row.attention_ms += ms;
        }
    }
    let total_ms: f64 = rows.values().map(|r| r.ms).sum();
    let attention_ms: f64 = rows.values().map(|r| r.attention_ms).sum();
    let mut operators: Vec<OperatorTime> = rows.into_values().collect();
    operators.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    (total_ms > 0.0).then(|| Profile {
        total_ms,
        attention_share: attention_ms / total_ms,
        operators,
    })
}

/// Whether a node that ran is part of attention: by its operator, by its name, or by the name of the node that an optimizer made it
/// from and to which it added something.
fn is_attention(node: &str, operator: &str, attention: &HashSet<String>) -> bool {
    // FusedMatMul: only products with a scale or a transpose are fused so, and in these models those are attention's.
    // Bodies of functions keep the function's name when they are inlined.
    ATTENTION.contains(&operator)
        || matches!(operator, "Softmax" | "FusedMatMul")
        || OURS.iter().any(|name| node.contains(name))
        || attention.contains(node)
        || node
            .rmatch_indices('/')
            .any(|(at, _)| attention.contains(&node[..at]))
}

const OURS: [&str; 2] = ["LinFusionAttention", "WindowAttention"];
const ATTENTION: [&str; 5] = [
    "Attention",
    "MultiHeadAttention",
    "PackedMultiHeadAttention",
    OURS[0],
    OURS[1],
];

/// Names of the nodes of a graph that are attention: from the product of queries and keys to that with the values, and operators
/// that are a whole attention.
pub fn attention_nodes(file: &OnnxFile) -> HashSet<String> {
    let graph = Graph::new(&file.model.graph);
    let mut names = HashSet::new();
    for (_, node) in graph.nodes() {
        match op(node) {
            "Softmax" => around(&graph, node, &mut names),
            operator if ATTENTION.contains(&operator) => {
                names.insert(label(node).to_owned());
            }
            _ => {}
        }
    }
    names
}

/// Steps between softmax and a product that are looked through.
const REACH: usize = 12;

fn around(graph: &Graph<'_>, softmax: &NodeProto, names: &mut HashSet<String>) {
    let mut found = vec![label(softmax).to_owned()];
    let mut value = softmax.input.first().map(String::as_str);
    let mut scores = false;
    for _ in 0..REACH {
        let Some(producer) = value.and_then(|v| graph.producer(v)) else {
            break;
        };
        let node = graph.node(producer.node);
        found.push(label(node).to_owned());
        if is_product(node) {
            scores = true;
            break;
        }
        if !matches!(
            op(node),
            "Add" | "Sub" | "Mul" | "Div" | "Cast" | "Where" | "Reshape" | "Transpose" | "Identity"
        ) {
            break;
        }
        // Scores are the larger operand of a scale or mask; exporters write either order.
        value = node.input.iter().map(String::as_str).find(|input| {
            graph
                .producer(input)
                .is_some_and(|p| leads_to_product(graph, graph.node(p.node), REACH))
        });
    }
    let mut value = softmax.output.first().map(String::as_str);
    for _ in 0..REACH {
        let Some(reader) = value.and_then(|v| graph.readers(v).first().copied()) else {
            break;
        };
        let node = graph.node(reader.node);
        found.push(label(node).to_owned());
        if is_product(node) {
            // A softmax that isn't between two products is a classifier's.
            if scores {
                names.extend(found);
            }
            return;
        }
        value = node.output.first().map(String::as_str);
    }
}

fn leads_to_product(graph: &Graph<'_>, node: &NodeProto, reach: usize) -> bool {
    is_product(node)
        || (reach > 0
            && matches!(
                op(node),
                "Add" | "Sub" | "Mul" | "Div" | "Cast" | "Reshape" | "Transpose" | "Identity"
            )
            && node
                .input
                .first()
                .into_iter()
                .chain(node.input.get(1))
                .filter_map(|input| graph.producer(input))
                .any(|p| leads_to_product(graph, graph.node(p.node), reach / 2)))
}

fn is_product(node: &NodeProto) -> bool {
    matches!(op(node), "MatMul" | "Einsum" | "FusedMatMul")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, operator: &str, dur: f64) -> Event {
        Event {
            cat: "Node".to_owned(),
            name: format!("{name}_kernel_time"),
            ts: 20.0,
            dur,
            args: Arguments {
                op_name: operator.to_owned(),
                provider: "CPUExecutionProvider".to_owned(),
            },
        }
    }

    #[test]
    fn times_are_summed_by_operator() {
        let attention = HashSet::from(["/attn1/MatMul".to_owned()]);
        let mut events = vec![
            event("/conv", "Conv", 4000.0),
            event("/attn1/MatMul", "MatMul", 1000.0),
            event("/attn1/MatMul_1", "MatMul", 500.0),
            event("/attn1/to_q/MatMul", "MatMul", 250.0),
            event("/attn1/MatMul/MatMulScaleFusion/", "FusedMatMul", 125.0),
            event("_inlfunc_LinFusionAttention_Elu", "Elu", 125.0),
        ];
        // The run before.
        events.push(Event {
            ts: 5.0,
            ..event("/conv", "Conv", 9e9)
        });
        for ts in [4.0, 10.0] {
            events.push(Event {
                cat: "Session".to_owned(),
                name: "model_run".to_owned(),
                ts,
                ..event("", "", 9e9)
            });
        }
        let profile = of(&events, &attention).unwrap();
        assert_eq!(profile.total_ms, 6.0);
        // Not MatMul_1 and not the projection.
        assert_eq!(profile.attention_share, 1.25 / 6.0);
        let conv = &profile.operators[0];
        assert_eq!(
            (conv.operator.as_str(), conv.calls, conv.ms),
            ("Conv", 1, 4.0)
        );
        assert!(of(&events[6..], &attention).is_none());
    }

    #[test]
    fn attention_is_found_in_exported_graphs() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("model.onnx");
        // Every attention, cross-attention too, has two products.
        for (model, attentions) in [
            ("exports/sd15-ts17-dyn-attn.onnx.gz", 32),
            ("exports/sd15-dynamo20-dyn-sdpa.onnx.gz", 32),
            ("exports/sd21-ts17-dyn-attn-fp16-upcast.onnx.gz", 32),
            ("exports/pixel-ts17-dyn-einsum.onnx.gz", 3),
            ("transformers/pixart-ts17-dyn-sdpa.onnx.gz", 4),
            ("transformers/sd3-ts17-dyn-sdpa.onnx.gz", 2),
        ] {
            std::fs::write(&path, linfusion_models::fixtures::bytes(model).unwrap()).unwrap();
            let file = OnnxFile::open(&path).unwrap();
            let names = attention_nodes(&file);
            let nodes = &file.model.graph.node;
            let products = nodes
                .iter()
                .filter(|n| names.contains(label(n)) && is_product(n));
            assert_eq!(products.count(), 2 * attentions, "{model}");
        }
    }

    #[test]
    fn what_is_no_profile_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        assert!(matches!(
            read(&path, &HashSet::new()),
            Err(ProfileError::Io { .. })
        ));
        std::fs::write(&path, "[{]").unwrap();
        assert!(matches!(
            read(&path, &HashSet::new()),
            Err(ProfileError::Format { .. })
        ));
        std::fs::write(&path, "[{\"cat\":\"Session\"}]").unwrap();
        assert!(matches!(
            read(&path, &HashSet::new()),
            Err(ProfileError::Empty { .. })
        ));
    }
}
