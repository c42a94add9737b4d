//! Arithmetic on the host.

use std::borrow::Cow;
use std::ops::Range;

use half::{bf16, f16};
use ndarray::{Array1, ArrayD, Axis, Slice, concatenate};

use super::{Arithmetic, Form, cuttable, joinable, summands, unchanged, unfit};
use crate::engine::{Engine, EngineError, Location, Value};
use crate::tensor::{DType, Tensor, each};

/// Loops over tensors on the host; sums are added in double precision.
pub struct Host;

impl Arithmetic for Host {
    fn location(&self) -> Location {
        Location::Host
    }

    fn upload(&mut self, tensor: Tensor) -> Result<Value, EngineError> {
        Ok(tensor.into())
    }

    fn download(&mut self, value: &Value) -> Result<Tensor, EngineError> {
        tensor(value).cloned()
    }

    fn sum(&mut self, terms: &[(f64, &Value)], form: Form) -> Result<Value, EngineError> {
        let values = summands(terms)?;
        if let Some(value) = unchanged(terms, form) {
            return Ok(value);
        }
        let shape = values.first().map_or(&[][..], |v| v.shape());
        let count = shape.iter().product();
        let factors = terms.iter().map(|(coefficient, _)| *coefficient);
        let rows = values
            .iter()
            .map(|v| Ok(Rows::of(tensor(v)?)))
            .collect::<Result<Vec<_>, EngineError>>()?;
        let terms: Vec<(f64, Rows<'_>)> = factors.zip(rows).collect();
        let added = Added {
            terms,
            bound: form.bound,
            count,
        };
        let array: Option<Tensor> = match form.dtype {
            DType::F16 => added.rounded(f16::from_f64, shape).map(Tensor::F16),
            DType::BF16 => added.rounded(bf16::from_f64, shape).map(Tensor::BF16),
            DType::F64 => added.rounded(|v| v, shape).map(Tensor::F64),
            DType::F32 => added.rounded(|v| v as f32, shape).map(Tensor::F32),
            _ => None,
        };
        array.map(Value::from).ok_or_else(|| unfit("add", &values))
    }

    fn join(&mut self, axis: usize, parts: &[&Value]) -> Result<Value, EngineError> {
        joinable(axis, parts)?;
        if let [only] = parts {
            return Ok((*only).clone());
        }
        let tensors = parts
            .iter()
            .map(|v| tensor(v))
            .collect::<Result<Vec<_>, EngineError>>()?;
        joined(axis, &tensors)
            .map(Value::from)
            .ok_or_else(|| unfit("join", parts))
    }

    fn part(
        &mut self,
        value: &Value,
        axis: usize,
        range: Range<usize>,
    ) -> Result<Value, EngineError> {
        cuttable(value, axis, &range)?;
        if value.shape().get(axis) == Some(&range.len()) {
            return Ok(value.clone());
        }
        let cut = each!(tensor(value)?, a => {
            Tensor::from(a.slice_axis(Axis(axis), Slice::from(range)).to_owned())
        });
        Ok(cut.into())
    }

    fn finite(&mut self, values: &[&Value]) -> Result<bool, EngineError> {
        for value in values {
            if !tensor(value)?.is_finite() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn tensor(value: &Value) -> Result<&Tensor, EngineError> {
    value.host().ok_or_else(|| EngineError::Run {
        engine: Engine::Ort,
        message: "a tensor on a device was given to arithmetic on the host".to_owned(),
    })
}

/// Elements in row-major order.
enum Rows<'t> {
    F32(Cow<'t, [f32]>),
    F16(Cow<'t, [f16]>),
    BF16(Cow<'t, [bf16]>),
    F64(Cow<'t, [f64]>),
}

impl<'t> Rows<'t> {
    fn of(tensor: &'t Tensor) -> Self {
        match tensor {
            Tensor::F32(a) => Self::F32(slice(a)),
            Tensor::F16(a) => Self::F16(slice(a)),
            Tensor::BF16(a) => Self::BF16(slice(a)),
            Tensor::F64(a) => Self::F64(slice(a)),
            other => Self::F64(Cow::Owned(other.to_f64().iter().copied().collect())),
        }
    }

    /// Adds `factor` times the elements from `start` on.
    fn add(&self, factor: f64, start: usize, to: &mut [f64]) {
        fn each<T: Copy>(from: &[T], to: &mut [f64], term: impl Fn(T) -> f64) {
            to.iter_mut()
                .zip(from)
                .for_each(|(sum, v)| *sum += term(*v));
        }
        fn rest<T>(all: &[T], start: usize) -> &[T] {
            all.get(start..).unwrap_or_default()
        }
        match self {
            Self::F32(a) => each(rest(a, start), to, |v| factor * f64::from(v)),
            Self::F16(a) => each(rest(a, start), to, |v| factor * f64::from(v)),
            Self::BF16(a) => each(rest(a, start), to, |v| factor * f64::from(v)),
            Self::F64(a) => each(rest(a, start), to, |v| factor * v),
        }
    }
}

fn slice<T: Clone>(array: &ArrayD<T>) -> Cow<'_, [T]> {
    match array.as_slice() {
        Some(rows) => Cow::Borrowed(rows),
        None => Cow::Owned(array.iter().cloned().collect()),
    }
}

/// A sum of so many elements.
struct Added<'t> {
    terms: Vec<(f64, Rows<'t>)>,
    bound: Option<f64>,
    count: usize,
}

impl Added<'_> {
    fn rounded<T>(&self, round: impl Fn(f64) -> T, shape: &[usize]) -> Option<ArrayD<T>> {
        /// Elements that are added at a time.
        const BLOCK: usize = 4096;
        let mut elements = Vec::with_capacity(self.count);
        let mut block = [0.0_f64; BLOCK];
        while elements.len() < self.count {
            let length = (self.count - elements.len()).min(BLOCK);
            let sums = block.get_mut(..length)?;
            sums.fill(0.0);
            for (factor, rows) in &self.terms {
                rows.add(*factor, elements.len(), sums);
            }
            elements.extend(sums.iter().map(|sum| match self.bound {
                Some(bound) => round(sum.clamp(-bound, bound)),
                None => round(*sum),
            }));
        }
        Array1::from_vec(elements)
            .into_dyn()
            .into_shape_with_order(shape)
            .ok()
    }
}

fn joined(axis: usize, tensors: &[&Tensor]) -> Option<Tensor> {
    macro_rules! same {
        ($($variant:ident),*) => {
            match tensors.first()? {
                $(Tensor::$variant(_) => {
                    let views = tensors.iter().map(|t| match t {
                        Tensor::$variant(a) => Some(a.view()),
                        _ => None,
                    });
                    let views = views.collect::<Option<Vec<_>>>()?;
                    concatenate(Axis(axis), &views).ok().map(Tensor::$variant)
                })*
            }
        };
    }
    same!(F32, F16, BF16, F64, I64, I32, U8, I8, Bool)
}
