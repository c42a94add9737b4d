//! Where weights are learned.

use candle_core::Device;

use super::error::DistillError;

/// The processor; in a program built with the feature `distill-cuda` its first GPU.
///
/// # Errors
/// There is no GPU that can be used.
pub(super) fn device() -> Result<Device, DistillError> {
    match cfg!(feature = "distill-cuda") {
        true => Device::new_cuda(0).map_err(|source| DistillError::Device {
            source: Box::new(source),
        }),
        false => Ok(Device::Cpu),
    }
}
