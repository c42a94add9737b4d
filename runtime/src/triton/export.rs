//! From a pipeline's folder to a model repository.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io::Read;
use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use linfusion_models::onnx::write::{ExternalData, WriteOptions, stage};
use linfusion_models::onnx::{ExternalRef, OnnxFile, for_each_tensor, is_external};
use serde::Serialize;

use super::config::{DynamicBatching, InstanceGroup, InstanceKind, ModelConfig, Platform};
use super::ensemble;
use super::error::TritonError;
use super::repository::{Existing, Unfinished};
use super::signature::{Batch, Operators, Signature};
use crate::pipeline::Folder;

/// The name that Triton looks for.
const MODEL: &str = "model.onnx";
const CONFIG: &str = "config.pbtxt";
const LIBRARY: &str = "liblinfusion_ops.so";
/// The folder of the only version of each model.
const VERSION: &str = "1";

/// What to export, and how it is to be served.
#[derive(Debug, Clone)]
pub struct Request {
    /// The pipeline's folder.
    pub pipeline: PathBuf,
    /// The repository's folder.
    pub repository: PathBuf,
    /// The absolute path under which the server sees the repository. The operator library's path in a configuration is
    /// ONNX Runtime's to open, so it can't be relative to the repository.
    pub served_at: String,
    /// The library with LinFusion's operators.
    pub operator_library: Option<PathBuf>,
    /// The largest batch of the models that can be batched.
    pub max_batch: NonZeroU32,
    /// Copies of each model that run at once.
    pub instances: NonZeroU32,
    /// What they run on.
    pub kind: InstanceKind,
    /// Bytes of a GPU's memory that one copy of a model may take; `None` for all.
    pub gpu_memory: Option<usize>,
    /// Whether models are copied.
    pub placing: Placing,
    /// What to do if there is a repository already.
    pub existing: Existing,
}

/// How a model comes into the repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Placing {
    /// As a copy.
    #[default]
    Copy,
    /// As symbolic links to the pipeline's files, by absolute path.
    Link,
}

/// A written repository.
#[derive(Debug, Serialize)]
pub struct Exported {
    /// Its folder.
    pub repository: PathBuf,
    /// Its models, in the order of an image's way.
    pub models: Vec<ExportedModel>,
}

/// A model of a repository.
#[derive(Debug, Serialize)]
pub struct ExportedModel {
    /// Its name.
    pub name: String,
    /// Its `max_batch_size`.
    pub max_batch_size: u32,
    /// What the user should know.
    pub notes: Vec<Note>,
}

/// What the user should know of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Note {
    /// Triton will not put requests together.
    NotBatched {
        /// Why.
        reason: String,
    },
    /// The model has LinFusion's operators, and the repository no library.
    NoLibrary,
    /// The library's path in the configuration.
    Library {
        /// As the server sees it.
        path: String,
    },
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBatched { reason } => {
                write!(f, "no batching across requests: {reason}")
            }
            Self::NoLibrary => f.write_str(
                "its LinFusion operators run by their definition in standard operators, slower than with --op-library",
            ),
            Self::Library { path } => write!(f, "operators from {path}, on the server"),
        }
    }
}

