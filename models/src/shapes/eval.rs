//! Evaluation of the operators that shape arithmetic is made of, on small
//! known tensors.

use crate::onnx::proto::NodeProto;

use super::SMALL;
use super::value::{Elements, Fact, axis, count};
use crate::graph::{attr_int, attr_ints, domain, op};

/// ONNX element type numbers that evaluation tells apart.
pub mod element {
    #![allow(missing_docs)]
    pub const FLOAT: i32 = 1;
    pub const INT32: i32 = 6;
    pub const INT64: i32 = 7;
    pub const BOOL: i32 = 9;
    pub const FLOAT16: i32 = 10;
    pub const DOUBLE: i32 = 11;
    pub const BFLOAT16: i32 = 16;

    #[must_use]
    pub fn is_float(element: i32) -> bool {
        matches!(element, FLOAT | FLOAT16 | DOUBLE | BFLOAT16)
    }
}

/// Decodes little-endian tensor bytes of the types shape arithmetic uses.
#[must_use]
pub fn decode(element: i32, bytes: &[u8]) -> Option<Elements> {
    fn chunks<const N: usize, T>(bytes: &[u8], f: impl Fn([u8; N]) -> T) -> Vec<T> {
        bytes
            .chunks_exact(N)
            .filter_map(|c| c.try_into().ok())
            .map(f)
            .collect()
    }
    Some(match element {
        element::FLOAT => Elements::Float(chunks(bytes, |b| f64::from(f32::from_le_bytes(b)))),
        element::DOUBLE => Elements::Float(chunks(bytes, f64::from_le_bytes)),
        element::FLOAT16 => {
            Elements::Float(chunks(bytes, |b| half::f16::from_le_bytes(b).to_f64()))
        }
        element::BFLOAT16 => {
            Elements::Float(chunks(bytes, |b| half::bf16::from_le_bytes(b).to_f64()))
        }
        element::INT64 => Elements::Int(chunks(bytes, i64::from_le_bytes)),
        element::INT32 => Elements::Int(chunks(bytes, |b| i64::from(i32::from_le_bytes(b)))),
        element::BOOL => Elements::Int(bytes.iter().map(|&b| i64::from(b != 0)).collect()),
        _ => return None,
    })
}

/// Fills in the elements of `outputs` where they follow from known inputs.
pub fn evaluate(node: &NodeProto, inputs: &[&Fact], outputs: &mut [Fact]) {
    if !domain(node).is_empty() || outputs.is_empty() {
        return;
    }
    if op(node) == "Split" {
        split(inputs, outputs);
        return;
    }
    let Some(first) = outputs.first_mut() else {
        return;
    };
    if first.elements.is_none() && first.count().is_some_and(|n| n <= SMALL) {
        first.elements = single(node, inputs, first);
        if first.elements.as_ref().map(|e| e.len() as i64) != first.count() {
            first.elements = None;
        }
    }
}

