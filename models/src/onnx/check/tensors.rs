//! Types, shapes and data of all tensors.

use super::{Fault, Place, Report};
use crate::onnx::element::{ElementType, element_count};
use crate::onnx::external::{ExternalRef, is_external};
use crate::onnx::open::OnnxFile;
use crate::onnx::proto::{ModelProto, TensorProto};
use crate::onnx::tensor::{TensorData, TensorError, TensorFault};
use crate::onnx::walk::for_each_tensor;

pub(super) fn check_all(model: &ModelProto, file: Option<&OnnxFile>, report: &mut Report) {
    for_each_tensor(model, &mut |_, tensor| {
        if let Err(error) = check(tensor, file) {
            report.add(Place::Model, Fault::Tensor(error));
        }
    });
}

fn check(tensor: &TensorProto, file: Option<&OnnxFile>) -> Result<(), TensorError> {
    if tensor.data_type == Some(ElementType::String.onnx()) {
        return strings(tensor).map_err(|fault| named(tensor, fault));
    }
    match file {
        Some(file) => file.tensor(tensor).map(drop),
        None if is_external(tensor) => reference(tensor).map_err(|fault| named(tensor, fault)),
        None => TensorData::inline(tensor).map(drop),
    }
}

fn named(tensor: &TensorProto, fault: TensorFault) -> TensorError {
    TensorError {
        tensor: tensor.name.clone().unwrap_or_default(),
        fault,
    }
}

fn strings(tensor: &TensorProto) -> Result<(), TensorFault> {
    if is_external(tensor) || tensor.raw_data.is_some() {
        return Err(TensorFault::Strings);
    }
    let expected = element_count(&tensor.dims)?;
    let found = tensor.string_data.len() as u64;
    if expected == found {
        return Ok(());
    }
    Err(TensorFault::ValueCount {
        field: "string_data",
        element: ElementType::String,
        dims: tensor.dims.clone(),
        expected,
        found,
    })
}

/// All that can be said of an external tensor without its data file.
fn reference(tensor: &TensorProto) -> Result<(), TensorFault> {
    let number = tensor.data_type.unwrap_or_default();
    let element = ElementType::from_onnx(number).ok_or(TensorFault::ElementType(number))?;
    let expected = element
        .byte_len(&tensor.dims)?
        .ok_or(TensorFault::Strings)? as u64;
    match ExternalRef::of(tensor)?.length {
        Some(found) if found != expected => Err(TensorFault::ByteCount {
            element,
            dims: tensor.dims.clone(),
            expected,
            found,
        }),
        _ => Ok(()),
    }
}
