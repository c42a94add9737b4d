//! Activations on disk: half-precision matrices in a file without a name, so that nothing is left behind.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::f16;
use half::slice::HalfFloatSliceExt;

/// Matrices of one size, each with a factor of its own that brings its values into half precision's range.
#[derive(Debug)]
pub struct Store {
    file: File,
    /// Values of a matrix.
    len: usize,
    factors: Vec<f32>,
}

impl Store {
    /// An empty store for matrices of `len` values, in `folder`.
    ///
    /// # Errors
    /// The folder takes no file.
    pub fn new(folder: &Path, len: usize) -> io::Result<Self> {
        Ok(Self::on(tempfile::tempfile_in(folder)?, len))
    }

    fn on(file: File, len: usize) -> Self {
        Self {
            file,
            len,
            factors: Vec::new(),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.factors.len()
    }

    /// Adds a matrix of finite values.
    ///
    /// # Errors
    /// It has another size, or the disk is full.
    pub fn push(&mut self, values: &[f32]) -> io::Result<()> {
        if values.len() != self.len {
            return Err(io::Error::other(format!(
                "a matrix of {} values among those of {}",
                values.len(),
                self.len
            )));
        }
        let largest = values.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
        // A power of two, so that nothing is rounded twice.
        let factor = match largest > 0.0 && largest.is_finite() {
            true => largest.log2().floor().exp2(),
            false => 1.0,
        };
        let mut halves = vec![f16::ZERO; values.len()];
        let scaled: Vec<f32> = values.iter().map(|v| v / factor).collect();
        halves.convert_from_f32_slice(&scaled);
        let bytes: Vec<u8> = halves.iter().flat_map(|h| h.to_le_bytes()).collect();
        self.file.write_all(&bytes)?;
        self.factors.push(factor);
        Ok(())
    }

    /// Appends matrix `index` to `into`.
    ///
    /// # Errors
    /// There is no such one, or it cannot be read.
    pub fn read(&self, index: usize, into: &mut Vec<f32>) -> io::Result<()> {
        let factor = self
            .factors
            .get(index)
            .ok_or_else(|| io::Error::other(format!("no matrix {index}")))?;
        let size = self.len * 2;
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, (index * size) as u64)?;
        let (words, _) = bytes.as_chunks();
        let halves: Vec<f16> = words.iter().map(|w| f16::from_le_bytes(*w)).collect();
        let start = into.len();
        into.resize(start + self.len, 0.0);
        if let Some(into) = into.get_mut(start..) {
            halves.convert_to_f32_slice(into);
            for value in into {
                *value *= factor;
            }
        }
        Ok(())
    }

    /// Bytes that a matrix of `len` values takes.
    #[must_use]
    pub fn bytes(len: usize) -> u64 {
        len as u64 * 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_any_size_keep_eleven_bits() {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::new(folder.path(), 3).unwrap();
        let matrices = [
            [1.0_f32, -0.333_333, 0.0],
            [3e9, -7.1e8, 1e6],
            [2e-12, 1e-13, 0.0],
        ];
        for matrix in &matrices {
            store.push(matrix).unwrap();
        }
        for (i, matrix) in matrices.iter().enumerate() {
            let mut read = Vec::new();
            store.read(i, &mut read).unwrap();
            // Half of the last of 11 bits, of values whose largest is in 1 … 2.
            let largest = matrix.iter().fold(0.0_f32, |m, v| m.max(v.abs()));
            for (a, b) in matrix.iter().zip(&read) {
                assert!((a - b).abs() <= largest * 2.0_f32.powi(-11), "{a} {b}");
            }
        }
        assert!(store.push(&[1.0]).is_err());
        assert!(store.read(3, &mut Vec::new()).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = Store::on(full, 1).push(&[1.0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }
}
