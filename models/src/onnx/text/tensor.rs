//! Tensors in the textual form.

use std::fmt::{self, Display, Formatter, Write};

use sha2::{Digest, Sha256};

use super::types::{self, Name, Quoted};
use super::{Elided, PrintOptions, Width};
use crate::onnx::element::{ElementType, element_count};
use crate::onnx::external::is_external;
use crate::onnx::proto::TensorProto;
use crate::onnx::tensor::TensorData;

/// Where a tensor stands; the two differ in the equals sign.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Initializer,
    Attribute,
}

/// What was shown of a tensor's values.
pub(super) enum Shown {
    /// Everything there is to say.
    All,
    /// A remark for the end of the line.
    Remark(String),
}

impl Shown {
    pub(super) fn comment(&self) -> String {
        match self {
            Self::All => String::new(),
            Self::Remark(remark) => format!("  # {remark}"),
        }
    }
}

/// Prints `float[2] name = {1, 2}`.
pub(super) fn print(
    f: &mut Formatter<'_>,
    tensor: &TensorProto,
    place: Place,
    options: &PrintOptions<'_>,
) -> Result<Shown, fmt::Error> {
    types::element(f, tensor.data_type)?;
    if !tensor.dims.is_empty() {
        let dims: Vec<String> = tensor.dims.iter().map(i64::to_string).collect();
        write!(f, "[{}]", dims.join(","))?;
    }
    f.write_char(' ')?;
    if let Some(name) = tensor.name.as_deref().filter(|n| !n.is_empty()) {
        write!(f, "{} ", Name(name))?;
    }
    if place == Place::Initializer {
        f.write_str("= ")?;
    }
    if is_external(tensor) && options.file.is_none() {
        f.write_char('[')?;
        for (index, entry) in tensor.external_data.iter().enumerate() {
            if index > 0 {
                f.write_str(", ")?;
            }
            types::entry(f, entry)?;
        }
        f.write_char(']')?;
        return Ok(Shown::All);
    }
    let shown = values(f, tensor, options)?;
    // Inside an attribute list a comment would swallow what follows.
    match (place, &shown) {
        (Place::Attribute, Shown::Remark(remark)) => {
            write!(f, "... /* {remark} */")?;
            Ok(Shown::All)
        }
        (Place::Initializer, Shown::Remark(_)) => {
            f.write_str("...")?;
            Ok(shown)
        }
        (_, Shown::All) => Ok(shown),
    }
}

fn values(
    f: &mut Formatter<'_>,
    tensor: &TensorProto,
    options: &PrintOptions<'_>,
) -> Result<Shown, fmt::Error> {
    let count = element_count(&tensor.dims).unwrap_or(u64::MAX);
    let is_small = usize::try_from(count).is_ok_and(|n| n <= options.max_elements);
    if tensor.data_type == Some(ElementType::String.onnx()) {
        return strings(f, tensor, is_small);
    }
    let data = match options.file {
        Some(file) => file.tensor(tensor),
        None => TensorData::inline(tensor),
    };
    let data = match data {
        Ok(data) => data,
        Err(error) => return Ok(Shown::Remark(format!("unreadable: {}", error.fault))),
    };
    if is_small && let Some(numbers) = numbers(&data) {
        write!(f, "{{{numbers}}}")?;
        return Ok(Shown::All);
    }
    let size = data.bytes.len();
    Ok(Shown::Remark(match options.elided {
        Elided::Size => format!("{size} bytes"),
        Elided::Hash => format!("{size} bytes, sha256 {}", short_hash(&data.bytes)),
    }))
}

fn strings(
    f: &mut Formatter<'_>,
    tensor: &TensorProto,
    is_small: bool,
) -> Result<Shown, fmt::Error> {
    if !is_small {
        return Ok(Shown::Remark(format!(
            "{} strings",
            tensor.string_data.len()
        )));
    }
    f.write_char('{')?;
    for (index, string) in tensor.string_data.iter().enumerate() {
        if index > 0 {
            f.write_str(", ")?;
        }
        Quoted(&String::from_utf8_lossy(string)).fmt(f)?;
    }
    f.write_char('}')?;
    Ok(Shown::All)
}

/// The values as the syntax wants them; types below a byte have no form in it.
/// Halves and 8-bit floats are written as their bit patterns, as `onnx.printer` does.
fn numbers(data: &TensorData) -> Option<String> {
    let bits = |element| TensorData {
        element,
        ..data.clone()
    };
    Some(match data.element {
        ElementType::F32 | ElementType::F64 => {
            let width = match data.element {
                ElementType::F32 => Width::F32,
                _ => Width::F64,
            };
            let values = data.to_f64_vec().ok()?;
            let texts = values
                .into_iter()
                .map(|v| super::from_fn(move |f| types::float(f, v, width)).to_string());
            texts.collect::<Vec<_>>().join(", ")
        }
        ElementType::F16 | ElementType::Bf16 => join(&bits(ElementType::U16).to_i64_vec().ok()?),
        ElementType::F8E4M3Fn
        | ElementType::F8E4M3Fnuz
        | ElementType::F8E5M2
        | ElementType::F8E5M2Fnuz
        | ElementType::F8E8M0 => join(&bits(ElementType::U8).to_i64_vec().ok()?),
        _ => join(&data.to_i64_vec().ok()?),
    })
}

fn join(values: &[i64]) -> String {
    let texts: Vec<String> = values.iter().map(i64::to_string).collect();
    texts.join(", ")
}

fn short_hash(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest
        .iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
