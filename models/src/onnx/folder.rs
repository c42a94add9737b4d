//! Which files a model may pull in as external data.
//!
//! A model file names its data files itself, so the names are untrusted input: a
//! downloaded model must not make us read `/etc/shadow` into its weights. Names
//! are therefore resolved by the kernel below a directory handle and never
//! compared as strings. Rules, in order:
//!
//! 1. The location is relative and has no `..`.
//! 2. It resolves below the folder that the model was opened in; symbolic links
//!    that stay inside that folder are fine.
//! 3. Otherwise its last component may be one symbolic link into the folder where
//!    the model file itself really lies. The Hugging Face cache is built so: both
//!    `snapshots/<rev>/model.onnx` and its data link into `../../blobs/`.
//! 4. What is found is a regular file with a single hard link.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Why a data file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataFileError {
    /// The location is no relative path below the model's folder.
    #[error("its data file `{location}` is not allowed: {reason}")]
    Location {
        /// The location as written in the model.
        location: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A symbolic link leads out of the model's folder.
    #[error(
        "its data file `{location}` is a symbolic link that leads out of the model's folder (hint: put the file itself beside the model)"
    )]
    Escapes {
        /// The location as written in the model.
        location: String,
    },
    /// The file does not exist.
    #[error(
        "its data file `{location}` is missing from {folder} (hint: both files belong together; was only the .onnx file downloaded?)"
    )]
    Missing {
        /// The location as written in the model.
        location: String,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A directory, FIFO, socket or device.
    #[error("its data file `{location}` is not a regular file")]
    NotRegular {
        /// The location as written in the model.
        location: String,
    },
    /// A hard link, which can be a file from anywhere on the same disk.
    #[error(
        "its data file `{location}` has {links} hard links; such a file may belong elsewhere (hint: replace it by a copy)"
    )]
    HardLinked {
        /// The location as written in the model.
        location: String,
        /// The number of names that the file has.
        links: u64,
    },
    /// The file changed after it was first read.
    #[error("its data file `{location}` was changed or replaced while it was being read")]
    Changed {
        /// The location as written in the model.
        location: String,
    },
    /// The model was read from memory, without a folder to look in.
    #[error(
        "its data file `{location}` cannot be looked up: the model was read from memory, without a folder"
    )]
    NoFolder {
        /// The location as written in the model.
        location: String,
    },
    /// The operating system's answer.
    #[error("its data file `{location}` cannot be read: {source}")]
    Io {
        /// The location as written in the model.
        location: String,
        /// The operating system's answer.
        r#source: io::Error,
    },
}

/// How a data file was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Below the folder that the model was opened in.
    Below,
    /// By a link into the folder where the model file really lies.
    Home,
}

/// The folder of a model: where its data files may lie.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    dir: OwnedFd,
    /// The folder of the model file itself, when the model was opened by a link.
    home: Option<(PathBuf, OwnedFd)>,
}

impl Folder {
    /// The folder that `model` (a path to an existing file) lies in.
    pub(super) fn of_model(model: &Path) -> io::Result<Self> {
        let path = match model.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        let dir = open_dir(&path)?;
        let home = if model.is_symlink() {
            match model.canonicalize()?.parent() {
                Some(home) => Some((home.to_path_buf(), open_dir(home)?)),
                None => None,
            }
        } else {
            None
        };
        Ok(Self { path, dir, home })
    }

    /// A folder that data files may lie in, for a model that is no file of its own.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_path_buf(),
            dir: open_dir(path)?,
            home: None,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the data file that a model in this folder calls `location`.
    pub(super) fn open(&self, location: &str) -> Result<(File, Route), DataFileError> {
        let parts = split(location)?;
        let relative: PathBuf = parts.iter().collect();
        match open_below(&self.dir, &relative, ResolveFlags::BENEATH) {
            Ok(file) => Ok((self.admit(file, location)?, Route::Below)),
            Err(Errno::XDEV | Errno::LOOP) => self.open_at_home(location, &relative),
            Err(error) => Err(self.failed(location, error)),
        }
    }

