//! Making parts of models.

use bytes::Bytes;
use half::{bf16, f16};

use buffa::MessageField;

use super::attrs::AttributeKind;
use super::element::ElementType;
use super::proto::__buffa::oneof::tensor_shape_proto::dimension::Value as DimValue;
use super::proto::__buffa::oneof::type_proto::Value as TypeValue;
use super::proto::{
    AttributeProto, GraphProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto, type_proto,
};

/// A tensor from little-endian bytes. Nothing is checked here: `check_model` is
/// what finds a length that doesn't fit.
pub fn tensor(
    name: &str,
    element: ElementType,
    dims: &[i64],
    bytes: impl Into<Bytes>,
) -> TensorProto {
    TensorProto {
        name: Some(name.to_owned()),
        data_type: Some(element.onnx()),
        dims: dims.to_vec(),
        raw_data: Some(bytes.into()),
        ..TensorProto::default()
    }
}

/// A tensor of i64, as ONNX wants for shapes, axes and indices.
pub fn tensor_i64(name: &str, dims: &[i64], values: &[i64]) -> TensorProto {
    let bytes: Bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(name, ElementType::I64, dims, bytes)
}

/// A tensor of f32.
pub fn tensor_f32(name: &str, dims: &[i64], values: &[f32]) -> TensorProto {
    let bytes: Bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    tensor(name, ElementType::F32, dims, bytes)
}

/// Floats in the byte form of a tensor, and what the conversion lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Little-endian values.
    pub bytes: Bytes,
    /// How many finite values became infinite.
    pub overflowed: usize,
}

/// Converts f32 values to a tensor of type `element`, rounding to nearest even.
/// `None` if `element` is none of f32, f16, bf16, f64.
pub fn encode_f32(element: ElementType, values: &[f32]) -> Option<Encoded> {
    fn pack<const N: usize>(values: &[f32], convert: impl Fn(f32) -> ([u8; N], bool)) -> Encoded {
        let mut bytes = Vec::with_capacity(values.len().saturating_mul(N));
        let mut overflowed = 0;
        for &value in values {
            let (encoded, is_finite) = convert(value);
            bytes.extend_from_slice(&encoded);
            overflowed += usize::from(value.is_finite() && !is_finite);
        }
        Encoded {
            bytes: bytes.into(),
            overflowed,
        }
    }
    Some(match element {
        ElementType::F32 => pack(values, |v| (v.to_le_bytes(), v.is_finite())),
        ElementType::F64 => pack(values, |v| (f64::from(v).to_le_bytes(), v.is_finite())),
        ElementType::F16 => pack(values, |v| {
            let half = f16::from_f32(v);
            (half.to_le_bytes(), half.is_finite())
        }),
        ElementType::Bf16 => pack(values, |v| {
            let half = bf16::from_f32(v);
            (half.to_le_bytes(), half.is_finite())
        }),
        _ => return None,
    })
}

/// An integer attribute.
pub fn int(name: &str, value: i64) -> AttributeProto {
    attribute(name, AttributeKind::Int).with_i(value)
}

/// A list of integers as an attribute.
pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        ints: values.to_vec(),
        ..attribute(name, AttributeKind::Ints)
    }
}

/// A float attribute.
pub fn float(name: &str, value: f32) -> AttributeProto {
    attribute(name, AttributeKind::Float).with_f(value)
}

/// A list of floats as an attribute.
pub fn floats(name: &str, values: &[f32]) -> AttributeProto {
    AttributeProto {
        floats: values.to_vec(),
        ..attribute(name, AttributeKind::Floats)
    }
}

/// A string attribute.
pub fn string(name: &str, value: &str) -> AttributeProto {
    attribute(name, AttributeKind::String).with_s(value.to_owned())
}

/// A tensor as an attribute.
pub fn tensor_attribute(name: &str, value: TensorProto) -> AttributeProto {
    AttributeProto {
        t: MessageField::some(value),
        ..attribute(name, AttributeKind::Tensor)
    }
}

/// A graph as an attribute.
pub fn graph_attribute(name: &str, value: GraphProto) -> AttributeProto {
    AttributeProto {
        g: MessageField::some(value),
        ..attribute(name, AttributeKind::Graph)
    }
}

/// Inside a function body: an attribute that takes the value of the function's
/// own attribute `reference`.
pub fn reference(name: &str, kind: AttributeKind, reference: &str) -> AttributeProto {
    attribute(name, kind).with_ref_attr_name(reference)
}

fn attribute(name: &str, kind: AttributeKind) -> AttributeProto {
    AttributeProto::default()
        .with_name(name)
        .with_type(kind.onnx())
}

