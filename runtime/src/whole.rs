//! Small files that are there whole or not at all.

use std::io::{self, Write};
use std::path::Path;

use linfusion_models::leftovers::{Leftover, unnamed};
use linfusion_models::staged::parent_folder;

/// Writes a file under another name and renames it, so that whoever looks sees all of it or what was there before.
///
/// # Errors
/// The folder is missing or full, or cannot be written to.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Renaming would replace a device or a pipe by a file.
    if path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir()) {
        return Err(io::Error::other("it is no regular file"));
    }
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
        let error = write_whole(Path::new("/dev/null"), b"").unwrap_err();
        assert_eq!(error.to_string(), "it is no regular file");
        let error = write_whole(&folder.path().join("no/x.json"), b"").unwrap_err();
        assert_eq!(error.to_string(), "No such file or directory (os error 2)");
    }
}
