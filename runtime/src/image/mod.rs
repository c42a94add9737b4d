//! 8-bit RGB images: read, resized, written row by row, measured.
//!
//! What goes into a model and comes out of it is the same number for number as with Hugging Face diffusers, which
//! reads and resizes with Pillow: [`resize()`] is bit for bit Pillow's, [`Rgb::to_planes`] and [`Rgb::from_planes`]
//! are `VaeImageProcessor`'s.

mod error;
mod metadata;
mod metrics;
mod read;
mod resize;
mod rgb;
mod rows;

pub use error::ImageError;
pub use metadata::{Metadata, Parameters};
pub use metrics::{difference, psnr, side_by_side, ssim};
pub use read::{MAX_PIXELS, read};
pub use resize::resize;
pub use rgb::{Rgb, from_byte, to_byte};
pub use rows::{RowWriter, check_output};

/// The arrays of `models/fixtures/images/cases.npz`.
#[cfg(test)]
mod fixture {
    use super::Rgb;
    use crate::{npz, tensor::Tensor};

    fn array(name: &str) -> Tensor {
        let path = linfusion_models::fixtures::path("images/cases.npz");
        let mut arrays = npz::read(&path).unwrap().into_iter();
        arrays.find(|(n, _)| n == name).unwrap().1
    }

    pub fn u8(name: &str) -> Vec<u8> {
        match array(name) {
            Tensor::U8(array) => array.into_iter().collect(),
            _ => panic!("{name} is not u8"),
        }
    }

    pub fn f32(name: &str) -> Vec<f32> {
        match array(name) {
            Tensor::F32(array) => array.into_iter().collect(),
            _ => panic!("{name} is not f32"),
        }
    }

    pub fn f64(name: &str) -> Vec<f64> {
        match array(name) {
            Tensor::F64(array) => array.into_iter().collect(),
            _ => panic!("{name} is not f64"),
        }
    }

    /// An array of the size of `noise`.
    pub fn image(name: &str) -> Rgb {
        Rgb::new(37, 29, u8(name)).unwrap()
    }
}
