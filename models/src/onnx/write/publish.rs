//! Giving staged files their names.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use super::scratch::{OutputFolder, unfinished};
use super::{Note, Overwrite, Staged, WriteError};
use crate::onnx::map::FileIdentity;
use crate::onnx::{OnnxFile, ReadError};

/// The files of a written model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The model file.
    pub model: PathBuf,
    /// The data file that was written for it.
    pub data: Option<PathBuf>,
    /// Data files of the input that the model goes on using.
    pub reused: Vec<PathBuf>,
    /// What the user should know.
    pub notes: Vec<Note>,
}

impl Published {
    /// Every file beside the model that must be kept with it.
    pub fn companions(&self) -> impl Iterator<Item = &Path> {
        let files = self.reused.iter().chain(&self.data);
        files.map(PathBuf::as_path)
    }
}

impl Staged {
    /// The staged model, decoded, with its data files resolved as they will be once
    /// it is published.
    ///
    /// # Errors
    /// [`ReadError`], which would be a bug in what was written.
    pub fn open(&self) -> Result<OnnxFile, ReadError> {
        let data = self.data.as_ref();
        OnnxFile::open_scratch(
            self.model.scratch.file(),
            &self.folder.path().join(&self.model.name),
            data.and_then(|d| Some((d.name.to_str()?, d.scratch.file()))),
        )
    }

    /// The name that the model will have.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join(&self.model.name)
    }

    /// Notes for the user, as they will be in [`Published`].
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Names the files: the data file first, the model last, so that a model is
    /// never there without its data.
    ///
    /// Of a model and data file that are both replaced, the old ones are set aside
    /// under hidden names first and put back on an error: at no time does an old
    /// model see new data.
    ///
    /// # Errors
    /// [`WriteError`]; the folder is then as it was before.
    pub fn publish(mut self) -> Result<Published, WriteError> {
        let mut registry = unfinished();
        let targets = self.data.iter().chain([&self.model]);
        for name in targets.map(|t| t.name.as_os_str()) {
            admit(&self.folder, name, self.overwrite, &self.inputs)?;
        }
        let mut undo = Undo::new(&self.folder);
        if let Some(data) = &mut self.data {
            if self.overwrite == Overwrite::Force {
                undo.set_aside(&self.model.name)?;
                undo.set_aside(&data.name)?;
            }
            let placed = data.scratch.place(&data.name, &mut registry);
            placed.map_err(|e| naming(&self.folder, &data.name, e))?;
            undo.created.push(data.name.clone());
            sync(&self.folder)?;
        }
        let model = &mut self.model;
        let placed = match (self.overwrite, &self.data) {
            (Overwrite::Force, None) => model.scratch.place_over(&model.name, &mut registry),
            _ => model.scratch.place(&model.name, &mut registry),
        };
        placed.map_err(|e| naming(&self.folder, &model.name, e))?;
        if self.data.is_some() {
            undo.created.push(model.name.clone());
        }
        sync(&self.folder)?;
        undo.keep();
        let path = |name: &OsString| self.folder.path().join(name);
        Ok(Published {
            model: path(&self.model.name),
            data: self.data.as_ref().map(|d| path(&d.name)),
            reused: std::mem::take(&mut self.reused),
            notes: std::mem::take(&mut self.notes),
        })
    }
}

/// Whether an output may have this name.
pub(super) fn admit(
    folder: &OutputFolder,
    name: &OsStr,
    overwrite: Overwrite,
    inputs: &[(FileIdentity, PathBuf)],
) -> Result<(), WriteError> {
    let path = folder.path().join(name);
    // Followed, so that a link to the input counts as the input.
    if let Ok(metadata) = path.metadata() {
        let identity = FileIdentity::of(&metadata);
        if let Some((_, input)) = inputs.iter().find(|(i, _)| i.same_file(&identity)) {
            return Err(WriteError::OutputIsInput {
                path,
                input: input.clone(),
            });
        }
        if !metadata.is_file() {
            return Err(WriteError::NotAFile { path });
        }
    }
    match (path.symlink_metadata(), overwrite) {
        (Ok(_), Overwrite::Refuse) => Err(WriteError::Exists { path }),
        (Err(error), _) if error.kind() != io::ErrorKind::NotFound => {
            Err(WriteError::io("look at", &path, error))
        }
        _ => Ok(()),
    }
}

fn naming(folder: &OutputFolder, name: &OsStr, error: io::Error) -> WriteError {
    let path = folder.path().join(name);
    if error.kind() == io::ErrorKind::AlreadyExists {
        WriteError::Exists { path }
    } else {
        WriteError::io("create", &path, error)
    }
}

fn sync(folder: &OutputFolder) -> Result<(), WriteError> {
    let synced = folder.sync();
    synced.map_err(|e| WriteError::io("sync the folder", folder.path(), e))
}

/// What was done so far; undone on drop, unless kept.
struct Undo {
    folder: OutputFolder,
    created: Vec<OsString>,
    /// Original name and hidden name.
    aside: Vec<(OsString, OsString)>,
}

impl Undo {
    fn new(folder: &OutputFolder) -> Self {
        Self {
            folder: folder.clone(),
            created: Vec::new(),
            aside: Vec::new(),
        }
    }

    fn set_aside(&mut self, name: &OsStr) -> Result<(), WriteError> {
        match self.folder.set_aside(name) {
            Ok(hidden) => {
                self.aside.push((name.to_owned(), hidden));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(WriteError::io(
                "replace",
                &self.folder.path().join(name),
                error,
            )),
        }
    }

    /// The new files are in place: the old ones go.
    fn keep(mut self) {
        self.created.clear();
        for (_, hidden) in self.aside.drain(..) {
            // The result is complete; a leftover hidden file does not spoil it.
            let _ = self.folder.remove(&hidden);
        }
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        // Best effort: there is already an error to report.
        for name in self.created.drain(..).rev() {
            let _ = self.folder.remove(&name);
        }
        for (name, hidden) in self.aside.drain(..).rev() {
            let _ = self.folder.restore(&hidden, &name);
        }
    }
}
