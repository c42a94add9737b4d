//! Output folders, which are there as a whole or not at all.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use tempfile::Builder;

use crate::leftovers::{TemporaryFolder, unnamed};
use crate::onnx::write::Overwrite;

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
            scratch: TemporaryFolder::within(parent_folder(place), &hidden())?,
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

    /// Gives it its place. What was there goes once the new folder is in place; file systems that can let the two change
    /// places at once, and elsewhere it is set aside first, and put back on an error.
    ///
    /// # Errors
    /// Something cannot be renamed, or is there and not to be replaced ([`io::ErrorKind::AlreadyExists`]).
    pub fn publish(self, overwrite: Overwrite) -> io::Result<()> {
        let there = self.place.symlink_metadata().is_ok();
        let flags = match (there, overwrite) {
            (true, Overwrite::Force) => RenameFlags::EXCHANGE,
            // Something may come between the look and the renaming.
            _ => RenameFlags::NOREPLACE,
        };
        match rename_with(self.scratch.path(), &self.place, flags) {
            // What was there has the temporary name now, and goes with it.
            Ok(()) if there => match self.scratch.path().symlink_metadata()?.is_dir() {
                true => Ok(()),
                false => fs::remove_file(self.scratch.path()),
            },
            Ok(()) => {
                self.scratch.keep();
                Ok(())
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => self.publish_in_steps(overwrite),
            Err(error) => Err(error.into()),
        }
    }

    /// The same in more than one step.
    fn publish_in_steps(self, overwrite: Overwrite) -> io::Result<()> {
        let aside = match (self.place.symlink_metadata(), overwrite) {
            (Ok(_), Overwrite::Refuse) => return Err(io::ErrorKind::AlreadyExists.into()),
            // On no list of leftovers: it holds what was there before.
            (Ok(_), Overwrite::Force) => {
                let folder = hidden().tempdir_in(parent_folder(&self.place));
                let folder = folder.map_err(unnamed)?;
                fs::rename(&self.place, folder.path().join(OLD))?;
                Some(folder)
            }
            (Err(_), _) => None,
        };
        if let Err(error) = fs::rename(self.scratch.path(), &self.place) {
            let Some(aside) = aside else {
                return Err(error);
            };
            let old = aside.path().join(OLD);
            if fs::rename(&old, &self.place).is_err() {
                // Better a hidden folder left behind than what was there lost.
                let _ = aside.keep();
                let said = format!("{error}; what was there is now {}", old.display());
                return Err(io::Error::new(error.kind(), said));
            }
            return Err(error);
        }
        self.scratch.keep();
        Ok(())
    }
}

const OLD: &str = "old";

fn rename_with(from: &Path, to: &Path, flags: RenameFlags) -> Result<(), Errno> {
    rustix::fs::renameat_with(CWD, from, CWD, to, flags)
}

/// Hidden, and permitted as any folder: whoever uses it is often another user.
fn hidden() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    builder
        .prefix(".linfusion-")
        .permissions(Permissions::from_mode(0o777));
    builder
}

/// The folder that a path lies in: `.` for a name alone.
#[must_use]
pub fn parent_folder(path: &Path) -> &Path {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
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

    /// Both ways to publish.
    const WAYS: [fn(StagedFolder, Overwrite) -> io::Result<()>; 2] =
        [StagedFolder::publish, StagedFolder::publish_in_steps];

    #[test]
    fn a_folder_is_there_whole_or_not_at_all() {
        for publish in WAYS {
            let scratch = tempfile::tempdir().unwrap();
            let place = scratch.path().join("weights");
            for text in ["first", "second"] {
                let staged = StagedFolder::of(&place).unwrap();
                fs::write(staged.path().join("file"), text).unwrap();
                publish(staged, Overwrite::Force).unwrap();
                assert_eq!(fs::read_to_string(place.join("file")).unwrap(), text);
                assert_eq!(names(scratch.path()), ["weights"]);
            }
            let refused = publish(StagedFolder::of(&place).unwrap(), Overwrite::Refuse);
            assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::AlreadyExists);
            assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "second");
            let file = scratch.path().join("file");
            fs::write(&file, "x").unwrap();
            publish(StagedFolder::of(&file).unwrap(), Overwrite::Force).unwrap();
            assert_eq!(names(scratch.path()), ["file", "weights"]);
            fs::remove_dir(&file).unwrap();
            // As open as a folder that anybody else makes.
            let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
            let other = scratch.path().join("other");
            fs::create_dir(&other).unwrap();
            assert_eq!(mode(&place), mode(&other));
            drop(StagedFolder::of(&place).unwrap());
            assert_eq!(names(scratch.path()), ["other", "weights"]);
        }
    }

    #[test]
    fn what_was_there_is_put_back() {
        for publish in WAYS {
            let scratch = tempfile::tempdir().unwrap();
            let place = scratch.path().join("weights");
            fs::create_dir(&place).unwrap();
            fs::write(place.join("file"), "old").unwrap();
            let staged = StagedFolder::of(&place).unwrap();
            // Nothing is left that could be renamed.
            fs::remove_dir(staged.path()).unwrap();
            let error = publish(staged, Overwrite::Force).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
            assert_eq!(fs::read_to_string(place.join("file")).unwrap(), "old");
            assert_eq!(names(scratch.path()), ["weights"]);
        }
    }
}
