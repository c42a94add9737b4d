//! What a model's metadata says about where it comes from.

use std::path::Path;

use linfusion_models::onnx::OnnxFile;

use crate::pipeline::Folder;

/// Whether the model, or that in a pipeline's folder, says that it was converted without trained weights, so that its images mean
/// nothing and only its speed counts. A file that cannot be read says nothing.
pub fn is_untrained(path: &Path) -> bool {
    if path.is_dir() {
        let model = Folder::open(path).and_then(|folder| folder.model(folder.denoiser()));
        return model.is_ok_and(|model| is_untrained(&model));
    }
    OnnxFile::open(path).is_ok_and(|file| {
        file.model.metadata_props.iter().any(|entry| {
            entry.key.as_deref() == Some("linfusion.weights")
                && entry
                    .value
                    .as_deref()
                    .is_some_and(|v| v.starts_with("none"))
        })
    })
}
