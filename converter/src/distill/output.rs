//! The checkpoint's folder, which is there as a whole or not at all.

use std::path::{Path, PathBuf};

use linfusion_models::checkpoint::write::{NewModule, write_folder};
use linfusion_models::leftovers::{TemporaryFolder, unnamed};
use linfusion_models::onnx::write::Overwrite;

use super::error::DistillError;

/// A new folder beside its place.
pub(super) struct Staged {
    folder: TemporaryFolder,
    place: PathBuf,
}

/// Says at once what would be said after all the work.
///
/// # Errors
/// Something is in the output's place, or its parent takes no folder.
pub(super) fn check(place: &Path, overwrite: Overwrite) -> Result<(), DistillError> {
    if overwrite == Overwrite::Refuse && place.symlink_metadata().is_ok() {
        return Err(DistillError::Exists {
            path: place.to_owned(),
        });
    }
    scratch_beside(place).map(drop)
}

/// # Errors
/// The folder of a file that is to be written takes none.
pub(super) fn check_file(place: &Path) -> Result<(), DistillError> {
    let found = match place.is_dir() {
        true => Err(std::io::Error::from(std::io::ErrorKind::IsADirectory)),
        false => tempfile::tempfile_in(around(place)).map(drop),
    };
    found.map_err(|source| DistillError::Write {
        path: place.to_owned(),
        source,
    })
}

fn scratch_beside(place: &Path) -> Result<TemporaryFolder, DistillError> {
    TemporaryFolder::within(around(place), &hidden()).map_err(|source| DistillError::Write {
        path: place.to_owned(),
        source,
    })
}

fn around(place: &Path) -> &Path {
    let parent = place.parent().filter(|p| !p.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

fn hidden() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".linfusion-distill-");
    builder
}

/// Writes `modules` beside `place`.
///
/// # Errors
/// The disk is full, or a module's weights have not the sizes that it states.
pub(super) fn stage(place: &Path, modules: &[NewModule]) -> Result<Staged, DistillError> {
    let folder = scratch_beside(place)?;
    write_folder(folder.path(), modules)?;
    Ok(Staged {
        folder,
        place: place.to_owned(),
    })
}

impl Staged {
    /// Where it is until it is published.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Gives the folder its name; what was there goes only when the new one is in place.
    ///
    /// # Errors
    /// The folder cannot be renamed, or something is in its place that is not to be replaced.
    pub fn publish(self, overwrite: Overwrite) -> Result<(), DistillError> {
        let failed = |source| DistillError::Write {
            path: self.place.clone(),
            source,
        };
        let there = self.place.symlink_metadata().is_ok();
        if there && overwrite == Overwrite::Refuse {
            return Err(DistillError::Exists { path: self.place });
        }
        // Under a folder of its own, so that an error on the way leaves the old one to be put back.
        // On no list of leftovers: it holds what was there before.
        let aside = hidden().tempdir_in(around(&self.place));
        let aside = aside.map_err(|error| failed(unnamed(error)))?;
        let old = aside.path().join("old");
        if there {
            std::fs::rename(&self.place, &old).map_err(failed)?;
        }
        let made = self.folder.path();
        let published = open_to_others(made).and_then(|()| std::fs::rename(made, &self.place));
        if let Err(error) = published {
            if there && std::fs::rename(&old, &self.place).is_err() {
                // Better a hidden folder left behind than a checkpoint lost.
                let _ = aside.keep();
            }
            return Err(failed(error));
        }
        // Its old name is gone; nothing is left to remove.
        self.folder.keep();
        Ok(())
    }
}

/// Folders for temporary files are closed to others; the result is as any folder.
fn open_to_others(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))
}
