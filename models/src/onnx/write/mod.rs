//! Writing models: first everything to scratch files, then all names at once.
//!
//! [`stage`] writes the files without giving them their names; [`Staged::publish`]
//! waits for the disk and names them, the data file first and the model last. In
//! between the caller can look at the result with [`Staged::open`]. A `Staged` that
//! is dropped leaves nothing behind.

mod layout;
mod pieces;
mod publish;
mod scratch;
mod spill;
#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::map::FileIdentity;
use super::open::{MAX_MODEL_BYTES, OnnxFile};
use super::proto::ModelProto;
use super::tensor::TensorError;
use layout::Planner;
use pieces::Sources;
pub use publish::Published;
pub use scratch::clean_up_unfinished;
use scratch::{OutputFolder, Scratch};
pub use spill::Spill;

/// What becomes of weights that the input keeps in data files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExternalData {
    /// `Reuse` if the output lies in the folder of the input and its data files,
    /// else `Copy`.
    #[default]
    Auto,
    /// The output refers to the input's data files; only new weights are written,
    /// to a second data file. Both are needed from then on.
    Reuse,
    /// All weights that the model still uses go into one data file beside the
    /// output, which needs no other file.
    Copy,
    /// All weights go into the model file, if they fit into 2 GiB.
    Inline,
}

/// What to do if an output file exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Overwrite {
    /// Refuse to write.
    #[default]
    Refuse,
    /// Replace it. The input and its data files are never replaced.
    Force,
}

/// How to write a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriteOptions {
    /// What becomes of external data.
    pub external: ExternalData,
    /// What to do if an output file exists.
    pub overwrite: Overwrite,
    /// New tensors of at least this many bytes go into a data file, if the model
    /// has one.
    pub min_external_bytes: usize,
    /// The largest model file to write; beyond, weights go into a data file. At
    /// most [`MAX_MODEL_BYTES`], the default.
    pub max_model_bytes: u64,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            external: ExternalData::Auto,
            overwrite: Overwrite::Refuse,
            min_external_bytes: 1024,
            max_model_bytes: MAX_MODEL_BYTES,
        }
    }
}

/// Why a model could not be written. Nothing is left behind then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The operating system's answer.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        r#source: io::Error,
    },
    /// The output has no file name.
    #[error("{path} names no file")]
    NoFileName {
        /// The output.
        path: PathBuf,
    },
    /// The output exists.
    #[error("{path} exists already (hint: choose another name, or replace it with --force)")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The output exists and is a directory or device.
    #[error("{path} exists and is not a regular file")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The output would replace what it is made from.
    #[error(
        "{path} is the input {input} itself, which is never overwritten (hint: choose another output name)"
    )]
    OutputIsInput {
        /// The output.
        path: PathBuf,
        /// The input file that it is.
        input: PathBuf,
    },
    /// Reuse was asked for, but the data file would not be found from there.
    #[error(
        "{path} cannot reuse the data files in {folder}: models find their data only below their own folder (hint: write into that folder, or copy the data)"
    )]
    ReuseElsewhere {
        /// The output.
        path: PathBuf,
        /// The folder of the data files.
        folder: PathBuf,
    },
    /// The model's structure alone exceeds the limit.
    #[error("{path} would exceed 2 GiB even with all weights in a data file")]
    TooLarge {
        /// The output.
        path: PathBuf,
    },
    /// An external tensor in a model that did not come from a file.
    #[error("tensor `{tensor}` refers to a data file, but the model was not read from a file")]
    NoSource {
        /// The tensor.
        tensor: String,
    },
    /// The name of the data file must be written into the model, as UTF-8.
    #[error("{path} needs a data file named after it, but its name is not UTF-8")]
    NameNotUtf8 {
        /// The output.
        path: PathBuf,
    },
    /// A source changed between reading and copying.
    #[error("{path} was changed or replaced while it was being copied")]
    SourceChanged {
        /// The input file.
        path: PathBuf,
    },
    /// A tensor of the model is malformed.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// A bug in this library.
    #[error("internal error: {0}")]
    Internal(&'static str),
}

impl WriteError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Something that the user should know about the written files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Note {
    /// Weights that were inline, or were to be, went into a data file.
    TooLargeForOneFile,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLargeForOneFile => f.write_str(
                "the model exceeds 2 GiB, the limit of one ONNX file: its weights are in a data file",
            ),
        }
    }
}

/// A model that is written completely, but has no name yet.
#[derive(Debug)]
#[must_use = "a staged model that is not published is gone"]
pub struct Staged {
    folder: OutputFolder,
    model: Target,
    data: Option<Target>,
    reused: Vec<PathBuf>,
    notes: Vec<Note>,
    overwrite: Overwrite,
    inputs: Vec<(FileIdentity, PathBuf)>,
}

#[derive(Debug)]
struct Target {
    name: OsString,
    scratch: Scratch,
    sync: Option<JoinHandle<io::Result<()>>>,
}

