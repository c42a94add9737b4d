//! PNG: 8-bit RGB, texts before the pixels.

use std::io;

use png::{BitDepth, ColorType, Encoder, EncodingError, StreamWriter};

use super::sink::Sink;
use crate::image::Metadata;

/// Rows that are compressed as they come.
pub type PngRows = Box<StreamWriter<'static, Sink>>;

/// Bytes of a chunk of pixels.
const CHUNK: usize = 1 << 20;

/// Writes what stands before the pixels.
pub fn begin(sink: Sink, width: u32, height: u32, metadata: &Metadata) -> io::Result<PngRows> {
    let mut encoder = Encoder::new(sink, width, height);
    encoder.set_color(ColorType::Rgb);
    encoder.set_depth(BitDepth::Eight);
    for (key, text) in metadata.entries() {
        let added = if text.chars().all(|c| u8::try_from(c).is_ok()) {
            encoder.add_text_chunk(key.clone(), text.clone())
        } else {
            encoder.add_itxt_chunk(key.clone(), text.clone())
        };
        added.map_err(to_io)?;
    }
    let writer = encoder.write_header().map_err(to_io)?;
    let rows = writer.into_stream_writer_with_size(CHUNK);
    Ok(Box::new(rows.map_err(to_io)?))
}

/// Writes what is still held and the end. The file's errors are lost here; its [`Sink`] has them.
pub fn finish(rows: PngRows) -> io::Result<()> {
    rows.finish().map_err(to_io)
}

fn to_io(error: EncodingError) -> io::Error {
    match error {
        EncodingError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
