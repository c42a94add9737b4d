//! Names, numbers and types in the textual form.

use std::fmt::{self, Display, Formatter, Write};

use super::Width;
use crate::onnx::element::ElementType;
use crate::onnx::proto::__buffa::oneof::tensor_shape_proto::dimension::Value as DimValue;
use crate::onnx::proto::__buffa::oneof::type_proto::Value as TypeValue;
use crate::onnx::proto::{StringStringEntryProto, TensorShapeProto, TypeProto, ValueInfoProto};

/// A name: as it is where the syntax takes it as an identifier, else quoted.
pub(super) struct Name<'a>(pub &'a str);

impl Display for Name<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut chars = self.0.chars();
        let is_identifier = chars
            .next()
            .is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
            && chars.all(|c| c.is_ascii_alphanumeric() || c == '_');
        if is_identifier {
            f.write_str(self.0)
        } else {
            Quoted(self.0).fmt(f)
        }
    }
}

/// A string literal.
pub(super) struct Quoted<'a>(pub &'a str);

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for c in self.0.chars() {
            if matches!(c, '"' | '\\') {
                f.write_char('\\')?;
            }
            f.write_char(c)?;
        }
        f.write_char('"')
    }
}

/// The shortest decimal that reads back as the same value.
pub(super) fn float(f: &mut Formatter<'_>, value: f64, width: Width) -> fmt::Result {
    if value.is_nan() {
        return f.write_str("nan");
    }
    match width {
        // It came from f32, so this loses nothing.
        Width::F32 => write!(f, "{:?}", value as f32),
        Width::F64 => write!(f, "{value:?}"),
    }
}

pub(super) fn entry(f: &mut Formatter<'_>, entry: &StringStringEntryProto) -> fmt::Result {
    let key = entry.key.as_deref().unwrap_or_default();
    let value = entry.value.as_deref().unwrap_or_default();
    write!(f, "{}: {}", Quoted(key), Quoted(value))
}

/// A value's declared type and its name.
pub(super) fn value(f: &mut Formatter<'_>, value: &ValueInfoProto) -> fmt::Result {
    if let Some(declared) = value.r#type.as_option() {
        type_proto(f, declared, 0)?;
        f.write_char(' ')?;
    }
    Name(value.name.as_deref().unwrap_or_default()).fmt(f)
}

/// Types nested deeper are cut.
const MAX_DEPTH: usize = 32;

/// Prints a type, e.g. `float[batch, 4]`.
#[derive(Clone, Copy, Debug)]
pub struct TypeText<'a>(pub &'a TypeProto);

impl fmt::Display for TypeText<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        type_proto(f, self.0, 0)
    }
}

pub(super) fn type_proto(f: &mut Formatter<'_>, declared: &TypeProto, depth: usize) -> fmt::Result {
    let Some(value) = declared.value.as_ref().filter(|_| depth < MAX_DEPTH) else {
        return f.write_char('?');
    };
    let inner = |f: &mut Formatter<'_>, inner: Option<&TypeProto>| match inner {
        Some(inner) => type_proto(f, inner, depth + 1),
        None => f.write_char('?'),
    };
    match value {
        TypeValue::TensorType(tensor) => {
            element(f, tensor.elem_type)?;
            shape(f, tensor.shape.as_option())
        }
        TypeValue::SparseTensorType(tensor) => {
            f.write_str("sparse_tensor(")?;
            element(f, tensor.elem_type)?;
            shape(f, tensor.shape.as_option())?;
            f.write_char(')')
        }
        TypeValue::SequenceType(sequence) => {
            f.write_str("seq(")?;
            inner(f, sequence.elem_type.as_option())?;
            f.write_char(')')
        }
        TypeValue::OptionalType(optional) => {
            f.write_str("optional(")?;
            inner(f, optional.elem_type.as_option())?;
            f.write_char(')')
        }
        TypeValue::MapType(map) => {
            f.write_str("map(")?;
            element(f, map.key_type)?;
            f.write_str(", ")?;
            inner(f, map.value_type.as_option())?;
            f.write_char(')')
        }
        TypeValue::OpaqueType(opaque) => {
            let domain = opaque.domain.as_deref().unwrap_or_default();
            let name = opaque.name.as_deref().unwrap_or_default();
            write!(f, "opaque({}, {})", Quoted(domain), Quoted(name))
        }
    }
}

pub(super) fn element(f: &mut Formatter<'_>, number: Option<i32>) -> fmt::Result {
    match ElementType::from_onnx(number.unwrap_or_default()) {
        Some(element) => f.write_str(element.name()),
        None => f.write_str("undefined"),
    }
}

/// No brackets mean a scalar, empty ones an unknown rank.
fn shape(f: &mut Formatter<'_>, shape: Option<&TensorShapeProto>) -> fmt::Result {
    let Some(shape) = shape else {
        return f.write_str("[]");
    };
    if shape.dim.is_empty() {
        return Ok(());
    }
    f.write_char('[')?;
    for (index, dim) in shape.dim.iter().enumerate() {
        if index > 0 {
            f.write_char(',')?;
        }
        match &dim.value {
            Some(DimValue::DimValue(size)) => write!(f, "{size}")?,
            Some(DimValue::DimParam(name)) if !name.is_empty() => Name(name).fmt(f)?,
            _ => f.write_char('?')?,
        }
    }
    f.write_char(']')
}
