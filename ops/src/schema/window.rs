//! `WindowAttention`: attributes and the shape rule.
//!
//! Of N = P + rows·cols tokens, P are text and the others an image in raster order. An image
//! query attends, by exact softmax of `scale · q·k`, to the keys of its window and to all text;
//! a text query attends to everything.

use std::fmt;
use std::ops::Range;

use super::{AttrError, Dims, Layout, LinFusionAttentionAttrs, ShapeError};

/// The operator's name.
pub const WINDOW_ATTENTION: &str = "WindowAttention";
/// Names of its four inputs, in order.
pub const WINDOW_INPUT_NAMES: [&str; 4] = ["q", "k", "v", "grid"];
/// Name of the optional `float` attribute: the factor on q·k; 0, the default, is 1/√D.
pub const ATTR_SCALE: &str = "scale";
/// Name of the `ints` attribute: rows and columns of a rectangular window.
pub const ATTR_WINDOW: &str = "window";
/// Name of the `int` attribute: radius of a circular window.
pub const ATTR_RADIUS: &str = "radius";
/// Name of the optional `string` attribute: `clamp` or `truncate`.
pub const ATTR_BORDER: &str = "border";
/// Name of the optional `string` attribute: `prefix` (the default) or `suffix`.
pub const ATTR_TEXT: &str = "text";

/// The keys around a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Window {
    /// This many rows and columns. One of an even number lies before the query
    /// (NATTEN, from 0.20 on).
    Rect {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
    },
    /// Keys at dy² + dx² < radius² (CLEAR).
    Circle {
        /// Radius.
        radius: usize,
    },
}

/// What happens to a window at the image's border.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Border {
    /// It is shifted inside and keeps its size (NATTEN); larger than the image, it is the image.
    Clamp,
    /// Keys outside the image don't exist (CLEAR).
    Truncate,
}

impl Border {
    /// As the attribute spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Clamp => "clamp",
            Self::Truncate => "truncate",
        }
    }
}

/// Where the text tokens lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TextSide {
    /// Before the image's.
    Prefix,
    /// After the image's.
    Suffix,
}

impl TextSide {
    /// As the attribute spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefix => "prefix",
            Self::Suffix => "suffix",
        }
    }
}

/// A window and its border.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowSpec {
    /// The keys around a query.
    pub window: Window,
    /// At the image's border.
    pub border: Border,
}

impl Default for WindowSpec {
    fn default() -> Self {
        Self {
            window: Window::Rect { rows: 16, cols: 16 },
            border: Border::Clamp,
        }
    }
}

impl fmt::Display for WindowSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.window {
            Window::Rect { rows, cols } => write!(f, "{rows}x{cols} {}", self.border.name()),
            Window::Circle { radius } => write!(f, "radius {radius}"),
        }
    }
}

/// The attributes of one `WindowAttention` node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowAttentionAttrs {
    /// Number of heads H, at least 1.
    pub num_heads: usize,
    /// Factor on q·k; `None`: 1/√D.
    pub scale: Option<f32>,
    /// The keys around a query.
    pub window: Window,
    /// At the image's border; a circle is always truncated.
    pub border: Border,
    /// Where the text lies.
    pub text: TextSide,
}

impl WindowAttentionAttrs {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`AttrError`] names the attribute and the value.
    pub fn check(&self) -> Result<(), AttrError> {
        if self.num_heads == 0 {
            return Err(AttrError::NumHeads(0));
        }
        if let Some(scale) = self.scale.filter(|s| !s.is_finite()) {
            return Err(AttrError::Scale(scale));
        }
        match self.window {
            Window::Rect { rows, cols }
                if rows == 0 || cols == 0 || rows.max(cols) > MAX_WINDOW =>
            {
                Err(AttrError::Window { rows, cols })
            }
            Window::Circle { radius } if radius == 0 || radius > MAX_WINDOW => {
                Err(AttrError::Radius(radius))
            }
            Window::Circle { .. } if self.border == Border::Clamp => Err(AttrError::CircleClamp),
            _ => Ok(()),
        }
    }

    /// The keys of one axis of length `size` that lie in the bounding box of the window of the
    /// query at `at`: what [`Window`] and [`Border`] mean.
    pub fn key_range(&self, axis: GridAxis, at: usize, size: usize) -> Range<usize> {
        let window = match (self.window, axis) {
            (Window::Rect { rows, .. }, GridAxis::Rows) => rows,
            (Window::Rect { cols, .. }, GridAxis::Cols) => cols,
            (Window::Circle { radius }, _) => (2 * radius).saturating_sub(1),
        };
        match self.border {
            Border::Clamp => {
                let window = window.min(size);
                let start = at.saturating_sub(window / 2).min(size - window);
                start..start + window
            }
            Border::Truncate => {
                let first = at as i128 - (window / 2) as i128;
                let end = (first + window as i128).clamp(0, size as i128) as usize;
                (first.max(0) as usize)..end
            }
        }
    }

    /// Whether the key at (dy, dx) of the query, in the bounding box, is in the window.
    pub fn reaches(&self, dy: usize, dx: usize) -> bool {
        match self.window {
            Window::Rect { .. } => true,
            Window::Circle { radius } => dy * dy + dx * dx < radius * radius,
        }
    }
}

