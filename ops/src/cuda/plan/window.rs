//! `WindowAttention`: its kernels and how they are launched.

use super::{
    Addresses, Device, Launch, PlanError, Step, fits_tensor_cores, grid, in_31_bits, row_bytes,
    suffix, tensor,
};
use crate::cuda::params::{Params, WindowParams};
use crate::schema::{Border, ElementType, Window, WindowAttentionAttrs, WindowDims};

/// Queries of a block: 8 rows of 8 of the image, or so many of the text.
const TILE_SIDE: usize = 8;
const TILE_QUERIES: usize = TILE_SIDE * TILE_SIDE;
/// Lists of keys that a block keeps, bytes of an entry.
const LISTS: usize = 3;
const KEY_BYTES: usize = 12;
/// Fewest keys that are worth a block of their own in the text queries' pass.
const MIN_SPLIT: usize = 512;
/// Queries of a block of the plain kernel, a warp each.
const PLAIN_QUERIES: usize = 4;
/// Largest side of an image with a circular window: squares of distances are held in 31 bits.
const MAX_CIRCLE_SIDE: usize = 1 << 15;

/// A tensor-core kernel, as linfusion.cu instantiates it.
struct FlashShape {
    /// Widest head.
    width: usize,
    row_tiles: usize,
    /// Keys at a time.
    keys: usize,
    /// Blocks that a multiprocessor runs at once.
    blocks: usize,
}

/// As `LF_WINDOWS` in linfusion.cu.
const FLASH: [FlashShape; 4] = [
    flash(64, 2, 64, 4),
    flash(80, 2, 32, 4),
    flash(128, 1, 64, 2),
    flash(256, 1, 16, 2),
];

const fn flash(width: usize, row_tiles: usize, keys: usize, blocks: usize) -> FlashShape {
    FlashShape {
        width,
        row_tiles,
        keys,
        blocks,
    }
}

impl FlashShape {
    fn threads(&self) -> usize {
        TILE_QUERIES / (16 * self.row_tiles) * 32
    }

    fn shared_bytes(&self) -> usize {
        let rows = TILE_QUERIES + 2 * 2 * self.keys;
        rows * row_bytes(self.width) + LISTS * self.keys * KEY_BYTES
    }
}

/// The kernels of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowPlan {
    dims: WindowDims,
    attrs: WindowAttentionAttrs,
    steps: Vec<Step>,
    splits: usize,
    keys_per_split: usize,
    partial_bytes: usize,
}

impl WindowPlan {
    /// Plans a call.
    ///
    /// `aligned` says that all tensors' addresses are multiples of 16.
    ///
    /// # Errors
    /// [`PlanError`] for sizes that no kernel takes.
    pub fn new(
        dims: &WindowDims,
        attrs: &WindowAttentionAttrs,
        element: ElementType,
        aligned: bool,
        device: &Device,
    ) -> Result<Self, PlanError> {
        let mut plan = Self {
            dims: *dims,
            attrs: *attrs,
            steps: vec![],
            splits: 1,
            keys_per_split: dims.tokens().max(1),
            partial_bytes: 0,
        };
        in_31_bits("heads of all batch elements", plan.heads())?;
        in_31_bits("a head width", dims.head_dim.max(dims.value_dim))?;
        // The last tile of queries and the last block of keys may reach behind the tokens.
        in_31_bits("tokens", dims.tokens().saturating_add(TILE_QUERIES))?;
        if matches!(attrs.window, Window::Circle { .. })
            && dims.rows.max(dims.cols) > MAX_CIRCLE_SIDE
        {
            return Err(PlanError::TooLarge {
                what: "sides of an image with a circular window",
                limit: MAX_CIRCLE_SIDE as u64 + 1,
                found: dims.rows.max(dims.cols) as u64,
            });
        }
        if plan.heads() == 0 || dims.value_dim == 0 {
            return Ok(plan);
        }
        let widths = [dims.head_dim, dims.value_dim];
        let shape = FLASH
            .iter()
            .find(|s| widths.iter().all(|w| *w <= s.width))
            .filter(|s| s.shared_bytes() <= device.shared_bytes as usize);
        match shape {
            Some(shape) if fits_tensor_cores(element, widths, aligned, device) => {
                plan.flash(shape, element, device)?;
            }
            _ => plan.plain(element, device)?,
        }
        Ok(plan)
    }

    /// Heads of all batch elements.
    fn heads(&self) -> usize {
        self.dims.batch.saturating_mul(self.dims.heads)
    }

