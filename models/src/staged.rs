//! Output folders, which are there as a whole or not at all.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::Builder;

use crate::leftovers::{TemporaryFolder, unnamed};

/// A hidden folder beside the place that it is to have; dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct StagedFolder {
    scratch: TemporaryFolder,
    place: PathBuf,
}

impl StagedFolder {
    /// Begins the folder that is to be `place`.
    ///
    /// # Errors
    /// The folder around `place` takes none.
    pub fn of(place: &Path) -> io::Result<Self> {
        Ok(Self {
            scratch: TemporaryFolder::within(around(place), &hidden())?,
            place: place.to_owned(),
        })
    }

    /// Where its files go until it is published.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// Where it will be.
    #[must_use]
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Gives it its place. What is there is set aside, goes once the new folder is in place, and is put back on an error:
    /// whether it may be replaced is for the caller to know.
    ///
    /// # Errors
    /// Something cannot be renamed.
    pub fn publish(self) -> io::Result<()> {
        let aside = match self.place.symlink_metadata().is_ok() {
            // On no list of leftovers: it holds what was there before.
            true => {
                let folder = hidden().tempdir_in(around(&self.place)).map_err(unnamed)?;
                fs::rename(&self.place, folder.path().join(OLD))?;
                Some(folder)
            }
            false => None,
        };
        if let Err(error) = fs::rename(self.scratch.path(), &self.place) {
            if let Some(folder) = aside
                && fs::rename(folder.path().join(OLD), &self.place).is_err()
            {
                // Better a hidden folder left behind than what was there lost.
                let _ = folder.keep();
            }
            return Err(error);
        }
        // Its old name is gone; nothing is left to remove.
        self.scratch.keep();
        Ok(())
    }
}

const OLD: &str = "old";

/// Hidden, and permitted as any folder: whoever uses it is often another user.
fn hidden() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder
        .prefix(".linfusion-")
        .permissions(Permissions::from_mode(0o777));
    builder
}

/// The folder that a path lies in.
#[must_use]
pub fn around(place: &Path) -> &Path {
    let parent = place.parent().filter(|p| !p.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("weights");
        for text in ["first", "second"] {
            let staged = StagedFolder::of(&place).unwrap();
            fs::write(staged.path().join("file"), text).unwrap();
            staged.publish().unwrap();
            assert_eq!(fs::read_to_string(place.join("file")).unwrap(), text);
            assert_eq!(names(scratch.path()), ["weights"]);
        }
        // As open as a folder that anybody else makes.
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        let other = scratch.path().join("other");
        fs::create_dir(&other).unwrap();
        assert_eq!(mode(&place), mode(&other));
        drop(StagedFolder::of(&place).unwrap());
        assert_eq!(names(scratch.path()), ["other", "weights"]);
    }

    #[test]
    fn what_was_there_is_put_back() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("weights");
        fs::create_dir(&place).unwrap();
        fs::write(place.join("file"), "old").unwrap();
        let staged = StagedFolder::of(&place).unwrap();
        // Nothing is left that could be renamed.
        fs::remove_dir(staged.path()).unwrap();
        let error = staged.publish().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "old");
        assert_eq!(names(scratch.path()), ["weights"]);
    }
}
