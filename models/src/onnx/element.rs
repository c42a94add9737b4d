//! The element types of ONNX tensors.

use std::fmt;

/// The element type of a tensor: `TensorProto.DataType`, up to IR version 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the documentation
#[repr(i32)]
pub enum ElementType {
    F32 = 1,
    U8 = 2,
    I8 = 3,
    U16 = 4,
    I16 = 5,
    I32 = 6,
    I64 = 7,
    String = 8,
    Bool = 9,
    F16 = 10,
    F64 = 11,
    U32 = 12,
    U64 = 13,
    Complex64 = 14,
    Complex128 = 15,
    Bf16 = 16,
    F8E4M3Fn = 17,
    F8E4M3Fnuz = 18,
    F8E5M2 = 19,
    F8E5M2Fnuz = 20,
    U4 = 21,
    I4 = 22,
    F4E2M1 = 23,
    F8E8M0 = 24,
    U2 = 25,
    I2 = 26,
    F6E2M3 = 27,
    F6E3M2 = 28,
}

impl ElementType {
    /// Every element type, by ascending ONNX number.
    pub const ALL: [Self; 28] = [
        Self::F32,
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::I32,
        Self::I64,
        Self::String,
        Self::Bool,
        Self::F16,
        Self::F64,
        Self::U32,
        Self::U64,
        Self::Complex64,
        Self::Complex128,
        Self::Bf16,
        Self::F8E4M3Fn,
        Self::F8E4M3Fnuz,
        Self::F8E5M2,
        Self::F8E5M2Fnuz,
        Self::U4,
        Self::I4,
        Self::F4E2M1,
        Self::F8E8M0,
        Self::U2,
        Self::I2,
        Self::F6E2M3,
        Self::F6E3M2,
    ];

    /// The type with this ONNX number; `None` for 0 (undefined) and unknown ones.
    pub fn from_onnx(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| *t as i32 == number)
    }

    /// The number in `TensorProto.data_type` and `TypeProto.Tensor.elem_type`.
    pub fn onnx(self) -> i32 {
        self as i32
    }

    /// Bits of one element as stored in `raw_data`; `None` for strings, which
    /// have no fixed size.
    pub fn bits(self) -> Option<u32> {
        use ElementType::*;
        Some(match self {
            String => return None,
            U2 | I2 => 2,
            U4 | I4 | F4E2M1 => 4,
            F6E2M3 | F6E3M2 => 6,
            Bool | U8 | I8 | F8E4M3Fn | F8E4M3Fnuz | F8E5M2 | F8E5M2Fnuz | F8E8M0 => 8,
            U16 | I16 | F16 | Bf16 => 16,
            F32 | I32 | U32 => 32,
            F64 | I64 | U64 | Complex64 => 64,
            Complex128 => 128,
        })
    }

    /// The spelling of ONNX's textual form and of its type strings (`tensor(float16)`).
    pub fn name(self) -> &'static str {
        use ElementType::*;
        match self {
            F32 => "float",
            U8 => "uint8",
            I8 => "int8",
            U16 => "uint16",
            I16 => "int16",
            I32 => "int32",
            I64 => "int64",
            String => "string",
            Bool => "bool",
            F16 => "float16",
            F64 => "double",
            U32 => "uint32",
            U64 => "uint64",
            Complex64 => "complex64",
            Complex128 => "complex128",
            Bf16 => "bfloat16",
            F8E4M3Fn => "float8e4m3fn",
            F8E4M3Fnuz => "float8e4m3fnuz",
            F8E5M2 => "float8e5m2",
            F8E5M2Fnuz => "float8e5m2fnuz",
            U4 => "uint4",
            I4 => "int4",
            F4E2M1 => "float4e2m1",
            F8E8M0 => "float8e8m0",
            U2 => "uint2",
            I2 => "int2",
            F6E2M3 => "float6e2m3",
            F6E3M2 => "float6e3m2",
        }
    }

    /// Whether this is one of the types that a LinFusion operator computes in:
    /// f32, f16, bf16, f64.
    pub fn is_compute_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16 | Self::F64)
    }

    /// Bytes that `dims` elements of this type take, `None` for strings.
    ///
    /// Sub-byte types are packed, with the last byte padded.
    ///
    /// # Errors
    /// A negative dimension, or a size that does not fit the address space.
    pub fn byte_len(self, dims: &[i64]) -> Result<Option<usize>, ShapeError> {
        let count = element_count(dims)?;
        let Some(bits) = self.bits() else {
            return Ok(None);
        };
        // count <= u64::MAX and bits <= 128, so the product fits in u128.
        let bytes = (u128::from(count) * u128::from(bits)).div_ceil(8);
        match isize::try_from(bytes) {
            Ok(bytes) => Ok(Some(bytes.unsigned_abs())),
            Err(_) => Err(ShapeError::TooLarge {
                dims: dims.to_vec(),
            }),
        }
    }
}

