//! `config.json`: which attention modules the checkpoint replaces.

use std::collections::HashSet;
use std::path::Path;

use linfusion_ops::schema::{Border, MAX_WINDOW, Window, WindowSpec};
use serde::Deserialize;
use serde_json::Value;

use super::tensors::TensorFile;
use super::{CheckpointError, SiteAttention};
use crate::json;

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
    pub attention: SiteAttention,
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
            serde_json::from_str(text).map_err(|e| unusable(path, json::problem(&e)))?;
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
    let attention = attention(fields).map_err(|p| format!("`{module_name}`: {p}"))?;
    Ok(Entry {
        module_name,
        dim,
        heads,
        mid,
        attention,
    })
}

fn attention(fields: &serde_json::Map<String, Value>) -> Result<SiteAttention, String> {
    let keys = ["window", "radius", "border"];
    let given = keys.iter().find(|key| fields.contains_key(**key));
    match fields.get("attention").map(|v| (v, v.as_str())) {
        None | Some((_, Some("linear"))) => match given {
            None => Ok(SiteAttention::Linear),
            Some(key) => Err(format!(
                "{key} is given, but attention is linear; expected hybrid or window"
            )),
        },
        Some((_, Some("hybrid"))) => window(fields).map(SiteAttention::Hybrid),
        Some((_, Some("window"))) => window(fields).map(SiteAttention::Window),
        Some((other, _)) => Err(format!(
            "attention is {other}; expected linear, hybrid or window"
        )),
    }
}

fn window(fields: &serde_json::Map<String, Value>) -> Result<Option<WindowSpec>, String> {
    let side = |value: &Value| {
        let side = value.as_u64().and_then(|n| usize::try_from(n).ok());
        side.filter(|n| (1..=MAX_WINDOW).contains(n))
    };
    let window = match (fields.get("window"), fields.get("radius")) {
        (Some(_), Some(_)) => return Err("both window and radius are given".to_owned()),
        (None, None) => None,
        (None, Some(value)) => Some(Window::Circle {
            radius: side(value)
                .ok_or_else(|| format!("radius is {value}; expected 1 to {MAX_WINDOW}"))?,
        }),
        (Some(value), None) => {
            let sides = match value.as_array().map(Vec::as_slice) {
                None => side(value).map(|n| (n, n)),
                Some([rows, cols]) => side(rows).zip(side(cols)),
                Some(_) => None,
            };
            let (rows, cols) = sides.ok_or_else(|| {
                format!("window is {value}; expected a number or [rows, columns]")
            })?;
            Some(Window::Rect { rows, cols })
        }
    };
    let border = match fields.get("border").map(|v| (v, v.as_str())) {
        None => None,
        Some((_, Some("clamp"))) => Some(Border::Clamp),
        Some((_, Some("truncate"))) => Some(Border::Truncate),
        Some((other, _)) => {
            return Err(format!("border is {other}; expected clamp or truncate"));
        }
    };
    match (window, border) {
        (None, None) => Ok(None),
        (None, Some(_)) => Err("border is given without window or radius".to_owned()),
        (Some(Window::Circle { .. }), Some(Border::Clamp)) => {
            Err("border is clamp; a window of a radius is always truncated".to_owned())
        }
        (Some(window), border) => Ok(Some(WindowSpec {
            window,
            border: border.unwrap_or(match window {
                Window::Rect { .. } => Border::Clamp,
                Window::Circle { .. } => Border::Truncate,
            }),
        })),
    }
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
