//! The folder of a repository: made beside its place, then put there whole.

use std::fs;
use std::path::Path;

use linfusion_models::onnx::write::Overwrite;
use linfusion_models::staged::{StagedFolder, parent_folder};

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
    existing: Existing,
    folder: StagedFolder,
}

impl Unfinished {
    /// Begins a repository that is to be `place`.
    ///
    /// # Errors
    /// Something is there that must not be replaced, or the folder around it cannot be written to.
    pub fn begin(place: &Path, existing: Existing) -> Result<Self, TritonError> {
        admit(place, existing)?;
        let folder = StagedFolder::of(place);
        Ok(Self {
            existing,
            folder: folder.map_err(TritonError::io("create a folder in", parent_folder(place)))?,
        })
    }

    /// Where its files go until then.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Puts it in its place.
    ///
    /// # Errors
    /// As for [`Self::begin`].
    pub fn publish(self) -> Result<(), TritonError> {
        let place = self.folder.place().to_owned();
        admit(&place, self.existing)?;
        let overwrite = match self.existing {
            Existing::Refuse => Overwrite::Refuse,
            Existing::Replace => Overwrite::Force,
        };
        self.folder
            .publish(overwrite)
            .map_err(TritonError::io("rename to", &place))
    }
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
