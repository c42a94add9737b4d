//! Writing a checkpoint in the official format.

use std::collections::HashMap;
use std::path::Path;

use linfusion_ops::schema::Window;
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};

use super::{CheckpointError, CheckpointModule, MlpWidth, Part, SiteAttention};

pub(super) const CONFIG: &str = "config.json";
pub(super) const TENSORS: &str = "diffusion_pytorch_model.safetensors";

/// A module and its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct NewModule {
    /// What it is; its index is its place among the modules written, whatever is said here.
    pub form: CheckpointModule,
    /// The values of its parts, row-major.
    pub parts: Vec<(Part, Vec<f32>)>,
}

/// Writes the folder `folder`, which is there, with one entry for each of `modules`, in float32.
///
/// # Errors
/// A part has not as many values as its shape in this module, or a file cannot be written.
pub fn write_folder(folder: &Path, modules: &[NewModule]) -> Result<(), CheckpointError> {
    let io = |path: &Path, source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    let tensors_path = folder.join(TENSORS);
    let mut tensors = Vec::new();
    for (index, module) in modules.iter().enumerate() {
        for (part, values) in &module.parts {
            let name = part.tensor_name(index);
            let expected = part.shape(&module.form).unwrap_or_default();
            if expected.iter().product::<usize>() != values.len() || expected.is_empty() {
                return Err(CheckpointError::Shape {
                    name,
                    module: module.form.module_name.clone(),
                    expected,
                    found: vec![values.len()],
                });
            }
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.push((name, expected, bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
        })
        .collect::<Result<Vec<_>, _>>();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views
        .and_then(|views| serialize_to_file(views, Some(metadata), &tensors_path))
        .map_err(|e| io(&tensors_path, std::io::Error::other(e)))?;
    let forms: Vec<CheckpointModule> = modules.iter().map(|m| m.form.clone()).collect();
    let config_path = folder.join(CONFIG);
    std::fs::write(&config_path, config_json(&forms)).map_err(|e| io(&config_path, e))?;
    // The library keeps its files to their owner; who may read the one may read the other.
    std::fs::metadata(&config_path)
        .and_then(|config| std::fs::set_permissions(&tensors_path, config.permissions()))
        .map_err(|e| io(&tensors_path, e))
}

pub(super) fn config_json(modules: &[CheckpointModule]) -> String {
    let list: Vec<_> = modules
        .iter()
        .map(|module| {
            let mid = match module.mid {
                MlpWidth::Identity => serde_json::json!(-1),
                MlpWidth::Width(width) if width == module.dim => serde_json::Value::Null,
                MlpWidth::Width(width) => serde_json::json!(width),
            };
            let mut entry = serde_json::json!({
                "module_name": module.module_name,
                "dim_n": module.dim,
                "heads": module.heads,
                "projection_mid_dim": mid,
            });
            if let SiteAttention::Hybrid(spec) | SiteAttention::Window(spec) = module.attention {
                entry["attention"] = serde_json::json!(module.attention.to_string());
                match spec.map(|s| (s.window, s.border.name())) {
                    None => {}
                    Some((Window::Rect { rows, cols }, border)) => {
                        entry["window"] = serde_json::json!([rows, cols]);
                        entry["border"] = serde_json::json!(border);
                    }
                    Some((Window::Circle { radius }, _)) => {
                        entry["radius"] = serde_json::json!(radius);
                    }
                }
            }
            entry
        })
        .collect();
    let config = serde_json::json!({ "_class_name": "LinFusion", "modules_list": list });
    format!("{config:#}\n")
}
