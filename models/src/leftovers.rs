//! Temporary files and folders that a process would leave behind if a signal ended it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// Removes what is on the list. To be called, from an ordinary thread, right before the process exits on a signal.
pub fn remove_all() {
    for path in paths().drain(..) {
        // Nothing better can be done about a failure while exiting.
        let _ = match path.is_dir() {
            true => std::fs::remove_dir_all(&path),
            false => std::fs::remove_file(&path),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
