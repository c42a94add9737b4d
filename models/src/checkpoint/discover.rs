//! Where a checkpoint for a model may already lie, and how to get one. Nothing here uses the network.

use std::path::{Path, PathBuf};

use crate::catalogue::Architecture;

/// The Hugging Face cache to look into; apart from the environment so that a search can be repeated.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SearchPlaces {
    /// The `hub` folder with `models--*` entries; `None` searches beside the model only.
    pub hub_cache: Option<PathBuf>,
}

/// What a search found, best candidate first, and where it looked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Discovery {
    /// Folders or `.safetensors` files that exist and look like checkpoints.
    pub found: Vec<PathBuf>,
    /// Every place that was tried, for the message when nothing was found.
    pub searched: Vec<PathBuf>,
}

impl SearchPlaces {
    /// The cache that the Hugging Face libraries would use: `HF_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `$XDG_CACHE_HOME/huggingface/hub`, else `~/.cache/huggingface/hub`.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).filter(|v| !v.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        let path = |name: &str| variable(name).map(PathBuf::from);
        let hub_cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| path("HF_HOME").map(|home| home.join("hub")))
            .or_else(|| path("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
            .or_else(|| path("HOME").map(|home| home.join(".cache/huggingface/hub")));
        Self { hub_cache }
    }
}

/// What `linfusion-convert MODEL --weights distill` calls the checkpoint that it learns for a model or a pipeline's folder of this
/// name.
#[must_use]
pub fn learned_name(model: &Path) -> std::ffi::OsString {
    let mut name = model.file_stem().unwrap_or_default().to_owned();
    name.push(".linfusion-weights");
    name
}

/// Looks for a checkpoint: `linfusion/`, the one that was learned for the model ([`learned_name`]), and `*.linfusion.safetensors` beside the model (and beside the
/// pipeline that the model's folder belongs to), then the published checkpoint of the architecture in the
/// local Hugging Face cache.
pub fn discover(
    model_path: &Path,
    architecture: Option<Architecture>,
    places: &SearchPlaces,
) -> Discovery {
    let mut discovery = Discovery::default();
    let folder = match model_path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    look_beside(&folder, model_path, &mut discovery);
    look_at(folder.join(learned_name(model_path)), &mut discovery);
    // In a diffusers pipeline the model is `unet/model.onnx`, and its siblings are folders.
    let pipeline = folder.join("..");
    if pipeline.join("model_index.json").is_file() {
        look_beside(&pipeline, model_path, &mut discovery);
        // By its own name, which may be a link's or the working folder's.
        if let Ok(pipeline) = std::path::absolute(&folder).map(|f| f.join(".."))
            && let Ok(pipeline) = pipeline.canonicalize()
        {
            look_at(
                pipeline.with_file_name(learned_name(&pipeline)),
                &mut discovery,
            );
        }
    }
    if let (Some(cache), Some(repository)) =
        (&places.hub_cache, architecture.and_then(hub_repository))
    {
        look_in_cache(cache, repository, &mut discovery);
    }
    discovery
}

/// The published checkpoint for an architecture; none is published for transformers. A ControlNet
/// copies its UNet's encoder, so it takes the UNet's checkpoint.
pub fn hub_repository(architecture: Architecture) -> Option<&'static str> {
    match architecture {
        Architecture::Sd15 | Architecture::ControlNet => Some("Yuanshi/LinFusion-1-5"),
        Architecture::Sd21 => Some("Yuanshi/LinFusion-2-1"),
        Architecture::Sdxl => Some("Yuanshi/LinFusion-XL"),
        _ => None,
    }
}

/// The command that puts the published checkpoint where [`discover`] finds it when it is run in the
/// model's folder; `None` where none is published.
pub fn download_command(architecture: Architecture) -> Option<String> {
    let repository = hub_repository(architecture)?;
    Some(format!("hf download {repository} --local-dir linfusion"))
}

fn look_beside(folder: &Path, model_path: &Path, discovery: &mut Discovery) {
    look_at(folder.join("linfusion"), discovery);
    discovery
        .searched
        .push(folder.join("*.linfusion.safetensors"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| name.ends_with(".linfusion.safetensors"))
        })
        .collect();
    // The file that is named after the model comes first.
    let own = model_path.with_extension("linfusion.safetensors");
    files.sort_by_key(|file| (file.file_name() != own.file_name(), file.clone()));
    discovery.found.append(&mut files);
}

fn look_at(checkpoint: PathBuf, discovery: &mut Discovery) {
    discovery.searched.push(checkpoint.clone());
    if is_checkpoint_folder(&checkpoint) {
        discovery.found.push(checkpoint);
    }
}