impl Target {
    /// Sets the disk to work on the complete file; [`Target::synced`] waits for it.
    /// In between the caller can verify the result, which costs about as long.
    fn start_sync(&mut self) -> io::Result<()> {
        let file = self.scratch.file().try_clone()?;
        let thread = std::thread::Builder::new().name("sync".into());
        self.sync = Some(thread.spawn(move || file.sync_all())?);
        Ok(())
    }

    /// Waits until the file's contents are durable.
    fn synced(&mut self) -> io::Result<()> {
        match self.sync.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            None | Some(Err(_)) => self.scratch.file().sync_all(),
        }
    }
}

/// Writes `model` to scratch files in the folder of `out`, and starts syncing them.
///
/// `source` is the file that the model came from: its external data is looked up
/// there, and weights that lie in its files are copied by the kernel. The bytes
/// written depend only on model, source and options.
///
/// # Errors
/// [`WriteError`]; nothing is left behind.
pub fn stage(
    model: &ModelProto,
    source: Option<&OnnxFile>,
    out: &Path,
    options: &WriteOptions,
) -> Result<Staged, WriteError> {
    let (folder_path, name) = split(out)?;
    let folder = OutputFolder::open(&folder_path)
        .map_err(|e| WriteError::io("open the folder", &folder_path, e))?;
    let mut data_name = name.to_owned();
    data_name.push("_data");

    // Encoding reads small fields from the map, which would be fatal if the file
    // had been truncated since: best noticed now.
    Sources::of(source).confirm_model()?;
    let layout = Planner {
        model,
        source,
        options,
        same_folder: is_source_folder(&folder_path, source),
        data_name: data_name.to_str(),
        out,
    }
    .plan()?;

    let inputs = inputs(source);
    let has_data = !layout.data.is_empty();
    let names = [Some(name), has_data.then_some(data_name.as_os_str())];
    for name in names.into_iter().flatten() {
        publish::admit(&folder, name, options.overwrite, &inputs)?;
    }
    // Again: planning may have mapped data files.
    let mut sources = Sources::of(source);
    let mut write = |name: &OsStr, pieces: &[pieces::Piece]| -> Result<Target, WriteError> {
        let path = folder.path().join(name);
        let scratch =
            Scratch::new(&folder, name).map_err(|e| WriteError::io("create", &path, e))?;
        sources.write(pieces, scratch.file(), &path)?;
        Ok(Target {
            name: name.to_owned(),
            scratch,
            sync: None,
        })
    };
    let mut data = if has_data {
        Some(write(&data_name, &layout.data)?)
    } else {
        None
    };
    let mut model = write(name, &layout.model)?;
    sources.confirm()?;
    for target in data.iter_mut().chain([&mut model]) {
        // Without a thread to spare, publishing syncs by itself.
        let _ = target.start_sync();
    }
    Ok(Staged {
        model,
        data,
        reused: layout.reused,
        notes: layout.notes,
        overwrite: options.overwrite,
        inputs,
        folder,
    })
}

/// Whether `out` could be written: what [`stage`] would refuse before it writes.
///
/// # Errors
/// [`WriteError`], as [`stage`] would give it.
pub fn check_output(
    source: Option<&OnnxFile>,
    out: &Path,
    options: &WriteOptions,
) -> Result<(), WriteError> {
    let (folder_path, name) = split(out)?;
    let folder = OutputFolder::open(&folder_path)
        .map_err(|e| WriteError::io("open the folder", &folder_path, e))?;
    publish::admit(&folder, name, options.overwrite, &inputs(source))
}

/// The folder and the file name of the output.
fn split(out: &Path) -> Result<(PathBuf, &OsStr), WriteError> {
    let no_name = || WriteError::NoFileName {
        path: out.to_owned(),
    };
    let name = out.file_name().ok_or_else(no_name)?;
    // `file_name` overlooks a trailing slash.
    if out.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(no_name());
    }
    let folder = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((folder, name))
}

/// Whether both are the same folder, however they are spelled.
fn is_source_folder(folder: &Path, source: Option<&OnnxFile>) -> bool {
    let identity = |path: &Path| {
        let metadata = path.metadata().ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let theirs = source.and_then(OnnxFile::folder).and_then(identity);
    theirs.is_some() && theirs == identity(folder)
}

/// The files that must not be replaced.
fn inputs(source: Option<&OnnxFile>) -> Vec<(FileIdentity, PathBuf)> {
    let Some(source) = source else {
        return Vec::new();
    };
    let model = source
        .source()
        .map(|s| (s.map.identity(), source.path().to_owned()));
    let folder = source.folder().unwrap_or(Path::new(""));
    let data = source
        .data_files_in_use()
        .into_iter()
        .map(|d| (d.map.identity(), folder.join(&d.location)));
    model.into_iter().chain(data).collect()
}
