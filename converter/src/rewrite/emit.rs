//! The operator's node, and its body as a model-local function or as nodes.

use linfusion_models::onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, NodeProto, ValueInfoProto,
};
use linfusion_models::onnx::{AttributeKind, ElementType, attr_f, attr_i, attr_ints, attr_s, make};
use linfusion_ops::body::{
    AttributeValue, BodyError, BodyFunction, BodyGraph, BodyNode, BodySpec, GraphValue, RefKind,
    WindowVariant, linfusion_attention_body, linfusion_attention_inline, window_attention_body,
    window_attention_inline,
};
use linfusion_ops::schema::{
    ATTR_BORDER, ATTR_EPS, ATTR_NUM_HEADS, ATTR_RADIUS, ATTR_SCALE, ATTR_TEXT, ATTR_WINDOW, Border,
    DOMAIN, LINFUSION_ATTENTION, OPSET_VERSION, TextSide, WINDOW_ATTENTION, Window,
    WindowAttentionAttrs,
};
use linfusion_ops::{Layout, LinFusionAttentionAttrs};
use serde::Serialize;

/// How the operator is written into the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Emit {
    /// A node of our domain and a model-local function with its meaning: runs in
    /// any ONNX Runtime, faster with our library.
    #[default]
    Function,
    /// A node of our domain alone: needs our library.
    Op,
    /// The body in standard operators, for engines without functions.
    Standard,
}

/// The names of the operator's operands at one site.
pub struct Operands<'a> {
    /// q, k, v, `[B, N, H·D]` each, and the grid where the operator takes one.
    pub inputs: &'a [&'a str],
    /// The output's name.
    pub out: &'a str,
    /// Name of the node, and prefix of an inlined body's names.
    pub name: &'a str,
}

/// The nodes that compute LinFusion attention at one site.
///
/// # Errors
/// The opset is outside what the body can be written in.
pub fn attention_nodes(
    emit: Emit,
    operands: &Operands<'_>,
    attrs: LinFusionAttentionAttrs,
    opset: i64,
    element: ElementType,
) -> Result<Vec<NodeProto>, BodyError> {
    if emit == Emit::Standard {
        let body = linfusion_attention_inline(spec(opset, element), attrs)?;
        return Ok(splice(&body, operands));
    }
    let attributes = vec![
        make::int(ATTR_NUM_HEADS, attrs.num_heads as i64),
        make::float(ATTR_EPS, attrs.eps),
    ];
    Ok(vec![make::node_in(
        DOMAIN,
        LINFUSION_ATTENTION,
        operands.name,
        operands.inputs,
        &[operands.out],
        attributes,
    )])
}

/// The nodes that compute window attention at one site.
///
/// # Errors
/// The opset is outside what the body can be written in.
pub fn window_nodes(
    emit: Emit,
    operands: &Operands<'_>,
    attrs: &WindowAttentionAttrs,
    opset: i64,
    element: ElementType,
) -> Result<Vec<NodeProto>, BodyError> {
    if emit == Emit::Standard {
        let body = window_attention_inline(spec(opset, element), attrs)?;
        return Ok(splice(&body, operands));
    }
    let attributes = attrs.attributes();
    let attributes = attributes
        .iter()
        .map(|a| attribute(&a.name, &a.value, &str::to_owned));
    Ok(vec![make::node_in(
        DOMAIN,
        WINDOW_ATTENTION,
        operands.name,
        operands.inputs,
        &[operands.out],
        attributes.collect(),
    )])
}

/// The attributes of a WindowAttention node; `None` if they are no such node's.
#[must_use]
pub fn window_attributes(node: &NodeProto) -> Option<WindowAttentionAttrs> {
    let size = |v: i64| usize::try_from(v).ok();
    let window = match (attr_ints(node, ATTR_WINDOW), attr_i(node, ATTR_RADIUS)) {
        (Some(&[rows, cols]), None) => Window::Rect {
            rows: size(rows)?,
            cols: size(cols)?,
        },
        (None, Some(radius)) => Window::Circle {
            radius: size(radius)?,
        },
        _ => return None,
    };
    let default = match window {
        Window::Rect { .. } => Border::Clamp,
        Window::Circle { .. } => Border::Truncate,
    };
    Some(WindowAttentionAttrs {
        num_heads: size(attr_i(node, ATTR_NUM_HEADS)?)?,
        scale: attr_f(node, ATTR_SCALE).filter(|s| *s != 0.0),
        window,
        border: match attr_s(node, ATTR_BORDER) {
            None => default,
            Some("clamp") => Border::Clamp,
            Some("truncate") => Border::Truncate,
            Some(_) => return None,
        },
        text: match attr_s(node, ATTR_TEXT) {
            None | Some("prefix") => TextSide::Prefix,
            Some("suffix") => TextSide::Suffix,
            Some(_) => return None,
        },
    })
}

fn spec(opset: i64, element: ElementType) -> BodySpec {
    let element = linfusion_ops::ElementType::from_onnx_code(element.onnx())
        .unwrap_or(linfusion_ops::ElementType::F32);
    BodySpec {
        opset,
        layout: Layout::Packed,
        element,
    }
}

