//! The file that rows go to.

use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

/// A file that remembers what went wrong first: the PNG encoder writes its last bytes when it is dropped and
/// loses their errors. Clones write to the same file.
#[derive(Debug, Clone)]
pub struct Sink {
    file: Arc<File>,
    first: Arc<Mutex<Option<io::Error>>>,
}

impl Sink {
    pub fn new(file: File) -> Self {
        Self {
            file: Arc::new(file),
            first: Arc::default(),
        }
    }

    /// The file's own error, if that is behind what an encoder says.
    pub fn cause(&self, said: io::Error) -> io::Error {
        self.take().unwrap_or(said)
    }

    /// Waits until everything is on the disk.
    pub fn close(self) -> io::Result<()> {
        match self.take() {
            Some(error) => Err(error),
            None => self.file.sync_all(),
        }
    }

    fn take(&self) -> Option<io::Error> {
        let mut first = self.first.lock().unwrap_or_else(|held| held.into_inner());
        first.take()
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = (&*self.file).write(bytes);
        if let Err(error) = &written
            && error.kind() != io::ErrorKind::Interrupted
        {
            let copy = match error.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => error.kind().into(),
            };
            let mut first = self.first.lock().unwrap_or_else(|held| held.into_inner());
            first.get_or_insert(copy);
        }
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        (&*self.file).flush()
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_a_writer_swallows_comes_at_the_end() {
        let sink = Sink::new(File::options().write(true).open("/dev/full").unwrap());
        let mut writer = sink.clone();
        assert!(writer.write(b"a").is_err());
        drop(writer);
        let error = sink.close().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