impl fmt::Display for ElementType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A shape that no tensor can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A dimension below zero.
    #[error("dimension {axis} of {dims:?} is negative")]
    Negative {
        /// Position of the dimension.
        axis: usize,
        /// All dimensions.
        dims: Vec<i64>,
    },
    /// The number of elements or bytes overflows.
    #[error("{dims:?} has more elements than any memory can hold")]
    TooLarge {
        /// All dimensions.
        dims: Vec<i64>,
    },
}

/// The number of elements of a tensor of shape `dims` (1 for a scalar).
///
/// # Errors
/// A negative dimension, or a count above 2^63 - 1. A zero dimension does not
/// excuse the others: `[0, 2^62, 2^62]` is refused, because code that multiplies
/// in another order would overflow.
pub fn element_count(dims: &[i64]) -> Result<u64, ShapeError> {
    let mut nonzero: u128 = 1;
    let mut has_zero = false;
    for (axis, &dim) in dims.iter().enumerate() {
        let Ok(dim) = u64::try_from(dim) else {
            return Err(ShapeError::Negative {
                axis,
                dims: dims.to_vec(),
            });
        };
        has_zero |= dim == 0;
        // Both factors are below 2^63 here, so this cannot overflow u128.
        nonzero *= u128::from(dim.max(1));
        if nonzero > i64::MAX.unsigned_abs().into() {
            return Err(ShapeError::TooLarge {
                dims: dims.to_vec(),
            });
        }
    }
    Ok(if has_zero {
        0
    } else {
        u64::try_from(nonzero).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip_and_are_dense() {
        for (index, element) in ElementType::ALL.into_iter().enumerate() {
            assert_eq!(element.onnx(), i32::try_from(index).unwrap() + 1);
            assert_eq!(ElementType::from_onnx(element.onnx()), Some(element));
        }
        for unknown in [i32::MIN, -1, 0, 29, i32::MAX] {
            assert_eq!(ElementType::from_onnx(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn byte_lengths() {
        use ElementType::*;
        let cases: [(ElementType, &[i64], Option<usize>); 10] = [
            (F32, &[], Some(4)),
            (F6E2M3, &[5], Some(4)),
            (F32, &[2, 3], Some(24)),
            (F32, &[2, 0, 3], Some(0)),
            (U4, &[3], Some(2)),
            (I4, &[4], Some(2)),
            (U2, &[5], Some(2)),
            (Bool, &[7], Some(7)),
            (Complex128, &[2], Some(32)),
            (String, &[2], None),
        ];
        for (element, dims, expected) in cases {
            assert_eq!(element.byte_len(dims), Ok(expected), "{element} {dims:?}");
        }
    }

    #[test]
    fn impossible_shapes() {
        let big = 1_i64 << 62;
        for dims in [
            &[i64::MAX, i64::MAX][..],
            &[big, big, 0],
            &[0, big, big],
            &[1 << 32, 1 << 32],
        ] {
            assert!(
                matches!(element_count(dims), Err(ShapeError::TooLarge { .. })),
                "{dims:?}"
            );
        }
        assert!(matches!(
            ElementType::F32.byte_len(&[i64::MAX]),
            Err(ShapeError::TooLarge { .. })
        ));
        assert!(matches!(
            element_count(&[2, -1]),
            Err(ShapeError::Negative { axis: 1, .. })
        ));
    }
}
