//! Which kernels run a call, and how: pure arithmetic, the same for a device and for the emulator.

mod linear;
mod window;

use thiserror::Error;

pub use self::linear::LinearPlan;
pub use self::window::WindowPlan;
use super::params::{Params, TensorParams};
use crate::schema::{ElementType, Layout};

/// What a plan has to know of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Compute capability, as (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Most bytes of shared memory that one block can have (opt-in).
    pub shared_bytes: u32,
}

/// Device addresses of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Addresses {
    /// Queries.
    pub q: u64,
    /// Keys.
    pub k: u64,
    /// Values.
    pub v: u64,
    /// The output.
    pub out: u64,
    /// At least as many bytes as the plan's workspace, aligned to 256; any value if it has none.
    pub workspace: u64,
}

/// One launch of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel's name in the module.
    pub kernel: String,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: u32,
    /// The argument.
    pub params: Params,
}

/// A launch without its argument.
#[derive(Debug, Clone, PartialEq)]
struct Step {
    kernel: String,
    grid: [u32; 3],
    threads: usize,
    shared_bytes: usize,
}

impl Step {
    fn launch(&self, params: Params) -> Launch {
        Launch {
            kernel: self.kernel.clone(),
            grid: self.grid,
            threads: self.threads as u32,
            shared_bytes: self.shared_bytes as u32,
            params,
        }
    }
}

/// Blocks of a launch: one a head and `more` along x, `panels` along y.
fn grid(heads: usize, more: usize, panels: usize) -> Result<[u32; 3], PlanError> {
    let blocks = in_31_bits("blocks of a launch", heads.saturating_mul(more))?;
    let panels = u32::try_from(panels).unwrap_or(u32::MAX);
    if panels >= 1 << 16 {
        return Err(PlanError::TooLarge {
            what: "blocks along y",
            limit: 1 << 16,
            found: u64::from(panels),
        });
    }
    Ok([blocks as u32, panels, 1])
}

/// Why a call can't be planned.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlanError {
    /// A size that kernels or launches hold in 31 bits.
    #[error("the CUDA kernels take {what} below {limit}, found {found}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The first value that is.
        limit: u64,
        /// Its value.
        found: u64,
    },
    /// No kernel needs so little shared memory as the device has.
    #[error(
        "{what} {found} needs {needed} bytes of shared memory a block, the device has {available}"
    )]
    SharedMemory {
        /// What makes it so much.
        what: &'static str,
        /// Its value.
        found: usize,
        /// Bytes needed.
        needed: usize,
        /// Bytes that a block can have.
        available: usize,
    },
}

/// The last part of a kernel's name that tells the element type.
fn suffix(element: ElementType) -> &'static str {
    match element {
        ElementType::F32 => "f32",
        ElementType::F16 => "f16",
        ElementType::Bf16 => "bf16",
        ElementType::F64 => "f64",
    }
}

/// Whether the tensor-core kernels take these: 16-bit elements, widths that are multiples of 8 up to 256, and
/// addresses that 16-byte copies can use, on a device that has the instructions.
fn fits_tensor_cores(
    element: ElementType,
    widths: [usize; 2],
    aligned: bool,
    device: &Device,
) -> bool {
    element.size() == 2
        && aligned
        && device.capability >= (8, 0)
        && widths.iter().all(|w| w % 8 == 0 && *w <= 256)
}

/// Bytes from one row of 16-bit elements in shared memory to the next (`row_bytes` in numbers.cuh).
fn row_bytes(width: usize) -> usize {
    if (width / 8) % 2 == 1 {
        width * 2
    } else {
        width * 2 + 16
    }
}

/// A tensor of `rows` tokens of `width` elements a head.
fn tensor(data: u64, layout: Layout, heads: usize, rows: usize, width: usize) -> TensorParams {
    let (heads, rows, width) = (heads as i64, rows as i64, width as i64);
    let (head, token) = match layout {
        Layout::Packed => (width, heads * width),
        Layout::Heads => (rows * width, width),
    };
    TensorParams {
        data,
        batch: heads * rows * width,
        head,
        token,
    }
}

fn in_31_bits(what: &'static str, value: usize) -> Result<i32, PlanError> {
    i32::try_from(value).map_err(|_| PlanError::TooLarge {
        what,
        limit: 1 << 31,
        found: value as u64,
    })
}
