//! Small files that are there whole or not at all.

use std::io::{self, Write};
use std::path::Path;

use linfusion_models::leftovers::{Leftover, unnamed};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::staged::parent_folder;

/// Whether a file may be put there, before it is made: nothing is there that must not be replaced, and its folder takes files.
///
/// # Errors
/// What stands in the way; [`io::ErrorKind::AlreadyExists`] where `overwrite` alone does.
pub fn check_place(path: &Path, overwrite: Overwrite) -> io::Result<()> {
    replaceable(path)?;
    if overwrite == Overwrite::Refuse && path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let file = tempfile::tempfile_in(parent_folder(path));
    file.map(drop).map_err(unnamed)
}

/// Renaming would replace a device or a pipe by a file.
fn replaceable(path: &Path) -> io::Result<()> {
    match path.metadata() {
        Ok(there) if there.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
        Ok(there) if !there.is_file() => Err(io::Error::other("it is no regular file")),
        _ => Ok(()),
    }
}

/// Writes a file under another name and renames it, so that whoever looks sees all of it or what was there before.
///
/// # Errors
/// The folder is missing or full, or cannot be written to.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replaceable(path)?;
    let file = tempfile::NamedTempFile::new_in(parent_folder(path));
    let mut file = file.map_err(unnamed)?;
    let _leftover = Leftover::new(file.path());
    // Not by way of the temporary file, whose errors have its name.
    file.as_file_mut().write_all(bytes)?;
    file.as_file().sync_all()?;
    // What a program makes for its user is not for the user's eyes alone.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file()
            .set_permissions(std::fs::Permissions::from_mode(0o644))?;
    }
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_left_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        for text in ["first, and longer", "second"] {
            write_whole(&path, text.as_bytes()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        for overwrite in [Overwrite::Refuse, Overwrite::Force] {
            let error = check_place(Path::new("/dev/null"), overwrite).unwrap_err();
            assert_eq!(error.to_string(), "it is no regular file");
            let error = check_place(&folder.path().join("no/x.json"), overwrite).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
        check_place(&path, Overwrite::Force).unwrap();
        let error = check_place(&path, Overwrite::Refuse).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(folder.path().read_dir().unwrap().count(), 1);
        let error = write_whole(Path::new("/dev/null"), b"").unwrap_err();
        assert_eq!(error.to_string(), "it is no regular file");
        let error = write_whole(&folder.path().join("no/x.json"), b"").unwrap_err();
        assert_eq!(error.to_string(), "No such file or directory (os error 2)");
    }
}
