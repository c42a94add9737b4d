//! Temporary files and folders that a process would leave behind if a signal ended it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{Builder, TempDir};

static PATHS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn paths() -> MutexGuard<'static, Vec<PathBuf>> {
    PATHS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps a path on the list of what [`remove_all`] removes.
#[derive(Debug)]
#[must_use = "it is on the list for as long as this lives"]
pub struct Leftover {
    path: PathBuf,
}

impl Leftover {
    /// Puts a temporary file or folder on the list. It should live longer than what removes it or gives it its name.
    pub fn new(path: &Path) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        paths().push(path.clone());
        Self { path }
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        let mut paths = paths();
        if let Some(place) = paths.iter().position(|p| *p == self.path) {
            paths.swap_remove(place);
        }
    }
}

/// A temporary folder that is on the list for as long as it is there.
#[derive(Debug)]
pub struct TemporaryFolder {
    // Dropped in this order.
    folder: TempDir,
    _leftover: Leftover,
}

impl TemporaryFolder {
    /// Makes one where the system has temporary files.
    ///
    /// # Errors
    /// As for [`Self::within`].
    pub fn new() -> io::Result<Self> {
        Self::within(&std::env::temp_dir(), &Builder::new())
    }

    /// Makes one in `parent`, named and permitted as `builder` has it.
    ///
    /// # Errors
    /// What the operating system says; the folder's own name, which nobody asked for, is not in it.
    pub fn within(parent: &Path, builder: &Builder<'_, '_>) -> io::Result<Self> {
        let folder = builder.tempdir_in(parent).map_err(unnamed)?;
        Ok(Self {
            _leftover: Leftover::new(folder.path()),
            folder,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves what is there to the caller.
    pub fn keep(self) {
        let _ = self.folder.keep();
    }
}

/// What the operating system said of a temporary file, without that file's name, which means nothing to whoever asked for
/// another.
pub fn unnamed(error: io::Error) -> io::Error {
    // The crate tempfile keeps the operating system's error to itself, and adds the name to its text.
    let text = error.to_string();
    match text.rsplit_once(" at path \"") {
        Some((said, _)) => io::Error::new(error.kind(), said),
        None => error,
    }
}

/// Removes what is on the list. To be called, from an ordinary thread, right before the process exits on a signal.
pub fn remove_all() {
    for path in paths().drain(..) {
        // Nothing better can be done about a failure while exiting.
        let _ = match path.is_dir() {
            true => remove_busy(&path),
            false => std::fs::remove_file(&path),
        };
    }
}

/// Removes a folder, to which another thread may still be adding files.
fn remove_busy(folder: &Path) -> io::Result<()> {
    let mut removed = std::fs::remove_dir_all(folder);
    for _ in 0..100 {
        match &removed {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                removed = std::fs::remove_dir_all(folder);
            }
            _ => break,
        }
    }
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_folder_goes_and_is_not_named() {
        let scratch = tempfile::tempdir().unwrap();
        let builder = Builder::new();
        let folder = TemporaryFolder::within(scratch.path(), &builder).unwrap();
        assert!(paths().contains(&folder.path().to_owned()));
        let path = folder.path().to_owned();
        drop(folder);
        assert!(!path.exists() && !paths().contains(&path));
        let kept = TemporaryFolder::within(scratch.path(), &builder).unwrap();
        let path = kept.path().to_owned();
        kept.keep();
        assert!(path.exists() && !paths().contains(&path));
        let nowhere = scratch.path().join("nowhere");
        let error = TemporaryFolder::within(&nowhere, &builder).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(error.to_string(), "No such file or directory (os error 2)");
    }

    #[test]
    fn what_is_on_the_list_goes_and_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        let [file, folder, finished] =
            ["file", "folder", "finished"].map(|n| scratch.path().join(n));
        std::fs::create_dir(&folder).unwrap();
        for path in [&file, &folder.join("inside"), &finished] {
            std::fs::write(path, "x").unwrap();
        }
        let _listed = [Leftover::new(&file), Leftover::new(&folder)];
        drop(Leftover::new(&finished));
        remove_all();
        let left: Vec<_> = std::fs::read_dir(scratch.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
        assert!(finished.exists());
    }
}