/// The model-local function.
///
/// # Errors
/// The opset has no function attributes.
pub fn linear_function(opset: i64, element: ElementType) -> Result<FunctionProto, BodyError> {
    let body = linfusion_attention_body(spec(opset, element))?;
    let doc = "LinFusion generalized linear attention (arXiv 2409.02097): phi(u) = elu(u) + 1, \
               out = phi(q) (phi(k)^T v / M) / (phi(q) . mean_M phi(k) + eps)";
    Ok(function(&body, doc, opset))
}

/// The model-local function of window attention.
///
/// # Errors
/// The opset has no function attributes.
pub fn window_function(
    variant: WindowVariant,
    opset: i64,
    element: ElementType,
) -> Result<FunctionProto, BodyError> {
    let body = window_attention_body(spec(opset, element), variant)?;
    let doc = "Softmax attention of image tokens over a 2-D window and all text tokens, and of \
               text tokens over all tokens";
    Ok(function(&body, doc, opset))
}

fn function(body: &BodyFunction, doc: &str, opset: i64) -> FunctionProto {
    let mut function = FunctionProto {
        name: Some(body.name.clone()),
        domain: Some(DOMAIN.to_owned()),
        doc_string: Some(doc.to_owned()),
        input: body.inputs.clone(),
        output: body.outputs.clone(),
        node: body
            .nodes
            .iter()
            .map(|n| {
                node(n, n.outputs.first().map_or("", String::as_str), &|s| {
                    s.to_owned()
                })
            })
            .collect(),
        opset_import: vec![make::opset("", opset)],
        ..FunctionProto::default()
    };
    for formal in &body.attributes {
        match &formal.default {
            None => function.attribute.push(formal.name.clone()),
            Some(value) => {
                function
                    .attribute_proto
                    .push(attribute(&formal.name, value, &str::to_owned))
            }
        }
    }
    function
}

/// The version of our domain that a model with the operator imports.
#[must_use]
pub fn domain_version() -> (&'static str, i64) {
    (DOMAIN, OPSET_VERSION)
}

fn splice(body: &BodyFunction, operands: &Operands<'_>) -> Vec<NodeProto> {
    let rename = |value: &str| -> String {
        if let Some(i) = body.inputs.iter().position(|n| n == value) {
            return operands
                .inputs
                .get(i)
                .map_or(String::new(), |s| (*s).to_owned());
        }
        if body.outputs.first().is_some_and(|o| o == value) {
            return operands.out.to_owned();
        }
        format!("{}/{value}", operands.name)
    };
    body.nodes
        .iter()
        .map(|n| {
            let name = format!(
                "{}/{}",
                operands.name,
                n.outputs.first().map_or("", String::as_str)
            );
            node(n, &name, &rename)
        })
        .collect()
}

fn node(body: &BodyNode, name: &str, rename: &dyn Fn(&str) -> String) -> NodeProto {
    let names = |values: &[String]| values.iter().map(|v| rename(v)).collect::<Vec<_>>();
    NodeProto {
        op_type: Some(body.op_type.clone()),
        name: Some(name.to_owned()),
        input: names(&body.inputs),
        output: names(&body.outputs),
        attribute: body
            .attributes
            .iter()
            .map(|a| attribute(&a.name, &a.value, rename))
            .collect(),
        ..NodeProto::default()
    }
}

/// The graph of a Loop, its values renamed like those around it.
fn graph(body: &BodyGraph, rename: &dyn Fn(&str) -> String) -> GraphProto {
    let values = |values: &[GraphValue]| -> Vec<ValueInfoProto> {
        let dims = |v: &GraphValue| vec![make::Dim::Unknown; v.rank];
        let element =
            |v: &GraphValue| ElementType::from_onnx(v.element).unwrap_or(ElementType::F32);
        values
            .iter()
            .map(|v| make::value_info(&rename(&v.name), element(v), &dims(v)))
            .collect()
    };
    let name = |n: &BodyNode| rename(n.outputs.first().map_or("", String::as_str));
    GraphProto {
        name: Some(rename("tile")),
        node: body
            .nodes
            .iter()
            .map(|n| node(n, &name(n), rename))
            .collect(),
        input: values(&body.inputs),
        output: values(&body.outputs),
        ..GraphProto::default()
    }
}

fn attribute(
    name: &str,
    value: &AttributeValue,
    rename: &dyn Fn(&str) -> String,
) -> AttributeProto {
    match value {
        AttributeValue::Int(v) => make::int(name, *v),
        AttributeValue::Ints(v) => make::ints(name, v),
        AttributeValue::Float(v) => make::float(name, *v),
        AttributeValue::String(v) => make::string(name, v),
        AttributeValue::TensorF32 { dims, data } => {
            make::tensor_attribute(name, make::tensor_f32("", dims, data))
        }
        AttributeValue::TensorF64 { dims, data } => {
            let bytes: bytes::Bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
            make::tensor_attribute(name, make::tensor("", ElementType::F64, dims, bytes))
        }
        AttributeValue::TensorI64 { dims, data } => {
            make::tensor_attribute(name, make::tensor_i64("", dims, data))
        }
        AttributeValue::Graph(body) => make::graph_attribute(name, graph(body, rename)),
        AttributeValue::Ref { attribute, kind } => {
            let kind = match kind {
                RefKind::Int => AttributeKind::Int,
                RefKind::Ints => AttributeKind::Ints,
                RefKind::Float => AttributeKind::Float,
            };
            make::reference(name, kind, attribute)
        }
    }
}
