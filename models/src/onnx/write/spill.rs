//! New tensors on their way to the output: in a nameless file and not in memory,
//! since a whole SDXL's are more than a gigabyte.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;

use super::super::map::MappedFile;

/// A nameless file that collects tensors' bytes and gives them back as slices of
/// one memory map.
#[derive(Debug)]
pub struct Spill {
    file: File,
    end: usize,
    tensors: Vec<Range<usize>>,
}

impl Spill {
    /// An empty spill in `folder`.
    ///
    /// # Errors
    /// No file can be made there.
    pub fn new(folder: &Path) -> io::Result<Self> {
        Ok(Self {
            file: tempfile::tempfile_in(folder)?,
            end: 0,
            tensors: Vec::new(),
        })
    }

    /// Appends a tensor's bytes. They are number 0, 1, 2 … of [`Spill::into_bytes`].
    ///
    /// # Errors
    /// The file cannot be written: usually the disk is full.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        let start = self.end;
        self.end = start.saturating_add(bytes.len());
        self.tensors.push(start..self.end);
        Ok(())
    }

    /// All tensors, in the order they came.
    ///
    /// # Errors
    /// The file cannot be mapped.
    pub fn into_bytes(self) -> io::Result<Vec<Bytes>> {
        let map = MappedFile::new(&self.file)?;
        Ok(self
            .tensors
            .into_iter()
            .map(|range| map.bytes().slice(range))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_back_what_it_took() {
        let folder = tempfile::tempdir().unwrap();
        let mut spill = Spill::new(folder.path()).unwrap();
        let tensors = [vec![1u8; 70_000], vec![], vec![2, 3]];
        for t in &tensors {
            spill.push(t).unwrap();
        }
        assert_eq!(folder.path().read_dir().unwrap().count(), 0, "nameless");
        assert_eq!(spill.into_bytes().unwrap(), tensors);
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        assert!(Spill::new(Path::new("/nowhere/at/all")).is_err());
    }
}
