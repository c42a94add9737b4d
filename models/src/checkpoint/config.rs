//! `config.json`: which attention modules the checkpoint replaces.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::CheckpointError;
use super::tensors::TensorFile;

/// No model has more attention modules or channels; a file that claims so is damaged.
const MAX_MODULES: usize = 1 << 16;
const MAX_DIM: u64 = 1 << 20;
/// A real config has a few kilobytes.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

pub(super) struct Config {
    pub modules: Vec<Entry>,
}

pub(super) struct Entry {
    pub module_name: String,
    pub dim: usize,
    pub heads: usize,
    pub mid: MidDim,
}

/// `projection_mid_dim`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MidDim {
    /// The key is absent.
    Unstated,
    /// `-1`
    Identity,
    /// `null`, or `0`: PyTorch's code reads `mid_dim or query_dim`.
    LikeDim,
    Width(usize),
}

#[derive(Deserialize)]
struct RawConfig {
    modules_list: Vec<serde_json::Map<String, Value>>,
}

impl Config {
    pub fn from_file(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io {
            path: path.to_owned(),
            source,
        };
        let size = std::fs::metadata(path).map_err(io)?.len();
        if size > MAX_CONFIG_BYTES {
            return Err(unusable(path, format!("it has {size} bytes")));
        }
        Self::parse(&std::fs::read_to_string(path).map_err(io)?, path)
    }

    /// The config in the tensors file's own metadata: the whole JSON text under `config`, or the list
    /// alone under `modules_list`.
    pub fn from_metadata(tensors: &TensorFile) -> Result<Self, CheckpointError> {
        if let Some(text) = tensors.metadata("config") {
            return Self::parse(text, tensors.path());
        }
        if let Some(list) = tensors.metadata("modules_list") {
            return Self::parse(&format!("{{\"modules_list\": {list}}}"), tensors.path());
        }
        Err(CheckpointError::NoConfig {
            path: tensors.path().to_owned(),
        })
    }

    fn parse(text: &str, path: &Path) -> Result<Self, CheckpointError> {
        let raw: RawConfig =
            serde_json::from_str(text).map_err(|e| unusable(path, e.to_string()))?;
        if raw.modules_list.is_empty() || raw.modules_list.len() > MAX_MODULES {
            let count = raw.modules_list.len();
            return Err(unusable(path, format!("modules_list has {count} entries")));
        }
        let modules = raw
            .modules_list
            .iter()
            .enumerate()
            .map(|(i, fields)| {
                entry(fields).map_err(|p| unusable(path, format!("modules_list[{i}]: {p}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let mut seen = HashSet::new();
        if let Some(twice) = modules.iter().find(|m| !seen.insert(&m.module_name)) {
            let problem = format!("`{}` is there twice", twice.module_name);
            return Err(unusable(path, problem));
        }
        Ok(Self { modules })
    }
}

fn entry(fields: &serde_json::Map<String, Value>) -> Result<Entry, String> {
    let module_name = fields
        .get("module_name")
        .and_then(Value::as_str)
        .filter(|name| !name.is_empty())
        .ok_or("module_name is missing or no text")?
        .to_owned();
    let dim = positive(fields, "dim_n")?;
    let heads = positive(fields, "heads")?;
    if dim % heads != 0 {
        return Err(format!(
            "`{module_name}`: dim_n {dim} is no multiple of heads {heads}"
        ));
    }
    let mid = match fields.get("projection_mid_dim") {
        None => MidDim::Unstated,
        Some(Value::Null) => MidDim::LikeDim,
        Some(value) => match value.as_i64() {
            Some(-1) => MidDim::Identity,
            Some(0) => MidDim::LikeDim,
            Some(_) => MidDim::Width(positive(fields, "projection_mid_dim")?),
            None => {
                return Err(format!(
                    "projection_mid_dim is {value}; expected null, -1 or a width"
                ));
            }
        },
    };
    Ok(Entry {
        module_name,
        dim,
        heads,
        mid,
    })
}

fn positive(fields: &serde_json::Map<String, Value>, key: &str) -> Result<usize, String> {
    let value = fields.get(key).ok_or_else(|| format!("{key} is missing"))?;
    value
        .as_u64()
        .filter(|n| (1..=MAX_DIM).contains(n))
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| format!("{key} is {value}; expected a number from 1 to {MAX_DIM}"))
}

fn unusable(path: &Path, problem: String) -> CheckpointError {
    CheckpointError::Config {
        path: path.to_owned(),
        problem,
    }
}
