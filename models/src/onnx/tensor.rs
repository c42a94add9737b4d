//! The values of a tensor, wherever the file keeps them.

use bytes::Bytes;
use half::{bf16, f16};

use super::element::{ElementType, ShapeError, element_count};
use super::external::{ExternalRef, ExternalRefError, is_external};
use super::folder::DataFileError;
use super::open::OnnxFile;
use super::proto::TensorProto;

/// Why a tensor's values cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("tensor `{tensor}`: {fault}")]
pub struct TensorError {
    /// The tensor's name.
    pub tensor: String,
    /// What is wrong with it.
    pub fault: TensorFault,
}

/// What can be wrong with a tensor.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFault {
    /// `data_type` is missing, undefined or unknown.
    #[error("its element type {0} is unknown")]
    ElementType(i32),
    /// An impossible shape.
    #[error("its shape {0}")]
    Shape(ShapeError),
    /// The number of bytes differs from what shape and type need.
    #[error("it holds {found} bytes, but {element} {dims:?} takes {expected}")]
    ByteCount {
        /// The element type.
        element: ElementType,
        /// The shape.
        dims: Vec<i64>,
        /// The bytes that these take.
        expected: u64,
        /// The bytes that are there.
        found: u64,
    },
    /// The number of values in a typed field differs from what the shape needs.
    #[error("its field {field} holds {found} values, but {element} {dims:?} takes {expected}")]
    ValueCount {
        /// `float_data` and so on.
        field: &'static str,
        /// The element type.
        element: ElementType,
        /// The shape.
        dims: Vec<i64>,
        /// The number of values that these take.
        expected: u64,
        /// The number of values that are there.
        found: u64,
    },
    /// A value that the element type cannot represent.
    #[error("value {value} at position {index} is outside the range of {element}")]
    OutOfRange {
        /// The element type.
        element: ElementType,
        /// Position of the value in its field.
        index: usize,
        /// The value.
        value: i128,
    },
    /// Values in more than one place.
    #[error("its values are in more than one place ({0})")]
    Ambiguous(&'static str),
    /// `segment` is set: a chunk of a tensor, which no runtime supports.
    #[error("it is only a segment of a tensor")]
    Segment,
    /// Strings have no byte form.
    #[error("it holds strings, which have no byte form")]
    Strings,
    /// A conversion that is not defined.
    #[error("{element} values cannot be read as {wanted}")]
    Conversion {
        /// What the tensor holds.
        element: ElementType,
        /// What was asked for.
        wanted: &'static str,
    },
    /// A malformed reference to a data file.
    #[error(transparent)]
    External(#[from] ExternalRefError),
    /// The reference points outside the data file.
    #[error(
        "it lies at offset {offset}, {length} bytes long, in `{location}`, which has only {size} bytes (hint: an interrupted download or copy?)"
    )]
    OutOfFile {
        /// The data file.
        location: String,
        /// The first byte.
        offset: u64,
        /// The number of bytes.
        length: u64,
        /// The size of the file.
        size: u64,
    },
    /// The data file cannot be used.
    #[error(transparent)]
    DataFile(#[from] DataFileError),
}

impl From<ShapeError> for TensorFault {
    fn from(error: ShapeError) -> Self {
        Self::Shape(error)
    }
}

/// A tensor's type, shape and values as little-endian bytes, row-major.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorData {
    /// The element type.
    pub element: ElementType,
    /// The shape; empty for a scalar.
    pub dims: Vec<i64>,
    /// The values; sub-byte types are packed from the low bits up.
    pub bytes: Bytes,
}

impl OnnxFile {
    /// The values of `tensor` as little-endian bytes: a slice of the map wherever
    /// the file has them in that form (`raw_data`, external data), else collected
    /// from the typed fields.
    ///
    /// # Errors
    /// [`TensorError`] if type, shape, length or data file are not in order.
    pub fn tensor_bytes(&self, tensor: &TensorProto) -> Result<Bytes, TensorError> {
        Ok(self.tensor(tensor)?.bytes)
    }

