//! How alike two images are, in numbers and to the eye.

use std::collections::VecDeque;

use super::{ImageError, Rgb};

/// Peak signal-to-noise ratio in decibels over all values: infinite for equal images.
///
/// # Errors
/// The images have different sizes.
pub fn psnr(a: &Rgb, b: &Rgb) -> Result<f64, ImageError> {
    same_size("PSNR", a, b)?;
    let pairs = a.bytes().iter().zip(b.bytes());
    let squares: u64 = pairs.map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
    let mean = squares as f64 / a.bytes().len() as f64;
    Ok(10.0 * (255.0 * 255.0 / mean).log10())
}

/// Structural similarity (Wang et al. 2004): 1 for equal images. The mean over red, green and blue and over all
/// places where a Gaussian window (11x11, sigma 1.5) lies within the image, with K1 = 0.01 and K2 = 0.03; so does
/// scikit-image with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2`.
///
/// # Errors
/// The images have different sizes, or a side of less than 11.
pub fn ssim(a: &Rgb, b: &Rgb) -> Result<f64, ImageError> {
    same_size("SSIM", a, b)?;
    if a.width().min(a.height()) < WINDOW as u32 {
        return Err(ImageError::Mismatch {
            what: "SSIM",
            expected: format!("at least {WINDOW}x{WINDOW}"),
            found: a.size(),
        });
    }
    let weights = gaussian();
    let places = (a.width() as usize + 1 - WINDOW) * 3;
    let mut recent = VecDeque::with_capacity(WINDOW);
    let mut total = 0.0;
    for (a, b) in a.rows().zip(b.rows()) {
        if recent.len() == WINDOW {
            recent.pop_front();
        }
        recent.push_back(moments_across(a, b, &weights));
        if recent.len() < WINDOW {
            continue;
        }
        let mut moments = vec![[0.0; 5]; places];
        for (row, weight) in recent.iter().zip(weights) {
            for (sum, value) in moments.iter_mut().zip(row) {
                add(sum, value, weight);
            }
        }
        total += moments.iter().map(similarity).sum::<f64>();
    }
    Ok(total / (places as f64 * (a.height() as usize + 1 - WINDOW) as f64))
}

/// The side of SSIM's window.
const WINDOW: usize = 11;

fn gaussian() -> [f64; WINDOW] {
    let weights: [f64; WINDOW] = std::array::from_fn(|i| {
        let x = (i as f64 - (WINDOW / 2) as f64) / 1.5;
        (-0.5 * x * x).exp()
    });
    let total: f64 = weights.iter().sum();
    weights.map(|w| w / total)
}

/// Weighted means of a, b, a*a, b*b and a*b.
type Moments = [f64; 5];

/// The moments of every window of one row.
fn moments_across(a: &[u8], b: &[u8], weights: &[f64; WINDOW]) -> Vec<Moments> {
    let values: Vec<Moments> = a
        .iter()
        .zip(b)
        .map(|(a, b)| {
            let (a, b) = (f64::from(*a), f64::from(*b));
            [a, b, a * a, b * b, a * b]
        })
        .collect();
    // A channel's next value is three values on.
    values
        .windows(3 * (WINDOW - 1) + 1)
        .map(|window| {
            let mut sum = [0.0; 5];
            for (value, weight) in window.iter().step_by(3).zip(weights) {
                add(&mut sum, value, *weight);
            }
            sum
        })
        .collect()
}

fn add(sum: &mut Moments, value: &Moments, weight: f64) {
    for (sum, value) in sum.iter_mut().zip(value) {
        *sum += weight * value;
    }
}

fn similarity([a, b, aa, bb, ab]: &Moments) -> f64 {
    const C1: f64 = (0.01 * 255.0) * (0.01 * 255.0);
    const C2: f64 = (0.03 * 255.0) * (0.03 * 255.0);
    let spread = (aa - a * a) + (bb - b * b);
    let both = ab - a * b;
    (2.0 * a * b + C1) * (2.0 * both + C2) / ((a * a + b * b + C1) * (spread + C2))
}

