//! Everything that can be wrong with a checkpoint.

use std::path::PathBuf;

use super::{MlpWidth, SiteAttention};

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// What was opened.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// The path is a file of another kind.
    #[error(
        "{} is neither a LinFusion folder (config.json and diffusion_pytorch_model.safetensors) nor a .safetensors file",
        path.display()
    )]
    NotACheckpoint {
        /// The path as given.
        path: PathBuf,
    },
    /// A folder without a tensors file, or with several.
    #[error(
        "{} has no diffusion_pytorch_model.safetensors, and {} other .safetensors files where exactly one would do \
         (a .bin checkpoint must be saved as safetensors first)",
        folder.display(),
        found.len()
    )]
    NoTensorsFile {
        /// The folder.
        folder: PathBuf,
        /// The candidates that were seen.
        found: Vec<PathBuf>,
    },
    /// Neither a config file nor a config in the tensors file's metadata.
    #[error(
        "{} has no config: expected config.json beside it, or a `config` entry in its metadata, with `modules_list`",
        path.display()
    )]
    NoConfig {
        /// The tensors file.
        path: PathBuf,
    },
    /// The config is there but says something impossible.
    #[error("the LinFusion config in {} is unusable: {problem}", path.display())]
    Config {
        /// The file that holds the config.
        path: PathBuf,
        /// What is wrong, with the value.
        problem: String,
    },
    /// The safetensors header is malformed.
    #[error("{} is no valid safetensors file: {problem}", path.display())]
    Header {
        /// The tensors file.
        path: PathBuf,
        /// What is wrong, with the value.
        problem: String,
    },
    /// A tensor that a module needs is not in the file.
    #[error("the checkpoint has no tensor `{name}`, which `{module}` needs")]
    MissingTensor {
        /// Name of the tensor.
        name: String,
        /// The module it belongs to.
        module: String,
    },
    /// A tensor is there that such a module does not have.
    #[error(
        "the checkpoint has tensor `{name}`, but `{module}` is of {attention} attention with {mid}, which has no such tensor (hint: `attention` in config.json says linear, hybrid or window; a missing first layer `to_q_.0` means no MLP)"
    )]
    StrayTensor {
        /// Name of the tensor.
        name: String,
        /// The module it belongs to.
        module: String,
        /// What the config says that the module is.
        attention: SiteAttention,
        /// The MLP that its tensors have.
        mid: MlpWidth,
    },
    /// A tensor has another shape than its module demands.
    #[error("tensor `{name}` of `{module}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// The module it belongs to.
        module: String,
        /// The shape that `dim_n` and the MLP width demand.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor's elements are not of a float type.
    #[error("tensor `{name}` has element type {found}; expected F16, BF16, F32 or F64")]
    ElementType {
        /// Name of the tensor.
        name: String,
        /// The type in the file.
        found: String,
    },
    /// Config and tensors disagree about the MLP.
    #[error("the config says that `{module}` has {config}, but its tensors have {tensors}")]
    WidthMismatch {
        /// The module.
        module: String,
        /// What `projection_mid_dim` states.
        config: MlpWidth,
        /// What the tensors have.
        tensors: MlpWidth,
    },
}
