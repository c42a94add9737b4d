//! Which kernels run a call, and how: pure arithmetic, the same for a device and for the emulator.

use super::params::Params;

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
