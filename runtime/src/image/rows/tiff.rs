//! TIFF: 8-bit RGB in uncompressed strips.
//!
//! Without compression every strip's place is known before the first row comes. So the directory stands at the
//! file's begin and the rows just follow it.

use std::borrow::Cow;
use std::io::{self, BufWriter, Cursor, Write};

use tiff::TiffError;
use tiff::encoder::{Rational, TiffEncoder, TiffKind, TiffKindBig, TiffKindStandard, TiffValue};
use tiff::tags::{
    CompressionMethod, PhotometricInterpretation, PlanarConfiguration, ResolutionUnit, Tag, Type,
};

use super::sink::Sink;
use crate::image::Metadata;

/// Rows that go to the file as they come.
pub type TiffRows = BufWriter<Sink>;

/// Bytes of a strip, where a row is not longer.
const STRIP: u64 = 1 << 20;

/// Strips at most, as a directory is kept in memory.
const STRIPS: u64 = 1 << 16;

/// What an ordinary TIFF can hold: its offsets have 32 bits. The margin is for the directory without its texts, of
/// which the strips' offsets and lengths are the most (2^16 * 8 bytes).
const ORDINARY: u64 = (1 << 32) - (1 << 20);

/// Writes what stands before the pixels.
pub fn begin(sink: Sink, width: u32, height: u32, metadata: &Metadata) -> io::Result<TiffRows> {
    let image = Image::new(width, height, metadata);
    let head = if image.needs_big() {
        image.head::<TiffKindBig>()
    } else {
        image.head::<TiffKindStandard>()
    };
    let mut rows = BufWriter::with_capacity(STRIP as usize, sink);
    rows.write_all(&head?)?;
    Ok(rows)
}

struct Image {
    width: u32,
    height: u32,
    rows_per_strip: u64,
    description: String,
    software: Option<String>,
}

impl Image {
    fn new(width: u32, height: u32, metadata: &Metadata) -> Self {
        let rows = u64::from(height);
        let strip = (STRIP / (u64::from(width) * 3)).max(rows.div_ceil(STRIPS));
        Self {
            width,
            height,
            rows_per_strip: strip.clamp(1, rows),
            description: description(metadata),
            software: metadata.get("Software").map(str::to_owned),
        }
    }

    fn needs_big(&self) -> bool {
        let texts = self.description.len() + self.software.as_ref().map_or(0, String::len);
        self.row_bytes() * u64::from(self.height) + texts as u64 > ORDINARY
    }

    fn row_bytes(&self) -> u64 {
        u64::from(self.width) * 3
    }

    /// Header and directory. Their length does not depend on the strips' places, which depend on it.
    fn head<K: Kind>(&self) -> io::Result<Vec<u8>> {
        let length = self.head_before::<K>(0)?.len() as u64;
        self.head_before::<K>(length)
    }

    fn head_before<K: Kind>(&self, pixels: u64) -> io::Result<Vec<u8>> {
        let mut head = Cursor::new(Vec::new());
        self.write_head::<K>(&mut head, pixels).map_err(to_io)?;
        let mut head = head.into_inner();
        // Strips begin at even places.
        if !head.len().is_multiple_of(2) {
            head.push(0);
        }
        Ok(head)
    }

    fn write_head<K: Kind>(
        &self,
        head: &mut Cursor<Vec<u8>>,
        pixels: u64,
    ) -> Result<(), TiffError> {
        let (offsets, lengths) = self.strips(pixels);
        let mut encoder = TiffEncoder::<_, K>::new_generic(head)?;
        let mut directory = encoder.image_directory()?;
        directory.write_tag(Tag::ImageWidth, self.width)?;
        directory.write_tag(Tag::ImageLength, self.height)?;
        directory.write_tag(Tag::BitsPerSample, &[8_u16; 3][..])?;
        directory.write_tag(Tag::Compression, CompressionMethod::None.to_u16())?;
        let rgb = PhotometricInterpretation::RGB.to_u16();
        directory.write_tag(Tag::PhotometricInterpretation, rgb)?;
        if !self.description.is_empty() {
            directory.write_tag(Tag::ImageDescription, Text(&self.description))?;
        }
        directory.write_tag(Tag::StripOffsets, K::values(&offsets)?)?;
        directory.write_tag(Tag::SamplesPerPixel, 3_u16)?;
        directory.write_tag(Tag::RowsPerStrip, self.rows_per_strip as u32)?;
        directory.write_tag(Tag::StripByteCounts, K::values(&lengths)?)?;
        directory.write_tag(Tag::XResolution, Rational { n: 1, d: 1 })?;
        directory.write_tag(Tag::YResolution, Rational { n: 1, d: 1 })?;
        let chunky = PlanarConfiguration::Chunky.to_u16();
        directory.write_tag(Tag::PlanarConfiguration, chunky)?;
        directory.write_tag(Tag::ResolutionUnit, ResolutionUnit::None.to_u16())?;
        if let Some(software) = &self.software {
            directory.write_tag(Tag::Software, Text(software))?;
        }
        directory.finish()
    }

