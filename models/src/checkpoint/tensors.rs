//! The tensors of a checkpoint: a mapped safetensors file, and which tensor is which part of a module.
//!
//! The header is parsed here rather than by the `safetensors` crate, whose end-of-buffer sum overflows
//! on a hostile header; every offset is checked against the file before anything is sliced.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use half::{bf16, f16};
use memmap2::Mmap;
use serde::Deserialize;
use serde_json::Value;

use super::{CheckpointError, CheckpointModule, MlpWidth, SiteAttention};
use crate::json;

/// One tensor of a module, by its role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// `to_q.weight` `[dim, dim]`, output channels first as PyTorch stores them.
    QWeight,
    /// `to_k.weight` `[dim, dim]`.
    KWeight,
    /// `to_v.weight` `[dim, dim]`.
    VWeight,
    /// `to_out.0.weight` `[dim, dim]`.
    OutWeight,
    /// `to_out.0.bias` `[dim]`.
    OutBias,
    /// `to_q.bias` `[dim]`, optional.
    QBias,
    /// `to_k.bias` `[dim]`, optional.
    KBias,
    /// `to_v.bias` `[dim]`, optional.
    VBias,
    /// `add_q_proj.weight` `[dim, dim]`: the text's projections, optional.
    AddQWeight,
    /// `add_k_proj.weight` `[dim, dim]`, optional.
    AddKWeight,
    /// `add_v_proj.weight` `[dim, dim]`, optional.
    AddVWeight,
    /// `to_add_out.weight` `[dim, dim]`, optional.
    AddOutWeight,
    /// `add_q_proj.bias` `[dim]`, optional.
    AddQBias,
    /// `add_k_proj.bias` `[dim]`, optional.
    AddKBias,
    /// `add_v_proj.bias` `[dim]`, optional.
    AddVBias,
    /// `to_add_out.bias` `[dim]`, optional.
    AddOutBias,
    /// `local_scale` `[heads]`: factor on the window attention of a hybrid.
    LocalScale,
    /// `global_scale` `[heads]`: factor on the linear attention of a hybrid.
    GlobalScale,
    /// A layer of the query's MLP, `to_q_.*`.
    QMlp(MlpPart),
    /// A layer of the key's MLP, `to_k_.*`.
    KMlp(MlpPart),
}

/// One tensor of an MLP: Linear(dim → mid), LayerNorm(mid, eps 1e-5), LeakyReLU(0.01), Linear(mid → dim).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MlpPart {
    /// `0.weight` `[mid, dim]`.
    InWeight,
    /// `0.bias` `[mid]`.
    InBias,
    /// `1.weight` `[mid]`.
    NormWeight,
    /// `1.bias` `[mid]`.
    NormBias,
    /// `3.weight` `[dim, mid]`.
    OutWeight,
    /// `3.bias` `[dim]`.
    OutBias,
}

impl Part {
    /// Every part that a module can have.
    pub const ALL: &[Self] = &[
        Self::QWeight,
        Self::KWeight,
        Self::VWeight,
        Self::OutWeight,
        Self::OutBias,
        Self::QBias,
        Self::KBias,
        Self::VBias,
        Self::AddQWeight,
        Self::AddKWeight,
        Self::AddVWeight,
        Self::AddOutWeight,
        Self::AddQBias,
        Self::AddKBias,
        Self::AddVBias,
        Self::AddOutBias,
        Self::LocalScale,
        Self::GlobalScale,
        Self::QMlp(MlpPart::InWeight),
        Self::QMlp(MlpPart::InBias),
        Self::QMlp(MlpPart::NormWeight),
        Self::QMlp(MlpPart::NormBias),
        Self::QMlp(MlpPart::OutWeight),
        Self::QMlp(MlpPart::OutBias),
        Self::KMlp(MlpPart::InWeight),
        Self::KMlp(MlpPart::InBias),
        Self::KMlp(MlpPart::NormWeight),
        Self::KMlp(MlpPart::NormBias),
        Self::KMlp(MlpPart::OutWeight),
        Self::KMlp(MlpPart::OutBias),
    ];