    /// The type, shape and values of `tensor`. See [`OnnxFile::tensor_bytes`].
    ///
    /// # Errors
    /// [`TensorError`] if type, shape, length or data file are not in order.
    pub fn tensor(&self, tensor: &TensorProto) -> Result<TensorData, TensorError> {
        named(tensor, read(tensor, Some(self)))
    }

    /// Looks for the data file of each of the main graph's initializers.
    ///
    /// # Errors
    /// [`TensorError`]: the first whose file is missing, cut off or not allowed.
    pub fn check_data_files(&self) -> Result<(), TensorError> {
        let stored = self.model.graph.initializer.iter();
        for tensor in stored.filter(|tensor| is_external(tensor)) {
            self.tensor(tensor)?;
        }
        Ok(())
    }
}

impl TensorData {
    /// The values of a tensor that holds them itself.
    ///
    /// # Errors
    /// [`TensorError`], among others for a tensor with external data.
    pub fn inline(tensor: &TensorProto) -> Result<Self, TensorError> {
        named(tensor, read(tensor, None))
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        // The shape was checked against the bytes when this value was made.
        element_count(&self.dims)
            .ok()
            .and_then(|n| usize::try_from(n).ok())
            .unwrap_or_default()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as f32, from f32, f16, bf16 or f64. From f64 they are rounded
    /// to nearest; a finite f64 beyond f32's range becomes an infinity.
    ///
    /// # Errors
    /// [`TensorFault::Conversion`] for any other type.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, TensorFault> {
        Ok(match self.element {
            ElementType::F32 => self.map(f32::from_le_bytes),
            ElementType::F16 => self.map(|b| f16::from_le_bytes(b).to_f32()),
            ElementType::Bf16 => self.map(|b| bf16::from_le_bytes(b).to_f32()),
            ElementType::F64 => self.map(|b| f64::from_le_bytes(b) as f32),
            element => return Err(not_convertible(element, "f32")),
        })
    }

    /// The values as f64, exactly, from f32, f16, bf16 or f64.
    ///
    /// # Errors
    /// [`TensorFault::Conversion`] for any other type.
    pub fn to_f64_vec(&self) -> Result<Vec<f64>, TensorFault> {
        Ok(match self.element {
            ElementType::F64 => self.map(f64::from_le_bytes),
            ElementType::F32 => self.map(|b| f64::from(f32::from_le_bytes(b))),
            ElementType::F16 => self.map(|b| f16::from_le_bytes(b).to_f64()),
            ElementType::Bf16 => self.map(|b| bf16::from_le_bytes(b).to_f64()),
            element => return Err(not_convertible(element, "f64")),
        })
    }

    /// The values as i64, exactly, from any integer of at least a byte, or bool.
    ///
    /// # Errors
    /// [`TensorFault::Conversion`] for any other type, and
    /// [`TensorFault::OutOfRange`] for a u64 above 2^63 - 1.
    pub fn to_i64_vec(&self) -> Result<Vec<i64>, TensorFault> {
        Ok(match self.element {
            ElementType::I64 => self.map(i64::from_le_bytes),
            ElementType::I32 => self.map(|b| i64::from(i32::from_le_bytes(b))),
            ElementType::I16 => self.map(|b| i64::from(i16::from_le_bytes(b))),
            ElementType::I8 => self.map(|b| i64::from(i8::from_le_bytes(b))),
            ElementType::U32 => self.map(|b| i64::from(u32::from_le_bytes(b))),
            ElementType::U16 => self.map(|b| i64::from(u16::from_le_bytes(b))),
            ElementType::U8 | ElementType::Bool => self.map(|b| i64::from(u8::from_le_bytes(b))),
            ElementType::U64 => {
                let values = self.map(u64::from_le_bytes);
                let narrow = |(index, value): (usize, u64)| {
                    i64::try_from(value).map_err(|_| TensorFault::OutOfRange {
                        element: ElementType::I64,
                        index,
                        value: value.into(),
                    })
                };
                return values.into_iter().enumerate().map(narrow).collect();
            }
            element => return Err(not_convertible(element, "i64")),
        })
    }

