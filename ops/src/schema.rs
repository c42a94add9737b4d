//! Names, attributes, element types and the shape rules of the operators.
//!
//! `LinFusionAttention`, per head, with φ(u) = elu(u) + 1 (that is `u + 1` for u > 0 and `exp(u)` otherwise):
//!
//! ```text
//! out[n] = φ(q[n]) · (Σ_m φ(k[m])ᵀ v[m] / M) / (φ(q[n]) · Σ_m φ(k[m]) / M + eps)
//! ```
//!
//! Sums are taken in `f32` for `f32`, `f16` and `bf16` tensors and in `f64` for `f64` ones. The
//! factor 1/M is applied to the accumulated sums, so no finite `f16` input overflows.
//!
//! Source of the formula: LinFusion (Liu, Yu, Wang: "LinFusion: 1 GPU, 1 Minute, 16K Image",
//! 2024), `GeneralizedLinearAttention`.

use std::fmt;

use thiserror::Error;

mod shapes;
mod window;

pub use shapes::{Dims, ShapeError};
pub use window::{
    ATTR_BORDER, ATTR_RADIUS, ATTR_SCALE, ATTR_TEXT, ATTR_WINDOW, Border, GridAxis, MAX_WINDOW,
    TextSide, WINDOW_ATTENTION, WINDOW_INPUT_NAMES, Window, WindowAttentionAttrs, WindowDims,
    WindowSpec,
};

/// The operators' domain.
pub const DOMAIN: &str = "ai.linfusion";
/// The version of [`DOMAIN`] that this crate implements, for `opset_import`.
pub const OPSET_VERSION: i64 = 1;
/// The name of linear attention.
pub const LINFUSION_ATTENTION: &str = "LinFusionAttention";
/// Name of the required `int` attribute that holds the number of heads.
pub const ATTR_NUM_HEADS: &str = "num_heads";
/// Name of the optional `float` attribute added to the normaliser.
pub const ATTR_EPS: &str = "eps";
/// Value of [`ATTR_EPS`] where the node has none.
pub const DEFAULT_EPS: f32 = 1e-4;
/// Names of the three inputs, in order.
pub const INPUT_NAMES: [&str; 3] = ["q", "k", "v"];
/// Name of the one output.
pub const OUTPUT_NAME: &str = "out";

/// The element types the operator is defined for. q, k, v and the output share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ElementType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision; sums are taken in `f32`.
    F16,
    /// Brain float; sums are taken in `f32`.
    Bf16,
    /// IEEE double precision; sums are taken in `f64`.
    F64,
}

impl ElementType {
    /// Every element type, in the order the operator's entries are registered.
    pub const ALL: [Self; 4] = [Self::F32, Self::F16, Self::Bf16, Self::F64];

    /// The number of `TensorProto.DataType` (FLOAT 1, FLOAT16 10, DOUBLE 11, BFLOAT16 16), which
    /// is also that of ONNX Runtime's `ONNXTensorElementDataType`.
    pub const fn onnx_code(self) -> i32 {
        match self {
            Self::F32 => 1,
            Self::F16 => 10,
            Self::F64 => 11,
            Self::Bf16 => 16,
        }
    }

    /// The element type with this `TensorProto.DataType` number, if it is one of ours.
    pub fn from_onnx_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.onnx_code() == code)
    }

    /// The type that sums are taken in.
    pub const fn accumulator(self) -> Self {
        match self {
            Self::F64 => Self::F64,
            Self::F32 | Self::F16 | Self::Bf16 => Self::F32,
        }
    }

    /// Size of one element in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F64 => "float64",
        })
    }
}

/// How q, k, v and the output lie in memory (row-major, contiguous).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Rank 3: q `[B, N, H·D]`, k `[B, M, H·D]`, v `[B, M, H·Dv]`, out `[B, N, H·Dv]`.
    Packed,
    /// Rank 4: q `[B, H, N, D]`, k `[B, H, M, D]`, v `[B, H, M, Dv]`, out `[B, H, N, Dv]`.
    Heads,
}

impl Layout {
    /// Rank of every tensor in this layout.
    pub const fn rank(self) -> usize {
        match self {
            Self::Packed => 3,
            Self::Heads => 4,
        }
    }

    /// The layout of tensors of this rank, if there is one.
    pub const fn from_rank(rank: usize) -> Option<Self> {
        match rank {
            3 => Some(Self::Packed),
            4 => Some(Self::Heads),
            _ => None,
        }
    }
}

/// An attribute out of its range.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum AttrError {
    /// `num_heads` is zero, negative, or beyond the address space.
    #[error("attribute `num_heads` must be at least 1, found {0}")]
    NumHeads(i64),
    /// `eps` is not a positive finite number.
    #[error("attribute `eps` must be positive and finite, found {0} (the usual value is 1e-4)")]
    Eps(f32),
    /// `scale` is no finite number.
    #[error("attribute `scale` must be finite, found {0} (0 stands for 1/sqrt(D))")]
    Scale(f32),
    /// `window` has a side out of range.
    #[error("attribute `window` must have sides from 1 to {MAX_WINDOW}, found {rows}x{cols}")]
    Window {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// `radius` is out of range.
    #[error("attribute `radius` must be from 1 to {MAX_WINDOW}, found {0}")]
    Radius(usize),
    /// A circle can't be shifted inside.
    #[error("attribute `border` must be `truncate` for a circular window, found `clamp`")]
    CircleClamp,
}

/// The attributes of one `LinFusionAttention` node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinFusionAttentionAttrs {
    /// Number of heads H, at least 1.
    pub num_heads: usize,
    /// Added to the normaliser; positive and finite.
    pub eps: f32,
}

impl LinFusionAttentionAttrs {
    /// Attributes as they stand in a node; `eps: None` means [`DEFAULT_EPS`].
    ///
    /// # Errors
    /// [`AttrError`] when a value is out of range. `eps` must be positive because φ underflows to
    /// zero for very negative inputs, where the quotient would be 0/0.
    pub fn new(num_heads: i64, eps: Option<f32>) -> Result<Self, AttrError> {
        let eps = eps.unwrap_or(DEFAULT_EPS);
        let heads = usize::try_from(num_heads)
            .ok()
            .filter(|&h| h >= 1)
            .ok_or(AttrError::NumHeads(num_heads))?;
        let attrs = Self {
            num_heads: heads,
            eps,
        };
        attrs.check()?;
        Ok(attrs)
    }

    /// Checks the ranges of values set field by field.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn check(&self) -> Result<(), AttrError> {
        if self.num_heads == 0 {
            return Err(AttrError::NumHeads(0));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return Err(AttrError::Eps(self.eps));
        }
        Ok(())
    }
}
