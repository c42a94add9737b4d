//! Images to files, row by row, so that an image larger than the memory can be written.

mod png;
mod sink;
mod tiff;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use linfusion_models::leftovers::{Leftover, unnamed};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::staged::parent_folder;
use tempfile::TempPath;

use self::png::PngRows;
use self::sink::Sink;
use self::tiff::TiffRows;
use super::{ImageError, Metadata, Rgb};
use crate::whole::check_place;

/// Writes an image row by row. The file appears under its name, whole, with [`RowWriter::finish`]; a writer that is
/// dropped before leaves nothing.
pub struct RowWriter {
    // Declared before `temporary`, as an open file cannot be deleted everywhere.
    body: Body,
    sink: Sink,
    temporary: TempPath,
    // Behind the path that it lists, so that it outlives it.
    leftover: Leftover,
    path: PathBuf,
    height: u32,
    row_bytes: usize,
    rows: u64,
}

impl std::fmt::Debug for RowWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowWriter")
            .field("path", &self.path)
            .field("height", &self.height)
            .field("rows", &self.rows)
            .finish_non_exhaustive()
    }
}

/// Whether an image can be begun under that name, before it is made: its extension is known, its folder can be written to, and
/// no file is there that must not be replaced.
///
/// # Errors
/// As [`RowWriter::create`]; or there is such a file.
pub fn check_output(path: &Path, overwrite: Overwrite) -> Result<(), ImageError> {
    Format::of(path)?;
    check_place(path, overwrite).map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => ImageError::Exists {
            path: path.to_owned(),
        },
        _ => ImageError::write(path, error),
    })
}

impl RowWriter {
    /// Begins an image of 8-bit RGB: a PNG or, as the extension says (`.png`, `.tif`, `.tiff`), an uncompressed
    /// TIFF, which is a BigTIFF if it would pass 4 GiB.
    ///
    /// # Errors
    /// The extension is another, the size has a zero or is beyond what the format holds (2^31 - 1 for a side), or
    /// the folder is missing, full or cannot be written to.
    pub fn create(
        path: &Path,
        width: u32,
        height: u32,
        metadata: &Metadata,
    ) -> Result<Self, ImageError> {
        check_output(path, Overwrite::Force)?;
        let format = Format::of(path)?;
        let row_bytes = check_size(width, height)?;
        let (file, temporary) = temporary_file(path)?.into_parts();
        let sink = Sink::new(file);
        let body = Body::begin(format, &sink, width, height, metadata);
        Ok(Self {
            body: body.map_err(|error| ImageError::write(path, sink.cause(error)))?,
            sink,
            leftover: Leftover::new(&temporary),
            temporary,
            path: path.to_owned(),
            height,
            row_bytes,
            rows: 0,
        })
    }

    /// Writes the next rows, three bytes a pixel.
    ///
    /// # Errors
    /// The bytes are no whole rows or more than promised, or the file cannot be written (the disk is full).
    pub fn write_rows(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        if !bytes.len().is_multiple_of(self.row_bytes) {
            return Err(ImageError::PartOfRow {
                row: self.row_bytes,
                found: bytes.len(),
            });
        }
        let rows = self.rows + (bytes.len() / self.row_bytes) as u64;
        if rows > u64::from(self.height) {
            return Err(self.wrong_count(rows));
        }
        self.body
            .write(bytes)
            .map_err(|error| ImageError::write(&self.path, self.sink.cause(error)))?;
        self.rows = rows;
        Ok(())
    }

