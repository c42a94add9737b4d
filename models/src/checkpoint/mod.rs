//! LinFusion checkpoints: the trained projections and MLPs of every replaced attention.
//!
//! A checkpoint is a folder of `config.json` and `diffusion_pytorch_model.safetensors`, or a single
//! `.safetensors` file whose config lies beside it or in its metadata. The config's `modules_list` names
//! one attention module an entry; entry `i` owns the tensors `i.*`. The order of the entries is the order
//! in which PyTorch registered the modules (`mid_block` last), **not** the order in which they run: use
//! [`Checkpoint::modules_in_execution_order`] or look modules up by name.
//!
//! Formula (`GeneralizedLinearAttention` of the official PyTorch code):
//! `q = to_q(x + F_q(x))`, `k = to_k(x + F_k(x))`, `v = to_v(x)`, where
//! `F(x) = W3·LeakyReLU(LayerNorm(W0·x + b0; g1, b1)) + b3`, or the identity where the config says so
//! (then `q = to_q(2x)`).

mod config;
mod discover;
mod error;
pub mod synth;
mod tensors;
pub mod write;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use linfusion_ops::schema::WindowSpec;
use sha2::{Digest, Sha256};

pub use self::discover::{
    Discovery, SearchPlaces, discover, download_command, hub_repository, learned_name,
};
pub use self::error::CheckpointError;
pub use self::tensors::{CheckpointTensor, FloatType, MlpPart, Part};

use self::config::{Config, MidDim};
use self::tensors::TensorFile;
use self::write::{CONFIG, TENSORS};
use crate::catalogue::execution_order;

/// A checkpoint whose config and tensors have been checked against each other.
///
/// The tensors stay in a read-only map of the file. As with every mapped file, somebody who truncates it
/// while it is in use ends the process.
#[derive(Debug)]
pub struct Checkpoint {
    /// The attention modules, in the order of the config's `modules_list`.
    pub modules: Vec<CheckpointModule>,
    /// The file that holds the tensors.
    pub path: PathBuf,
    tensors: TensorFile,
    sha256: OnceLock<String>,
}

/// One attention module of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointModule {
    /// Position in `modules_list`, and the prefix of the module's tensors.
    pub index: usize,
    /// PyTorch path of the attention it replaces, e.g. `mid_block.attentions.0.transformer_blocks.0.attn1`.
    pub module_name: String,
    /// Channels in and out of the attention.
    pub dim: usize,
    /// Number of heads; divides `dim`.
    pub heads: usize,
    /// Width of the two MLPs, as the tensors have it.
    pub mid: MlpWidth,
    /// The form of attention that the weights are for.
    pub attention: SiteAttention,
}

/// What a module's weights were learned for. The windows are those that they were learned
/// with, where the config says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SiteAttention {
    /// LinFusion attention: the official format.
    Linear,
    /// `a ⊙ Window(q, k, v) + b ⊙ LinFusion(q', k', v')`.
    Hybrid(Option<WindowSpec>),
    /// Window attention alone.
    Window(Option<WindowSpec>),
}

impl std::fmt::Display for SiteAttention {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linear => "linear",
            Self::Hybrid(_) => "hybrid",
            Self::Window(_) => "window",
        })
    }
}

/// What `F_q` and `F_k` are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpWidth {
    /// No MLP: F is the identity, so that q = to_q(2x) and k = to_k(2x).
    Identity,
    /// Linear → LayerNorm → LeakyReLU → Linear through this many channels.
    Width(usize),
}

impl std::fmt::Display for MlpWidth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Identity => f.write_str("no MLP (identity)"),
            Self::Width(width) => write!(f, "an MLP of width {width}"),
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint at `path`: a folder, or a `.safetensors` file.
    ///
    /// # Errors
    /// The config or the tensors are missing or malformed, a tensor has another shape than `dim_n`
    /// demands, or the MLP width of the tensors is not the one that the config states.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CheckpointError> {
        let (tensors_path, config_beside) = locate(path.as_ref())?;
        let tensors = TensorFile::open(&tensors_path)?;
        let config = match config_beside {
            Some(file) => Config::from_file(&file)?,
            None => Config::from_metadata(&tensors)?,
        };
        let modules = config
            .modules
            .into_iter()
            .enumerate()
            .map(|(index, entry)| check_module(&tensors, index, entry))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            modules,
            path: tensors_path,
            tensors,
            sha256: OnceLock::new(),
        })
    }

    /// SHA-256 of the tensors file, in lower-case hexadecimal; computed on the first call.
    pub fn sha256(&self) -> &str {
        self.sha256.get_or_init(|| {
            let digest = Sha256::digest(self.tensors.all_bytes());
            digest.iter().map(|byte| format!("{byte:02x}")).collect()
        })
    }

    /// The module with this PyTorch path.
    pub fn module(&self, module_name: &str) -> Option<&CheckpointModule> {
        self.modules.iter().find(|m| m.module_name == module_name)
    }

    /// The modules in the order in which the model runs them.
    pub fn modules_in_execution_order(&self) -> Vec<&CheckpointModule> {
        let names: Vec<&str> = self
            .modules
            .iter()
            .map(|m| m.module_name.as_str())
            .collect();
        execution_order(&names)
            .into_iter()
            .filter_map(|i| self.modules.get(i))
            .collect()
    }

    /// A tensor that the module must have, as a slice of the mapped file.
    ///
    /// # Errors
    /// The tensor is not there (an MLP part of a module without MLP, an absent optional bias), has an
    /// element type that is no float, or another shape than the module demands.
    pub fn tensor(
        &self,
        module: &CheckpointModule,
        part: Part,
    ) -> Result<CheckpointTensor, CheckpointError> {
        self.optional_tensor(module, part)?
            .ok_or_else(|| CheckpointError::MissingTensor {
                name: part.tensor_name(module.index),
                module: module.module_name.clone(),
            })
    }

    /// A tensor that the module may have, such as [`Part::QBias`].
    ///
    /// # Errors
    /// As [`Self::tensor`], but an absent tensor is `None`.
    pub fn optional_tensor(
        &self,
        module: &CheckpointModule,
        part: Part,
    ) -> Result<Option<CheckpointTensor>, CheckpointError> {
        checked_tensor(&self.tensors, module, part)
    }

    /// Names of tensors in the file that belong to no module or to no known part of one. A file of the
    /// official code has none.
    pub fn unused_tensors(&self) -> Vec<&str> {
        let known = |name: &str| {
            name.split_once('.').is_some_and(|(index, rest)| {
                index.parse::<usize>().is_ok_and(|i| i < self.modules.len())
                    && Part::ALL.iter().any(|part| part.suffix() == rest)
            })
        };
        self.tensors.names().filter(|name| !known(name)).collect()
    }
}

