//! Tensors of any element type that diffusion graphs take or give.

use std::fmt;

use half::{bf16, f16};
use ndarray::{ArrayD, ArrayViewD};

/// Element types that the engines exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE binary64.
    F64,
    /// Signed 64-bit.
    I64,
    /// Signed 32-bit.
    I32,
    /// Unsigned 8-bit.
    U8,
    /// Signed 8-bit.
    I8,
    /// Boolean.
    Bool,
}

impl DType {
    /// Short name, e.g. `f16`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F64 => "f64",
            Self::I64 => "i64",
            Self::I32 => "i32",
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::Bool => "bool",
        }
    }

    /// Whether values have a fraction.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16 | Self::F64)
    }

    /// The type with this number in ONNX's `TensorProto.DataType`.
    pub fn from_onnx(code: i32) -> Option<Self> {
        Some(match code {
            1 => Self::F32,
            2 => Self::U8,
            3 => Self::I8,
            6 => Self::I32,
            7 => Self::I64,
            9 => Self::Bool,
            10 => Self::F16,
            11 => Self::F64,
            16 => Self::BF16,
            _ => return None,
        })
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A dense tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum Tensor {
    /// Elements of [`DType::F32`].
    F32(ArrayD<f32>),
    /// Elements of [`DType::F16`].
    F16(ArrayD<f16>),
    /// Elements of [`DType::BF16`].
    BF16(ArrayD<bf16>),
    /// Elements of [`DType::F64`].
    F64(ArrayD<f64>),
    /// Elements of [`DType::I64`].
    I64(ArrayD<i64>),
    /// Elements of [`DType::I32`].
    I32(ArrayD<i32>),
    /// Elements of [`DType::U8`].
    U8(ArrayD<u8>),
    /// Elements of [`DType::I8`].
    I8(ArrayD<i8>),
    /// Elements of [`DType::Bool`].
    Bool(ArrayD<bool>),
}

/// Runs `$body` with `$array` bound to the array of whatever type.
macro_rules! each {
    ($tensor:expr, $array:ident => $body:expr) => {
        match $tensor {
            $crate::tensor::Tensor::F32($array) => $body,
            $crate::tensor::Tensor::F16($array) => $body,
            $crate::tensor::Tensor::BF16($array) => $body,
            $crate::tensor::Tensor::F64($array) => $body,
            $crate::tensor::Tensor::I64($array) => $body,
            $crate::tensor::Tensor::I32($array) => $body,
            $crate::tensor::Tensor::U8($array) => $body,
            $crate::tensor::Tensor::I8($array) => $body,
            $crate::tensor::Tensor::Bool($array) => $body,
        }
    };
}
pub(crate) use each;

impl Tensor {
    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::BF16(_) => DType::BF16,
            Self::F64(_) => DType::F64,
            Self::I64(_) => DType::I64,
            Self::I32(_) => DType::I32,
            Self::U8(_) => DType::U8,
            Self::I8(_) => DType::I8,
            Self::Bool(_) => DType::Bool,
        }
    }

    /// Dimensions, outermost first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        each!(self, a => a.shape())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        each!(self, a => a.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as f64 (an i64 beyond 2^53 is rounded).
    pub fn to_f64(&self) -> ArrayD<f64> {
        match self {
            Self::F32(a) => a.mapv(f64::from),
            Self::F16(a) => a.mapv(f16::to_f64),
            Self::BF16(a) => a.mapv(bf16::to_f64),
            Self::F64(a) => a.clone(),
            Self::I64(a) => a.mapv(|v| v as f64),
            Self::I32(a) => a.mapv(f64::from),
            Self::U8(a) => a.mapv(f64::from),
            Self::I8(a) => a.mapv(f64::from),
            Self::Bool(a) => a.mapv(|v| if v { 1.0 } else { 0.0 }),
        }
    }

    /// The f32 elements, if that is the type.
    pub fn as_f32(&self) -> Option<ArrayViewD<'_, f32>> {
        match self {
            Self::F32(a) => Some(a.view()),
            _ => None,
        }
    }

    /// The same values as another type: floats rounded to nearest-even, integers truncated toward zero and
    /// saturated, booleans by `!= 0`.
    pub fn cast(&self, dtype: DType) -> Self {
        if self.dtype() == dtype {
            return self.clone();
        }
        // Every other type but large i64 goes through f64 without loss.
        if let (Self::I32(a), DType::I64) = (self, dtype) {
            return Self::I64(a.mapv(i64::from));
        }
        Self::from_f64(self.to_f64(), dtype)
    }

    /// The values in the given type, converted as by [`Self::cast`].
    pub fn from_f64(values: ArrayD<f64>, dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32(values.mapv(|v| v as f32)),
            DType::F16 => Self::F16(values.mapv(f16::from_f64)),
            DType::BF16 => Self::BF16(values.mapv(bf16::from_f64)),
            DType::F64 => Self::F64(values),
            DType::I64 => Self::I64(values.mapv(|v| v as i64)),
            DType::I32 => Self::I32(values.mapv(|v| v as i32)),
            DType::U8 => Self::U8(values.mapv(|v| v as u8)),
            DType::I8 => Self::I8(values.mapv(|v| v as i8)),
            DType::Bool => Self::Bool(values.mapv(|v| v != 0.0)),
        }
    }

    /// A tensor of little-endian bytes, as ONNX stores them; `None` if they are too few or too many.
    pub fn from_le_bytes(dtype: DType, shape: &[usize], bytes: &[u8]) -> Option<Self> {
        macro_rules! read {
            ($variant:ident, $type:ty) => {{
                let (words, rest) = bytes.as_chunks();
                let values = words.iter().map(|w| <$type>::from_le_bytes(*w)).collect();
                let array = ArrayD::from_shape_vec(shape, values).ok()?;
                rest.is_empty().then_some(Self::$variant(array))
            }};
        }
        match dtype {
            DType::F32 => read!(F32, f32),
            DType::F16 => read!(F16, f16),
            DType::BF16 => read!(BF16, bf16),
            DType::F64 => read!(F64, f64),
            DType::I64 => read!(I64, i64),
            DType::I32 => read!(I32, i32),
            DType::U8 => read!(U8, u8),
            DType::I8 => read!(I8, i8),
            DType::Bool => {
                let values = bytes.iter().map(|b| *b != 0).collect();
                Some(Self::Bool(ArrayD::from_shape_vec(shape, values).ok()?))
            }
        }
    }

    /// Whether no element is infinite or NaN.
    pub fn is_finite(&self) -> bool {
        match self {
            Self::F32(a) => a.iter().all(|v| v.is_finite()),
            Self::F16(a) => a.iter().all(|v| v.is_finite()),
            Self::BF16(a) => a.iter().all(|v| v.is_finite()),
            Self::F64(a) => a.iter().all(|v| v.is_finite()),
            _ => true,
        }
    }
}