    /// Name of the tensor within its module, e.g. `to_q_.0.weight`.
    pub fn suffix(self) -> String {
        match self {
            Self::QWeight => "to_q.weight".to_owned(),
            Self::KWeight => "to_k.weight".to_owned(),
            Self::VWeight => "to_v.weight".to_owned(),
            Self::OutWeight => "to_out.0.weight".to_owned(),
            Self::OutBias => "to_out.0.bias".to_owned(),
            Self::QBias => "to_q.bias".to_owned(),
            Self::KBias => "to_k.bias".to_owned(),
            Self::VBias => "to_v.bias".to_owned(),
            Self::AddQWeight => "add_q_proj.weight".to_owned(),
            Self::AddKWeight => "add_k_proj.weight".to_owned(),
            Self::AddVWeight => "add_v_proj.weight".to_owned(),
            Self::AddOutWeight => "to_add_out.weight".to_owned(),
            Self::AddQBias => "add_q_proj.bias".to_owned(),
            Self::AddKBias => "add_k_proj.bias".to_owned(),
            Self::AddVBias => "add_v_proj.bias".to_owned(),
            Self::AddOutBias => "to_add_out.bias".to_owned(),
            Self::LocalScale => "local_scale".to_owned(),
            Self::GlobalScale => "global_scale".to_owned(),
            Self::QMlp(part) => format!("to_q_.{}", part.suffix()),
            Self::KMlp(part) => format!("to_k_.{}", part.suffix()),
        }
    }

    /// Name of the tensor in the file of the module with this index.
    pub fn tensor_name(self, index: usize) -> String {
        format!("{index}.{}", self.suffix())
    }

    /// The shape that the part must have; `None` if such a module has no such part.
    pub fn shape(self, module: &CheckpointModule) -> Option<Vec<usize>> {
        let (dim, linear) = (module.dim, module.attention == SiteAttention::Linear);
        let hybrid = matches!(module.attention, SiteAttention::Hybrid(_));
        Some(match self {
            Self::QWeight | Self::KWeight | Self::VWeight | Self::OutWeight => vec![dim, dim],
            Self::OutBias | Self::QBias | Self::KBias | Self::VBias => vec![dim],
            Self::AddQWeight | Self::AddKWeight | Self::AddVWeight | Self::AddOutWeight
                if !linear =>
            {
                vec![dim, dim]
            }
            Self::AddQBias | Self::AddKBias | Self::AddVBias | Self::AddOutBias if !linear => {
                vec![dim]
            }
            Self::LocalScale | Self::GlobalScale if hybrid => vec![module.heads],
            Self::QMlp(part) | Self::KMlp(part) => {
                let MlpWidth::Width(mid) = module.mid else {
                    return None;
                };
                match part {
                    MlpPart::InWeight => vec![mid, dim],
                    MlpPart::InBias | MlpPart::NormWeight | MlpPart::NormBias => vec![mid],
                    MlpPart::OutWeight => vec![dim, mid],
                    MlpPart::OutBias => vec![dim],
                }
            }
            _ => return None,
        })
    }

    pub(super) fn is_required(self, module: &CheckpointModule) -> bool {
        let linear = module.attention == SiteAttention::Linear;
        match self {
            Self::QMlp(_) | Self::KMlp(_) => module.mid != MlpWidth::Identity,
            Self::LocalScale | Self::GlobalScale => {
                matches!(module.attention, SiteAttention::Hybrid(_))
            }
            Self::QWeight | Self::KWeight | Self::VWeight | Self::OutWeight | Self::OutBias => {
                linear
            }
            _ => false,
        }
    }
}

impl MlpPart {
    fn suffix(self) -> &'static str {
        match self {
            Self::InWeight => "0.weight",
            Self::InBias => "0.bias",
            Self::NormWeight => "1.weight",
            Self::NormBias => "1.bias",
            Self::OutWeight => "3.weight",
            Self::OutBias => "3.bias",
        }
    }
}

/// Element types that a checkpoint's tensors may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
}

impl FloatType {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "F16" => Self::F16,
            "BF16" => Self::BF16,
            "F32" => Self::F32,
            "F64" => Self::F64,
            _ => return None,
        })
    }

    /// Size of an element.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// A tensor of the checkpoint; `bytes` is a slice of the mapped file.
#[derive(Debug, Clone)]
pub struct CheckpointTensor {
    /// Name in the file, e.g. `3.to_q.weight`.
    pub name: String,
    /// Element type.
    pub dtype: FloatType,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Elements in row-major order, little-endian.
    pub bytes: Bytes,
}

impl CheckpointTensor {
    /// The elements as f64, which holds every supported type exactly.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            FloatType::F16 => self.decode(|b| f16::from_le_bytes(b).to_f64()),
            FloatType::BF16 => self.decode(|b| bf16::from_le_bytes(b).to_f64()),
            FloatType::F32 => self.decode(|b| f64::from(f32::from_le_bytes(b))),
            FloatType::F64 => self.decode(f64::from_le_bytes),
        }
    }

    /// The elements as f32: exact from f16, bf16 and f32, rounded to nearest-even from f64 (an f64 beyond
    /// f32's range becomes an infinity).
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            FloatType::F16 => self.decode(|b| f16::from_le_bytes(b).to_f32()),
            FloatType::BF16 => self.decode(|b| bf16::from_le_bytes(b).to_f32()),
            FloatType::F32 => self.decode(f32::from_le_bytes),
            FloatType::F64 => self.decode(|b| f64::from_le_bytes(b) as f32),
        }
    }

    fn decode<const N: usize, T>(&self, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.bytes
            .as_chunks::<N>()
            .0
            .iter()
            .map(|chunk| read(*chunk))
            .collect()
    }
}

