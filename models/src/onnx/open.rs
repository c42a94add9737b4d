//! Opening an ONNX file: map it, decode it, leave the weights where they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use buffa::{DecodeError, DecodeOptions};
use bytes::Bytes;

use super::folder::{DataFileError, Folder, Route};
use super::limits::Limits;
use super::map::MappedFile;
use super::proto::ModelProto;
use super::sniff;

/// The largest protobuf message: 2 GiB less one byte.
pub const MAX_MODEL_BYTES: u64 = (1 << 31) - 1;

/// Why a file is not a model that we can read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The operating system's answer.
    #[error("{path} cannot be read: {source}{hint}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        r#source: io::Error,
        /// What to try; starts with a space, or empty.
        hint: String,
    },
    /// A directory, FIFO or device.
    #[error("{path} is not a regular file{hint}")]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What to try; starts with a space, or empty.
        hint: String,
    },
    /// Recognised as something else.
    #[error("{path} is not an ONNX model; it looks like {what}")]
    LooksLike {
        /// The file.
        path: PathBuf,
        /// What it looks like, with a hint.
        what: &'static str,
    },
    /// Larger than a protobuf message can be.
    #[error(
        "{path} has {size} bytes, but an ONNX model cannot exceed 2 GiB (hint: larger models keep their weights in a second file; is this that data file?)"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The bytes end inside a field.
    #[error(
        "{path} ends early, after {size} bytes (hint: an interrupted download or copy? compare its size with the original)"
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// No protobuf, or another message.
    #[error("{path} is not an ONNX model: {source}")]
    Decode {
        /// The file.
        path: PathBuf,
        /// What the decoder stumbled over.
        r#source: DecodeError,
    },
    /// Valid protobuf without a graph.
    #[error("{path} is not an ONNX model: it has no graph")]
    NoGraph {
        /// The file.
        path: PathBuf,
    },
    /// Graphs nested too deeply.
    #[error("its subgraphs are nested more than {limit} deep")]
    TooDeep {
        /// The limit.
        limit: usize,
    },
    /// Too many nodes.
    #[error("it has more than {limit} nodes")]
    TooManyNodes {
        /// The limit.
        limit: usize,
    },
    /// A name beyond reason.
    #[error("the name starting with `{start}` has {length} bytes; the limit is {limit}")]
    NameTooLong {
        /// The first 40 characters.
        start: String,
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
}

/// An ONNX file that is open: its decoded structure, with `raw_data` fields as
/// slices of the mapped file, and its data files, mapped when first used.
///
/// The weights are not read: decoding touches only the pages between them.
#[derive(Debug)]
pub struct OnnxFile {
    /// The decoded model. Its large `bytes` fields point into the mapped file, so
    /// cloning it copies structure, not weights.
    pub model: ModelProto,
    path: PathBuf,
    size: u64,
    source: Option<ModelFile>,
    folder: Option<Folder>,
    data_files: Mutex<BTreeMap<String, Arc<DataFile>>>,
}

/// The model file itself.
#[derive(Debug)]
pub(super) struct ModelFile {
    pub file: File,
    pub map: MappedFile,
}

/// A data file of a model, mapped.
#[derive(Debug)]
pub(super) struct DataFile {
    pub location: String,
    pub map: MappedFile,
    pub route: Route,
}

