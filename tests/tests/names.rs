//! Users merge LoRAs by initializer name: what conversion does not touch keeps its
//! name and its bytes, and no name comes to mean something else.

use std::collections::{HashMap, HashSet};

use linfusion_convert::convert::{Partial, WeightsFrom, convert};
use linfusion_convert::graph::tensor_name;
use linfusion_models::checkpoint::MlpWidth;
use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{NodeProto, TensorProto};
use linfusion_tests::{checkpoint_for, request, unpack};

struct Named<'m> {
    tensors: HashMap<&'m str, &'m TensorProto>,
    nodes: HashSet<(&'m str, &'m [String])>,
}

impl<'m> Named<'m> {
    fn of(file: &'m OnnxFile) -> Self {
        let graph = &file.model.graph;
        let tensors: HashMap<_, _> = graph
            .initializer
            .iter()
            .map(|t| (tensor_name(t), t))
            .collect();
        assert_eq!(tensors.len(), graph.initializer.len(), "a name twice");
        Named {
            tensors,
            nodes: graph.node.iter().map(key).collect(),
        }
    }
}

/// What a node is known by: names may be missing, and a new node may take the place
/// of an old one.
fn key(node: &NodeProto) -> (&str, &[String]) {
    (node.op_type.as_deref().unwrap_or(""), &node.output)
}

fn compare(before: &OnnxFile, after: &OnnxFile) -> Vec<String> {
    let (old, new) = (Named::of(before), Named::of(after));
    let mut wrong = Vec::new();
    let bytes = |file: &OnnxFile, t| file.tensor_bytes(t).unwrap().to_vec();
    for (name, tensor) in &old.tensors {
        let kept = new.tensors.get(name);
        if let Some(kept) = kept
            && ((&kept.dims, kept.data_type) != (&tensor.dims, tensor.data_type)
                || bytes(before, tensor) != bytes(after, kept))
        {
            wrong.push(format!("'{name}' is another tensor now"));
        }
        let is_other_module = (name.ends_with(".weight") || name.ends_with(".bias"))
            && !name.contains("attn1")
            && !name.contains("attention");
        if kept.is_none() && is_other_module {
            wrong.push(format!("'{name}' is gone"));
        }
    }
    // Whatever is still read by a node that is still there.
    for node in &before.model.graph.node {
        let is_there = new.nodes.contains(&key(node));
        for input in node.input.iter().filter(|_| is_there) {
            if old.tensors.contains_key(input.as_str()) && !new.tensors.contains_key(input.as_str())
            {
                let reader = after.model.graph.node.iter().find(|n| key(n) == key(node));
                if reader.is_some_and(|n| n.input.contains(input)) {
                    wrong.push(format!("'{input}' is gone and still read"));
                }
            }
        }
    }
    wrong
}

#[test]
fn names_keep_their_tensors() {
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for name in fixtures::exports().unwrap() {
        let path = unpack(&name, folder.path()).unwrap();
        let scratch = folder.path().join(name.replace('/', "_"));
        let weights = checkpoint_for(&path, &scratch, MlpWidth::Width(4)).unwrap();
        for weights in [WeightsFrom::Untrained, WeightsFrom::Path(weights)] {
            let out = scratch.join("out.onnx");
            let mut job = request(&path, &out, weights);
            job.partial = Partial::Allow;
            job.overwrite = linfusion_models::onnx::write::Overwrite::Force;
            let report = convert(&job, &mut |_| {}).unwrap();
            assert!(report.initializers_removed > 0 || report.weights == "none");
            let before = OnnxFile::open(&path).unwrap();
            let after = OnnxFile::open(&out).unwrap();
            for wrong in compare(&before, &after) {
                failures.push(format!("{name}, weights {}: {wrong}", report.weights));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
