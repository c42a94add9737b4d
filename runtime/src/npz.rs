//! NumPy archives of named tensors, as test cases and `--inputs` come.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::{
    NpzReader, NpzWriter, ReadNpyError, ReadNpyExt, ReadNpzError, ReadableElement, WriteNpzError,
};

use crate::tensor::{DType, Tensor};

/// Why an archive cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum NpzError {
    /// The file cannot be opened or made.
    #[error("cannot open {}: {source}", path.display())]
    Io {
        /// The archive.
        path: PathBuf,
        /// What the operating system said.
        r#source: std::io::Error,
    },
    /// The archive or one of its arrays is damaged.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        r#source: ReadNpzError,
    },
    /// One of its arrays is damaged.
    #[error("cannot read array `{name}` of {}: {source}", path.display())]
    Array {
        /// The archive.
        path: PathBuf,
        /// The array.
        name: String,
        /// What is wrong.
        r#source: ReadNpzError,
    },
    /// An array has a type that is not supported.
    #[error(
        "array `{name}` of {} is none of f32, f64, i64, i32, u8, i8, bool: {source}",
        path.display()
    )]
    ElementType {
        /// The archive.
        path: PathBuf,
        /// The array.
        name: String,
        /// What the reader said of the last type that was tried.
        r#source: ReadNpzError,
    },
    /// The archive cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        r#source: WriteNpzError,
    },
}

/// All tensors of an archive, in its order.
///
/// # Errors
/// The file is missing, no archive, or holds a type that NumPy has and the engines lack.
pub fn read(path: &Path) -> Result<Vec<(String, Tensor)>, NpzError> {
    let broken = |source| NpzError::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(|source| NpzError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut archive = NpzReader::new(BufReader::new(file)).map_err(broken)?;
    let names = archive.names().map_err(broken)?;
    names
        .into_iter()
        .map(|name| {
            let (path, array) = (path.to_owned(), name.clone());
            match read_one(&mut archive, &name) {
                Ok(tensor) => Ok((name, tensor)),
                Err(source) if is_of_another_type(&source) => Err(NpzError::ElementType {
                    path,
                    name: array,
                    source,
                }),
                Err(source) => Err(NpzError::Array {
                    path,
                    name: array,
                    source,
                }),
            }
        })
        .collect()
}

/// The single-precision values of a `.npy` file of floats.
///
/// # Errors
/// The file is missing, damaged, or no array of f32 or f64.
pub fn read_array(path: &Path) -> Result<ArrayD<f32>, NpzError> {
    let open = || {
        File::open(path)
            .map(BufReader::new)
            .map_err(|source| NpzError::Io {
                path: path.to_owned(),
                source,
            })
    };
    let single = ArrayD::<f32>::read_npy(open()?);
    let double = || Ok::<_, NpzError>(ArrayD::<f64>::read_npy(open()?));
    match single {
        Ok(array) => Ok(array),
        Err(source) => match double()? {
            Ok(array) => Ok(array.mapv(|v| v as f32)),
            Err(_) => Err(NpzError::Read {
                path: path.to_owned(),
                source: ReadNpzError::Npy(source),
            }),
        },
    }
}

type Archive = NpzReader<BufReader<File>>;

/// The reader only answers whether an array has one given type, so they are tried in turn.
fn read_one(archive: &mut Archive, name: &str) -> Result<Tensor, ReadNpzError> {
    fn typed<T: ReadableElement>(
        archive: &mut Archive,
        name: &str,
    ) -> Result<ArrayD<T>, ReadNpzError> {
        archive.by_name::<OwnedRepr<T>, IxDyn>(name)
    }
    type Typed = fn(&mut Archive, &str) -> Result<Tensor, ReadNpzError>;
    const OTHERS: [Typed; 6] = [
        |archive, name| typed(archive, name).map(Tensor::I64),
        |archive, name| typed(archive, name).map(Tensor::F64),
        |archive, name| typed(archive, name).map(Tensor::I32),
        |archive, name| typed(archive, name).map(Tensor::U8),
        |archive, name| typed(archive, name).map(Tensor::I8),
        |archive, name| typed(archive, name).map(Tensor::Bool),
    ];
    let single = typed(archive, name).map(Tensor::F32);
    OTHERS.iter().fold(single, |found, typed| match found {
        Err(error) if is_of_another_type(&error) => typed(archive, name),
        found => found,
    })
}

fn is_of_another_type(error: &ReadNpzError) -> bool {
    matches!(error, ReadNpzError::Npy(ReadNpyError::WrongDescriptor(_)))
}

/// Writes tensors as an archive; f16 and bf16, which the format's Rust writer lacks, become f32.
///
/// # Errors
/// The file cannot be made or written.
pub fn write(path: &Path, tensors: &[(String, Tensor)]) -> Result<(), NpzError> {
    let broken = |source| NpzError::Write {
        path: path.to_owned(),
        source,
    };
    let file = File::create(path).map_err(|source| NpzError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut archive = NpzWriter::new_compressed(BufWriter::new(file));
    for (name, tensor) in tensors {
        let name = name.as_str();
        match tensor {
            Tensor::F32(a) => archive.add_array(name, a),
            Tensor::F64(a) => archive.add_array(name, a),
            Tensor::I64(a) => archive.add_array(name, a),
            Tensor::I32(a) => archive.add_array(name, a),
            Tensor::U8(a) => archive.add_array(name, a),
            Tensor::I8(a) => archive.add_array(name, a),
            Tensor::Bool(a) => archive.add_array(name, a),
            Tensor::F16(_) | Tensor::BF16(_) => match tensor.cast(DType::F32) {
                Tensor::F32(a) => archive.add_array(name, &a),
                _ => Ok(()),
            },
        }
        .map_err(broken)?;
    }
    archive.finish().map_err(broken)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{arr0, arr1};

    #[test]
    fn tensors_survive_a_round_trip() {
        let tensors = [
            ("a", Tensor::from(arr1(&[1.0_f32, 2.0]))),
            ("b", Tensor::from(arr0(7_i64))),
            ("c", Tensor::from(arr1(&[true, false]))),
            ("d", Tensor::from(arr1(&[1.0_f64]))),
        ]
        .map(|(name, tensor)| (name.to_owned(), tensor));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        write(&path, &tensors).unwrap();
        assert_eq!(read(&path).unwrap(), tensors);
        std::fs::write(&path, "no zip").unwrap();
        assert!(matches!(read(&path), Err(NpzError::Read { .. })));
    }

    #[test]
    fn a_damaged_array_is_named_with_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.npz");
        let zeros = Tensor::from(arr1(&[0_i32; 1000]));
        write(&path, &[("a".to_owned(), zeros)]).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        // Of the packed array, which its checksum is of.
        let stored = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        bytes[stored - 8] ^= 0xff;
        std::fs::write(&path, bytes).unwrap();
        let error = read(&path).unwrap_err();
        let said = error.to_string();
        assert!(matches!(error, NpzError::Array { .. }), "{said}");
        assert!(
            said.contains("array `a` of ") && said.contains("x.npz"),
            "{said}"
        );
    }
}
