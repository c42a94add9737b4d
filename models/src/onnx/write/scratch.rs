//! Files that exist completely or not at all.
//!
//! A scratch file has no name where the file system allows it (`O_TMPFILE`), so
//! that even SIGKILL leaves nothing behind; elsewhere it has a hidden name, which
//! a registry remembers for [`clean_up_unfinished`].

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

/// The folder that results are written to, held by a handle so that it stays the
/// same folder whatever is renamed meanwhile.
#[derive(Clone, Debug)]
pub(super) struct OutputFolder {
    dir: Arc<OwnedFd>,
    path: PathBuf,
}

/// A file under construction.
#[derive(Debug)]
pub(super) struct Scratch {
    file: File,
    folder: OutputFolder,
    /// The hidden name, where the file has to have one.
    hidden: Option<OsString>,
}

/// Hidden names of files under construction, in this whole process.
static UNFINISHED: Mutex<Vec<(OutputFolder, OsString)>> = Mutex::new(Vec::new());

/// Removes what unfinished writes of this process would leave behind. To be called
/// (from an ordinary thread) before exiting on SIGINT or SIGTERM.
///
/// It waits for a publication in progress, which takes milliseconds, so that no
/// data file is left without its model.
pub fn clean_up_unfinished() {
    for (folder, name) in unfinished().drain(..) {
        // Nothing better can be done about a failure while exiting.
        let _ = rustix::fs::unlinkat(&*folder.dir, name, AtFlags::empty());
    }
}

/// The registry; holding it keeps [`clean_up_unfinished`] waiting.
pub(super) type Publication = MutexGuard<'static, Vec<(OutputFolder, OsString)>>;

pub(super) fn unfinished() -> Publication {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl OutputFolder {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        // Not O_PATH: the handle is also synced.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            dir: Arc::new(rustix::fs::openat(CWD, path, flags, Mode::empty())?),
            path: path.to_path_buf(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes renames and links in the folder durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        match rustix::fs::fsync(&*self.dir) {
            // Some network and FUSE file systems cannot sync a folder.
            Ok(()) | Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Moves the entry `name` to a new hidden name and returns that.
    pub(super) fn set_aside(&self, name: &OsStr) -> io::Result<OsString> {
        let aside = hidden_name(name, "old");
        self.rename(name, &aside, RenameFlags::NOREPLACE)?;
        Ok(aside)
    }

    /// Renames, and refuses to replace anything.
    pub(super) fn restore(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        self.rename(from, to, RenameFlags::NOREPLACE)
    }

    pub(super) fn remove(&self, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&*self.dir, name, AtFlags::empty())?)
    }

    fn rename(&self, from: &OsStr, to: &OsStr, flags: RenameFlags) -> io::Result<()> {
        match rustix::fs::renameat_with(&*self.dir, from, &*self.dir, to, flags) {
            // File systems without NOREPLACE: a link refuses to replace as well.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if !flags.is_empty() => {
                rustix::fs::linkat(&*self.dir, from, &*self.dir, to, AtFlags::empty())?;
                self.remove(from)
            }
            other => Ok(other?),
        }
    }
}

