//! Files as shared bytes: a memory map that remembers which file it shows.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use bytes::Bytes;
use memmap2::{Mmap, MmapOptions};

/// A read-only file mapped into memory.
///
/// The map is private and read-only, so nothing here can change the file. If
/// another process *truncates* the file, touching the lost pages kills this
/// process with SIGBUS: no portable way exists to turn that into an error, so
/// bulk copies go through the file descriptor instead (see [`super::write`]),
/// and only what has to be looked at (the graph, small tensors) is read from
/// the map.
#[derive(Clone, Debug)]
pub(super) struct MappedFile {
    bytes: Bytes,
    identity: FileIdentity,
}

/// Device and inode, with the size and time that tell whether a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileIdentity {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    modified: (i64, i64),
}

impl FileIdentity {
    pub(super) fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    /// Whether both are the same file, whatever its contents are by now.
    pub(super) fn same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

impl MappedFile {
    /// Maps a regular file that is open for reading. Pages are read when touched.
    /// The map outlives the descriptor: a model may have thousands of data files,
    /// and a process only about a thousand descriptors.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let identity = FileIdentity::of(&file.metadata()?);
        let bytes = if identity.size == 0 {
            Bytes::new()
        } else {
            Bytes::from_owner(map(file, identity.size)?)
        };
        Ok(Self { bytes, identity })
    }

    pub(super) fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    pub(super) fn identity(&self) -> FileIdentity {
        self.identity
    }

    /// Whether `file` is the mapped one, with the size and time it had then.
    pub(super) fn is_unchanged(&self, file: &File) -> io::Result<bool> {
        Ok(FileIdentity::of(&file.metadata()?) == self.identity)
    }

    /// Where in the file `segment` lies, if it is a slice of this map.
    pub(super) fn locate(&self, segment: &[u8]) -> Option<Range<u64>> {
        let map = self.bytes.as_ptr_range();
        let part = segment.as_ptr_range();
        if segment.is_empty() || part.start < map.start || part.end > map.end {
            return None;
        }
        let start = (part.start.addr() - map.start.addr()) as u64;
        Some(start..start + segment.len() as u64)
    }
}

fn map(file: &File, size: u64) -> io::Result<Mmap> {
    let length = usize::try_from(size).map_err(|_| {
        io::Error::new(io::ErrorKind::FileTooLarge, "larger than the address space")
    })?;
    // SAFETY: the map is private and only ever read. Another process can change
    // the file under us: a changed byte is a wrong weight, never an invalid value,
    // since only `[u8]` is read from the map, and every parse of it is bounds-checked.
    unsafe { MmapOptions::new().len(length).map(file) }
}
