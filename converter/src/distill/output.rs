//! The checkpoint's folder, which is there as a whole or not at all.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use linfusion_models::checkpoint::CheckpointError;
use linfusion_models::checkpoint::write::{NewModule, write_folder};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::staged::{StagedFolder, parent_folder};
use linfusion_runtime::whole::check_place;

use super::error::DistillError;

/// Says at once what would be said after all the work.
///
/// # Errors
/// Something is in the output's place, or its parent takes no folder.
pub(super) fn check(place: &Path, overwrite: Overwrite) -> Result<(), DistillError> {
    admit(place, overwrite)?;
    let device = |path: &Path| path.metadata().map(|m| m.dev()).ok();
    if place.exists() && device(place) != device(parent_folder(place)) {
        let why = "it is a mount point, which cannot be replaced (hint: name a folder inside it)";
        return Err(failed(place)(io::Error::other(why)));
    }
    StagedFolder::of(place).map(drop).map_err(failed(place))
}

/// The same of a file.
///
/// # Errors
/// Something is in its place, or its folder takes none.
pub(super) fn check_file(place: &Path, overwrite: Overwrite) -> Result<(), DistillError> {
    check_place(place, overwrite).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => DistillError::Exists {
            path: place.to_owned(),
        },
        _ => failed(place)(error),
    })
}

/// Writes `modules` beside `place`.
///
/// # Errors
/// The disk is full, or a module's weights have not the sizes that it states.
pub(super) fn stage(place: &Path, modules: &[NewModule]) -> Result<StagedFolder, DistillError> {
    let folder = StagedFolder::of(place).map_err(failed(place))?;
    write_folder(folder.path(), modules).map_err(|error| match error {
        // Nobody asked for the folder that it is in so far.
        CheckpointError::Io { source, .. } => failed(place)(source),
        error => error.into(),
    })?;
    Ok(folder)
}

/// Gives the folder its name; what was there goes only when the new one is in place.
///
/// # Errors
/// The folder cannot be renamed, or something is in its place that is not to be replaced.
pub(super) fn publish(folder: StagedFolder, overwrite: Overwrite) -> Result<(), DistillError> {
    let place = folder.place().to_owned();
    admit(&place, overwrite)?;
    folder.publish(overwrite).map_err(failed(&place))
}

fn admit(place: &Path, overwrite: Overwrite) -> Result<(), DistillError> {
    match overwrite == Overwrite::Refuse && place.symlink_metadata().is_ok() {
        true => Err(DistillError::Exists {
            path: place.to_owned(),
        }),
        false => Ok(()),
    }
}

fn failed(place: &Path) -> impl FnOnce(io::Error) -> DistillError {
    let path = place.to_owned();
    |source| DistillError::Write { path, source }
}