    /// Offsets and lengths of the strips of pixels that begin at a place.
    fn strips(&self, pixels: u64) -> (Vec<u64>, Vec<u64>) {
        let full = self.rows_per_strip * self.row_bytes();
        let all = u64::from(self.height) * self.row_bytes();
        let count = all.div_ceil(full);
        let offsets = (0..count).map(|i| pixels + i * full);
        let lengths = (0..count).map(|i| full.min(all - i * full));
        (offsets.collect(), lengths.collect())
    }
}

/// Which integers say where things are.
trait Kind: TiffKind {
    type Values: TiffValue;
    fn values(values: &[u64]) -> Result<Self::Values, TiffError>;
}

impl Kind for TiffKindStandard {
    type Values = Numbers<u32>;
    fn values(values: &[u64]) -> Result<Self::Values, TiffError> {
        let narrow: Result<_, _> = values.iter().map(|v| u32::try_from(*v)).collect();
        Ok(Numbers(narrow?))
    }
}

impl Kind for TiffKindBig {
    type Values = Numbers<u64>;
    fn values(values: &[u64]) -> Result<Self::Values, TiffError> {
        Ok(Numbers(values.to_vec()))
    }
}

struct Numbers<T>(Vec<T>);

impl<T> TiffValue for Numbers<T>
where
    [T]: TiffValue,
{
    const BYTE_LEN: u8 = <[T] as TiffValue>::BYTE_LEN;
    const FIELD_TYPE: Type = <[T] as TiffValue>::FIELD_TYPE;

    fn count(&self) -> usize {
        self.0.len()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.0.as_slice().data()
    }
}

/// A text in UTF-8. TIFF knows only ASCII, so that a reader may take other bytes for something else (Pillow: Latin-1).
struct Text<'a>(&'a str);

impl TiffValue for Text<'_> {
    const BYTE_LEN: u8 = 1;
    const FIELD_TYPE: Type = Type::ASCII;

    fn count(&self) -> usize {
        self.0.len() + 1
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = self.0.as_bytes().to_vec();
        bytes.push(0);
        Cow::Owned(bytes)
    }
}

/// The only text, or a line `key: text` for each; the software has a field of its own.
fn description(metadata: &Metadata) -> String {
    let entries = metadata.entries().iter();
    let others: Vec<_> = entries.filter(|(key, _)| key != "Software").collect();
    match others.as_slice() {
        [(_, text)] => text.clone(),
        others => {
            let lines = others.iter().map(|(key, text)| format!("{key}: {text}"));
            lines.collect::<Vec<_>>().join("\n")
        }
    }
}

fn to_io(error: TiffError) -> io::Error {
    match error {
        TiffError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_64_bits_are_used_where_32_do_not_do() {
        let image = |width, height| Image::new(width, height, &Metadata::default());
        assert!(!image(16384, 16384).needs_big());
        assert!(!image(32768, 32768).needs_big());
        assert!(image(37837, 37837).needs_big());
        // The largest ordinary file: the last strip begins and the directory lies below 2^32.
        let rows = (ORDINARY / 3) as u32;
        assert!(!image(1, rows).needs_big() && image(1, rows + 1).needs_big());
        let largest = image(1, rows);
        let head = largest.head::<TiffKindStandard>().unwrap();
        assert!(head.len() as u64 + ORDINARY < 1 << 32);
        assert!(image(1, u32::MAX / 2).head::<TiffKindBig>().unwrap().len() < 2 << 20);
    }

    #[test]
    fn a_bigtiff_is_read_back() {
        let mut metadata = Metadata::default();
        metadata.push("parameters", "灯").unwrap();
        let image = Image::new(700, 900, &metadata);
        assert!(image.strips(0).0.len() > 1);
        let pixels: Vec<u8> = (0..700 * 900 * 3).map(|i| (i % 251) as u8).collect();
        let mut file = image.head::<TiffKindBig>().unwrap();
        file.extend(&pixels);
        assert_eq!(file[2..4], 43_u16.to_ne_bytes());

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big.tif");
        std::fs::write(&path, file).unwrap();
        let read = crate::image::read(&path).unwrap();
        assert!(read == crate::image::Rgb::new(700, 900, pixels).unwrap());
    }
}
