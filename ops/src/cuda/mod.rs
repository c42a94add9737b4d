//! CUDA: the kernels, how a call is turned into launches, and the driver that takes them.
//!
//! [`plan`] is arithmetic on shapes and runs everywhere; [`driver`] loads the driver's library when it is first
//! needed and links none. `kernels/` has the CUDA C++; the archive that `make cuda` compiles of it is part of the
//! library where it was there at build time ([`kernels`]).

pub mod archive;
pub mod driver;
pub mod params;
pub mod plan;

use self::archive::Archive;

#[cfg(linfusion_kernels)]
static KERNELS: Option<&[u8]> = Some(include_bytes!(env!("LINFUSION_KERNELS_PATH")));
#[cfg(not(linfusion_kernels))]
static KERNELS: Option<&[u8]> = None;

/// The archive of compiled kernels, if this library was built with them.
pub fn kernels() -> Option<&'static [u8]> {
    KERNELS
}

/// What there is of CUDA: in the library and on this machine. One line.
pub fn status() -> String {
    let Some(kernels) = kernels() else {
        return "CUDA: not built in (`make cuda lib` builds a library with it)".into();
    };
    let kernels = match Archive::read(kernels) {
        Ok(archive) => format!("kernels for compute capability {archive}"),
        Err(error) => error.to_string(),
    };
    let driver = match driver::version() {
        Ok((major, minor)) => format!("driver for CUDA {major}.{minor}"),
        Err(error) => error.to_string(),
    };
    format!("CUDA: {kernels}; {driver}")
}
