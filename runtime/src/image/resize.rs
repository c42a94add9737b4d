//! Resizing as Pillow does it: Lanczos windows of three lobes, across and then down, each pass to 8 bits, with
//! coefficients of 22 fractional bits. Other libraries keep fractions between the passes and differ by some values.

use std::f64::consts::PI;

use super::{ImageError, Rgb};

/// Lobes on each side of the window.
const LOBES: f64 = 3.0;

/// Fractional bits of a coefficient: a sum of products with bytes fits into 32 bits.
const BITS: u32 = 22;

/// The image in another size, bit for bit as Pillow's `resize((width, height), LANCZOS)` gives it.
///
/// # Errors
/// The asked size has a zero or does not fit into memory.
pub fn resize(image: &Rgb, width: u32, height: u32) -> Result<Rgb, ImageError> {
    let mut bytes = Vec::with_capacity(super::rgb::byte_count(width, height)?);
    let across;
    let rows = if width == image.width() {
        image.bytes()
    } else {
        across = resize_rows(image, width);
        &across
    };
    if height == image.height() {
        bytes.extend_from_slice(rows);
    } else {
        let row_bytes = width as usize * 3;
        let mut sums = vec![0_i64; row_bytes];
        for window in windows(image.height(), height) {
            sums.fill(HALF);
            let taken = rows.chunks_exact(row_bytes).skip(window.start);
            for (row, weight) in taken.zip(&window.weights) {
                for (sum, byte) in sums.iter_mut().zip(row) {
                    *sum += weight * i64::from(*byte);
                }
            }
            bytes.extend(sums.iter().map(|sum| byte(*sum)));
        }
    }
    Rgb::new(width, height, bytes)
}

fn resize_rows(image: &Rgb, width: u32) -> Vec<u8> {
    let windows = windows(image.width(), width);
    let mut bytes = Vec::with_capacity(windows.len() * image.height() as usize * 3);
    for row in image.rows() {
        let pixels = row.as_chunks::<3>().0;
        for window in &windows {
            let mut sums = [HALF; 3];
            for (pixel, weight) in pixels.iter().skip(window.start).zip(&window.weights) {
                for (sum, byte) in sums.iter_mut().zip(pixel) {
                    *sum += weight * i64::from(*byte);
                }
            }
            bytes.extend(sums.map(byte));
        }
    }
    bytes
}

/// The input values that make one output value, and how much of each.
struct Window {
    start: usize,
    weights: Vec<i64>,
}

/// One window for each of `to` values from `from` values.
fn windows(from: u32, to: u32) -> Vec<Window> {
    let scale = f64::from(from) / f64::from(to);
    // Between fewer values the window widens, so that every input counts.
    let stretch = scale.max(1.0);
    let support = LOBES * stretch;
    let narrow = 1.0 / stretch;
    (0..to)
        .map(|i| {
            let centre = (f64::from(i) + 0.5) * scale;
            let start = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from as usize);
            let weights: Vec<f64> = (start..end)
                .map(|x| lanczos((x as f64 - centre + 0.5) * narrow))
                .collect();
            let total: f64 = weights.iter().sum();
            let one = f64::from(1 << BITS);
            Window {
                start,
                weights: weights
                    .iter()
                    .map(|w| (w / total * one).round() as i64)
                    .collect(),
            }
        })
        .collect()
}

fn lanczos(x: f64) -> f64 {
    if (-LOBES..LOBES).contains(&x) {
        sinc(x) * sinc(x / LOBES)
    } else {
        0.0
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    (x * PI).sin() / (x * PI)
}

/// What rounds a sum to the nearest byte.
const HALF: i64 = 1 << (BITS - 1);

fn byte(sum: i64) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    const SIZES: [(u32, u32); 8] = [
        (37, 29),
        (64, 48),
        (16, 16),
        (37, 11),
        (90, 29),
        (1, 1),
        (3, 70),
        (111, 2),
    ];

    #[test]
    fn every_byte_is_pillows() {
        let image = fixture::image("noise");
        for (width, height) in SIZES {
            let expected = fixture::u8(&format!("resized/{width}x{height}"));
            let found = resize(&image, width, height).unwrap();
            assert_eq!((found.width(), found.height()), (width, height));
            assert!(found.bytes() == expected, "{width}x{height}");
        }
    }

    /// Why this is not left to the image crate: it misses Pillow by more than rounding.
    #[test]
    fn the_image_crates_filter_is_another_one() {
        let image = fixture::image("noise");
        let source =
            image::RgbImage::from_raw(image.width(), image.height(), image.bytes().to_vec())
                .unwrap();
        let worst = SIZES.map(|(width, height)| {
            let filter = image::imageops::FilterType::Lanczos3;
            let found = image::imageops::resize(&source, width, height, filter);
            let expected = fixture::u8(&format!("resized/{width}x{height}"));
            let pairs = found.as_raw().iter().zip(&expected);
            pairs.map(|(a, b)| a.abs_diff(*b)).max().unwrap()
        });
        assert!(worst.iter().any(|w| *w > 1), "{worst:?}");
    }

    #[test]
    fn sizes_of_zero_are_refused() {
        let image = Rgb::new(1, 1, vec![1, 2, 3]).unwrap();
        assert!(resize(&image, 0, 4).is_err());
        assert!(resize(&image, 4, 0).is_err());
        assert_eq!(resize(&image, 2, 2).unwrap().bytes(), [1, 2, 3].repeat(4));
    }
}