impl OnnxFile {
    /// Opens and decodes a model under the default [`Limits`].
    ///
    /// # Errors
    /// [`ReadError`]; a file that is something else than ONNX is named.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ReadError> {
        Self::open_with(path, &Limits::default())
    }

    /// Opens and decodes a model under given limits.
    ///
    /// # Errors
    /// [`ReadError`]; a file that is something else than ONNX is named.
    pub fn open_with(path: impl AsRef<Path>, limits: &Limits) -> Result<Self, ReadError> {
        let path = path.as_ref();
        let io_error = |source: io::Error| ReadError::Io {
            hint: hint_for(path, &source),
            path: path.to_owned(),
            source,
        };
        let file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(path)
            .map_err(io_error)?;
        let metadata = file.metadata().map_err(io_error)?;
        if !metadata.is_file() {
            return Err(ReadError::NotRegular {
                hint: hint_for_folder(path),
                path: path.to_owned(),
            });
        }
        let folder = Folder::of_model(path).map_err(io_error)?;
        let map = MappedFile::new(&file).map_err(io_error)?;
        let model = decode(map.bytes(), path, limits)?;
        Ok(Self {
            model,
            path: path.to_owned(),
            size: map.identity().size,
            source: Some(ModelFile { file, map }),
            folder: Some(folder),
            data_files: Mutex::default(),
        })
    }

    /// Decodes a model from memory. Its external data, if any, is looked up in
    /// `base_dir`; without one, using an external tensor is an error.
    ///
    /// # Errors
    /// [`ReadError`], with `<memory>` as the path.
    pub fn from_bytes(bytes: Bytes, base_dir: Option<&Path>) -> Result<Self, ReadError> {
        let path = Path::new("<memory>");
        let model = decode(&bytes, path, &Limits::default())?;
        let folder = base_dir
            .map(Folder::at)
            .transpose()
            .map_err(|source| ReadError::Io {
                path: base_dir.unwrap_or(path).to_owned(),
                source,
                hint: String::new(),
            })?;
        Ok(Self {
            model,
            path: path.to_owned(),
            size: bytes.len() as u64,
            source: None,
            folder,
            data_files: Mutex::default(),
        })
    }

    /// Opens a model that has no name yet. `path` is the one it will have; `data`
    /// is its data file, under the name that the model uses.
    pub(super) fn open_scratch(
        file: &File,
        path: &Path,
        data: Option<(&str, &File)>,
    ) -> Result<Self, ReadError> {
        let io_error = |source: io::Error| ReadError::Io {
            hint: String::new(),
            path: path.to_owned(),
            source,
        };
        let folder = Folder::of_model(path).map_err(io_error)?;
        let map = MappedFile::new(file).map_err(io_error)?;
        let model = decode(map.bytes(), path, &Limits::default())?;
        let mut data_files = BTreeMap::new();
        if let Some((location, file)) = data {
            let data = DataFile {
                location: location.to_owned(),
                map: MappedFile::new(file).map_err(io_error)?,
                route: Route::Below,
            };
            data_files.insert(location.to_owned(), Arc::new(data));
        }
        Ok(Self {
            model,
            path: path.to_owned(),
            size: map.identity().size,
            source: Some(ModelFile {
                file: file.try_clone().map_err(io_error)?,
                map,
            }),
            folder: Some(folder),
            data_files: Mutex::new(data_files),
        })
    }

    /// The path that the model was opened by (`<memory>` if it was not a file).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder in which the model's data files are looked up.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(Folder::path)
    }

    /// The size in bytes of the model file, without data files.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The mapped model file.
    pub(super) fn source(&self) -> Option<&ModelFile> {
        self.source.as_ref()
    }

    /// The data file called `location`, opened and mapped once.
    pub(super) fn data_file(&self, location: &str) -> Result<Arc<DataFile>, DataFileError> {
        let mut files = self
            .data_files
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = files.get(location) {
            return Ok(Arc::clone(file));
        }
        let folder = self
            .folder
            .as_ref()
            .ok_or_else(|| DataFileError::NoFolder {
                location: location.to_owned(),
            })?;
        let (file, route) = folder.open(location)?;
        let map = MappedFile::new(&file).map_err(|source| DataFileError::Io {
            location: location.to_owned(),
            source,
        })?;
        let file = Arc::new(DataFile {
            location: location.to_owned(),
            map,
            route,
        });
        files.insert(location.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    /// Opens a data file that is mapped already once more, to copy from it.
    pub(super) fn reopen(&self, data: &DataFile) -> Result<File, DataFileError> {
        let location = || data.location.clone();
        let folder = self
            .folder
            .as_ref()
            .ok_or_else(|| DataFileError::NoFolder {
                location: location(),
            })?;
        let (file, _) = folder.open(&data.location)?;
        match data.map.is_unchanged(&file) {
            Ok(true) => Ok(file),
            Ok(false) => Err(DataFileError::Changed {
                location: location(),
            }),
            Err(source) => Err(DataFileError::Io {
                location: location(),
                source,
            }),
        }
    }

    /// The data files that were used so far.
    pub(super) fn data_files_in_use(&self) -> Vec<Arc<DataFile>> {
        let files = self
            .data_files
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        files.values().map(Arc::clone).collect()
    }
}

fn decode(bytes: &Bytes, path: &Path, limits: &Limits) -> Result<ModelProto, ReadError> {
    let size = bytes.len() as u64;
    let looks_like = || {
        let head = bytes.get(..sniff::SNIFF_BYTES).unwrap_or(bytes);
        sniff::looks_like(head).map(|what| ReadError::LooksLike {
            path: path.to_owned(),
            what,
        })
    };
    if size > MAX_MODEL_BYTES {
        return Err(looks_like().unwrap_or(ReadError::TooLarge {
            path: path.to_owned(),
            size,
        }));
    }
    let decoded: Result<ModelProto, DecodeError> = DecodeOptions::new()
        .with_recursion_limit(limits.message_depth)
        .with_element_memory_limit(limits.structure_bytes)
        .decode(&mut bytes.clone());
    let model = match decoded {
        Ok(model) => model,
        Err(source) => {
            return Err(looks_like().unwrap_or(match source {
                // Every known writer puts ir_version (tag 0x08) first; what starts
                // otherwise and ends early was no model to begin with.
                DecodeError::UnexpectedEof if bytes.first() == Some(&8) => ReadError::Truncated {
                    path: path.to_owned(),
                    size,
                },
                source => ReadError::Decode {
                    path: path.to_owned(),
                    source,
                },
            }));
        }
    };
    if model.graph.is_unset() {
        return Err(looks_like().unwrap_or(ReadError::NoGraph {
            path: path.to_owned(),
        }));
    }
    limits.check(&model)?;
    Ok(model)
}

fn hint_for(path: &Path, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::NotFound && path.is_symlink() {
        " (it is a symbolic link to a file that is not there: was its download interrupted?)".into()
    } else {
        String::new()
    }
}

/// Exported pipelines are folders; say which file in them is meant.
fn hint_for_folder(path: &Path) -> String {
    ["model.onnx", "unet/model.onnx", "unet.onnx"]
        .iter()
        .map(|inner| path.join(inner))
        .find(|inner| inner.is_file())
        .map(|inner| format!(" (did you mean {}?)", inner.display()))
        .unwrap_or_default()
}