/// Writes the repository. `watch` hears which model is next, and may stop it.
///
/// # Errors
/// [`TritonError`]; nothing is written then.
pub fn export(
    request: &Request,
    watch: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Exported, TritonError> {
    let folder = Folder::open(&request.pipeline)?;
    let components = components(&folder)?;
    apart(request)?;
    if let Some(library) = &request.operator_library {
        check_library(library)?;
    }
    let unfinished = Unfinished::begin(&request.repository, request.existing)?;
    let mut models = Vec::new();
    let mut configs = BTreeMap::new();
    for component in components {
        if watch(component).is_break() {
            return Err(TritonError::Stopped);
        }
        let place = unfinished.path().join(component);
        let (config, notes) = write_model(request, &folder, component, &place)?;
        models.push(ExportedModel {
            name: config.name.clone(),
            max_batch_size: config.max_batch_size,
            notes,
        });
        configs.insert(component, config);
    }
    let encoders = (configs.get("text_encoder")).zip(configs.get("text_encoder_2"));
    if let Some(config) = encoders.and_then(|(a, b)| ensemble::of_text_encoders(a, b)) {
        write_config(&config, &unfinished.path().join(ensemble::NAME))?;
        models.push(ExportedModel {
            name: config.name,
            max_batch_size: config.max_batch_size,
            notes: Vec::new(),
        });
    }
    unfinished.publish()?;
    Ok(Exported {
        repository: request.repository.clone(),
        models,
    })
}

/// The folders with models, in the order of an image's way.
fn components(folder: &Folder) -> Result<Vec<&'static str>, TritonError> {
    let missing = |missing| TritonError::Missing {
        path: folder.root().to_owned(),
        missing,
    };
    let there = |names: &[&'static str]| -> Vec<&'static str> {
        names.iter().copied().filter(|n| folder.has(n)).collect()
    };
    // A refiner of SD-XL has the second text encoder only.
    let encoders = there(&["text_encoder", "text_encoder_2"]);
    if encoders.is_empty() {
        return Err(missing("text_encoder"));
    }
    for needed in [folder.denoiser(), "vae_decoder"] {
        if !folder.has(needed) {
            return Err(missing(needed));
        }
    }
    let rest = there(&[
        "controlnet",
        folder.denoiser(),
        "vae_decoder",
        "vae_encoder",
    ]);
    Ok([encoders, rest].concat())
}

/// Replacing a folder must not take the pipeline with it.
fn apart(request: &Request) -> Result<(), TritonError> {
    let pipeline = fs::canonicalize(&request.pipeline)
        .map_err(TritonError::io("resolve", &request.pipeline))?;
    let Ok(repository) = fs::canonicalize(&request.repository) else {
        return Ok(());
    };
    if pipeline.starts_with(&repository) || repository.starts_with(&pipeline) {
        return Err(TritonError::Nested {
            repository: request.repository.clone(),
            pipeline: request.pipeline.clone(),
        });
    }
    Ok(())
}

/// A shared library for Linux, whatever its processor: it need not be this machine's.
fn check_library(path: &Path) -> Result<(), TritonError> {
    let mut magic = [0; 4];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
    let problem = match read {
        Ok(()) if magic == *b"\x7fELF" => return Ok(()),
        Ok(()) => {
            "is no shared library for Linux; expected liblinfusion_ops.so, which `make lib` builds"
                .to_owned()
        }
        Err(error) => format!("cannot be read: {error}"),
    };
    Err(TritonError::Library {
        path: path.to_owned(),
        problem,
    })
}

fn write_model(
    request: &Request,
    folder: &Folder,
    component: &str,
    place: &Path,
) -> Result<(ModelConfig, Vec<Note>), TritonError> {
    let path = folder.model(component)?;
    let file = OnnxFile::open(&path).map_err(|source| TritonError::Read {
        model: component.to_owned(),
        source,
    })?;
    let signature = Signature::of(&file)?;
    let mut notes = Vec::new();
    let max_batch = match &signature.batch {
        Batch::Open => request.max_batch.get(),
        Batch::None(reason) => {
            let reason = reason.clone();
            notes.push(Note::NotBatched { reason });
            0
        }
    };
    let version = place.join(VERSION);
    fs::create_dir_all(&version).map_err(TritonError::io("create", &version))?;
    match request.placing {
        Placing::Copy => {
            let options = WriteOptions {
                external: ExternalData::Copy,
                ..WriteOptions::default()
            };
            stage(&file.model, Some(&file), &version.join(MODEL), &options)?.publish()?;
        }
        Placing::Link => link(&file, &version)?,
    }
    let mut operator_libraries = Vec::new();
    match (signature.operators, &request.operator_library) {
        (Operators::None, _) => {}
        (Operators::Undefined, None) => return Err(TritonError::NeedsLibrary { path }),
        (Operators::Defined, None) => notes.push(Note::NoLibrary),
        (_, Some(library)) => {
            let copy = place.join(LIBRARY);
            fs::copy(library, &copy).map_err(TritonError::io("write", &copy))?;
            let root = request.served_at.trim_end_matches('/');
            let path = format!("{root}/{component}/{LIBRARY}");
            notes.push(Note::Library { path: path.clone() });
            operator_libraries.push(path);
        }
    }
    let config = ModelConfig {
        name: component.to_owned(),
        platform: Platform::OnnxRuntime,
        max_batch_size: max_batch,
        inputs: signature.inputs(max_batch),
        outputs: signature.outputs(max_batch),
        dynamic_batching: (max_batch > 1).then_some(DynamicBatching),
        instances: Some(InstanceGroup {
            kind: request.kind,
            count: request.instances,
        }),
        operator_libraries,
        parameters: parameters(request),
        steps: Vec::new(),
    };
    write_config(&config, place)?;
    Ok((config, notes))
}

/// Parameters of Triton's backend that matter here. Those of the CUDA provider are not `gpu_execution_accelerator`'s
/// because the backend sets these four to their defaults after it has read the accelerator's.
fn parameters(request: &Request) -> BTreeMap<&'static str, String> {
    let mut parameters = BTreeMap::from([
        // One node after the other: a UNet is a chain, and two large attentions at once take twice the memory.
        ("execution_mode", "0".to_owned()),
        ("enable_mem_arena", "1".to_owned()),
        // A pattern is one block for everything that a step takes, planned anew for each size of image.
        ("enable_mem_pattern", "0".to_owned()),
    ]);
    if request.kind != InstanceKind::Cpu {
        // As much as is asked for, not the next power of two of it.
        parameters.insert("arena_extend_strategy", "1".to_owned());
        // Heuristic: the exhaustive default measures each convolution at each new size of image.
        parameters.insert("cudnn_conv_algo_search", "1".to_owned());
        if let Some(bytes) = request.gpu_memory {
            parameters.insert("gpu_mem_limit", bytes.to_string());
        }
    }
    parameters
}

