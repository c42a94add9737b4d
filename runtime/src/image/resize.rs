//! Resizing as Pillow does it: Lanczos windows of three lobes, across and down, each pass to 8 bits, with
//! coefficients of 22 fractional bits. The image crate's Lanczos goes down first and keeps fractions between the
//! passes: on the fixture of noise and hard edges it is off by up to 37 of 255.

use std::f64::consts::PI;

use super::{ImageError, Rgb};

/// Lobes on each side of the window.
const LOBES: f64 = 3.0;

/// Fractional bits of a coefficient: a sum of products with bytes fits into 32 bits.
const BITS: u32 = 22;

/// The image in another size, bit for bit as Pillow 13's `resize((width, height), LANCZOS)` gives it. Earlier versions
/// of Pillow always go across first, which gives other roundings where more than twice as many rows as columns go.
///
/// # Errors
/// The asked size has a zero or does not fit into memory.
pub fn resize(image: &Rgb, width: u32, height: u32) -> Result<Rgb, ImageError> {
    super::rgb::byte_count(width, height)?;
    let narrow = image.width() as usize * 3;
    let wide = width as usize * 3;
    let bytes = match (width == image.width(), height == image.height()) {
        (true, true) => image.bytes().to_vec(),
        (false, true) => across(image.bytes(), image.width(), width),
        (true, false) => down(image.bytes(), narrow, image.height(), height),
        (false, false) if down_first(image, width, height) => {
            let low = down(image.bytes(), narrow, image.height(), height);
            across(&low, image.width(), width)
        }
        (false, false) => {
            let across = across(image.bytes(), image.width(), width);
            down(&across, wide, image.height(), height)
        }
    };
    Rgb::new(width, height, bytes)
}

/// Whether the rows are made fewer before they are changed: Pillow 13 does so, as it is faster, if more than twice as
/// many rows go as columns. The pass that comes first rounds first, so the order is seen in the result.
fn down_first(image: &Rgb, width: u32, height: u32) -> bool {
    let columns = i64::from(image.width()) - i64::from(width);
    let rows = i64::from(image.height()) - i64::from(height);
    rows > 0 && rows > 2 * columns
}

/// Rows of `from` pixels as rows of `to` pixels.
fn across(bytes: &[u8], from: u32, to: u32) -> Vec<u8> {
    let windows = windows(from, to);
    let from = from as usize;
    let mut resized = Vec::with_capacity(bytes.len() / from * windows.len());
    for row in bytes.as_chunks::<3>().0.chunks_exact(from) {
        for window in &windows {
            let mut sums = [HALF; 3];
            for (pixel, weight) in row.iter().skip(window.start).zip(&window.weights) {
                for (sum, byte) in sums.iter_mut().zip(pixel) {
                    *sum += weight * i64::from(*byte);
                }
            }
            resized.extend(sums.map(byte));
        }
    }
    resized
}

/// `from` rows as `to` rows.
fn down(bytes: &[u8], row_bytes: usize, from: u32, to: u32) -> Vec<u8> {
    let mut resized = Vec::with_capacity(row_bytes * to as usize);
    let mut sums = vec![0; row_bytes];
    for window in windows(from, to) {
        sums.fill(HALF);
        let rows = bytes.chunks_exact(row_bytes).skip(window.start);
        for (row, weight) in rows.zip(&window.weights) {
            for (sum, byte) in sums.iter_mut().zip(row) {
                *sum += weight * i64::from(*byte);
            }
        }
        resized.extend(sums.iter().map(|sum| byte(*sum)));
    }
    resized
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

    const SIZES: [(u32, u32); 9] = [
        (37, 29),
        (64, 48),
        (16, 16),
        (37, 11),
        (90, 29),
        (1, 1),
        (3, 70),
        (111, 2),
        (30, 14),
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

    #[test]
    fn sizes_of_zero_are_refused() {
        let image = Rgb::new(1, 1, vec![1, 2, 3]).unwrap();
        assert!(resize(&image, 0, 4).is_err());
        assert!(resize(&image, 4, 0).is_err());
        assert_eq!(resize(&image, 2, 2).unwrap().bytes(), [1, 2, 3].repeat(4));
    }
}