impl Scratch {
    /// A new empty file in `folder`, readable and writable, with the permissions
    /// that the process's umask leaves.
    pub(super) fn new(folder: &OutputFolder, for_name: &OsStr) -> io::Result<Self> {
        if let Some(file) = unnamed(folder)? {
            return Ok(Self {
                file,
                folder: folder.clone(),
                hidden: None,
            });
        }
        let hidden = hidden_name(for_name, "tmp");
        // Registered first: a signal between the two calls must find it.
        let mut registry = unfinished();
        registry.push((folder.clone(), hidden.clone()));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        match rustix::fs::openat(&*folder.dir, &hidden, flags, PERMISSIONS) {
            Ok(file) => Ok(Self {
                file: file.into(),
                folder: folder.clone(),
                hidden: Some(hidden),
            }),
            Err(error) => {
                forget(&mut registry, &hidden);
                Err(error.into())
            }
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name; fails if that name is taken.
    pub(super) fn place(&mut self, name: &OsStr, registry: &mut Publication) -> io::Result<()> {
        match self.hidden.take() {
            None => self.link(name),
            Some(hidden) => match self.folder.restore(&hidden, name) {
                Ok(()) => {
                    forget(registry, &hidden);
                    Ok(())
                }
                Err(error) => {
                    self.hidden = Some(hidden);
                    Err(error)
                }
            },
        }
    }

    /// Gives the file its name, atomically replacing what has it now.
    pub(super) fn place_over(
        &mut self,
        name: &OsStr,
        registry: &mut Publication,
    ) -> io::Result<()> {
        let hidden = match self.hidden.take() {
            Some(hidden) => hidden,
            // A link cannot replace, so the file gets a hidden name on the way.
            None => {
                let hidden = hidden_name(name, "tmp");
                self.link(&hidden)?;
                registry.push((self.folder.clone(), hidden.clone()));
                hidden
            }
        };
        match self.folder.rename(&hidden, name, RenameFlags::empty()) {
            Ok(()) => {
                forget(registry, &hidden);
                Ok(())
            }
            Err(error) => {
                self.hidden = Some(hidden);
                Err(error)
            }
        }
    }

    fn link(&self, name: &OsStr) -> io::Result<()> {
        let this = descriptor_path(&self.file);
        rustix::fs::linkat(CWD, this, &*self.folder.dir, name, AtFlags::SYMLINK_FOLLOW)?;
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Some(hidden) = self.hidden.take() {
            forget(&mut unfinished(), &hidden);
            let _ = self.folder.remove(&hidden);
        }
    }
}

const PERMISSIONS: Mode = Mode::from_raw_mode(0o666);

/// `None` where the file system, or a missing `/proc`, rules out unnamed files.
fn unnamed(folder: &OutputFolder) -> io::Result<Option<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::openat(&*folder.dir, ".", flags, PERMISSIONS) {
        Ok(file) => {
            let file = File::from(file);
            Ok(Path::new(&descriptor_path(&file)).exists().then_some(file))
        }
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL | Errno::NOSYS) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn descriptor_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// A name that no other process picks: process, time and a counter are in it.
fn hidden_name(name: &OsStr, suffix: &str) -> OsString {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    let nanos = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |t| t.subsec_nanos());
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}-{nanos}-{count}.{suffix}", std::process::id()));
    hidden
}

fn forget(registry: &mut Publication, hidden: &OsStr) {
    registry.retain(|(_, name)| name != hidden);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// What [`Scratch::new`] gives where files cannot be unnamed.
    fn named(folder: &OutputFolder) -> Scratch {
        let mut scratch = Scratch::new(folder, OsStr::new("out")).unwrap();
        if scratch.hidden.is_none() {
            let hidden = hidden_name(OsStr::new("out"), "tmp");
            scratch.link(&hidden).unwrap();
            unfinished().push((folder.clone(), hidden.clone()));
            scratch.hidden = Some(hidden);
        }
        scratch.file().write_all(b"new").unwrap();
        scratch
    }

    fn count(dir: &Path) -> usize {
        std::fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn files_with_a_hidden_name_behave_like_those_without() {
        let dir = tempfile::tempdir().unwrap();
        let folder = OutputFolder::open(dir.path()).unwrap();
        let out = dir.path().join("out");

        drop(named(&folder));
        assert_eq!(count(dir.path()), 0, "dropped");

        named(&folder)
            .place(OsStr::new("out"), &mut unfinished())
            .unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"new");
        std::fs::write(&out, "old").unwrap();
        let taken = named(&folder).place(OsStr::new("out"), &mut unfinished());
        assert_eq!(taken.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&out).unwrap(), b"old");
        named(&folder)
            .place_over(OsStr::new("out"), &mut unfinished())
            .unwrap();
        assert_eq!(std::fs::read(&out).unwrap(), b"new");
        assert_eq!(count(dir.path()), 1);
        let left = unfinished().iter().any(|(f, _)| f.path == dir.path());
        assert!(!left, "the registry forgets what is finished");
    }

    #[test]
    fn an_unnamed_file_replaces_atomically() {
        let dir = tempfile::tempdir().unwrap();
        let folder = OutputFolder::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("out"), "old").unwrap();
        let mut scratch = Scratch::new(&folder, OsStr::new("out")).unwrap();
        scratch.file().write_all(b"new").unwrap();
        scratch
            .place_over(OsStr::new("out"), &mut unfinished())
            .unwrap();
        assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), b"new");
        assert_eq!(count(dir.path()), 1);
    }
}