fn write_config(config: &ModelConfig, place: &Path) -> Result<(), TritonError> {
    // Triton wants a version of an ensemble too, which is empty.
    let version = place.join(VERSION);
    fs::create_dir_all(&version).map_err(TritonError::io("create", &version))?;
    let path = place.join(CONFIG);
    fs::write(&path, config.to_string()).map_err(TritonError::io("write", &path))
}

/// Links the model and its files of weights, under the names that the model has for them.
fn link(file: &OnnxFile, version: &Path) -> Result<(), TritonError> {
    let fault = |problem: String| TritonError::Weights {
        path: file.path().to_owned(),
        problem,
    };
    let mut locations = BTreeSet::new();
    let mut first_fault = None;
    for_each_tensor(&file.model, &mut |_, tensor| {
        if !is_external(tensor) || first_fault.is_some() {
            return;
        }
        match ExternalRef::of(tensor) {
            Ok(reference) if locations.contains(&reference.location) => {}
            // Looking at one tensor of a file applies all rules on which files a model may name.
            Ok(reference) => match file.tensor_bytes(tensor) {
                Ok(_) => {
                    locations.insert(reference.location);
                }
                Err(error) => first_fault = Some(error.to_string()),
            },
            Err(error) => first_fault = Some(error.to_string()),
        }
    });
    if let Some(problem) = first_fault {
        return Err(fault(problem));
    }
    let folder = file.path().parent().unwrap_or(Path::new("."));
    let pairs = locations
        .iter()
        .map(|location| (folder.join(location), version.join(location)));
    for (from, to) in pairs.chain([(file.path().to_owned(), version.join(MODEL))]) {
        let target = fs::canonicalize(&from).map_err(TritonError::io("resolve", &from))?;
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(TritonError::io("create", parent))?;
        }
        symlink(&target, &to).map_err(TritonError::io("link", &to))?;
    }
    Ok(())
}
