//! The weights of a converted file, against the checkpoint that they came from.

use std::collections::HashSet;

use bytes::Bytes;
use linfusion_models::checkpoint::{Checkpoint, CheckpointError, CheckpointModule, MlpPart, Part};
use linfusion_models::onnx::proto::TensorProto;
use linfusion_models::onnx::{ElementType, OnnxFile};
use serde::Serialize;

use super::converted_sites;
use crate::convert::CONVERTED_KEY;
use crate::graph::{Graph, tensor_name};
use crate::rewrite::site::SUFFIX;
use crate::rewrite::weights::{Orientation, initializer};

/// What a file's weights are against a checkpoint's, by converted module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoredWeights {
    /// Modules with the checkpoint's weights, and no others.
    pub equal: Vec<String>,
    /// Modules with other weights.
    pub different: Vec<Difference>,
    /// Modules of window attention, which has no weights of a checkpoint.
    pub without: Vec<String>,
}

/// A module whose weights are not the checkpoint's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The module.
    pub module: String,
    /// What is different.
    pub problem: String,
}

impl std::fmt::Display for StoredWeights {
    /// A line of numbers, then a line for each of the first modules that differ.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 8;
        let count = self.different.len();
        write!(
            f,
            "{count} of {} sites have other weights",
            self.equal.len() + self.without.len() + count
        )?;
        for Difference { module, problem } in self.different.iter().take(SHOWN) {
            write!(f, "\n  {module}: {problem}")?;
        }
        match count.saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

/// Compares the weights that a file's converted sites store with those of their modules in the checkpoint.
///
/// # Errors
/// The checkpoint cannot be read.
pub fn compare_weights(
    file: &OnnxFile,
    checkpoint: &Checkpoint,
) -> Result<StoredWeights, CheckpointError> {
    let graph = Graph::new(&file.model.graph);
    let mut found = StoredWeights::default();
    for name in converted_modules(file) {
        let Some(module) = checkpoint.modules.iter().find(|m| m.module_name == name) else {
            found.different.push(Difference {
                module: name,
                problem: "the checkpoint has no such module".to_owned(),
            });
            continue;
        };
        let own = own_parts(checkpoint, module)?;
        let stored = stored(&graph, checkpoint, module)?;
        let mut expected: Option<(ElementType, Vec<(Part, Bytes)>)> = None;
        let (mut other, mut same) = (Vec::new(), HashSet::new());
        for tensor in &stored {
            let Some(element) = tensor.data_type.and_then(ElementType::from_onnx) else {
                continue;
            };
            if expected.as_ref().is_none_or(|(e, _)| *e != element) {
                expected = Some((element, stored_forms(checkpoint, module, element)?));
            }
            let forms = expected.as_ref().map_or(&[][..], |(_, forms)| forms);
            let bytes = file.tensor_bytes(tensor).ok();
            let mut parts = forms
                .iter()
                .filter(|(_, form)| bytes.as_ref() == Some(form))
                .map(|(part, _)| *part)
                .peekable();
            match parts.peek() {
                Some(_) => same.extend(parts),
                None => other.push(tensor_name(tensor)),
            }
        }
        let missing = own.iter().filter(|part| !same.contains(*part)).count();
        let problem = match (other.as_slice(), missing) {
            ([], 0) if own.is_empty() => {
                found.without.push(name);
                continue;
            }
            ([], 0) => {
                found.equal.push(name);
                continue;
            }
            ([], _) if same.is_empty() => "it has none of the checkpoint's weights".to_owned(),
            ([], missing) => format!("{missing} of the checkpoint's tensors are not in the file"),
            ([first], _) => format!("'{first}' is no tensor of the checkpoint's module"),
            ([first, rest @ ..], _) => format!(
                "'{first}' and {} more are no tensors of the checkpoint's module",
                rest.len()
            ),
        };
        found.different.push(Difference {
            module: name,
            problem,
        });
    }
    Ok(found)
}

/// The modules that were converted: as the file's metadata has them, else by its operators.
fn converted_modules(file: &OnnxFile) -> Vec<String> {
    let mut recorded = file.model.metadata_props.iter();
    let recorded = recorded.find(|p| p.key.as_deref() == Some(CONVERTED_KEY));
    if let Some(list) = recorded.and_then(|p| p.value.as_deref()) {
        return list.split_whitespace().map(str::to_owned).collect();
    }
    let (sites, unread) = converted_sites(file);
    let mut seen = HashSet::new();
    sites
        .into_iter()
        .map(|site| site.module)
        .chain(unread.into_iter().map(|site| site.module))
        .filter(|module| seen.insert(module.clone()))
        .collect()
}

/// The parts of a module that no file has that was converted without it: its MLPs, and a hybrid's scales; without MLPs its
/// projections.
fn own_parts(
    checkpoint: &Checkpoint,
    module: &CheckpointModule,
) -> Result<Vec<Part>, CheckpointError> {
    let there = |parts: &[Part]| -> Result<Vec<Part>, CheckpointError> {
        let mut found = Vec::new();
        for part in parts {
            if checkpoint.optional_tensor(module, *part)?.is_some() {
                found.push(*part);
            }
        }
        Ok(found)
    };
    let learned = there(&[
        Part::QMlp(MlpPart::InWeight),
        Part::QMlp(MlpPart::OutWeight),
        Part::KMlp(MlpPart::InWeight),
        Part::KMlp(MlpPart::OutWeight),
        Part::LocalScale,
        Part::GlobalScale,
    ])?;
    match learned.is_empty() {
        true => there(&[Part::QWeight, Part::KWeight]),
        false => Ok(learned),
    }
}

/// The weights in the file that are the module's, by the names of the nodes that read them.
fn stored<'m>(
    graph: &Graph<'m>,
    checkpoint: &Checkpoint,
    module: &CheckpointModule,
) -> Result<Vec<&'m TensorProto>, CheckpointError> {
    let own = [
        format!("/{}/", module.module_name),
        format!("/{}{SUFFIX}/", module.module_name),
    ];
    // Where a hybrid's module has no projection, the graph's own layer is used again.
    let mut reused = Vec::new();
    for (part, step) in [
        (Part::QWeight, "linear/to_q/"),
        (Part::KWeight, "linear/to_k/"),
    ] {
        if checkpoint.optional_tensor(module, part)?.is_none() {
            reused.push(step);
        }
    }
    let nodes = graph.nodes().map(|(_, n)| n).filter(|n| {
        let name = n.name.as_deref().unwrap_or("");
        let within = own
            .iter()
            .find_map(|prefix| name.strip_prefix(prefix.as_str()));
        within.is_some_and(|step| !reused.iter().any(|r| step.starts_with(r)))
    });
    // Shapes and other small constants are named like the nodes; weights like modules.
    let mut read: Vec<_> = nodes
        .flat_map(|n| &n.input)
        .filter(|name| !name.starts_with('/'))
        .filter_map(|name| graph.initializer(name))
        .collect();
    // Layers that kept their nodes.
    let own = format!("{}.", module.module_name);
    read.extend(graph.proto.initializer.iter().filter(|t| {
        let name = tensor_name(t);
        name.starts_with(&own) && name.contains(SUFFIX)
    }));
    read.sort_by_key(|t| tensor_name(t));
    read.dedup_by_key(|t| tensor_name(t));
    Ok(read)
}

/// Every tensor of a module as a file may store it.
fn stored_forms(
    checkpoint: &Checkpoint,
    module: &CheckpointModule,
    element: ElementType,
) -> Result<Vec<(Part, Bytes)>, CheckpointError> {
    let mut forms = Vec::new();
    for part in Part::ALL {
        let Ok(Some(tensor)) = checkpoint.optional_tensor(module, *part) else {
            continue;
        };
        for orientation in [Orientation::Stored, Orientation::Transposed] {
            // An MLP that is the identity is folded into its projection.
            for factor in [1.0, 2.0] {
                let form = initializer("", &tensor, orientation, factor, element);
                let bytes = form.and_then(|f| f.tensor.raw_data);
                forms.extend(bytes.map(|bytes| (*part, bytes)));
            }
        }
        if matches!(part, Part::LocalScale | Part::GlobalScale) {
            let heads = tensor.to_f64();
            let channels = module.dim / module.heads.max(1);
            let values: Vec<f64> = heads
                .iter()
                .flat_map(|&v| std::iter::repeat_n(v, channels))
                .collect();
            let encoded = crate::rewrite::weights::encode(&values, element);
            forms.extend(encoded.map(|(bytes, _)| (*part, bytes)));
        }
    }
    Ok(forms)
}
