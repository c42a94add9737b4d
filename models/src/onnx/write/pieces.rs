//! Writing a file whose bytes mostly lie in other files already.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use rustix::io::Errno;

use super::WriteError;
use crate::onnx::OnnxFile;
use crate::onnx::map::MappedFile;
use crate::onnx::open::DataFile;

/// A part of a file to be written.
#[derive(Clone, Debug)]
pub(super) enum Piece {
    /// These bytes; copied from file to file where they lie in a source's map.
    Bytes(Bytes),
    /// This many zeros.
    Zeros(u64),
}

/// The files that the model was read from, to copy from. The kernel copies between
/// descriptors (or shares blocks), so weights don't pass through this process and
/// a truncated source is an error, not a SIGBUS.
pub(super) struct Sources<'a> {
    model: Option<&'a OnnxFile>,
    /// By address of the map.
    maps: Vec<(MappedFile, Origin)>,
    /// One descriptor at a time: there can be thousands of data files.
    open: Option<(usize, File)>,
}

#[derive(Clone)]
enum Origin {
    Model,
    Data(Arc<DataFile>),
}

impl<'a> Sources<'a> {
    /// The file that the model came from, and its data files that were used so far.
    pub(super) fn of(model: Option<&'a OnnxFile>) -> Self {
        let mut maps = Vec::new();
        if let Some(model) = model {
            if let Some(source) = model.source() {
                maps.push((source.map.clone(), Origin::Model));
            }
            for data in model.data_files_in_use() {
                maps.push((data.map.clone(), Origin::Data(data)));
            }
        }
        maps.sort_by_key(|(map, _)| map.bytes().as_ptr().addr());
        Self {
            model,
            maps,
            open: None,
        }
    }

    /// Writes `pieces` one after the other to the empty file `target`.
    pub(super) fn write(
        &mut self,
        pieces: &[Piece],
        target: &File,
        name: &Path,
    ) -> Result<(), WriteError> {
        let failed = |error| WriteError::io("write", name, error);
        let mut memory = io::BufWriter::with_capacity(1 << 16, target);
        let mut pending = pieces.iter().peekable();
        while let Some(piece) = pending.next() {
            match piece {
                Piece::Zeros(count) => {
                    io::copy(&mut io::repeat(0).take(*count), &mut memory).map_err(failed)?;
                }
                Piece::Bytes(bytes) => match self.locate(bytes) {
                    None => memory.write_all(bytes).map_err(failed)?,
                    Some((index, mut range)) => {
                        // Neighbours in the source are copied in one go.
                        while let Some(Piece::Bytes(next)) = pending.peek()
                            && let Some((next_index, next_range)) = self.locate(next)
                            && (next_index, next_range.start) == (index, range.end)
                        {
                            range.end = next_range.end;
                            pending.next();
                        }
                        memory.flush().map_err(failed)?;
                        self.copy(index, range, target, name)?;
                    }
                },
            }
        }
        memory.flush().map_err(failed)
    }

    /// Checks that the model file is as it was when it was mapped.
    pub(super) fn confirm_model(&self) -> Result<(), WriteError> {
        let index = self
            .maps
            .iter()
            .position(|(_, origin)| matches!(origin, Origin::Model));
        match (index, self.model.and_then(OnnxFile::source)) {
            (Some(index), Some(source)) => self.confirm_one(index, &source.file),
            _ => Ok(()),
        }
    }

    /// Checks that no source changed since it was mapped: what was copied belongs
    /// to the structure that was decoded.
    pub(super) fn confirm(&mut self) -> Result<(), WriteError> {
        if let Some((index, file)) = self.open.take() {
            self.confirm_one(index, &file)?;
        }
        Ok(())
    }

    fn locate(&self, bytes: &[u8]) -> Option<(usize, Range<u64>)> {
        let address = bytes.as_ptr().addr();
        let after = self
            .maps
            .partition_point(|(map, _)| map.bytes().as_ptr().addr() <= address);
        let index = after.checked_sub(1)?;
        let (map, _) = self.maps.get(index)?;
        Some((index, map.locate(bytes)?))
    }

    /// Appends a range of a source to `target` at its current position.
    fn copy(
        &mut self,
        index: usize,
        range: Range<u64>,
        target: &File,
        name: &Path,
    ) -> Result<(), WriteError> {
        self.open(index)?;
        let Some((_, source)) = &self.open else {
            return Ok(());
        };
        let mut at = range.start;
        while at < range.end {
            let left = usize::try_from(range.end - at).unwrap_or(usize::MAX);
            let copied =
                match rustix::fs::copy_file_range(source, Some(&mut at), target, None, left) {
                    Ok(copied) => copied,
                    Err(Errno::INTR) => continue,
                    // Different or unusual file systems.
                    Err(
                        Errno::XDEV
                        | Errno::INVAL
                        | Errno::NOSYS
                        | Errno::OPNOTSUPP
                        | Errno::PERM
                        | Errno::BADF
                        | Errno::IO,
                    ) => copy_through_memory(source, &mut at, target, left)
                        .map_err(|e| WriteError::io("write", name, e))?,
                    Err(error) => return Err(WriteError::io("write", name, error.into())),
                };
            if copied == 0 {
                return Err(self.changed(index));
            }
        }
        Ok(())
    }

    fn open(&mut self, index: usize) -> Result<(), WriteError> {
        if self.open.as_ref().is_some_and(|(open, _)| *open == index) {
            return Ok(());
        }
        self.confirm()?;
        let (Some(model), Some((_, origin))) = (self.model, self.maps.get(index)) else {
            return Ok(());
        };
        let file = match origin {
            Origin::Data(data) => model.reopen(data).map_err(|_| self.changed(index))?,
            Origin::Model => match model.source() {
                Some(source) => source
                    .file
                    .try_clone()
                    .map_err(|e| WriteError::io("read", model.path(), e))?,
                None => return Ok(()),
            },
        };
        self.confirm_one(index, &file)?;
        self.open = Some((index, file));
        Ok(())
    }

    fn confirm_one(&self, index: usize, file: &File) -> Result<(), WriteError> {
        match self.maps.get(index).map(|(map, _)| map.is_unchanged(file)) {
            Some(Ok(true)) => Ok(()),
            Some(Err(error)) => Err(WriteError::io("read", &self.path(index), error)),
            _ => Err(self.changed(index)),
        }
    }

    fn changed(&self, index: usize) -> WriteError {
        WriteError::SourceChanged {
            path: self.path(index),
        }
    }

    fn path(&self, index: usize) -> PathBuf {
        let Some(model) = self.model else {
            return PathBuf::new();
        };
        match self.maps.get(index) {
            Some((_, Origin::Data(data))) => {
                let folder = model.folder().unwrap_or(Path::new(""));
                folder.join(&data.location)
            }
            _ => model.path().to_owned(),
        }
    }
}

/// Where the kernel cannot copy: a megabyte at a time, by `read`, not by the map.
fn copy_through_memory(
    source: &File,
    at: &mut u64,
    mut target: &File,
    length: usize,
) -> io::Result<usize> {
    let mut buffer = vec![0; length.min(1 << 20)];
    let read = loop {
        match source.read_at(&mut buffer, *at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    target.write_all(buffer.get(..read).unwrap_or_default())?;
    *at += read as u64;
    Ok(read)
}