/// A safetensors file whose header has been checked.
#[derive(Debug)]
pub(super) struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    tensors: HashMap<String, Located>,
    metadata: HashMap<String, String>,
}

#[derive(Debug)]
struct Located {
    dtype: String,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The limit of the format's own reference implementation.
const MAX_HEADER: usize = 100_000_000;

impl TensorFile {
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io = |source| CheckpointError::Io {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.len() == 0 {
            return Err(CheckpointError::Header {
                path: path.to_owned(),
                problem: "it is empty".to_owned(),
            });
        }
        // SAFETY: the map is read-only and private to this value. That nobody truncates the file while
        // it is mapped cannot be ensured; `Checkpoint`'s documentation says so.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::parse(path, Bytes::from_owner(map))
    }

    pub fn parse(path: &Path, bytes: Bytes) -> Result<Self, CheckpointError> {
        let wrong = |problem: String| CheckpointError::Header {
            path: path.to_owned(),
            problem,
        };
        let (length, rest) = bytes
            .split_first_chunk::<8>()
            .ok_or_else(|| wrong(format!("it has only {} bytes", bytes.len())))?;
        let length = u64::from_le_bytes(*length);
        let header = usize::try_from(length)
            .ok()
            .filter(|n| *n <= MAX_HEADER)
            .and_then(|n| rest.get(..n))
            .ok_or_else(|| {
                wrong(format!(
                    "its header claims {length} bytes, the file has {} after the length",
                    rest.len()
                ))
            })?;
        let fields: HashMap<String, Value> =
            serde_json::from_slice(header).map_err(|e| wrong(format!("its header: {e}")))?;
        let data_start = 8 + header.len();
        let data_len = rest.len() - header.len();

        let mut tensors = HashMap::with_capacity(fields.len());
        let mut metadata = HashMap::new();
        for (name, value) in fields {
            if name == "__metadata__" {
                metadata = serde_json::from_value(value)
                    .map_err(|e| wrong(format!("its __metadata__: {e}")))?;
                continue;
            }
            let raw: RawTensor = serde_json::from_value(value).map_err(|e| {
                wrong(format!(
                    "the entry of tensor `{name}`: {}",
                    json::problem(&e)
                ))
            })?;
            let located = locate(&raw, data_start, data_len)
                .map_err(|problem| wrong(format!("tensor `{name}` {problem}")))?;
            tensors.insert(name, located);
        }
        Ok(Self {
            path: path.to_owned(),
            bytes,
            tensors,
            metadata,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn all_bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    pub fn tensor(&self, name: &str) -> Result<Option<CheckpointTensor>, CheckpointError> {
        let Some(located) = self.tensors.get(name) else {
            return Ok(None);
        };
        let dtype =
            FloatType::parse(&located.dtype).ok_or_else(|| CheckpointError::ElementType {
                name: name.to_owned(),
                found: located.dtype.clone(),
            })?;
        Ok(Some(CheckpointTensor {
            name: name.to_owned(),
            dtype,
            shape: located.shape.clone(),
            bytes: self.bytes.slice(located.start..located.end),
        }))
    }
}

/// Checks a tensor's place in the file; the answer is relative to the file's start.
fn locate(raw: &RawTensor, data_start: usize, data_len: usize) -> Result<Located, String> {
    let [start, end] = raw.data_offsets;
    let within = |offset: u64| usize::try_from(offset).ok().filter(|o| *o <= data_len);
    let (Some(start), Some(end)) = (within(start), within(end)) else {
        return Err(format!(
            "claims bytes {start} to {end} of {data_len} bytes of data"
        ));
    };
    let length = end
        .checked_sub(start)
        .ok_or_else(|| format!("ends at byte {end}, before its start {start}"))?;
    let shape = raw
        .shape
        .iter()
        .map(|d| usize::try_from(*d))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| format!("has shape {:?}", raw.shape))?;
    // Types that no checkpoint uses are listed without a size check; asking for one is an error.
    if let Some(dtype) = FloatType::parse(&raw.dtype) {
        let expected = shape
            .iter()
            .try_fold(dtype.bytes() as u128, |n, d| n.checked_mul(*d as u128));
        if expected != Some(length as u128) {
            return Err(format!(
                "has shape {shape:?} of {}, but {length} bytes",
                raw.dtype
            ));
        }
    }
    Ok(Located {
        dtype: raw.dtype.clone(),
        shape,
        start: data_start + start,
        end: data_start + end,
    })
}
