//! References from a tensor to its bytes in a data file.

use super::element::ElementType;
use super::proto::{StringStringEntryProto, TensorProto};

/// `TensorProto.data_location` for bytes in another file.
pub(super) const EXTERNAL: i32 = 1;

/// Where a tensor's bytes lie in a data file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRef {
    /// The file, relative to the model's folder.
    pub location: String,
    /// The first byte.
    pub offset: u64,
    /// The number of bytes, if written down.
    pub length: Option<u64>,
}

/// Why a reference to a data file is malformed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExternalRefError {
    /// There is no `location`.
    #[error("its external data has no location")]
    NoLocation,
    /// A key that ONNX does not define.
    #[error(
        "its external data has the unknown key `{0}` (known: location, offset, length, checksum)"
    )]
    UnknownKey(String),
    /// A key that occurs twice.
    #[error("its external data has the key `{0}` twice")]
    Twice(&'static str),
    /// An offset or length that is no whole number from 0 to 2^64 - 1.
    #[error("its external data has {key} `{value}`, which is not a number of bytes")]
    NotANumber {
        /// `offset` or `length`.
        key: &'static str,
        /// What is written there.
        value: String,
    },
}

/// Whether the tensor's bytes lie in another file.
pub fn is_external(tensor: &TensorProto) -> bool {
    tensor.data_location == Some(EXTERNAL)
}

impl ExternalRef {
    /// Reads the reference of an external tensor.
    ///
    /// # Errors
    /// [`ExternalRefError`], for anything but the four keys that ONNX defines.
    pub fn of(tensor: &TensorProto) -> Result<Self, ExternalRefError> {
        let (mut location, mut offset, mut length, mut checksum) = (None, None, None, None);
        for entry in &tensor.external_data {
            let key = entry.key.as_deref().unwrap_or_default();
            let value = entry.value.as_deref().unwrap_or_default();
            let (slot, key) = match key {
                "location" => (&mut location, "location"),
                "offset" => (&mut offset, "offset"),
                "length" => (&mut length, "length"),
                "checksum" => (&mut checksum, "checksum"),
                other => return Err(ExternalRefError::UnknownKey(other.to_owned())),
            };
            if slot.replace(value).is_some() {
                return Err(ExternalRefError::Twice(key));
            }
        }
        Ok(Self {
            location: location.ok_or(ExternalRefError::NoLocation)?.to_owned(),
            offset: offset.map_or(Ok(0), |v| number("offset", v))?,
            length: length.map(|v| number("length", v)).transpose()?,
        })
    }

    /// Makes `tensor` refer to these bytes, and drops what it held inline. The
    /// checksum goes too: ONNX defines it over the whole data file.
    pub fn apply(&self, tensor: &mut TensorProto) {
        let mut entries = vec![
            entry("location", &self.location),
            entry("offset", &self.offset.to_string()),
        ];
        if let Some(length) = self.length {
            entries.push(entry("length", &length.to_string()));
        }
        tensor.external_data = entries;
        tensor.data_location = Some(EXTERNAL);
        drop_inline(tensor);
    }
}

/// Whether the tensor's values may be held as raw bytes, and so moved to a file.
pub(super) fn can_be_external(tensor: &TensorProto) -> bool {
    let element = ElementType::from_onnx(tensor.data_type.unwrap_or_default());
    element.is_some_and(|e| e != ElementType::String) && tensor.segment.is_unset()
}

pub(super) fn drop_inline(tensor: &mut TensorProto) {
    tensor.raw_data = None;
    tensor.float_data = Vec::new();
    tensor.int32_data = Vec::new();
    tensor.int64_data = Vec::new();
    tensor.double_data = Vec::new();
    tensor.uint64_data = Vec::new();
}

fn entry(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto::default()
        .with_key(key)
        .with_value(value)
}

fn number(key: &'static str, value: &str) -> Result<u64, ExternalRefError> {
    // `parse` alone would take a leading plus.
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    match value.parse() {
        Ok(number) if digits => Ok(number),
        _ => Err(ExternalRefError::NotANumber {
            key,
            value: value.chars().take(40).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(entries: &[(&str, &str)]) -> TensorProto {
        TensorProto {
            external_data: entries.iter().map(|(k, v)| entry(k, v)).collect(),
            data_location: Some(EXTERNAL),
            ..TensorProto::default()
        }
    }

    #[test]
    fn the_four_keys_are_read() {
        let full = tensor(&[
            ("location", "w.bin"),
            ("offset", "4096"),
            ("length", "16"),
            ("checksum", "ab"),
        ]);
        let expected = ExternalRef {
            location: "w.bin".into(),
            offset: 4096,
            length: Some(16),
        };
        assert_eq!(ExternalRef::of(&full), Ok(expected));
        let least = ExternalRef::of(&tensor(&[("location", "w")])).unwrap();
        assert_eq!((least.offset, least.length), (0, None));
    }

    #[test]
    fn near_misses_are_refused() {
        use ExternalRefError as E;
        let number = |key, value: &str| E::NotANumber {
            key,
            value: value.into(),
        };
        let cases: [(&[(&str, &str)], E); 8] = [
            (&[], E::NoLocation),
            (&[("offset", "0")], E::NoLocation),
            (
                &[("location", "a"), ("location", "b")],
                E::Twice("location"),
            ),
            (
                &[("location", "a"), ("basepath", "/")],
                E::UnknownKey("basepath".into()),
            ),
            (
                &[("location", "a"), ("offset", "-1")],
                number("offset", "-1"),
            ),
            (
                &[("location", "a"), ("offset", "+1")],
                number("offset", "+1"),
            ),
            (&[("location", "a"), ("length", "")], number("length", "")),
            (
                &[("location", "a"), ("length", "18446744073709551616")],
                number("length", "18446744073709551616"),
            ),
        ];
        for (entries, expected) in cases {
            assert_eq!(
                ExternalRef::of(&tensor(entries)),
                Err(expected),
                "{entries:?}"
            );
        }
    }
}
