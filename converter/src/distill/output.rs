//! The checkpoint's folder, which is there as a whole or not at all.

use std::path::{Path, PathBuf};

use linfusion_models::checkpoint::write::{NewModule, write_folder};
use linfusion_models::leftovers::Leftover;
use linfusion_models::onnx::write::Overwrite;
use tempfile::TempDir;

use super::error::DistillError;

/// A new folder beside its place.
pub(super) struct Staged {
    folder: TempDir,
    _leftover: Leftover,
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

fn scratch_beside(place: &Path) -> Result<TempDir, DistillError> {
    let parent = place.parent().filter(|p| !p.as_os_str().is_empty());
    tempfile::Builder::new()
        .prefix(".linfusion-distill-")
        .tempdir_in(parent.unwrap_or(Path::new(".")))
        .map_err(|source| DistillError::Write {
            path: place.to_owned(),
            source,
        })
}

/// Writes `modules` beside `place`.
///
/// # Errors
/// The disk is full, or a module's weights have not the sizes that it states.
pub(super) fn stage(place: &Path, modules: &[NewModule]) -> Result<Staged, DistillError> {
    let folder = scratch_beside(place)?;
    let leftover = Leftover::new(folder.path());
    write_folder(folder.path(), modules)?;
    Ok(Staged {
        _leftover: leftover,
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
        let aside = scratch_beside(&self.place)?;
        let old = aside.path().join("old");
        if there {
            std::fs::rename(&self.place, &old).map_err(failed)?;
        }
        let made = self.folder.keep();
        open_to_others(&made).map_err(failed)?;
        if let Err(error) = std::fs::rename(&made, &self.place) {
            if there {
                std::fs::rename(&old, &self.place).map_err(failed)?;
            }
            // The first error is the one to tell.
            let _ = std::fs::remove_dir_all(&made);
            return Err(failed(error));
        }
        Ok(())
    }
}

/// Folders for temporary files are closed to others; the result is as any folder.
fn open_to_others(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))
}