fn single(node: &NodeProto, inputs: &[&Fact], out: &Fact) -> Option<Elements> {
    let elements = |i: usize| inputs.get(i).and_then(|f| f.elements.as_ref());
    match op(node) {
        "Shape" => {
            let shape = inputs.first()?.shape.as_ref()?;
            let rank = shape.len() as i64;
            let clamp = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank) as usize;
            let start = clamp(attr_int(node, "start").unwrap_or(0));
            let end = clamp(attr_int(node, "end").unwrap_or(rank));
            Some(Elements::Int(shape.get(start..end).unwrap_or(&[]).to_vec()))
        }
        "Size" => Some(Elements::Int(vec![inputs.first()?.count()?])),
        "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Dropout" => {
            elements(0).cloned()
        }
        "Cast" => elements(0).map(|e| e.cast(out.element.is_some_and(element::is_float))),
        "CastLike" => elements(0).map(|e| e.cast(out.element.is_some_and(element::is_float))),
        "Concat" => concat(node, inputs),
        "Gather" => gather(node, inputs),
        "Slice" => {
            let ranges = slice_ranges(node, inputs)?;
            elements(0)?.select(&strided_indices(inputs.first()?.shape.as_ref()?, &ranges)?)
        }
        "Transpose" => transpose(node, inputs),
        "Expand" | "Tile" if elements(0)?.len() == 1 => {
            elements(0)?.select(&vec![0; usize::try_from(out.count()?).ok()?])
        }
        "Range" => {
            let (s, d) = (
                *elements(0)?.ints()?.first()?,
                *elements(2)?.ints()?.first()?,
            );
            Some(Elements::Int(
                (0..out.count()?)
                    .map(|i| s.wrapping_add(i.wrapping_mul(d)))
                    .collect(),
            ))
        }
        "ConstantOfShape" => {
            let value = crate::graph::attribute(node, "value").and_then(|a| a.t.as_option());
            let one = match value {
                None => Elements::Float(vec![0.0]),
                Some(t) => decode(t.data_type?, t.raw_data.as_deref()?)?,
            };
            one.select(&vec![0; usize::try_from(out.count()?).ok()?])
        }
        "ReduceProd" | "ReduceSum" | "ReduceMax" | "ReduceMin" if out.count() == Some(1) => {
            let v = elements(0)?;
            let fold = |f: fn(f64, f64) -> f64, start: f64| {
                (0..v.len()).filter_map(|i| v.float(i)).fold(start, f)
            };
            let x = match op(node) {
                "ReduceProd" => fold(|a, b| a * b, 1.0),
                "ReduceSum" => fold(|a, b| a + b, 0.0),
                "ReduceMax" => fold(f64::max, f64::NEG_INFINITY),
                _ => fold(f64::min, f64::INFINITY),
            };
            Some(Elements::Float(vec![x]).cast(matches!(v, Elements::Float(_))))
        }
        "Where" => {
            let (c, a, b) = (inputs.first()?, inputs.get(1)?, inputs.get(2)?);
            let pick = |f: &Fact, i: i64| f.elements.as_ref()?.float(broadcast_index(i, out, f)?);
            let both_int = a.ints().is_some() && b.ints().is_some();
            let v = (0..out.count()?)
                .map(|i| {
                    if pick(c, i)? != 0.0 {
                        pick(a, i)
                    } else {
                        pick(b, i)
                    }
                })
                .collect::<Option<Vec<f64>>>()?;
            Some(Elements::Float(v).cast(!both_int))
        }
        name => match inputs {
            [a] => unary(name, a),
            [a, b] => binary(name, a, b, out),
            _ => None,
        },
    }
}

fn unary(name: &str, a: &Fact) -> Option<Elements> {
    let f: fn(f64) -> f64 = match name {
        "Sqrt" => f64::sqrt,
        "Reciprocal" => |x| 1.0 / x,
        "Neg" => |x| -x,
        "Floor" => f64::floor,
        "Ceil" => f64::ceil,
        "Round" => f64::round,
        "Abs" => f64::abs,
        "Exp" => f64::exp,
        "Not" => |x| f64::from(x == 0.0),
        _ => return None,
    };
    let e = a.elements.as_ref()?;
    let v = (0..e.len())
        .map(|i| e.float(i).map(f))
        .collect::<Option<Vec<_>>>()?;
    Some(Elements::Float(v).cast(matches!(e, Elements::Float(_))))
}

fn binary(name: &str, a: &Fact, b: &Fact, out: &Fact) -> Option<Elements> {
    let n = out.count()?;
    let pairs = |f: &Fact, i: i64| broadcast_index(i, out, f);
    if let (Some(x), Some(y)) = (a.ints(), b.ints()) {
        let f: fn(i64, i64) -> Option<i64> = match name {
            "Add" => i64::checked_add,
            "Sub" => i64::checked_sub,
            "Mul" => i64::checked_mul,
            "Div" => i64::checked_div,
            "Mod" => i64::checked_rem_euclid,
            "Max" => |x, y| Some(x.max(y)),
            "Min" => |x, y| Some(x.min(y)),
            "Equal" => |x, y| Some(i64::from(x == y)),
            "Less" => |x, y| Some(i64::from(x < y)),
            "LessOrEqual" => |x, y| Some(i64::from(x <= y)),
            "Greater" => |x, y| Some(i64::from(x > y)),
            "GreaterOrEqual" => |x, y| Some(i64::from(x >= y)),
            "And" => |x, y| Some(i64::from(x != 0 && y != 0)),
            "Or" => |x, y| Some(i64::from(x != 0 || y != 0)),
            "Pow" => |x, y| x.checked_pow(u32::try_from(y).ok()?),
            _ => return None,
        };
        return (0..n)
            .map(|i| f(*x.get(pairs(a, i)?)?, *y.get(pairs(b, i)?)?))
            .collect::<Option<Vec<_>>>()
            .map(Elements::Int);
    }
    let f: fn(f64, f64) -> f64 = match name {
        "Add" => |x, y| x + y,
        "Sub" => |x, y| x - y,
        "Mul" => |x, y| x * y,
        "Div" => |x, y| x / y,
        "Pow" => f64::powf,
        "Max" => f64::max,
        "Min" => f64::min,
        _ => return None,
    };
    (0..n)
        .map(|i| {
            Some(f(
                a.elements.as_ref()?.float(pairs(a, i)?)?,
                b.elements.as_ref()?.float(pairs(b, i)?)?,
            ))
        })
        .collect::<Option<Vec<_>>>()
        .map(Elements::Float)
}