    /// Every `N`-byte element through `convert`.
    fn map<const N: usize, T>(&self, convert: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        elements.iter().map(|bytes| convert(*bytes)).collect()
    }
}

fn not_convertible(element: ElementType, wanted: &'static str) -> TensorFault {
    TensorFault::Conversion { element, wanted }
}

fn named<T>(tensor: &TensorProto, result: Result<T, TensorFault>) -> Result<T, TensorError> {
    result.map_err(|fault| TensorError {
        tensor: tensor.name.clone().unwrap_or_default(),
        fault,
    })
}

fn read(tensor: &TensorProto, file: Option<&OnnxFile>) -> Result<TensorData, TensorFault> {
    let number = tensor.data_type.unwrap_or_default();
    let element = ElementType::from_onnx(number).ok_or(TensorFault::ElementType(number))?;
    if tensor.segment.is_set() {
        return Err(TensorFault::Segment);
    }
    let expected = element
        .byte_len(&tensor.dims)?
        .ok_or(TensorFault::Strings)?;
    let bytes = if is_external(tensor) {
        external(tensor, file, element, expected)?
    } else if let Some(raw) = &tensor.raw_data {
        if typed_fields(tensor) > 0 {
            return Err(TensorFault::Ambiguous("raw_data and a typed field"));
        }
        raw.clone()
    } else {
        typed(tensor, element)?
    };
    if bytes.len() != expected {
        return Err(TensorFault::ByteCount {
            element,
            dims: tensor.dims.clone(),
            expected: expected as u64,
            found: bytes.len() as u64,
        });
    }
    Ok(TensorData {
        element,
        dims: tensor.dims.clone(),
        bytes,
    })
}

fn external(
    tensor: &TensorProto,
    file: Option<&OnnxFile>,
    element: ElementType,
    expected: usize,
) -> Result<Bytes, TensorFault> {
    if tensor.raw_data.as_ref().is_some_and(|raw| !raw.is_empty()) || typed_fields(tensor) > 0 {
        return Err(TensorFault::Ambiguous("a data file and the model file"));
    }
    let reference = ExternalRef::of(tensor)?;
    let length = reference.length.unwrap_or(expected as u64);
    if length != expected as u64 {
        return Err(TensorFault::ByteCount {
            element,
            dims: tensor.dims.clone(),
            expected: expected as u64,
            found: length,
        });
    }
    let data = match file {
        Some(file) => file.data_file(&reference.location)?,
        None => {
            return Err(DataFileError::NoFolder {
                location: reference.location,
            }
            .into());
        }
    };
    let bytes = data.map.bytes();
    let size = bytes.len();
    let start = usize::try_from(reference.offset).ok();
    let range = start
        .filter(|start| expected <= size && *start <= size - expected)
        .map(|start| start..start + expected);
    match range {
        Some(range) => Ok(bytes.slice(range)),
        None => Err(TensorFault::OutOfFile {
            location: reference.location,
            offset: reference.offset,
            length,
            size: size as u64,
        }),
    }
}

/// How many values the typed fields hold together.
fn typed_fields(tensor: &TensorProto) -> usize {
    tensor.float_data.len()
        + tensor.int32_data.len()
        + tensor.int64_data.len()
        + tensor.double_data.len()
        + tensor.uint64_data.len()
        + tensor.string_data.len()
}

