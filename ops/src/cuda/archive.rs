//! The compiled kernels: machine code of several architectures and PTX in one file, which
//! `ops/scripts/compile_kernels.py` writes.
//!
//! The bytes `LFKERN01`, the number of images (32 bits, little-endian), and for each image its kind (`c` for machine
//! code, `p` for PTX), the compute capability's major and minor number, a zero (8 bits each) and the length of its
//! zlib stream (32 bits); then the streams.

use std::fmt;
use std::io::Read;

use flate2::read::ZlibDecoder;
use thiserror::Error;

const MAGIC: &[u8] = b"LFKERN01";
/// Bytes of an entry of the table.
const ENTRY: usize = 8;

/// Why an archive gives no image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ArchiveError {
    /// It is not what the script writes.
    #[error("the archive of CUDA kernels is damaged: {0}")]
    Damaged(&'static str),
    /// Nothing in it runs on a device.
    #[error(
        "no CUDA kernels for this device: found compute capability {}.{}, the kernels are for {available}",
        .capability.0, .capability.1
    )]
    NoImage {
        /// The device's.
        capability: (u32, u32),
        /// What the archive has.
        available: String,
    },
}

/// An archive whose table has been read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive<'a> {
    images: Vec<Image<'a>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Image<'a> {
    kind: Kind,
    capability: (u32, u32),
    stream: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Runs on its generation from its minor number on.
    MachineCode,
    /// Compiled by the driver, for its capability and all later ones.
    Ptx,
}

impl Image<'_> {
    fn runs_on(&self, capability: (u32, u32)) -> bool {
        match self.kind {
            Kind::MachineCode => {
                self.capability.0 == capability.0 && self.capability.1 <= capability.1
            }
            Kind::Ptx => self.capability <= capability,
        }
    }
}

impl<'a> Archive<'a> {
    /// Reads the table.
    ///
    /// # Errors
    /// [`ArchiveError::Damaged`].
    pub fn read(bytes: &'a [u8]) -> Result<Self, ArchiveError> {
        const SHORT: ArchiveError = ArchiveError::Damaged("it ends too soon");
        let rest = bytes
            .strip_prefix(MAGIC)
            .ok_or(ArchiveError::Damaged("it doesn't begin with LFKERN01"))?;
        let (count, rest) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
        let count = u32::from_le_bytes(*count) as usize;
        let table = count.checked_mul(ENTRY).ok_or(SHORT)?;
        let (table, mut streams) = rest.split_at_checked(table).ok_or(SHORT)?;
        let (entries, _) = table.as_chunks::<ENTRY>();
        let mut images = Vec::new();
        for &[kind, major, minor, _, a, b, c, d] in entries {
            let kind = match kind {
                b'c' => Kind::MachineCode,
                b'p' => Kind::Ptx,
                _ => return Err(ArchiveError::Damaged("an image is of no known kind")),
            };
            let length = u32::from_le_bytes([a, b, c, d]) as usize;
            let (stream, rest) = streams.split_at_checked(length).ok_or(SHORT)?;
            streams = rest;
            images.push(Image {
                kind,
                capability: (major.into(), minor.into()),
                stream,
            });
        }
        Ok(Self { images })
    }

    /// The image for a device, as the driver loads it: the machine code of the nearest member of its generation, else
    /// PTX.
    ///
    /// # Errors
    /// [`ArchiveError`].
    pub fn image(&self, capability: (u32, u32)) -> Result<Vec<u8>, ArchiveError> {
        let best = self
            .images
            .iter()
            .filter(|image| image.runs_on(capability))
            .max_by_key(|image| (image.kind == Kind::MachineCode, image.capability))
            .ok_or_else(|| ArchiveError::NoImage {
                capability,
                available: self.to_string(),
            })?;
        let mut code = Vec::new();
        ZlibDecoder::new(best.stream)
            .read_to_end(&mut code)
            .map_err(|_| ArchiveError::Damaged("an image can't be decompressed"))?;
        // PTX is text that ends with a zero.
        code.push(0);
        Ok(code)
    }
}

/// The capabilities: `7.5, 8.0, 9.0 and PTX of 8.0`.
impl fmt::Display for Archive<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |kind: Kind| {
            let images = self.images.iter().filter(move |image| image.kind == kind);
            let names: Vec<String> = images
                .map(|image| format!("{}.{}", image.capability.0, image.capability.1))
                .collect();
            names.join(", ")
        };
        write!(f, "{} and PTX of {}", of(Kind::MachineCode), of(Kind::Ptx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::ZlibEncoder;
    use std::io::Write;

    fn archive(images: &[(u8, u8, u8, &str)]) -> Vec<u8> {
        let streams: Vec<Vec<u8>> = images
            .iter()
            .map(|(.., code)| {
                let mut encoder = ZlibEncoder::new(vec![], Compression::default());
                encoder.write_all(code.as_bytes()).unwrap();
                encoder.finish().unwrap()
            })
            .collect();
        let mut bytes = MAGIC.to_vec();
        bytes.extend((images.len() as u32).to_le_bytes());
        for ((kind, major, minor, _), stream) in images.iter().zip(&streams) {
            bytes.extend([*kind, *major, *minor, 0]);
            bytes.extend((stream.len() as u32).to_le_bytes());
        }
        bytes.extend(streams.concat());
        bytes
    }

    fn example() -> Vec<u8> {
        archive(&[
            (b'c', 7, 5, "turing"),
            (b'c', 8, 0, "ampere"),
            (b'c', 8, 6, "ga10x"),
            (b'c', 9, 0, "hopper"),
            (b'p', 8, 0, "ptx"),
        ])
    }

    #[test]
    fn a_device_gets_the_nearest_code() {
        let bytes = example();
        let archive = Archive::read(&bytes).unwrap();
        for (capability, expected) in [
            ((7, 5), "turing"),
            ((8, 0), "ampere"),
            ((8, 6), "ga10x"),
            ((8, 9), "ga10x"),
            ((9, 0), "hopper"),
            ((10, 3), "ptx"),
            ((13, 0), "ptx"),
        ] {
            let image = archive.image(capability).unwrap();
            assert_eq!(
                image,
                [expected.as_bytes(), &[0]].concat(),
                "{capability:?}"
            );
        }
        for old in [(7, 0), (6, 1)] {
            let error = archive.image(old).unwrap_err().to_string();
            assert!(
                error.contains("7.5, 8.0, 8.6, 9.0 and PTX of 8.0"),
                "{error}"
            );
        }
    }

    #[test]
    fn damage_is_told() {
        let bytes = example();
        for end in 0..bytes.len() {
            let result = Archive::read(&bytes[..end]);
            assert!(
                matches!(result, Err(ArchiveError::Damaged(_))),
                "{end} bytes"
            );
        }
        let mut other = example();
        other[12] = b'x';
        assert!(Archive::read(&other).is_err());
        let mut other = example();
        let last = other.len() - 8;
        other[last] ^= 0xff;
        assert!(Archive::read(&other).unwrap().image((13, 0)).is_err());
    }
}
