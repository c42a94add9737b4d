//! The operator's node, and its body as a model-local function or as nodes.

use linfusion_models::onnx::proto::{AttributeProto, FunctionProto, NodeProto};
use linfusion_models::onnx::{AttributeKind, ElementType, make};
use linfusion_ops::body::{
    AttributeValue, BodyError, BodyFunction, BodyNode, BodySpec, RefKind, linfusion_attention_body,
    linfusion_attention_inline,
};
use linfusion_ops::schema::{ATTR_EPS, ATTR_NUM_HEADS, DOMAIN, LINFUSION_ATTENTION, OPSET_VERSION};
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
    /// `[B, N, H·D]` each: q, k, v.
    pub qkv: [&'a str; 3],
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
        &operands.qkv,
        &[operands.out],
        attributes,
    )])
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
pub fn function(opset: i64, element: ElementType) -> Result<FunctionProto, BodyError> {
    let body = linfusion_attention_body(spec(opset, element))?;
    let mut function = FunctionProto {
        name: Some(body.name.clone()),
        domain: Some(DOMAIN.to_owned()),
        doc_string: Some(
            "LinFusion generalized linear attention (arXiv 2409.02097): phi(u) = elu(u) + 1, \
             out = phi(q) (phi(k)^T v / M) / (phi(q) . mean_M phi(k) + eps)"
                .to_owned(),
        ),
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
            Some(value) => function
                .attribute_proto
                .push(attribute(&formal.name, value)),
        }
    }
    Ok(function)
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
                .qkv
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
    let (inputs, outputs) = (names(&body.inputs), names(&body.outputs));
    let refs = |v: &[String]| v.iter().map(String::clone).collect::<Vec<_>>();
    NodeProto {
        op_type: Some(body.op_type.clone()),
        name: Some(name.to_owned()),
        input: refs(&inputs),
        output: refs(&outputs),
        attribute: body
            .attributes
            .iter()
            .map(|a| attribute(&a.name, &a.value))
            .collect(),
        ..NodeProto::default()
    }
}

fn attribute(name: &str, value: &AttributeValue) -> AttributeProto {
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
        AttributeValue::Ref { attribute, kind } => {
            let kind = match kind {
                RefKind::Int => AttributeKind::Int,
                RefKind::Float => AttributeKind::Float,
            };
            make::reference(name, kind, attribute)
        }
    }
}