    /// Rule 3: the one hop that the Hugging Face cache needs.
    fn open_at_home(
        &self,
        location: &str,
        relative: &Path,
    ) -> Result<(File, Route), DataFileError> {
        let escapes = || DataFileError::Escapes {
            location: location.to_owned(),
        };
        let (home, home_dir) = self.home.as_ref().ok_or_else(escapes)?;
        let target =
            rustix::fs::readlinkat(&self.dir, relative, Vec::new()).map_err(|_| escapes())?;
        let target = Path::new(OsStr::from_bytes(target.as_bytes()));
        let from = self.path.join(relative);
        let target = match from.parent() {
            Some(parent) => parent.join(target),
            None => return Err(escapes()),
        };
        let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(escapes());
        };
        if folder.canonicalize().ok().as_deref() != Some(home) {
            return Err(escapes());
        }
        // The check above only chooses the message: what is opened is named
        // relative to the handle of the model's real folder.
        let flags = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match open_below(home_dir, Path::new(name), flags) {
            Ok(file) => Ok((self.admit(file, location)?, Route::Home)),
            Err(Errno::LOOP | Errno::XDEV) => Err(escapes()),
            Err(error) => Err(self.failed(location, error)),
        }
    }

    /// Rule 4.
    fn admit(&self, file: OwnedFd, location: &str) -> Result<File, DataFileError> {
        let file = File::from(file);
        let metadata = file.metadata().map_err(|source| DataFileError::Io {
            location: location.to_owned(),
            source,
        })?;
        if !metadata.is_file() {
            return Err(DataFileError::NotRegular {
                location: location.to_owned(),
            });
        }
        if metadata.nlink() > 1 {
            return Err(DataFileError::HardLinked {
                location: location.to_owned(),
                links: metadata.nlink(),
            });
        }
        Ok(file)
    }

    fn failed(&self, location: &str, error: Errno) -> DataFileError {
        let location = location.to_owned();
        match error {
            Errno::NOENT | Errno::NOTDIR => DataFileError::Missing {
                location,
                folder: self.path.clone(),
            },
            // A socket, or a FIFO or device that cannot be opened this way.
            Errno::NXIO | Errno::NODEV | Errno::ISDIR => DataFileError::NotRegular { location },
            error => DataFileError::Io {
                location,
                source: error.into(),
            },
        }
    }
}

/// Rule 1. `.` components are dropped; torch and optimum write plain names.
fn split(location: &str) -> Result<Vec<&OsStr>, DataFileError> {
    let refuse = |reason| {
        Err(DataFileError::Location {
            location: location.to_owned(),
            reason,
        })
    };
    if location.contains('\0') {
        return refuse("it contains a NUL character");
    }
    let mut parts = Vec::new();
    for component in Path::new(location).components() {
        match component {
            Component::Normal(part) => parts.push(part),
            Component::CurDir => {}
            Component::ParentDir => return refuse("it contains `..`"),
            Component::RootDir | Component::Prefix(_) => return refuse("it is an absolute path"),
        }
    }
    // A trailing slash or dot names a folder, which `components` would forget.
    if parts.is_empty() || location.ends_with('/') || location.ends_with("/.") {
        return refuse("it names no file");
    }
    Ok(parts)
}

fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

/// `NONBLOCK`, so that a FIFO cannot make us wait for its writer.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

fn open_below(dir: &OwnedFd, relative: &Path, resolve: ResolveFlags) -> Result<OwnedFd, Errno> {
    let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
    // The kernel answers EAGAIN when something below was renamed meanwhile.
    for _ in 0..8 {
        match rustix::fs::openat2(dir, relative, READ, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            // Linux before 5.6, and old container sandboxes.
            Err(Errno::NOSYS | Errno::PERM) => return open_without_links(dir, relative),
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// What `openat2` does, for kernels without it: no symbolic link at any step.
fn open_without_links(dir: &OwnedFd, relative: &Path) -> Result<OwnedFd, Errno> {
    let mut parts: Vec<&OsStr> = relative.iter().collect();
    let Some(name) = parts.pop() else {
        return Err(Errno::NOENT);
    };
    let step = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut at = rustix::io::fcntl_dupfd_cloexec(dir, 0)?;
    for part in parts {
        at = rustix::fs::openat(at.as_fd(), part, step, Mode::empty())?;
    }
    rustix::fs::openat(at, name, READ | OFlags::NOFOLLOW, Mode::empty())
}
