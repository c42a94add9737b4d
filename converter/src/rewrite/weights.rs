//! Checkpoint tensors as ONNX initializers: transposed to `[in, out]` and
//! rounded to the graph's element type.

use bytes::Bytes;
use half::{bf16, f16};
use linfusion_models::checkpoint::{CheckpointTensor, FloatType};
use linfusion_models::onnx::proto::TensorProto;
use linfusion_models::onnx::{ElementType, make};

/// Whether to swap the two axes of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Orientation {
    /// As PyTorch stores it: `[out, in]`, or a vector.
    Stored,
    /// `[in, out]`, as a MatMul wants it.
    Transposed,
}

/// An initializer and what its conversion lost.
pub struct Converted {
    /// The initializer.
    pub tensor: TensorProto,
    /// Finite values that became infinite.
    pub overflowed: usize,
}

/// Makes an initializer of a checkpoint tensor, times `factor` (a power of two,
/// so exact). `None` if `element` is no floating-point type we compute in.
#[must_use]
pub fn initializer(
    name: &str,
    source: &CheckpointTensor,
    orientation: Orientation,
    factor: f64,
    element: ElementType,
) -> Option<Converted> {
    let dims: Vec<i64> = source.shape.iter().map(|&d| d as i64).collect();
    let order = match (orientation, &source.shape[..]) {
        (Orientation::Transposed, &[rows, cols]) => Order::Swapped { rows, cols },
        _ => Order::Same,
    };
    let dims = match order {
        Order::Swapped { .. } => dims.into_iter().rev().collect(),
        Order::Same => dims,
    };
    let same_type = matches!(
        (source.dtype, element),
        (FloatType::F32, ElementType::F32)
            | (FloatType::F16, ElementType::F16)
            | (FloatType::BF16, ElementType::Bf16)
            | (FloatType::F64, ElementType::F64)
    );
    let (bytes, overflowed) = if same_type && factor == 1.0 {
        let bytes = match source.dtype.bytes() {
            2 => permute::<2>(&source.bytes, order),
            4 => permute::<4>(&source.bytes, order),
            _ => permute::<8>(&source.bytes, order),
        };
        (bytes, 0)
    } else {
        let values: Vec<f64> = order
            .of(&source.to_f64())
            .into_iter()
            .map(|v| v * factor)
            .collect();
        encode(&values, element)?
    };
    Some(Converted {
        tensor: make::tensor(name, element, &dims, bytes),
        overflowed,
    })
}

#[derive(Clone, Copy)]
enum Order {
    Same,
    Swapped { rows: usize, cols: usize },
}

impl Order {
    fn of<T: Copy>(self, values: &[T]) -> Vec<T> {
        match self {
            Order::Same => values.to_vec(),
            Order::Swapped { rows, cols } => {
                // Blocks keep both sides of the transposition in cache.
                const BLOCK: usize = 32;
                let mut out = values.to_vec();
                for r0 in (0..rows).step_by(BLOCK) {
                    for c0 in (0..cols).step_by(BLOCK) {
                        for r in r0..(r0 + BLOCK).min(rows) {
                            for c in c0..(c0 + BLOCK).min(cols) {
                                if let (Some(to), Some(from)) =
                                    (out.get_mut(c * rows + r), values.get(r * cols + c))
                                {
                                    *to = *from;
                                }
                            }
                        }
                    }
                }
                out
            }
        }
    }
}

fn permute<const N: usize>(bytes: &Bytes, order: Order) -> Bytes {
    match order {
        Order::Same => bytes.clone(),
        Order::Swapped { .. } => {
            let (items, _) = bytes.as_chunks::<N>();
            Bytes::from_owner(order.of(items).into_flattened())
        }
    }
}

/// `values` as little-endian bytes of `element`, and how many of the finite became infinite.
pub fn encode(values: &[f64], element: ElementType) -> Option<(Bytes, usize)> {
    fn pack<const N: usize>(values: &[f64], f: impl Fn(f64) -> ([u8; N], bool)) -> (Bytes, usize) {
        let mut overflowed = 0;
        let mut bytes = Vec::with_capacity(values.len().saturating_mul(N));
        for &v in values {
            let (b, infinite) = f(v);
            overflowed += usize::from(infinite && v.is_finite());
            bytes.extend_from_slice(&b);
        }
        (bytes.into(), overflowed)
    }
    Some(match element {
        ElementType::F32 => pack(values, |v| {
            ((v as f32).to_le_bytes(), (v as f32).is_infinite())
        }),
        ElementType::F64 => pack(values, |v| (v.to_le_bytes(), false)),
        ElementType::F16 => pack(values, |v| {
            (
                f16::from_f64(v).to_le_bytes(),
                f16::from_f64(v).is_infinite(),
            )
        }),
        ElementType::Bf16 => pack(values, |v| {
            (
                bf16::from_f64(v).to_le_bytes(),
                bf16::from_f64(v).is_infinite(),
            )
        }),
        _ => return None,
    })
}
