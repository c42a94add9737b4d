//! The folder of a repository: made beside its place, then put there whole.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use linfusion_models::leftovers::TemporaryFolder;
use tempfile::TempDir;

use super::error::TritonError;

/// What to do if there is a repository already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Existing {
    /// Refuse to write.
    #[default]
    Refuse,
    /// Replace it, if it is a model repository.
    Replace,
}

/// A repository that is not in its place yet; dropped, it leaves nothing behind.
pub struct Unfinished {
    place: PathBuf,
    existing: Existing,
    scratch: TemporaryFolder,
}

impl Unfinished {
    /// Begins a repository that is to be `place`.
    ///
    /// # Errors
    /// Something is there that must not be replaced, or the folder around it cannot be written to.
    pub fn begin(place: &Path, existing: Existing) -> Result<Self, TritonError> {
        admit(place, existing)?;
        let around = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Ok(Self {
            place: place.to_owned(),
            existing,
            scratch: TemporaryFolder::within(around, &hidden())
                .map_err(TritonError::io("create a folder in", around))?,
        })
    }

    /// Where its files go until then.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// Puts it in its place. What was there is set aside first, and put back on an error.
    ///
    /// # Errors
    /// As for [`Self::begin`].
    pub fn publish(self) -> Result<(), TritonError> {
        admit(&self.place, self.existing)?;
        let rename =
            |from: &Path, to: &Path| fs::rename(from, to).map_err(TritonError::io("rename to", to));
        let around = self.scratch.path().parent().unwrap_or(Path::new("."));
        let aside = match self.place.exists() {
            true => {
                // On no list of leftovers: it holds what was there before.
                let folder: TempDir = hidden()
                    .tempdir_in(around)
                    .map_err(TritonError::io("create a folder in", around))?;
                rename(&self.place, &folder.path().join("old"))?;
                Some(folder)
            }
            false => None,
        };
        let placed = rename(self.scratch.path(), &self.place);
        match (placed, aside) {
            (Ok(()), _) => {
                // Its old name is gone; nothing is left to remove.
                self.scratch.keep();
                Ok(())
            }
            (Err(error), Some(folder)) => {
                if rename(&folder.path().join("old"), &self.place).is_err() {
                    // Better a hidden folder left behind than a repository lost.
                    let _ = folder.keep();
                }
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }
}

/// A hidden folder with the permissions of an ordinary one: a server is often another user.
fn hidden() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder
        .prefix(".linfusion-triton-")
        .permissions(Permissions::from_mode(0o777));
    builder
}

fn admit(place: &Path, existing: Existing) -> Result<(), TritonError> {
    if fs::symlink_metadata(place).is_err() {
        return Ok(());
    }
    if existing == Existing::Refuse {
        return Err(TritonError::Exists {
            path: place.to_owned(),
        });
    }
    let foreign = |found: String| TritonError::NotARepository {
        path: place.to_owned(),
        found,
    };
    let entries = fs::read_dir(place).map_err(|e| foreign(e.to_string()))?;
    for entry in entries {
        let path = entry.map_err(TritonError::io("read", place))?.path();
        if !path.join("config.pbtxt").is_file() {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Err(foreign(format!(
                "`{name}` in it is no folder with a config.pbtxt"
            )));
        }
    }
    Ok(())
}