/// A node of the standard domain.
pub fn node(
    op_type: &str,
    name: &str,
    inputs: &[&str],
    outputs: &[&str],
    attributes: Vec<AttributeProto>,
) -> NodeProto {
    NodeProto {
        op_type: Some(op_type.to_owned()),
        name: Some(name.to_owned()),
        input: inputs.iter().map(|&s| s.to_owned()).collect(),
        output: outputs.iter().map(|&s| s.to_owned()).collect(),
        attribute: attributes,
        ..NodeProto::default()
    }
}

/// A node of another domain.
pub fn node_in(
    domain: &str,
    op_type: &str,
    name: &str,
    inputs: &[&str],
    outputs: &[&str],
    attributes: Vec<AttributeProto>,
) -> NodeProto {
    node(op_type, name, inputs, outputs, attributes).with_domain(domain)
}

/// One dimension of a declared shape.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dim {
    /// A fixed size.
    Fixed(i64),
    /// A named size, the same wherever the name occurs.
    Named(String),
    /// Nothing is known.
    Unknown,
}

/// The declared type of a value: a tensor of `dims`.
pub fn value_info(name: &str, element: ElementType, dims: &[Dim]) -> ValueInfoProto {
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: MessageField::some(tensor_type(element, Some(dims))),
        ..ValueInfoProto::default()
    }
}

/// A tensor type; without `dims`, even the rank is unknown.
pub fn tensor_type(element: ElementType, dims: Option<&[Dim]>) -> TypeProto {
    let shape = dims.map(|dims| TensorShapeProto {
        dim: dims.iter().map(dimension).collect(),
        ..TensorShapeProto::default()
    });
    let tensor = type_proto::Tensor {
        elem_type: Some(element.onnx()),
        shape: shape.map_or_else(MessageField::none, MessageField::some),
        ..type_proto::Tensor::default()
    };
    TypeProto {
        value: Some(TypeValue::from(tensor)),
        ..TypeProto::default()
    }
}

/// The element type and shape of a declared tensor; `None` for other types, and
/// for the shape if the rank is unknown.
pub fn tensor_type_of(value: &ValueInfoProto) -> Option<(ElementType, Option<Vec<Dim>>)> {
    let Some(TypeValue::TensorType(tensor)) = &value.r#type.as_option()?.value else {
        return None;
    };
    let element = ElementType::from_onnx(tensor.elem_type.unwrap_or_default())?;
    let dims = tensor.shape.as_option().map(|shape| {
        let dims = shape.dim.iter().map(|dim| match &dim.value {
            Some(DimValue::DimValue(size)) => Dim::Fixed(*size),
            Some(DimValue::DimParam(name)) if !name.is_empty() => Dim::Named(name.clone()),
            _ => Dim::Unknown,
        });
        dims.collect()
    });
    Some((element, dims))
}

fn dimension(dim: &Dim) -> tensor_shape_proto::Dimension {
    tensor_shape_proto::Dimension {
        value: match dim {
            Dim::Fixed(size) => Some(DimValue::DimValue(*size)),
            Dim::Named(name) => Some(DimValue::DimParam(name.clone())),
            Dim::Unknown => None,
        },
        ..tensor_shape_proto::Dimension::default()
    }
}

/// A version of a domain's operators that the model uses (`""` is standard ONNX).
pub fn opset(domain: &str, version: i64) -> OperatorSetIdProto {
    OperatorSetIdProto::default()
        .with_domain(domain)
        .with_version(version)
}

/// An entry of `metadata_props`.
pub fn metadata(key: &str, value: &str) -> StringStringEntryProto {
    StringStringEntryProto::default()
        .with_key(key)
        .with_value(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::TensorData;

    #[test]
    fn floats_are_rounded_to_nearest_and_overflow_is_counted() {
        // 65520 is the first f32 that rounds to infinity in f16; 2049 is halfway
        // between two f16 values and goes to the even one.
        let values = [1.0, 2049.0, 65519.0, 65520.0, f32::INFINITY, -1e-8];
        let half = encode_f32(ElementType::F16, &values).unwrap();
        assert_eq!(half.overflowed, 1);
        let back = TensorData::inline(&tensor("t", ElementType::F16, &[6], half.bytes)).unwrap();
        let inf = f32::INFINITY;
        assert_eq!(
            back.to_f32_vec().unwrap(),
            [1.0, 2048.0, 65504.0, inf, inf, -0.0]
        );

        let brain = encode_f32(ElementType::Bf16, &[f32::MAX, 1.0]).unwrap();
        assert_eq!(brain.overflowed, 1);
        assert_eq!(encode_f32(ElementType::I64, &[1.0]), None);
    }

    #[test]
    fn declared_types_read_back() {
        let dims = [Dim::Named("batch".into()), Dim::Fixed(4), Dim::Unknown];
        let value = value_info("x", ElementType::Bf16, &dims);
        assert_eq!(
            tensor_type_of(&value),
            Some((ElementType::Bf16, Some(dims.to_vec())))
        );
    }
}
