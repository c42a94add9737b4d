//! The models that are timed: the operator and the other ways to compute attention.

use linfusion_ops::body::{
    AttributeValue, BodyAttribute, BodyFunction, BodyNode, BodySpec, linfusion_attention_inline,
};
use linfusion_ops::{ElementType, Layout, LinFusionAttentionAttrs};

use crate::onnx_bytes::{Form, OneNode};

pub const BATCH: usize = 2;
pub const HEADS: usize = 8;
/// Rows and columns of the factors of [`matrix_product`].
pub const PRODUCT: usize = 1024;

/// A way to compute attention.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Contender {
    /// Our operator.
    Operator,
    /// The operator's function body in standard operators.
    Body,
    /// MatMul, Softmax, MatMul.
    Softmax,
    /// com.microsoft.MultiHeadAttention.
    Fused,
}

impl Contender {
    pub const ALL: [Self; 4] = [Self::Operator, Self::Body, Self::Softmax, Self::Fused];

    pub fn name(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Body => "function body",
            Self::Softmax => "MatMul+Softmax+MatMul",
            Self::Fused => "MultiHeadAttention",
        }
    }
}

const SPEC: BodySpec = BodySpec {
    opset: 17,
    layout: Layout::Packed,
    element: ElementType::F32,
};

/// The model of a contender for heads of this width.
pub fn model(contender: Contender, width: usize) -> Result<Vec<u8>, String> {
    let form = match contender {
        Contender::Operator => Form::Op,
        // The standard operators in place of the node, as ONNX Runtime runs a function without
        // our library.
        Contender::Body => {
            let attrs =
                LinFusionAttentionAttrs::new(HEADS as i64, None).map_err(|e| e.to_string())?;
            let body = linfusion_attention_inline(SPEC, attrs);
            Form::Inlined(body.map_err(|e| e.to_string())?)
        }
        Contender::Softmax => Form::Inlined(softmax(width)),
        Contender::Fused => Form::Other {
            op_type: "MultiHeadAttention".into(),
            domain: "com.microsoft".into(),
        },
    };
    Ok(one_node(form, width))
}

/// out = q · k with square factors.
pub fn matrix_product() -> Vec<u8> {
    let body = function(vec![node("MatMul", &["q", "k"], "out", vec![])]);
    one_node(Form::Inlined(body), PRODUCT / HEADS)
}

fn one_node(form: Form, width: usize) -> Vec<u8> {
    OneNode {
        opset: SPEC.opset,
        layout: SPEC.layout,
        element: SPEC.element,
        heads: HEADS as i64,
        eps: None,
        widths: [width, width],
        form,
    }
    .encode()
}

fn function(nodes: Vec<BodyNode>) -> BodyFunction {
    BodyFunction {
        name: String::new(),
        inputs: vec![],
        outputs: vec![],
        attributes: vec![],
        nodes,
    }
}

fn node(op_type: &str, inputs: &[&str], output: &str, attributes: Vec<BodyAttribute>) -> BodyNode {
    BodyNode {
        op_type: op_type.into(),
        inputs: inputs.iter().map(|&s| s.into()).collect(),
        outputs: vec![output.into()],
        attributes,
    }
}

fn attribute(name: &str, value: AttributeValue) -> Vec<BodyAttribute> {
    let name = name.into();
    vec![BodyAttribute { name, value }]
}

/// Softmax attention as exporters write it.
fn softmax(width: usize) -> BodyFunction {
    let ints = |data: &[i64]| {
        let (dims, data) = (vec![data.len() as i64], data.to_vec());
        attribute("value", AttributeValue::TensorI64 { dims, data })
    };
    let permute = |to: &[i64]| attribute("perm", AttributeValue::Ints(to.to_vec()));
    let scale = AttributeValue::TensorF32 {
        dims: vec![],
        data: vec![1.0 / (width as f32).sqrt()],
    };
    function(vec![
        node(
            "Constant",
            &[],
            "split",
            ints(&[0, 0, HEADS as i64, width as i64]),
        ),
        node(
            "Constant",
            &[],
            "merged",
            ints(&[0, 0, (HEADS * width) as i64]),
        ),
        node("Constant", &[], "scale", attribute("value", scale)),
        node("Reshape", &["q", "split"], "q4", vec![]),
        node("Reshape", &["k", "split"], "k4", vec![]),
        node("Reshape", &["v", "split"], "v4", vec![]),
        node("Transpose", &["q4"], "qh", permute(&[0, 2, 1, 3])),
        node("Transpose", &["k4"], "kt", permute(&[0, 2, 3, 1])),
        node("Transpose", &["v4"], "vh", permute(&[0, 2, 1, 3])),
        node("Mul", &["qh", "scale"], "qs", vec![]),
        node("MatMul", &["qs", "kt"], "scores", vec![]),
        node(
            "Softmax",
            &["scores"],
            "weights",
            attribute("axis", AttributeValue::Int(-1)),
        ),
        node("MatMul", &["weights", "vh"], "heads", vec![]),
        node("Transpose", &["heads"], "rows", permute(&[0, 2, 1, 3])),
        node("Reshape", &["rows", "merged"], "out", vec![]),
    ])
}