/// The flat index into `operand` for flat index `i` of the broadcast `out`.
fn broadcast_index(i: i64, out: &Fact, operand: &Fact) -> Option<usize> {
    let (out, shape) = (out.shape.as_ref()?, operand.shape.as_ref()?);
    let (mut rest, mut index, mut stride) = (i, 0i64, 1i64);
    for (back, &d) in out.iter().rev().enumerate() {
        let here = if d == 0 { 0 } else { rest % d };
        rest = if d == 0 { 0 } else { rest / d };
        if let Some(&s) = shape.len().checked_sub(back + 1).and_then(|k| shape.get(k)) {
            if s != 1 {
                index += here * stride;
            }
            stride *= s;
        }
    }
    usize::try_from(index).ok()
}

fn concat(node: &NodeProto, inputs: &[&Fact]) -> Option<Elements> {
    // Shape arithmetic concatenates vectors only.
    if inputs
        .iter()
        .any(|f| f.shape.as_ref().is_none_or(|s| s.len() != 1))
        || attr_int(node, "axis")? > 0
    {
        return None;
    }
    if inputs.iter().all(|f| f.ints().is_some()) {
        return Some(Elements::Int(
            inputs
                .iter()
                .flat_map(|f| f.ints().unwrap_or(&[]))
                .copied()
                .collect(),
        ));
    }
    let mut all = Vec::new();
    for f in inputs {
        let e = f.elements.as_ref()?;
        all.extend((0..e.len()).filter_map(|i| e.float(i)));
    }
    Some(Elements::Float(all))
}

fn gather(node: &NodeProto, inputs: &[&Fact]) -> Option<Elements> {
    let data = inputs.first()?;
    if data.shape.as_ref()?.len() != 1 || axis(attr_int(node, "axis").unwrap_or(0), 1)? != 0 {
        return None;
    }
    let n = data.count()?;
    let indices = inputs
        .get(1)?
        .ints()?
        .iter()
        .map(|&i| usize::try_from(if i < 0 { i + n } else { i }).ok())
        .collect::<Option<Vec<_>>>()?;
    data.elements.as_ref()?.select(&indices)
}

fn transpose(node: &NodeProto, inputs: &[&Fact]) -> Option<Elements> {
    let data = inputs.first()?;
    let shape = data.shape.as_ref()?;
    let perm = permutation(node, shape.len())?;
    let mut strides = vec![1i64; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].checked_mul(shape[i + 1])?;
    }
    let out: Vec<i64> = perm.iter().map(|&p| shape[p]).collect();
    let indices = (0..count(&out)?)
        .map(|flat| {
            let (mut rest, mut index) = (flat, 0);
            for (&p, &d) in perm.iter().zip(&out).rev() {
                index += (rest % d) * strides[p];
                rest /= d;
            }
            usize::try_from(index).ok()
        })
        .collect::<Option<Vec<_>>>()?;
    data.elements.as_ref()?.select(&indices)
}