    /// Completes the file and gives it its name; whether a file that has this name by now is replaced, `overwrite` says.
    ///
    /// # Errors
    /// Rows are missing, or the file cannot be written.
    pub fn finish(self, overwrite: Overwrite) -> Result<(), ImageError> {
        if self.rows != u64::from(self.height) {
            return Err(self.wrong_count(self.rows));
        }
        let cannot = |error| ImageError::write(&self.path, error);
        self.body
            .finish()
            .map_err(|error| cannot(self.sink.cause(error)))?;
        self.sink.close().map_err(cannot)?;
        let persisted = match overwrite {
            Overwrite::Force => self.temporary.persist(&self.path),
            Overwrite::Refuse => self.temporary.persist_noclobber(&self.path),
        };
        drop(self.leftover);
        persisted
            .map(drop)
            .map_err(|error| match error.error.kind() {
                std::io::ErrorKind::AlreadyExists => ImageError::Exists {
                    path: self.path.clone(),
                },
                _ => ImageError::write(&self.path, error.error),
            })
    }

    fn wrong_count(&self, found: u64) -> ImageError {
        ImageError::Rows {
            path: self.path.clone(),
            expected: self.height,
            found,
        }
    }
}

impl Rgb {
    /// Writes the image to a PNG or TIFF file, over one that is there; see [`RowWriter`].
    ///
    /// # Errors
    /// The same as a [`RowWriter`]'s.
    pub fn write(&self, path: &Path, metadata: &Metadata) -> Result<(), ImageError> {
        let mut writer = RowWriter::create(path, self.width(), self.height(), metadata)?;
        writer.write_rows(self.bytes())?;
        writer.finish(Overwrite::Force)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Png,
    Tiff,
}

impl Format {
    fn of(path: &Path) -> Result<Self, ImageError> {
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        match extension.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "tif" | "tiff" => Ok(Self::Tiff),
            _ => Err(ImageError::Extension {
                path: path.to_owned(),
                found: extension.into_owned(),
            }),
        }
    }
}

enum Body {
    Png(PngRows),
    Tiff(TiffRows),
}

impl Body {
    fn begin(
        format: Format,
        sink: &Sink,
        width: u32,
        height: u32,
        metadata: &Metadata,
    ) -> std::io::Result<Self> {
        Ok(match format {
            Format::Png => Self::Png(png::begin(sink.clone(), width, height, metadata)?),
            Format::Tiff => Self::Tiff(tiff::begin(sink.clone(), width, height, metadata)?),
        })
    }

    fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Png(rows) => rows.write_all(bytes),
            Self::Tiff(rows) => rows.write_all(bytes),
        }
    }

    fn finish(self) -> std::io::Result<()> {
        match self {
            Self::Png(rows) => png::finish(rows),
            Self::Tiff(mut rows) => rows.flush(),
        }
    }
}

/// The longest side that PNG allows. Baseline readers of TIFF take it for signed as well.
const LONGEST: u32 = i32::MAX as u32;

/// As many bytes as a row has, if an image of this size can be written.
fn check_size(width: u32, height: u32) -> Result<usize, ImageError> {
    let refuse = |reason| ImageError::Size {
        width,
        height,
        reason,
    };
    if width == 0 || height == 0 {
        return Err(refuse("both must be at least 1"));
    }
    if width > LONGEST || height > LONGEST {
        return Err(refuse("files hold at most 2147483647 each way"));
    }
    let row = u64::from(width) * 3;
    let fits = row
        .checked_mul(u64::from(height))
        .is_some_and(|all| all <= LARGEST_FILE && usize::try_from(all).is_ok());
    match usize::try_from(row) {
        Ok(row) if fits => Ok(row),
        _ => Err(refuse("files of more than 2^60 bytes are not written")),
    }
}

/// More than file systems hold; sums with it cannot overflow.
const LARGEST_FILE: u64 = 1 << 60;

/// A file in the folder of `path`, as only there it can be renamed to it.
fn temporary_file(path: &Path) -> Result<tempfile::NamedTempFile<File>, ImageError> {
    let folder = parent_folder(path);
    let mut builder = tempfile::Builder::new();
    builder.prefix(".linfusion-").suffix(".part");
    // A temporary file is private by default; this one becomes a file as any other, under the user's umask.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder
        .tempfile_in(folder)
        .map_err(|error| ImageError::write(path, unnamed(error)))
}

#[cfg(test)]
mod tests;