/// The typed field that ONNX assigns to each element type, as bytes.
fn typed(tensor: &TensorProto, element: ElementType) -> Result<Bytes, TensorFault> {
    use ElementType::*;
    let pack = Pack { tensor, element };
    match element {
        F32 => pack.same_width("float_data", &tensor.float_data, 1, |v| v.to_le_bytes()),
        Complex64 => pack.same_width("float_data", &tensor.float_data, 2, |v| v.to_le_bytes()),
        F64 => pack.same_width("double_data", &tensor.double_data, 1, |v| v.to_le_bytes()),
        Complex128 => pack.same_width("double_data", &tensor.double_data, 2, |v| v.to_le_bytes()),
        I64 => pack.same_width("int64_data", &tensor.int64_data, 1, |v| v.to_le_bytes()),
        U64 => pack.same_width("uint64_data", &tensor.uint64_data, 1, |v| v.to_le_bytes()),
        U32 => pack.narrow("uint64_data", &tensor.uint64_data, u32::to_le_bytes),
        I32 => pack.same_width("int32_data", &tensor.int32_data, 1, |v| v.to_le_bytes()),
        I16 => pack.narrow("int32_data", &tensor.int32_data, i16::to_le_bytes),
        // Halves travel as the bit pattern of an unsigned 16-bit number.
        U16 | F16 | Bf16 => pack.narrow("int32_data", &tensor.int32_data, u16::to_le_bytes),
        I8 => pack.narrow("int32_data", &tensor.int32_data, i8::to_le_bytes),
        U8 | Bool | F8E4M3Fn | F8E4M3Fnuz | F8E5M2 | F8E5M2Fnuz | F8E8M0 | U4 | I4 | F4E2M1
        | U2 | I2 => pack.narrow("int32_data", &tensor.int32_data, u8::to_le_bytes),
        F6E2M3 | F6E3M2 => pack.six_bits(&tensor.int32_data),
        String => Err(TensorFault::Strings),
    }
}

struct Pack<'a> {
    tensor: &'a TensorProto,
    element: ElementType,
}

impl Pack<'_> {
    /// Values that are stored at their own width, `per_element` of them each.
    fn same_width<T: Copy, const N: usize>(
        &self,
        field: &'static str,
        values: &[T],
        per_element: u64,
        to_bytes: impl Fn(T) -> [u8; N],
    ) -> Result<Bytes, TensorFault> {
        let count = element_count(&self.tensor.dims)?;
        self.check_count(field, count.saturating_mul(per_element), values.len())?;
        Ok(values.iter().flat_map(|v| to_bytes(*v)).collect())
    }

    /// Values that are stored wider than they are; a byte may hold several.
    fn narrow<W, T, const N: usize>(
        &self,
        field: &'static str,
        values: &[W],
        to_bytes: impl Fn(T) -> [u8; N],
    ) -> Result<Bytes, TensorFault>
    where
        W: Copy + Into<i128>,
        T: TryFrom<i128>,
    {
        let bytes = self
            .element
            .byte_len(&self.tensor.dims)?
            .unwrap_or_default();
        self.check_count(field, (bytes / N) as u64, values.len())?;
        let mut packed = Vec::with_capacity(bytes);
        for (index, value) in values.iter().enumerate() {
            let value: i128 = (*value).into();
            let bool_range = self.element != ElementType::Bool || matches!(value, 0 | 1);
            match T::try_from(value) {
                Ok(value) if bool_range => packed.extend(to_bytes(value)),
                _ => {
                    return Err(TensorFault::OutOfRange {
                        element: self.element,
                        index,
                        value,
                    });
                }
            }
        }
        Ok(packed.into())
    }

    /// Six-bit floats: one value each, packed into a bit stream from the low bits up.
    fn six_bits(&self, values: &[i32]) -> Result<Bytes, TensorFault> {
        let count = element_count(&self.tensor.dims)?;
        self.check_count("int32_data", count, values.len())?;
        let mut packed = Vec::new();
        let (mut bits, mut held) = (0_u16, 0);
        for (index, &value) in values.iter().enumerate() {
            let six = u16::try_from(value).ok().filter(|v| *v < 64);
            bits |= six.ok_or(TensorFault::OutOfRange {
                element: self.element,
                index,
                value: value.into(),
            })? << held;
            held += 6;
            if held >= 8 {
                packed.extend(bits.to_le_bytes().first());
                bits >>= 8;
                held -= 8;
            }
        }
        if held > 0 {
            packed.extend(bits.to_le_bytes().first());
        }
        Ok(packed.into())
    }

    fn check_count(
        &self,
        field: &'static str,
        expected: u64,
        found: usize,
    ) -> Result<(), TensorFault> {
        if expected == found as u64 {
            return Ok(());
        }
        Err(TensorFault::ValueCount {
            field,
            element: self.element,
            dims: self.tensor.dims.clone(),
            expected,
            found: found as u64,
        })
    }
}