    /// Bytes of device memory that the launches use, aligned to 256.
    pub fn workspace_bytes(&self) -> usize {
        self.partial_bytes
    }

    /// What to launch, in order, on one stream.
    pub fn launches(&self, at: &Addresses) -> Vec<Launch> {
        let w = &self.dims;
        let of = |data, width| tensor(data, w.layout, w.heads, w.tokens(), width);
        let (window_rows, window_cols, radius) = match self.attrs.window {
            Window::Rect { rows, cols } => (rows, cols, 0),
            Window::Circle { radius } => (2 * radius - 1, 2 * radius - 1, radius),
        };
        let scale = self.attrs.scale.filter(|s| *s != 0.0);
        let params = WindowParams {
            q: of(at.q, w.head_dim),
            k: of(at.k, w.head_dim),
            v: of(at.v, w.value_dim),
            out: of(at.out, w.value_dim),
            partial: at.workspace,
            tokens: w.tokens() as i64,
            image_start: w.image_start(self.attrs.text) as i64,
            text_start: w.text_start(self.attrs.text) as i64,
            keys_per_split: self.keys_per_split as i64,
            batch: w.batch as i32,
            heads: w.heads as i32,
            splits: self.splits as i32,
            head_dim: w.head_dim as i32,
            value_dim: w.value_dim as i32,
            text: w.text as i32,
            rows: w.rows as i32,
            cols: w.cols as i32,
            window_rows: window_rows as i32,
            window_cols: window_cols as i32,
            // No distance within the image reaches this.
            radius_squared: (radius * radius).min(i32::MAX as usize) as i64,
            clamp: i32::from(self.attrs.border == Border::Clamp),
            scale: scale.map_or_else(|| 1.0 / (w.head_dim as f64).sqrt(), f64::from),
        };
        self.steps
            .iter()
            .map(|step| step.launch(Params::Window(params)))
            .collect()
    }

    fn flash(
        &mut self,
        shape: &FlashShape,
        element: ElementType,
        device: &Device,
    ) -> Result<(), PlanError> {
        let w = self.dims;
        let heads = self.heads();
        let name = format!("{}_w{}", suffix(element), shape.width);
        let tiles = w.rows.div_ceil(TILE_SIDE) * w.cols.div_ceil(TILE_SIDE);
        let step = |kernel, grid| Step {
            kernel,
            grid,
            threads: shape.threads(),
            shared_bytes: shape.shared_bytes(),
        };
        self.steps = vec![step(
            format!("linfusion_window_{name}"),
            grid(heads, tiles, 1)?,
        )];
        if w.text == 0 {
            return Ok(());
        }
        let texts = w.text.div_ceil(TILE_QUERIES);
        let blocks = device.multiprocessors as usize * shape.blocks;
        let splits = (blocks / heads.saturating_mul(texts).max(1)).max(1);
        self.keys_per_split = w
            .tokens()
            .div_ceil(splits)
            .max(MIN_SPLIT)
            .next_multiple_of(shape.keys);
        self.splits = w.tokens().div_ceil(self.keys_per_split);
        self.partial_bytes = (heads * self.splits)
            .saturating_mul(w.text)
            .saturating_mul((w.value_dim + 2) * 4);
        self.steps.push(step(
            format!("linfusion_window_text_{name}"),
            grid(heads, self.splits, texts)?,
        ));
        self.steps.push(Step {
            kernel: format!("linfusion_window_combine_{}", suffix(element)),
            grid: grid(heads, w.text.div_ceil(4), 1)?,
            threads: 128,
            shared_bytes: 0,
        });
        Ok(())
    }

    fn plain(&mut self, element: ElementType, device: &Device) -> Result<(), PlanError> {
        let w = self.dims;
        let number = element.accumulator().size();
        let warp = (w.head_dim + w.value_dim + 32) * number + 32 * 4;
        let shared_bytes = PLAIN_QUERIES * warp.next_multiple_of(16);
        if shared_bytes > device.shared_bytes as usize {
            return Err(PlanError::SharedMemory {
                what: "a head width of",
                found: w.head_dim.max(w.value_dim),
                needed: shared_bytes,
                available: device.shared_bytes as usize,
            });
        }
        self.steps = vec![Step {
            kernel: format!("linfusion_window_plain_{}", suffix(element)),
            grid: grid(self.heads(), w.tokens().div_ceil(PLAIN_QUERIES), 1)?,
            threads: PLAIN_QUERIES * 32,
            shared_bytes,
        }];
        Ok(())
    }
}
