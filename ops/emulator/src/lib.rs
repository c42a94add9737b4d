//! The CUDA kernels of `linfusion-ops` on the CPU.
//!
//! `ops/src/cuda/kernels` is compiled as host C++ against `shim/cuda_shim.h`, which does lane by lane what the PTX
//! instructions in `ptx.cuh` do. A block's threads are fibers; warps and lanes run in an order that a seed chooses, an
//! asynchronous copy lands no earlier than the wait that covers it, and shared memory holds NaNs until it is written.
//! So a missing barrier or a wait that is off by one gives wrong numbers here, as it might on a device, and the
//! emulator itself tells of divergent warps, deadlocks and stray matrix loads.
//!
//! The kernels are there twice. In the second build every load and store is looked at ([`Watch::Memory`]): two threads
//! at the same bytes of shared memory or of a tensor, one of them writing, with no barrier between; a copy's target that
//! is touched before the copy has been waited for; an access outside of its tensor. These are errors even where the
//! numbers come out right, in whatever order the threads ran.
//!
//! What it can't show: speed, bank conflicts, and mistakes in the PTX of `ptx.cuh` itself.
//!
//! - [`emulate`] runs one launch;
//! - [`Memory`] is a tensor whose end is the end of a page, so that reading behind it ends the test;
//! - [`run_linear`] and [`run_window`] plan and run a whole call.

mod memory;
mod run;

/// A `libcuda.so.1` whose device memory is the host's and whose launches run in the emulator. Loaded before the real
/// one, the dynamic linker gives it to whoever asks for `libcuda.so.1`.
pub const FAKE_DRIVER: &str = env!("LINFUSION_FAKE_DRIVER");

use std::ffi::{CStr, CString, c_char, c_int, c_void};

use linfusion_ops::cuda::plan::Launch;
use thiserror::Error;

pub use self::memory::Memory;
pub use self::run::{Bits, RunError, RunOptions, run_linear, run_window};

/// A mistake put in on purpose, to see that tests would find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u32)]
pub enum Plant {
    /// No mistake.
    #[default]
    None = 0,
    /// The second of every three barriers of a block is left out.
    MissingBarrier = 1,
    /// Barriers of a warp are left out.
    MissingWarpBarrier = 2,
    /// Waits leave one group of copies more under way than they say.
    WaitOffByOne = 3,
}

/// What is looked at while a launch runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Watch {
    /// What kernels ask of the machine.
    #[default]
    Calls,
    /// Every load and store as well: about ten times slower.
    Memory,
}

/// How a launch is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Order of blocks, warps and lanes.
    pub seed: u64,
    /// A mistake to put in.
    pub plant: Plant,
    /// What is looked at.
    pub watch: Watch,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            seed: 1,
            plant: Plant::None,
            watch: Watch::Calls,
        }
    }
}

/// What the emulator found wrong with a launch: the kernel, block and thread, and what it did.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct EmulatorError(String);

unsafe extern "C" {
    fn lf_emulate(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        params_bytes: usize,
        seed: u64,
        plant: u32,
        watched: c_int,
        message: *mut c_char,
        message_bytes: usize,
    ) -> c_int;
    fn lf_kernel_name(index: usize) -> *const c_char;
    fn lf_half_to_float(bits: u16) -> f32;
    fn lf_float_to_half(value: f32) -> u16;
    fn lf_float_to_brain(value: f32) -> u16;
    fn lf_link_kernels();
    fn lf_link_test_kernels();
    fn lf_link_watched_kernels();
}

/// Runs a launch to its end.
///
/// # Safety
/// The addresses in the launch's parameters must be those of memory that is large enough, as
/// for the kernel on a device.
///
/// # Errors
/// What the kernel did wrong, or that the launch does not fit it.
pub unsafe fn emulate(launch: &Launch, settings: &Settings) -> Result<(), EmulatorError> {
    let error = |text: &str| EmulatorError(text.to_owned());
    let name =
        CString::new(launch.kernel.as_str()).map_err(|_| error("a kernel's name has a zero"))?;
    let (params, bytes) = launch.params.argument();
    let mut message = [0 as c_char; 512];
    // SAFETY: the arrays live through the call; memory is the caller's promise. The link
    // functions do nothing: naming them is what links the kernels.
    let failed = unsafe {
        lf_link_kernels();
        lf_link_test_kernels();
        lf_link_watched_kernels();
        lf_emulate(
            name.as_ptr(),
            launch.grid.as_ptr(),
            launch.threads,
            launch.shared_bytes,
            params,
            bytes,
            settings.seed,
            settings.plant as u32,
            c_int::from(settings.watch == Watch::Memory),
            message.as_mut_ptr(),
            message.len(),
        )
    };
    if failed == 0 {
        return Ok(());
    }
    // SAFETY: the message is zero-terminated, as `snprintf` leaves it.
    let text = unsafe { CStr::from_ptr(message.as_ptr()) };
    Err(error(&text.to_string_lossy()))
}

/// The names of all kernels, in alphabetical order.
pub fn kernel_names() -> Vec<String> {
    // SAFETY: names live for ever; null ends them.
    unsafe {
        lf_link_kernels();
        (0..)
            .map(|i| lf_kernel_name(i))
            .take_while(|name| !name.is_null())
            .map(|name| CStr::from_ptr(name).to_string_lossy().into_owned())
            .collect()
    }
}

/// The emulator's conversions of 16-bit numbers.
pub mod conversions {
    /// Half precision to single.
    pub fn half_to_float(bits: u16) -> f32 {
        // SAFETY: arithmetic only.
        unsafe { super::lf_half_to_float(bits) }
    }

    /// Single precision to the nearest half.
    pub fn float_to_half(value: f32) -> u16 {
        // SAFETY: arithmetic only.
        unsafe { super::lf_float_to_half(value) }
    }

    /// Single precision to the nearest brain float.
    pub fn float_to_brain(value: f32) -> u16 {
        // SAFETY: arithmetic only.
        unsafe { super::lf_float_to_brain(value) }
    }
}