macro_rules! from_array {
    ($($variant:ident: $type:ty),*) => {
        $(impl<D: ndarray::Dimension> From<ndarray::Array<$type, D>> for Tensor {
            fn from(array: ndarray::Array<$type, D>) -> Self {
                Self::$variant(array.into_dyn())
            }
        })*
    };
}
from_array!(F32: f32, F16: f16, BF16: bf16, F64: f64, I64: i64, I32: i32, U8: u8, I8: i8, Bool: bool);

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::arr1;

    #[test]
    fn bytes_are_little_endian_and_as_many_as_the_shape_says() {
        let bytes = [1, 0, 0, 0, 255, 255, 255, 255];
        let read = |dtype, shape: &[usize]| Tensor::from_le_bytes(dtype, shape, &bytes);
        assert_eq!(read(DType::I32, &[2]), Some(arr1(&[1_i32, -1]).into()));
        assert_eq!(
            read(DType::I64, &[1]),
            Some(arr1(&[-4_294_967_295_i64]).into())
        );
        assert_eq!(read(DType::F16, &[2, 2]).unwrap().shape(), [2, 2]);
        assert_eq!(read(DType::Bool, &[8]).unwrap().to_f64().sum(), 5.0);
        assert!(read(DType::I32, &[3]).is_none() && read(DType::I64, &[2]).is_none());
        assert!(Tensor::from_le_bytes(DType::I32, &[1], &bytes[..5]).is_none());
    }

    #[test]
    fn casts_round_and_saturate() {
        let values = Tensor::from(arr1(&[1.0_f64, -2.7, 3e5, 1.000_488_4]));
        let cases: [(DType, [f64; 4]); 4] = [
            (
                DType::F16,
                [1.0, -2.699_218_75, f64::INFINITY, 1.0009765625],
            ),
            (DType::I8, [1.0, -2.0, 127.0, 1.0]),
            (DType::U8, [1.0, 0.0, 255.0, 1.0]),
            (DType::Bool, [1.0; 4]),
        ];
        for (dtype, expected) in cases {
            let cast = values.cast(dtype);
            assert_eq!(cast.dtype(), dtype);
            assert_eq!(cast.to_f64(), arr1(&expected).into_dyn(), "{dtype}");
        }
        assert!(!values.cast(DType::F16).is_finite());
        assert!(values.is_finite());
    }
}