/// Images of one height in a row, from the left.
///
/// # Errors
/// There is none, or their heights differ.
pub fn side_by_side(images: &[&Rgb]) -> Result<Rgb, ImageError> {
    let mismatch = |expected, found| ImageError::Mismatch {
        what: "a row of images",
        expected,
        found,
    };
    let Some(first) = images.first() else {
        let expected = "at least one image".to_owned();
        return Err(mismatch(expected, "none".to_owned()));
    };
    let height = first.height();
    if let Some(other) = images.iter().find(|i| i.height() != height) {
        let expected = format!("images of height {height}");
        return Err(mismatch(expected, format!("one of {}", other.size())));
    }
    let width = images
        .iter()
        .try_fold(0_u32, |sum, image| sum.checked_add(image.width()))
        .ok_or(ImageError::Size {
            width: u32::MAX,
            height,
            reason: "the images are too wide together",
        })?;
    let mut bytes = Vec::with_capacity(super::rgb::byte_count(width, height)?);
    let mut rows: Vec<_> = images.iter().map(|image| image.rows()).collect();
    for _ in 0..height {
        rows.iter_mut()
            .filter_map(Iterator::next)
            .for_each(|row| bytes.extend_from_slice(row));
    }
    Rgb::new(width, height, bytes)
}

/// How far each value of two images is apart, `gain` times as bright.
///
/// # Errors
/// The images have different sizes.
pub fn difference(a: &Rgb, b: &Rgb, gain: f32) -> Result<Rgb, ImageError> {
    same_size("a difference", a, b)?;
    let pairs = a.bytes().iter().zip(b.bytes());
    let bytes = pairs.map(|(a, b)| (f32::from(a.abs_diff(*b)) * gain).round() as u8);
    Rgb::new(a.width(), a.height(), bytes.collect())
}

fn same_size(what: &'static str, a: &Rgb, b: &Rgb) -> Result<(), ImageError> {
    if (a.width(), a.height()) == (b.width(), b.height()) {
        return Ok(());
    }
    Err(ImageError::Mismatch {
        what,
        expected: format!("images of one size ({})", a.size()),
        found: format!("another of {}", b.size()),
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture;
    use super::*;

    /// Sums of up to 16K terms of f64 in another order: relative errors of 1e-12, more where variances cancel
    /// (65025 / C2 = 1e3 times).
    #[test]
    fn metrics_are_those_of_the_formulas() {
        let image = fixture::image("noise");
        for name in ["blurred", "shifted"] {
            let other = fixture::image(name);
            let expected = fixture::f64(&format!("psnr/{name}"))[0];
            assert!((psnr(&image, &other).unwrap() - expected).abs() < 1e-9);
            let expected = fixture::f64(&format!("ssim/{name}"))[0];
            let found = ssim(&image, &other).unwrap();
            assert!((found - expected).abs() < 1e-9, "{found}, not {expected}");
        }
        assert_eq!(psnr(&image, &image).unwrap(), f64::INFINITY);
        assert!((ssim(&image, &image).unwrap() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn images_of_other_sizes_are_refused() {
        let (wide, high) = (
            Rgb::new(20, 10, vec![0; 600]).unwrap(),
            Rgb::new(10, 20, vec![0; 600]).unwrap(),
        );
        assert!(psnr(&wide, &high).is_err());
        assert!(ssim(&wide, &high).is_err());
        assert!(difference(&wide, &high, 1.0).is_err());
        assert!(side_by_side(&[&wide, &high]).is_err());
        assert!(side_by_side(&[]).is_err());
        let message = ssim(&wide, &wide).unwrap_err().to_string();
        assert!(message.contains("11x11") && message.contains("20x10"));
    }

    #[test]
    fn pictures_show_both_and_what_differs() {
        let a = Rgb::new(1, 2, vec![1, 2, 3, 4, 5, 6]).unwrap();
        let b = Rgb::new(2, 2, (10..22).collect()).unwrap();
        let row = side_by_side(&[&a, &b]).unwrap();
        assert_eq!((row.width(), row.height()), (3, 2));
        assert_eq!(&row.bytes()[..9], [1, 2, 3, 10, 11, 12, 13, 14, 15]);
        assert_eq!(&row.bytes()[9..12], [4, 5, 6]);
        let other = Rgb::new(1, 2, vec![1, 0, 103, 4, 5, 5]).unwrap();
        assert_eq!(
            difference(&a, &other, 10.0).unwrap().bytes(),
            [0, 20, 255, 0, 0, 10]
        );
    }
}