/// The permutation of a Transpose, checked against `rank`.
#[must_use]
pub fn permutation(node: &NodeProto, rank: usize) -> Option<Vec<usize>> {
    let perm: Vec<usize> = match attr_ints(node, "perm") {
        None | Some([]) => (0..rank).rev().collect(),
        Some(p) => p
            .iter()
            .map(|&i| usize::try_from(i).ok())
            .collect::<Option<_>>()?,
    };
    let mut seen = vec![false; rank];
    for &p in &perm {
        let slot = seen.get_mut(p)?;
        if std::mem::replace(slot, true) {
            return None;
        }
    }
    (perm.len() == rank).then_some(perm)
}

/// One axis of a Slice: first index, step and number of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SliceRange {
    /// First index taken.
    pub start: i64,
    /// Distance between two taken indices.
    pub step: i64,
    /// How many are taken.
    pub len: i64,
}

/// The range that a Slice takes on every axis of its input.
#[must_use]
pub fn slice_ranges(node: &NodeProto, inputs: &[&Fact]) -> Option<Vec<SliceRange>> {
    let shape = inputs.first()?.shape.as_ref()?;
    let by_input = |i: usize| inputs.get(i).and_then(|f| f.ints()).map(<[i64]>::to_vec);
    let given = |i: usize| inputs.get(i).is_some_and(|f| f.shape.is_some());
    let (starts, ends, axes, steps) = match attr_ints(node, "starts") {
        Some(starts) => (
            starts.to_vec(),
            attr_ints(node, "ends")?.to_vec(),
            attr_ints(node, "axes").map(<[i64]>::to_vec),
            None,
        ),
        None => {
            // An axes or steps input that is there but unknown leaves the slice unknown.
            if (given(3) && by_input(3).is_none()) || (given(4) && by_input(4).is_none()) {
                return None;
            }
            (by_input(1)?, by_input(2)?, by_input(3), by_input(4))
        }
    };
    let mut ranges: Vec<SliceRange> = shape
        .iter()
        .map(|&d| SliceRange {
            start: 0,
            step: 1,
            len: d,
        })
        .collect();
    let axes = axes.unwrap_or_else(|| (0..starts.len() as i64).collect());
    for (i, &a) in axes.iter().enumerate() {
        let a = axis(a, shape.len())?;
        let d = shape[a];
        let step = steps.as_ref().map_or(Some(1), |s| s.get(i).copied())?;
        let wrap = |v: i64| if v < 0 { v.saturating_add(d) } else { v };
        let (s, e) = (wrap(*starts.get(i)?), wrap(*ends.get(i)?));
        ranges[a] = if step > 0 {
            let (s, e) = (s.clamp(0, d), e.clamp(0, d));
            SliceRange {
                start: s,
                step,
                len: (e - s).max(0).checked_add(step - 1)? / step,
            }
        } else if step < 0 {
            let s = s.clamp(-1, d - 1);
            let e = (if *ends.get(i)? < -d { -1 } else { e }).clamp(-1, d - 1);
            let back = step.checked_neg()?;
            SliceRange {
                start: s,
                step,
                len: (s - e).max(0).checked_add(back - 1)? / back,
            }
        } else {
            return None;
        };
    }
    Some(ranges)
}

fn strided_indices(shape: &[i64], ranges: &[SliceRange]) -> Option<Vec<usize>> {
    let mut indices = vec![0i64];
    for (&d, r) in shape.iter().zip(ranges) {
        indices = indices
            .iter()
            .flat_map(|&base| (0..r.len).map(move |i| base * d + r.start + i * r.step))
            .collect();
        if indices.len() as i64 > SMALL {
            return None;
        }
    }
    indices
        .into_iter()
        .map(|i| usize::try_from(i).ok())
        .collect()
}

fn split(inputs: &[&Fact], outputs: &mut [Fact]) {
    let Some(data) = inputs
        .first()
        .filter(|f| f.shape.as_ref().is_some_and(|s| s.len() == 1))
    else {
        return;
    };
    let Some(elements) = data.elements.as_ref() else {
        return;
    };
    let mut at = 0usize;
    for out in outputs {
        let Some(n) = out.count().and_then(|n| usize::try_from(n).ok()) else {
            return;
        };
        out.elements = elements.select(&(at..at.saturating_add(n)).collect::<Vec<_>>());
        at = at.saturating_add(n);
    }
}
