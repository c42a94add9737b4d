//! The models that are timed: an operator and the other ways to compute attention.

use linfusion_ops::body::{
    AttributeValue, BodyAttribute, BodyFunction, BodyNode, BodySpec, linfusion_attention_inline,
    window_attention_inline,
};
use linfusion_ops::schema::{ATTR_NUM_HEADS, WindowAttentionAttrs};
use linfusion_ops::{ElementType, Layout, LinFusionAttentionAttrs};

use crate::onnx_bytes::{Form, OneNode, Site};

/// Rows and columns of the factors of [`matrix_product`].
pub const PRODUCT: usize = 1024;

/// What the operator of a model is.
#[derive(Clone, Copy)]
pub enum Operator {
    /// `LinFusionAttention`.
    #[allow(dead_code, reason = "each benchmark has one of them")]
    Linear,
    /// `WindowAttention`.
    #[allow(dead_code, reason = "each benchmark has one of them")]
    Window(WindowAttentionAttrs),
}

/// An operator and its heads.
#[derive(Clone, Copy)]
pub struct Attention {
    pub operator: Operator,
    pub heads: usize,
    /// Of each head.
    pub width: usize,
}

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

/// The model of a contender. The operator and its body take the inputs of the operator, the
/// others q, k and v.
pub fn model(contender: Contender, attention: Attention) -> Result<Vec<u8>, String> {
    let form = match contender {
        Contender::Operator => Form::Op,
        // The standard operators in place of the node, as ONNX Runtime runs a function without
        // our library.
        Contender::Body => Form::Inlined(body(attention)?),
        Contender::Softmax => Form::Inlined(softmax(attention)),
        Contender::Fused => Form::Other {
            op_type: "MultiHeadAttention".into(),
            domain: "com.microsoft".into(),
        },
    };
    let site = match (contender, attention.operator) {
        (Contender::Operator | Contender::Body, Operator::Window(attrs)) => Site::Window {
            attributes: attrs
                .attributes()
                .into_iter()
                .filter(|a| a.name != ATTR_NUM_HEADS)
                .collect(),
        },
        _ => Site::Linear { eps: None },
    };
    Ok(one_node(form, site, attention.heads, attention.width))
}

fn body(attention: Attention) -> Result<BodyFunction, String> {
    let body = match attention.operator {
        Operator::Linear => {
            let attrs = LinFusionAttentionAttrs::new(attention.heads as i64, None)
                .map_err(|e| e.to_string())?;
            linfusion_attention_inline(SPEC, attrs)
        }
        Operator::Window(attrs) => window_attention_inline(SPEC, &attrs),
    };
    body.map_err(|e| e.to_string())
}

/// out = q · k with square factors.
pub fn matrix_product() -> Vec<u8> {
    let body = function(vec![node("MatMul", &["q", "k"], "out", vec![])]);
    one_node(Form::Inlined(body), Site::Linear { eps: None }, 1, PRODUCT)
}

fn one_node(form: Form, site: Site, heads: usize, width: usize) -> Vec<u8> {
    OneNode {
        opset: SPEC.opset,
        layout: SPEC.layout,
        element: SPEC.element,
        heads: heads as i64,
        site,
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
fn softmax(Attention { heads, width, .. }: Attention) -> BodyFunction {
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
            ints(&[0, 0, heads as i64, width as i64]),
        ),
        node(
            "Constant",
            &[],
            "merged",
            ints(&[0, 0, (heads * width) as i64]),
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