/// Larger windows than any image has tokens on a side are typing errors.
pub const MAX_WINDOW: usize = 1 << 20;

/// An axis of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GridAxis {
    /// Down.
    Rows,
    /// Across.
    Cols,
}

/// The checked sizes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WindowDims {
    /// Memory layout of q, k, v and the output.
    pub layout: Layout,
    /// Batch size B.
    pub batch: usize,
    /// Number of heads H.
    pub heads: usize,
    /// Text tokens P.
    pub text: usize,
    /// Rows of image tokens.
    pub rows: usize,
    /// Columns of image tokens.
    pub cols: usize,
    /// Width of one head of q and k, D.
    pub head_dim: usize,
    /// Width of one head of v and of the output, Dv.
    pub value_dim: usize,
}

impl WindowDims {
    /// Checks shapes and grid against each other and against the attributes.
    ///
    /// # Errors
    /// [`ShapeError`] naming the input, the expected and the found value.
    pub fn new(
        q_shape: &[usize],
        k_shape: &[usize],
        v_shape: &[usize],
        grid: [i64; 2],
        attrs: &WindowAttentionAttrs,
    ) -> Result<Self, ShapeError> {
        attrs.check()?;
        let like = LinFusionAttentionAttrs {
            num_heads: attrs.num_heads,
            eps: super::DEFAULT_EPS,
        };
        let dims = Dims::new(q_shape, k_shape, v_shape, &like)?;
        if dims.keys != dims.queries {
            return Err(ShapeError::Dimension {
                input: "k",
                what: "the number of keys",
                axis: dims.layout.rank() - 2,
                expected: dims.queries,
                found: dims.keys,
                because: "in input `q`",
                shape: k_shape.to_vec(),
            });
        }
        let size = |v: i64| usize::try_from(v).ok().filter(|&v| v > 0);
        let sides = size(grid[0]).zip(size(grid[1]));
        let pixels = sides.and_then(|(r, c)| r.checked_mul(c));
        match (sides, pixels) {
            (Some((rows, cols)), Some(pixels)) if pixels <= dims.queries => Ok(Self {
                layout: dims.layout,
                batch: dims.batch,
                heads: dims.heads,
                text: dims.queries - pixels,
                rows,
                cols,
                head_dim: dims.head_dim,
                value_dim: dims.value_dim,
            }),
            _ => Err(ShapeError::Grid {
                grid,
                tokens: dims.queries,
                shape: q_shape.to_vec(),
            }),
        }
    }

    /// The output's shape: `[B, N, H·Dv]` or `[B, H, N, Dv]`.
    pub fn out_shape(&self) -> Vec<usize> {
        match self.layout {
            Layout::Packed => vec![
                self.batch,
                self.tokens(),
                self.heads.saturating_mul(self.value_dim),
            ],
            Layout::Heads => vec![self.batch, self.heads, self.tokens(), self.value_dim],
        }
    }

    /// Tokens N, text and image.
    pub fn tokens(&self) -> usize {
        self.text + self.rows * self.cols
    }

    /// The token of the first text.
    pub fn text_start(&self, side: TextSide) -> usize {
        match side {
            TextSide::Prefix => 0,
            TextSide::Suffix => self.rows * self.cols,
        }
    }

    /// The token of the first pixel.
    pub fn image_start(&self, side: TextSide) -> usize {
        match side {
            TextSide::Prefix => self.text,
            TextSide::Suffix => 0,
        }
    }
}