/// The tensors file, and the config file beside it if there is one.
fn locate(path: &Path) -> Result<(PathBuf, Option<PathBuf>), CheckpointError> {
    let kind = std::fs::metadata(path).map_err(|source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    })?;
    if kind.is_dir() {
        let config = path.join(CONFIG);
        let named = path.join(TENSORS);
        let tensors = if named.is_file() {
            named
        } else {
            only_safetensors_in(path)?
        };
        return Ok((tensors, config.is_file().then_some(config)));
    }
    if path.extension().is_none_or(|e| e != "safetensors") {
        return Err(CheckpointError::NotACheckpoint {
            path: path.to_owned(),
        });
    }
    let folder = path.parent().unwrap_or(Path::new(""));
    let own = path.with_extension("json");
    let shared = folder.join(CONFIG);
    let config = [own, shared].into_iter().find(|c| c.is_file());
    Ok((path.to_owned(), config))
}

fn only_safetensors_in(folder: &Path) -> Result<PathBuf, CheckpointError> {
    let io = |source| CheckpointError::Io {
        path: folder.to_owned(),
        source,
    };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            found.push(path);
        }
    }
    found.sort();
    match <[PathBuf; 1]>::try_from(found) {
        Ok([only]) => Ok(only),
        Err(found) => Err(CheckpointError::NoTensorsFile {
            folder: folder.to_owned(),
            found,
        }),
    }
}

fn check_module(
    tensors: &TensorFile,
    index: usize,
    entry: config::Entry,
) -> Result<CheckpointModule, CheckpointError> {
    let width_tensor = Part::QMlp(MlpPart::InBias).tensor_name(index);
    let has_mlp = !matches!(entry.attention, SiteAttention::Window(_));
    let mid = match tensors.shape(&width_tensor).filter(|_| has_mlp) {
        None => MlpWidth::Identity,
        Some([width]) => MlpWidth::Width(*width),
        Some(shape) => {
            return Err(CheckpointError::Shape {
                name: width_tensor,
                module: entry.module_name,
                expected: vec![entry.dim],
                found: shape.to_vec(),
            });
        }
    };
    let stated = match entry.mid {
        MidDim::Unstated => mid,
        MidDim::Identity => MlpWidth::Identity,
        MidDim::LikeDim => MlpWidth::Width(entry.dim),
        MidDim::Width(width) => MlpWidth::Width(width),
    };
    let module = CheckpointModule {
        index,
        module_name: entry.module_name,
        dim: entry.dim,
        heads: entry.heads,
        mid,
        attention: entry.attention,
    };
    for part in Part::ALL {
        let present = checked_tensor(tensors, &module, *part)?.is_some();
        if !present && part.is_required(&module) {
            return Err(CheckpointError::MissingTensor {
                name: part.tensor_name(index),
                module: module.module_name,
            });
        }
    }
    // After the shapes: a wrong `dim_n` would otherwise be reported as a wrong width.
    if stated != mid && !matches!(module.attention, SiteAttention::Window(_)) {
        return Err(CheckpointError::WidthMismatch {
            module: module.module_name,
            config: stated,
            tensors: mid,
        });
    }
    Ok(module)
}

fn checked_tensor(
    tensors: &TensorFile,
    module: &CheckpointModule,
    part: Part,
) -> Result<Option<CheckpointTensor>, CheckpointError> {
    let name = part.tensor_name(module.index);
    let Some(tensor) = tensors.tensor(&name)? else {
        return Ok(None);
    };
    let expected = part.shape(module).ok_or_else(|| {
        // A tensor of an MLP that the others say is not there, or of another attention.
        CheckpointError::StrayTensor {
            name: name.clone(),
            module: module.module_name.clone(),
            attention: module.attention,
            mid: module.mid,
        }
    })?;
    if tensor.shape == expected {
        return Ok(Some(tensor));
    }
    Err(CheckpointError::Shape {
        name,
        module: module.module_name.clone(),
        expected,
        found: tensor.shape,
    })
}

#[cfg(test)]
mod tests;
