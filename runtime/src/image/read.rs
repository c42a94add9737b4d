//! Images from files.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::Path;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::{ImageError, Rgb};

/// The most pixels an image to read may have: 16384 x 16384.
pub const MAX_PIXELS: u64 = 1 << 28;

/// The most memory a decoder may ask for: the pixels as four 16-bit values, and as much again for its own needs.
const MEMORY: u64 = MAX_PIXELS * 16;

/// Reads a PNG, JPEG, WebP, TIFF or BMP file, whatever its name, as 8-bit RGB.
///
/// As Pillow's `convert("RGB")`: transparency is dropped, not blended, and colour profiles are not applied. Values
/// of 16 bits are rounded to 8. The orientation that a camera stores in EXIF is not applied: such a picture comes as
/// its pixels are stored.
///
/// # Errors
/// The file is missing, damaged, of another format, or has more than 2^28 pixels.
pub fn read(path: &Path) -> Result<Rgb, ImageError> {
    let open = |source| ImageError::Open {
        path: path.to_owned(),
        source,
    };
    let mut file = BufReader::new(File::open(path).map_err(open)?);
    let big_tiff = is_big_tiff(&mut file).map_err(open)?;
    let mut reader = ImageReader::new(file).with_guessed_format().map_err(open)?;
    if big_tiff {
        reader.set_format(ImageFormat::Tiff);
    }
    let Some(name) = reader.format().and_then(name_of) else {
        return Err(ImageError::Format {
            path: path.to_owned(),
            found: first_bytes(reader.into_inner()),
        });
    };
    let mut limits = Limits::default();
    limits.max_alloc = Some(MEMORY);
    reader.limits(limits);

    let broken = |error: image::ImageError| ImageError::Decode {
        path: path.to_owned(),
        format: name,
        reason: error.to_string(),
    };
    let decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(ImageError::TooLarge {
            path: path.to_owned(),
            width,
            height,
            limit: MAX_PIXELS,
        });
    }
    let pixels = DynamicImage::from_decoder(decoder).map_err(broken)?;
    Rgb::new(width, height, pixels.into_rgb8().into_raw())
}

fn name_of(format: ImageFormat) -> Option<&'static str> {
    Some(match format {
        ImageFormat::Png => "PNG",
        ImageFormat::Jpeg => "JPEG",
        ImageFormat::WebP => "WebP",
        ImageFormat::Tiff => "TIFF",
        ImageFormat::Bmp => "BMP",
        _ => return None,
    })
}

/// Whether the file is a TIFF with offsets of 64 bits, which the image crate reads but does not recognise.
fn is_big_tiff(file: &mut (impl Read + Seek)) -> io::Result<bool> {
    let start = first_8(file)?;
    file.rewind()?;
    Ok(start.starts_with(b"II\x2b\x00") || start.starts_with(b"MM\x00\x2b"))
}

fn first_8(file: &mut (impl Read + Seek)) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    file.rewind()?;
    file.take(8).read_to_end(&mut start)?;
    Ok(start)
}

fn first_bytes(mut file: impl Read + Seek) -> String {
    match first_8(&mut file) {
        Ok(start) if start.is_empty() => "none, the file is empty".to_owned(),
        Ok(start) => {
            let bytes: Vec<_> = start.iter().map(|b| format!("{b:02x}")).collect();
            bytes.join(" ")
        }
        Err(error) => format!("not readable: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Cursor;

    use super::super::fixture;
    use super::*;

    const FORMATS: [ImageFormat; 5] = [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::WebP,
        ImageFormat::Tiff,
        ImageFormat::Bmp,
    ];

    fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
        let mut file = Cursor::new(Vec::new());
        image.write_to(&mut file, format).unwrap();
        file.into_inner()
    }

    fn pixels() -> (Rgb, DynamicImage) {
        let image = fixture::image("noise");
        let buffer =
            image::RgbImage::from_raw(image.width(), image.height(), image.bytes().to_vec());
        (image, buffer.unwrap().into())
    }

    #[test]
    fn every_format_is_read_whatever_the_files_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image.txt");
        let (image, pixels) = pixels();
        for format in FORMATS {
            fs::write(&path, encoded(&pixels, format)).unwrap();
            let found = read(&path).unwrap();
            if format == ImageFormat::Jpeg {
                assert_eq!((found.width(), found.height()), (37, 29));
            } else {
                assert_eq!(found, image);
            }
        }
    }

    #[test]
    fn transparency_is_dropped_and_grey_has_three_channels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let clear = image::RgbaImage::from_raw(1, 1, vec![9, 8, 7, 0]).unwrap();
        fs::write(&path, encoded(&clear.into(), ImageFormat::Png)).unwrap();
        assert_eq!(read(&path).unwrap().bytes(), [9, 8, 7]);
        let grey = image::GrayImage::from_raw(1, 1, vec![5]).unwrap();
        fs::write(&path, encoded(&grey.into(), ImageFormat::Png)).unwrap();
        assert_eq!(read(&path).unwrap().bytes(), [5, 5, 5]);
    }

    /// Decoders of JPEG and BMP may fill in what is missing at the end; nobody can read a tenth of a file.
    #[test]
    fn truncated_files_are_errors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for format in FORMATS {
            let whole = encoded(&pixels().1, format);
            for tenths in 0..10 {
                fs::write(&path, &whole[..whole.len() * tenths / 10]).unwrap();
                let found = read(&path);
                if tenths < 2 || matches!(format, ImageFormat::Png | ImageFormat::WebP) {
                    let message = found.unwrap_err().to_string();
                    assert!(message.contains("a.png"), "{message}");
                }
            }
        }
    }

    #[test]
    fn damaged_files_do_not_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let (image, pixels) = pixels();
        for format in FORMATS {
            let whole = encoded(&pixels, format);
            let mut changed = 0;
            for at in 0..whole.len().min(120) {
                let mut damaged = whole.clone();
                damaged[at] ^= 0x5a;
                fs::write(&path, &damaged).unwrap();
                changed += usize::from(read(&path).is_ok_and(|found| found == image));
            }
            // Most of the first bytes matter.
            assert!(changed < 80, "{format:?}: {changed}");
        }
    }

    #[test]
    fn other_files_are_named_with_what_they_begin_with() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for (bytes, part) in [
            (&b""[..], "the file is empty"),
            (b"GIF89a\x01\x00\x01\x00", "47 49 46 38 39 61 01 00"),
            (b"hello", "68 65 6c 6c 6f)"),
        ] {
            fs::write(&path, bytes).unwrap();
            let message = read(&path).unwrap_err().to_string();
            assert!(
                message.contains(part) && message.contains("use PNG"),
                "{message}"
            );
        }
        let missing = read(&folder.path().join("b.png")).unwrap_err();
        assert!(matches!(missing, ImageError::Open { .. }));
    }

    #[test]
    fn an_image_of_too_many_pixels_is_refused_by_its_header() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let mut encoder = png::Encoder::new(fs::File::create(&path).unwrap(), 16385, 16384);
        encoder.set_color(png::ColorType::Rgb);
        drop(
            encoder
                .write_header()
                .unwrap()
                .into_stream_writer()
                .unwrap(),
        );
        assert!(matches!(
            read(&path).unwrap_err(),
            ImageError::TooLarge {
                width: 16385,
                height: 16384,
                ..
            }
        ));
    }
}
