//! What the host passes to a kernel: one structure by value, as `kernels/params.h` declares it.

/// Where element (b, h, n, i) of a tensor lies: `data + b*batch + h*head + n*token + i`, strides in
/// elements.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TensorParams {
    /// Device address.
    pub data: u64,
    /// From one batch element to the next.
    pub batch: i64,
    /// From one head to the next.
    pub head: i64,
    /// From one token to the next.
    pub token: i64,
}

/// Parameters of the kernels of `LinFusionAttention`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LinearParams {
    /// Queries.
    pub q: TensorParams,
    /// Keys.
    pub k: TensorParams,
    /// Values.
    pub v: TensorParams,
    /// The output.
    pub out: TensorParams,
    /// Device address of the sums of each split.
    pub partial: u64,
    /// Device address of the sums as the second phase reads them.
    pub state: u64,
    /// Number of queries N.
    pub queries: i64,
    /// Number of keys M.
    pub keys: i64,
    /// Keys of one split, the last may have fewer.
    pub keys_per_split: i64,
    /// Queries of one block of the second phase.
    pub queries_per_block: i64,
    /// Batch size B.
    pub batch: i32,
    /// Number of heads H.
    pub heads: i32,
    /// Splits of the keys.
    pub splits: i32,
    /// Width of one head of q and k, D.
    pub head_dim: i32,
    /// Width of one head of v and the output, Dv.
    pub value_dim: i32,
    /// Added to the normaliser.
    pub eps: f32,
}

/// Parameters of the kernels of `WindowAttention`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct WindowParams {
    /// Queries.
    pub q: TensorParams,
    /// Keys.
    pub k: TensorParams,
    /// Values.
    pub v: TensorParams,
    /// The output.
    pub out: TensorParams,
    /// Device address of the results of each split for text queries.
    pub partial: u64,
    /// Tokens N, text and image.
    pub tokens: i64,
    /// The first token of the image.
    pub image_start: i64,
    /// The first token of the text.
    pub text_start: i64,
    /// Keys of one split of the text queries' pass.
    pub keys_per_split: i64,
    /// Batch size B.
    pub batch: i32,
    /// Number of heads H.
    pub heads: i32,
    /// Splits of the text queries' pass.
    pub splits: i32,
    /// Width of one head of q and k, D.
    pub head_dim: i32,
    /// Width of one head of v and the output, Dv.
    pub value_dim: i32,
    /// Text tokens P.
    pub text: i32,
    /// Rows of image tokens.
    pub rows: i32,
    /// Columns of image tokens.
    pub cols: i32,
    /// Rows of the window or of a circle's bounding box.
    pub window_rows: i32,
    /// Columns of the window or of a circle's bounding box.
    pub window_cols: i32,
    /// Square of the radius; 0 for a rectangle.
    pub radius_squared: i64,
    /// Factor on q·k.
    pub scale: f64,
    /// 1: the window is shifted inside at the border; 0: it is cut there.
    pub clamp: i32,
}

/// The one argument of a launch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Params {
    /// Of `LinFusionAttention`.
    Linear(LinearParams),
    /// Of `WindowAttention`.
    Window(WindowParams),
}

impl Params {
    /// Its address, as `cuLaunchKernel` takes it, and its size in bytes.
    pub fn argument(&self) -> (*const std::ffi::c_void, usize) {
        match self {
            Self::Linear(p) => ((&raw const *p).cast(), size_of::<LinearParams>()),
            Self::Window(p) => ((&raw const *p).cast(), size_of::<WindowParams>()),
        }
    }
}
