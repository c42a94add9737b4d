//! The weights of a converted file, against the checkpoint that they came from.

use bytes::Bytes;
use linfusion_models::checkpoint::{Checkpoint, CheckpointError, CheckpointModule, Part};
use linfusion_models::onnx::{ElementType, OnnxFile};

use crate::graph::{Graph, tensor_name};
use crate::rewrite::site::SUFFIX;
use crate::rewrite::weights::{Orientation, initializer};

/// The stored tensors that a converted site reads and that are no tensor of its module
/// in the checkpoint, a line each.
///
/// # Errors
/// The checkpoint or the file's data cannot be read, or the checkpoint has no module of
/// the file.
pub fn weights_that_differ(
    file: &OnnxFile,
    checkpoint: &Checkpoint,
) -> Result<Vec<String>, CheckpointError> {
    let graph = Graph::new(&file.model.graph);
    let mut different = Vec::new();
    for module in &checkpoint.modules {
        let own = [
            format!("/{}/", module.module_name),
            format!("/{}{SUFFIX}/", module.module_name),
        ];
        // Where a hybrid's module has no projection, the graph's own layer is used again.
        let reused = [
            (Part::QWeight, "linear/to_q/"),
            (Part::KWeight, "linear/to_k/"),
        ]
        .map(
            |(part, step)| match checkpoint.optional_tensor(module, part) {
                Ok(None) => Some(step),
                _ => None,
            },
        );
        let nodes = graph.nodes().map(|(_, n)| n).filter(|n| {
            let name = n.name.as_deref().unwrap_or("");
            let within = own
                .iter()
                .find_map(|prefix| name.strip_prefix(prefix.as_str()));
            within.is_some_and(|step| !reused.iter().flatten().any(|r| step.starts_with(r)))
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
        let mut expected: Option<(ElementType, Vec<Bytes>)> = None;
        for tensor in read {
            let Some(element) = tensor.data_type.and_then(ElementType::from_onnx) else {
                continue;
            };
            if expected.as_ref().is_none_or(|(e, _)| *e != element) {
                expected = Some((element, stored_forms(checkpoint, module, element)?));
            }
            let known = expected.as_ref().map_or(&[][..], |(_, forms)| forms);
            let same = file
                .tensor_bytes(tensor)
                .is_ok_and(|bytes| known.contains(&bytes));
            if !same {
                different.push(format!(
                    "{}: '{}' is no tensor of the checkpoint's module",
                    module.module_name,
                    tensor_name(tensor)
                ));
            }
        }
    }
    Ok(different)
}

/// Every tensor of a module as a file may store it.
fn stored_forms(
    checkpoint: &Checkpoint,
    module: &CheckpointModule,
    element: ElementType,
) -> Result<Vec<Bytes>, CheckpointError> {
    let mut forms = Vec::new();
    for part in Part::ALL {
        let Ok(Some(tensor)) = checkpoint.optional_tensor(module, *part) else {
            continue;
        };
        for orientation in [Orientation::Stored, Orientation::Transposed] {
            // An MLP that is the identity is folded into its projection.
            for factor in [1.0, 2.0] {
                let form = initializer("", &tensor, orientation, factor, element);
                forms.extend(form.and_then(|f| f.tensor.raw_data));
            }
        }
        if matches!(part, Part::LocalScale | Part::GlobalScale) {
            let heads = tensor.to_f64();
            let channels = module.dim / module.heads.max(1);
            let values: Vec<f64> = heads
                .iter()
                .flat_map(|&v| std::iter::repeat_n(v, channels))
                .collect();
            forms.extend(crate::rewrite::weights::encode(&values, element).map(|(b, _)| b));
        }
    }
    Ok(forms)
}
