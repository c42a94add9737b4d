//! CUDA: the kernels, how a call is turned into launches, and the driver that takes them.
//!
//! [`plan`] is arithmetic on shapes and runs everywhere; [`driver`] loads the driver's library when it is first
//! needed and links none. `kernels/` has the CUDA C++; the fatbin that `make cuda` compiles of it is part of the
//! library where it was there at build time ([`image`]).

pub mod driver;
pub mod params;
pub mod plan;

/// The compute capabilities that the fatbin has machine code for; later devices compile its PTX.
pub const CAPABILITIES: &str = "7.5, 8.0, 8.6, 8.9, 9.0, 10.0, 12.0";

#[cfg(linfusion_fatbin)]
mod fatbin {
    /// The driver reads the image in words.
    #[repr(C, align(16))]
    struct Aligned<Bytes: ?Sized>(Bytes);

    static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("LINFUSION_FATBIN_PATH")));

    pub(super) fn image() -> Option<&'static [u8]> {
        Some(&IMAGE.0)
    }
}

#[cfg(not(linfusion_fatbin))]
mod fatbin {
    pub(super) fn image() -> Option<&'static [u8]> {
        None
    }
}

/// The compiled kernels, if this library was built with them.
pub fn image() -> Option<&'static [u8]> {
    fatbin::image()
}

/// What there is of CUDA: in the library and on this machine. One line.
pub fn status() -> String {
    if image().is_none() {
        return "CUDA: not built in (`make cuda lib` builds a library with it)".into();
    }
    let driver = match driver::version() {
        Ok((major, minor)) => format!("driver for CUDA {major}.{minor}"),
        Err(error) => error.to_string(),
    };
    format!("CUDA: kernels for compute capability {CAPABILITIES} and PTX; {driver}")
}
