//! Why an image cannot be read, made or written.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image cannot be read, made or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("cannot open the image {}: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the operating system said.
        r#source: io::Error,
    },
    /// The file's first bytes are none of a supported format's.
    #[error(
        "{} is no image of a known format (its first bytes are {found}); use PNG, JPEG, WebP, TIFF or BMP",
        path.display()
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// The first bytes, in hexadecimal.
        found: String,
    },
    /// The file is damaged or uses a part of its format that is not supported.
    #[error(
        "cannot read {} as {format}: {reason}; if other programs open it, save it again as an 8-bit PNG",
        path.display()
    )]
    Decode {
        /// The image.
        path: PathBuf,
        /// The format that the first bytes tell.
        format: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// The image to read has too many pixels.
    #[error(
        "{} has {width}x{height} pixels, at most {limit} are read (as many as 16384x16384 has); make it smaller",
        path.display()
    )]
    TooLarge {
        /// The image.
        path: PathBuf,
        /// Its width.
        width: u32,
        /// Its height.
        height: u32,
        /// The limit for the product of both.
        limit: u64,
    },
    /// A size of zero, or one that a file or the memory cannot hold.
    #[error("an image cannot have {width}x{height} pixels: {reason}")]
    Size {
        /// The asked width.
        width: u32,
        /// The asked height.
        height: u32,
        /// What limits it.
        reason: &'static str,
    },
    /// An image's values are not as many as its size says.
    #[error("an image of {width}x{height} pixels has {expected} values, not {found}")]
    Count {
        /// The image's width.
        width: u32,
        /// The image's height.
        height: u32,
        /// As many values as it has.
        expected: usize,
        /// As many as were given.
        found: usize,
    },
    /// Images that belong together have different sizes.
    #[error("{what} needs {expected}, not {found}; resize one of the images")]
    Mismatch {
        /// What the images are for.
        what: &'static str,
        /// The size that is needed.
        expected: String,
        /// The size that was given.
        found: String,
    },
    /// The extension of the file to write tells no format that can be written.
    #[error(
        "cannot tell the format of {} from its extension `{found}`; name it *.png, *.tif or *.tiff",
        path.display()
    )]
    Extension {
        /// The file to write.
        path: PathBuf,
        /// What it ends with.
        found: String,
    },
    /// A text to store in the image has a form that no image file can hold.
    #[error("cannot store the text `{key}` in an image: {reason}")]
    Text {
        /// The text's key.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Part of a row was given.
    #[error("{found} bytes are no whole rows of {row} bytes")]
    PartOfRow {
        /// As many bytes as a row has.
        row: usize,
        /// As many as were given.
        found: usize,
    },
    /// More or fewer rows were given than promised.
    #[error("{} was begun with {expected} rows, but {found} were written", path.display())]
    Rows {
        /// The file.
        path: PathBuf,
        /// The promised rows.
        expected: u32,
        /// The rows that came.
        found: u64,
    },
    /// The file is there, and was not to be replaced.
    #[error("{} exists already; choose another name, or replace it with --overwrite", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}; {hint}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        r#source: io::Error,
        /// What can be done about it.
        hint: &'static str,
    },
}

impl ImageError {
    /// Whether the name asked for is at fault, rather than a file or the machine.
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Extension { .. })
    }

    /// A file cannot be written, with what the kind of error suggests.
    pub(super) fn write(path: &Path, source: io::Error) -> Self {
        use io::ErrorKind as Kind;
        let hint = match source.kind() {
            Kind::StorageFull | Kind::QuotaExceeded | Kind::WriteZero => {
                "free space there or write to another disk"
            }
            Kind::FileTooLarge => "write to a file system that holds larger files",
            Kind::PermissionDenied | Kind::ReadOnlyFilesystem => {
                "choose a folder that you may write to"
            }
            Kind::NotFound | Kind::NotADirectory => "make its folder first",
            Kind::IsADirectory => "a folder has that name: choose another one",
            _ => "check that the disk works and that the folder can be written to",
        };
        Self::Write {
            path: path.to_owned(),
            source,
            hint,
        }
    }
}