fn look_in_cache(cache: &Path, repository: &str, discovery: &mut Discovery) {
    let entry = cache.join(format!("models--{}", repository.replace('/', "--")));
    discovery.searched.push(entry.clone());
    let Ok(revision) = std::fs::read_to_string(entry.join("refs/main")) else {
        return;
    };
    let revision = revision.trim();
    if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_alphanumeric()) {
        return;
    }
    let snapshot = entry.join("snapshots").join(revision);
    if is_checkpoint_folder(&snapshot) {
        discovery.found.push(snapshot);
    }
}

fn is_checkpoint_folder(folder: &Path) -> bool {
    folder.join("config.json").is_file()
        && std::fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .any(|entry| entry.path().extension().is_some_and(|e| e == "safetensors"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_the_libraries_order() {
        let cases = [
            (vec![("HF_HUB_CACHE", "/a"), ("HF_HOME", "/b")], "/a"),
            (vec![("HF_HOME", "/b"), ("HOME", "/h")], "/b/hub"),
            (
                vec![("XDG_CACHE_HOME", "/x"), ("HOME", "/h")],
                "/x/huggingface/hub",
            ),
            (vec![("HOME", "/h")], "/h/.cache/huggingface/hub"),
        ];
        for (variables, expected) in cases {
            let places = SearchPlaces::from_variables(|name| {
                let found = variables.iter().find(|(key, _)| *key == name)?;
                Some(found.1.into())
            });
            assert_eq!(places.hub_cache.as_deref(), Some(Path::new(expected)));
        }
    }

    #[test]
    fn finds_beside_the_model_before_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("unet.onnx");
        let make = |path: &Path| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "{}").unwrap();
        };
        let cache = folder.path().join("hub");
        let places = SearchPlaces {
            hub_cache: Some(cache.clone()),
        };
        let none = discover(&model, Some(Architecture::Sdxl), &places);
        assert_eq!(none.found, Vec::<PathBuf>::new());
        assert_eq!(none.searched.len(), 4);

        let entry = cache.join("models--Yuanshi--LinFusion-XL");
        make(&entry.join("snapshots/0123abcd/config.json"));
        make(&entry.join("snapshots/0123abcd/diffusion_pytorch_model.safetensors"));
        std::fs::create_dir_all(entry.join("refs")).unwrap();
        std::fs::write(entry.join("refs/main"), "0123abcd\n").unwrap();
        make(&folder.path().join("zz.linfusion.safetensors"));
        make(&folder.path().join("aa.linfusion.safetensors"));
        make(&folder.path().join("unet.linfusion.safetensors"));
        make(&folder.path().join("linfusion/config.json"));
        make(&folder.path().join("linfusion/x.safetensors"));
        let learned = folder.path().join("unet.linfusion-weights");
        make(&learned.join("config.json"));
        make(&learned.join("x.safetensors"));

        let found = discover(&model, Some(Architecture::Sdxl), &places).found;
        let expected = [
            folder.path().join("linfusion"),
            folder.path().join("unet.linfusion.safetensors"),
            folder.path().join("aa.linfusion.safetensors"),
            folder.path().join("zz.linfusion.safetensors"),
            learned,
            entry.join("snapshots/0123abcd"),
        ];
        assert_eq!(found, expected);
        let other = discover(&model, Some(Architecture::Sd15), &places).found;
        assert_eq!(other.len(), 5);
    }

    #[test]
    fn what_was_learned_for_a_pipeline_lies_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for name in ["sd15/unet", "sd15.linfusion-weights"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::fs::write(root.join("sd15/model_index.json"), "{}").unwrap();
        let learned = root.join("sd15.linfusion-weights");
        std::fs::write(learned.join("config.json"), "{}").unwrap();
        std::fs::write(learned.join("x.safetensors"), "").unwrap();
        let model = root.join("sd15/unet/model.onnx");
        let found = discover(&model, None, &SearchPlaces::default()).found;
        assert_eq!(found, [learned]);
    }

    #[test]
    fn a_cache_reference_cannot_leave_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let entry = folder.path().join("models--Yuanshi--LinFusion-1-5");
        for sub in ["refs", "snapshots", "evil"] {
            std::fs::create_dir_all(entry.join(sub)).unwrap();
        }
        std::fs::write(entry.join("refs/main"), "../evil").unwrap();
        std::fs::write(entry.join("evil/config.json"), "{}").unwrap();
        std::fs::write(entry.join("evil/x.safetensors"), "").unwrap();
        let places = SearchPlaces {
            hub_cache: Some(folder.path().to_owned()),
        };
        let model = Path::new("/nowhere/unet.onnx");
        assert!(
            discover(model, Some(Architecture::Sd15), &places)
                .found
                .is_empty()
        );
    }
}
