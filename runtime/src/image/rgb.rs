//! An image in memory, and its values as models have them.

use super::ImageError;

/// An image of 8-bit red, green and blue, row after row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

impl Rgb {
    /// An image from its bytes: three a pixel, from the top left.
    ///
    /// # Errors
    /// The size has a zero, or there are more or fewer bytes.
    pub fn new(width: u32, height: u32, bytes: Vec<u8>) -> Result<Self, ImageError> {
        check_count(width, height, bytes.len())?;
        Ok(Self {
            width,
            height,
            bytes,
        })
    }

    /// An image from planes of red, green and blue, as a VAE's decoder gives them for [-1, 1]; see [`to_byte`].
    ///
    /// # Errors
    /// The size has a zero, or there are more or fewer values.
    pub fn from_planes(width: u32, height: u32, planes: &[f32]) -> Result<Self, ImageError> {
        let count = check_count(width, height, planes.len())?;
        let (red, others) = planes.split_at(count / 3);
        let (green, blue) = others.split_at(count / 3);
        let mut bytes = Vec::with_capacity(count);
        for ((red, green), blue) in red.iter().zip(green).zip(blue) {
            bytes.extend([to_byte(*red), to_byte(*green), to_byte(*blue)]);
        }
        Self::new(width, height, bytes)
    }

    /// Planes of red, green and blue in [-1, 1], as a VAE's encoder takes them; see [`from_byte`].
    pub fn to_planes(&self) -> Vec<f32> {
        let channel = |c| self.bytes.iter().skip(c).step_by(3).map(|b| from_byte(*b));
        channel(0).chain(channel(1)).chain(channel(2)).collect()
    }

    /// Pixels in a row.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Three bytes a pixel, from the top left.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The rows from the top.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, u8> {
        self.bytes.chunks_exact(self.width as usize * 3)
    }

    /// Width and height as in `512x768`.
    pub(super) fn size(&self) -> String {
        format!("{}x{}", self.width, self.height)
    }
}

/// A byte in [-1, 1], as diffusers computes it.
pub fn from_byte(byte: u8) -> f32 {
    2.0 * (f32::from(byte) / 255.0) - 1.0
}

/// The byte for a value in [-1, 1], as diffusers computes it: halves go to the even byte, what is outside to the
/// nearest end. What is not a number becomes black.
pub fn to_byte(value: f32) -> u8 {
    let unit = (value * 0.5 + 0.5).clamp(0.0, 1.0);
    (unit * 255.0).round_ties_even() as u8
}

/// As many bytes as an image has.
pub(super) fn byte_count(width: u32, height: u32) -> Result<usize, ImageError> {
    let refuse = |reason| ImageError::Size {
        width,
        height,
        reason,
    };
    if width == 0 || height == 0 {
        return Err(refuse("both must be at least 1"));
    }
    usize::try_from(width)
        .ok()
        .and_then(|w| w.checked_mul(3))
        .and_then(|row| row.checked_mul(height as usize))
        .filter(|bytes| isize::try_from(*bytes).is_ok())
        .ok_or_else(|| refuse("they do not fit into memory"))
}

fn check_count(width: u32, height: u32, found: usize) -> Result<usize, ImageError> {
    let expected = byte_count(width, height)?;
    if found != expected {
        return Err(ImageError::Count {
            width,
            height,
            expected,
            found,
        });
    }
    Ok(expected)
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    #[test]
    fn values_are_those_of_diffusers() {
        let encoded: Vec<f32> = (0..=255).map(from_byte).collect();
        assert_eq!(encoded, fixture::f32("encoded"));
        let decoded: Vec<u8> = fixture::f32("values").iter().map(|v| to_byte(*v)).collect();
        assert_eq!(decoded, fixture::u8("decoded"));
        assert_eq!(to_byte(f32::NAN), 0);
    }

    #[test]
    fn planes_are_turned_into_pixels_and_back() {
        let image = Rgb::new(5, 3, (0..45).map(|i| i * 5).collect()).unwrap();
        let planes = image.to_planes();
        assert_eq!(planes[1], from_byte(15));
        assert_eq!(planes[15], from_byte(5));
        assert_eq!(Rgb::from_planes(5, 3, &planes).unwrap(), image);
        assert_eq!(image.rows().nth(1).unwrap()[0], 75);
    }

    #[test]
    fn sizes_are_checked() {
        for (width, height, count) in [(0, 1, 0), (1, 0, 0), (2, 2, 11), (u32::MAX, u32::MAX, 3)] {
            assert!(Rgb::new(width, height, vec![0; count]).is_err());
            assert!(Rgb::from_planes(width, height, &vec![0.0; count]).is_err());
        }
    }
}
