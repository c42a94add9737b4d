//! Reading the attributes of a node.

use super::proto::{AttributeProto, GraphProto, NodeProto, TensorProto};

/// The kinds of attribute values: `AttributeProto.AttributeType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the documentation
#[repr(i32)]
pub enum AttributeKind {
    Float = 1,
    Int = 2,
    String = 3,
    Tensor = 4,
    Graph = 5,
    Floats = 6,
    Ints = 7,
    Strings = 8,
    Tensors = 9,
    Graphs = 10,
    SparseTensor = 11,
    SparseTensors = 12,
    TypeProto = 13,
    TypeProtos = 14,
}

impl AttributeKind {
    /// Every kind, by ascending ONNX number.
    pub const ALL: [Self; 14] = [
        Self::Float,
        Self::Int,
        Self::String,
        Self::Tensor,
        Self::Graph,
        Self::Floats,
        Self::Ints,
        Self::Strings,
        Self::Tensors,
        Self::Graphs,
        Self::SparseTensor,
        Self::SparseTensors,
        Self::TypeProto,
        Self::TypeProtos,
    ];

    /// The kind with this ONNX number.
    pub fn from_onnx(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as i32 == number)
    }

    /// The spelling of ONNX's textual form.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Int => "int",
            Self::String => "string",
            Self::Tensor => "tensor",
            Self::Graph => "graph",
            Self::Floats => "floats",
            Self::Ints => "ints",
            Self::Strings => "strings",
            Self::Tensors => "tensors",
            Self::Graphs => "graphs",
            Self::SparseTensor => "sparse_tensor",
            Self::SparseTensors => "sparse_tensors",
            Self::TypeProto => "type_proto",
            Self::TypeProtos => "type_protos",
        }
    }

    /// The number in `AttributeProto.type`.
    pub fn onnx(self) -> i32 {
        self as i32
    }
}

/// The attribute called `name`.
pub fn attr<'a>(node: &'a NodeProto, name: &str) -> Option<&'a AttributeProto> {
    node.attribute
        .iter()
        .find(|a| a.name.as_deref() == Some(name))
}

/// The integer attribute called `name`; an absent value field means 0, as
/// proto3 writers leave zeros out.
pub fn attr_i(node: &NodeProto, name: &str) -> Option<i64> {
    of_kind(node, name, AttributeKind::Int).map(|a| a.i.unwrap_or_default())
}

/// The float attribute called `name`; an absent value field means 0.
pub fn attr_f(node: &NodeProto, name: &str) -> Option<f32> {
    of_kind(node, name, AttributeKind::Float).map(|a| a.f.unwrap_or_default())
}

/// The string attribute called `name`, if it is UTF-8.
pub fn attr_s<'a>(node: &'a NodeProto, name: &str) -> Option<&'a str> {
    let attribute = of_kind(node, name, AttributeKind::String)?;
    str::from_utf8(attribute.s.as_deref().unwrap_or_default()).ok()
}

/// The integer-list attribute called `name`.
pub fn attr_ints<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [i64]> {
    of_kind(node, name, AttributeKind::Ints).map(|a| a.ints.as_slice())
}

/// The float-list attribute called `name`.
pub fn attr_floats<'a>(node: &'a NodeProto, name: &str) -> Option<&'a [f32]> {
    of_kind(node, name, AttributeKind::Floats).map(|a| a.floats.as_slice())
}

/// The tensor attribute called `name`.
pub fn attr_t<'a>(node: &'a NodeProto, name: &str) -> Option<&'a TensorProto> {
    of_kind(node, name, AttributeKind::Tensor)?.t.as_option()
}

/// The graph attribute called `name`.
pub fn attr_g<'a>(node: &'a NodeProto, name: &str) -> Option<&'a GraphProto> {
    of_kind(node, name, AttributeKind::Graph)?.g.as_option()
}

/// The attribute called `name`, if it has that kind and holds its own value.
///
/// Inside a function an attribute can stand for one of the function's own
/// (`ref_attr_name`); its value is then not known here.
fn of_kind<'a>(node: &'a NodeProto, name: &str, kind: AttributeKind) -> Option<&'a AttributeProto> {
    let attribute = attr(node, name)?;
    let is_reference = attribute
        .ref_attr_name
        .as_deref()
        .is_some_and(|r| !r.is_empty());
    (attribute.r#type == Some(kind.onnx()) && !is_reference).then_some(attribute)
}
