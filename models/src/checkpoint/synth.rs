//! Random checkpoints in the official format, for tests and for measuring speed without trained weights.
//!
//! Values are drawn as PyTorch initialises its layers: uniform in ±1/√fan_in for linear layers, near one
//! for the LayerNorm's weight. The same modules and seed give the same bytes.

use crate::random::SplitMix64;
use std::collections::HashMap;
use std::path::Path;

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};

use super::write::{CONFIG, TENSORS, config_json};
use super::{CheckpointError, CheckpointModule, FloatType, MlpPart, MlpWidth, Part, SiteAttention};

/// A module to invent weights for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SynthModule {
    /// PyTorch path of the attention.
    pub module_name: String,
    /// Channels; a multiple of `heads`.
    pub dim: usize,
    /// Number of heads.
    pub heads: usize,
    /// Width of the MLPs.
    pub mid: MlpWidth,
    /// What the weights are for.
    pub attention: SiteAttention,
}

/// How the tensors are written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SynthOptions {
    /// Seed of the random numbers.
    pub seed: u64,
    /// Element type of every tensor.
    pub dtype: FloatType,
    /// `local_scale` and `global_scale` of every head of a hybrid; random around ½ where
    /// `None`.
    pub scales: Option<[f64; 2]>,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            dtype: FloatType::F32,
            scales: None,
        }
    }
}

/// Writes a checkpoint folder (made if absent) of `config.json` and `diffusion_pytorch_model.safetensors`,
/// with one random module for each of `modules`, in their order.
///
/// # Errors
/// A file cannot be written.
pub fn write_checkpoint(
    folder: &Path,
    modules: &[SynthModule],
    options: SynthOptions,
) -> Result<(), CheckpointError> {
    let io = |path: &Path, source| CheckpointError::Io {
        path: path.to_owned(),
        source,
    };
    std::fs::create_dir_all(folder).map_err(|e| io(folder, e))?;

    let forms: Vec<CheckpointModule> = modules.iter().enumerate().map(form).collect();
    let config_path = folder.join(CONFIG);
    std::fs::write(&config_path, config_json(&forms)).map_err(|e| io(&config_path, e))?;

    let tensors_path = folder.join(TENSORS);
    let mut random = SplitMix64::new(options.seed);
    let mut tensors = Vec::new();
    for (index, (module, form)) in modules.iter().zip(&forms).enumerate() {
        for part in Part::ALL.iter().filter(|p| p.is_required(form)) {
            let Some(shape) = part.shape(form) else {
                continue;
            };
            let mut values = draw(*part, module, shape.iter().product(), &mut random);
            match (part, options.scales) {
                (Part::LocalScale, Some([local, _])) => values.fill(local),
                (Part::GlobalScale, Some([_, global])) => values.fill(global),
                _ => {}
            }
            tensors.push((
                part.tensor_name(index),
                shape,
                encode(&values, options.dtype),
            ));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            TensorView::new(dtype(options.dtype), shape.clone(), bytes).map(|view| (name, view))
        })
        .collect::<Result<Vec<_>, _>>();
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    views
        .and_then(|views| serialize_to_file(views, Some(metadata), &tensors_path))
        .map_err(|e| io(&tensors_path, std::io::Error::other(e)))
}

fn form((index, module): (usize, &SynthModule)) -> CheckpointModule {
    CheckpointModule {
        index,
        module_name: module.module_name.clone(),
        dim: module.dim,
        heads: module.heads,
        mid: module.mid,
        attention: module.attention,
    }
}

fn draw(part: Part, module: &SynthModule, count: usize, random: &mut SplitMix64) -> Vec<f64> {
    let mid = match module.mid {
        MlpWidth::Identity => module.dim,
        MlpWidth::Width(width) => width,
    };
    let (centre, fan_in) = match part {
        Part::QMlp(MlpPart::NormWeight) | Part::KMlp(MlpPart::NormWeight) => (1.0, 16),
        Part::LocalScale | Part::GlobalScale => (0.5, 25),
        Part::QMlp(MlpPart::OutWeight | MlpPart::OutBias)
        | Part::KMlp(MlpPart::OutWeight | MlpPart::OutBias) => (0.0, mid),
        _ => (0.0, module.dim),
    };
    let spread = 1.0 / (fan_in as f64).sqrt();
    (0..count)
        .map(|_| centre + spread * random.symmetric())
        .collect()
}

fn dtype(dtype: FloatType) -> Dtype {
    match dtype {
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
        FloatType::F32 => Dtype::F32,
        FloatType::F64 => Dtype::F64,
    }
}

fn encode(values: &[f64], dtype: FloatType) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.bytes());
    for value in values {
        match dtype {
            FloatType::F16 => bytes.extend(f16::from_f64(*value).to_le_bytes()),
            FloatType::BF16 => bytes.extend(bf16::from_f64(*value).to_le_bytes()),
            FloatType::F32 => bytes.extend((*value as f32).to_le_bytes()),
            FloatType::F64 => bytes.extend(value.to_le_bytes()),
        }
    }
    bytes
}
