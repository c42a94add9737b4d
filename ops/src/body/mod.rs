//! The operators in standard ONNX operators, as plain values.
//!
//! The nodes are protobuf-free so that whoever writes models can turn them into a model-local
//! `FunctionProto` ([`linfusion_attention_body`], [`window_attention_body`]) or splice them into
//! a graph ([`linfusion_attention_inline`], [`window_attention_inline`]).
//!
//! ONNX Runtime inlines a model-local function under the *model's* opset, whatever the function
//! itself imports, so a body is generated for one opset. Everything in it is linear in the number
//! of queries and keys.
//!
//! The bodies keep symbolic dimensions (`Reshape` with 0 and -1). `Reshape` with -1 refuses empty
//! tensors, so unlike the kernels a body needs B, N and M of at least 1.

use thiserror::Error;

use crate::schema::{ATTR_NUM_HEADS, AttrError, ElementType, INPUT_NAMES, Layout, OUTPUT_NAME};

mod linfusion;
mod window;

pub use linfusion::{linfusion_attention_body, linfusion_attention_inline};
pub use window::{WindowShape, WindowVariant, window_attention_body, window_attention_inline};

/// The oldest opset whose `Constant` can refer to a function's attribute.
pub const MIN_FUNCTION_OPSET: i64 = 12;
/// The oldest opset of which a body can be inlined.
pub const MIN_INLINE_OPSET: i64 = 11;
/// The oldest opset whose `Cast` knows bfloat16.
pub const MIN_BF16_OPSET: i64 = 13;
/// The newest opset whose operators were checked against the bodies.
pub const MAX_OPSET: i64 = 28;

/// What a body is generated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodySpec {
    /// The model's opset of the default domain.
    pub opset: i64,
    /// Layout of q, k, v and the output.
    pub layout: Layout,
    /// Element type of q, k, v and the output.
    ///
    /// From opset 15 on the bodies for `f16` and `bf16` end in `CastLike` and are therefore also
    /// right for `f32` inputs: use one of them where a model has sites of several of these types.
    pub element: ElementType,
}

/// Why there is no body.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum BodyError {
    /// Attributes can't be passed into a function body at this opset.
    #[error(
        "opset {opset} has no way to pass attributes into a function body (12 is the oldest that has); only the op-only form (`op`) or the inlined form (`standard`) works for this model"
    )]
    NoFunctionAttributes {
        /// The opset asked for.
        opset: i64,
    },
    /// The opset lies outside the range served.
    #[error("opset {opset} is outside the range served, {min} to {max}")]
    Opset {
        /// The opset asked for.
        opset: i64,
        /// The oldest opset served.
        min: i64,
        /// The newest opset served.
        max: i64,
    },
    /// Standard ONNX has no bfloat16 at this opset, so there is no body to write.
    #[error(
        "opset {opset} has no bfloat16 `Cast` (13 is the oldest that has); only the op-only form (`op`) works for this model"
    )]
    NoBf16 {
        /// The opset asked for.
        opset: i64,
    },
    /// An attribute is out of range.
    #[error(transparent)]
    Attr(#[from] AttrError),
}

/// A function: a named body with formal inputs, outputs and attributes.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyFunction {
    /// The function's name; its domain is [`crate::schema::DOMAIN`].
    pub name: String,
    /// Formal inputs.
    pub inputs: Vec<String>,
    /// Formal outputs.
    pub outputs: Vec<String>,
    /// Formal attributes; none in an inlined body.
    pub attributes: Vec<FormalAttribute>,
    /// The nodes, in topological order; all in the default domain.
    pub nodes: Vec<BodyNode>,
}

/// An attribute that a caller of the function gives.
#[derive(Debug, Clone, PartialEq)]
pub struct FormalAttribute {
    /// The attribute's name.
    pub name: String,
    /// `None`: required (`FunctionProto.attribute`); else the value where the caller gives none
    /// (`FunctionProto.attribute_proto`).
    pub default: Option<AttributeValue>,
}

/// One node of a body.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyNode {
    /// Operator type in the default domain.
    pub op_type: String,
    /// Input value names.
    pub inputs: Vec<String>,
    /// Output value names.
    pub outputs: Vec<String>,
    /// Attributes.
    pub attributes: Vec<BodyAttribute>,
}

/// One attribute of a node.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyAttribute {
    /// The attribute's name.
    pub name: String,
    /// Its value.
    pub value: AttributeValue,
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq)]
pub enum AttributeValue {
    /// `AttributeProto.INT`.
    Int(i64),
    /// `AttributeProto.INTS`.
    Ints(Vec<i64>),
    /// `AttributeProto.FLOAT`.
    Float(f32),
    /// `AttributeProto.STRING`.
    String(String),
    /// `AttributeProto.TENSOR` of FLOAT; no dims: a scalar.
    TensorF32 {
        /// Dimensions.
        dims: Vec<i64>,
        /// Elements in row-major order.
        data: Vec<f32>,
    },
    /// `AttributeProto.TENSOR` of DOUBLE.
    TensorF64 {
        /// Dimensions.
        dims: Vec<i64>,
        /// Elements in row-major order.
        data: Vec<f64>,
    },
    /// `AttributeProto.TENSOR` of INT64.
    TensorI64 {
        /// Dimensions.
        dims: Vec<i64>,
        /// Elements in row-major order.
        data: Vec<i64>,
    },
    /// `AttributeProto.GRAPH`: the body of a Loop.
    Graph(BodyGraph),
    /// `AttributeProto.ref_attr_name`: the value of the function's attribute of this name.
    Ref {
        /// The function's attribute.
        attribute: String,
        /// `AttributeProto.type`, which ONNX wants even for a reference.
        kind: RefKind,
    },
}

/// Type of an attribute that is passed by reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefKind {
    /// `AttributeProto.INT`.
    Int,
    /// `AttributeProto.INTS`.
    Ints,
    /// `AttributeProto.FLOAT`.
    Float,
}

/// A graph inside a node. It may read every value of the body around it; its own names are
/// different from those.
#[derive(Debug, Clone, PartialEq)]
pub struct BodyGraph {
    /// Its inputs.
    pub inputs: Vec<GraphValue>,
    /// Its outputs.
    pub outputs: Vec<GraphValue>,
    /// The nodes, in topological order.
    pub nodes: Vec<BodyNode>,
}

/// An input or output of a [`BodyGraph`].
#[derive(Debug, Clone, PartialEq)]
pub struct GraphValue {
    /// Its name.
    pub name: String,
    /// Number of `TensorProto.DataType`.
    pub element: i32,
    /// Number of dimensions, all of unknown size.
    pub rank: usize,
}

fn check_spec(spec: BodySpec, min: i64) -> Result<(), BodyError> {
    let opset = spec.opset;
    if !(min..=MAX_OPSET).contains(&opset) {
        return Err(BodyError::Opset {
            opset,
            min,
            max: MAX_OPSET,
        });
    }
    if spec.element == ElementType::Bf16 && opset < MIN_BF16_OPSET {
        return Err(BodyError::NoBf16 { opset });
    }
    Ok(())
}

/// Where the number of heads comes from.
#[derive(Clone, Copy)]
enum Heads {
    /// From the function's formal attribute.
    Formal,
    /// Written into the body.
    Fixed(usize),
}

struct Builder {
    spec: BodySpec,
    heads: Heads,
    nodes: Vec<BodyNode>,
}

impl Builder {
    fn op(
        &mut self,
        op_type: &str,
        inputs: &[&str],
        output: &str,
        attributes: Vec<BodyAttribute>,
    ) -> String {
        self.nodes.push(BodyNode {
            op_type: op_type.into(),
            inputs: inputs.iter().map(|&s| s.into()).collect(),
            outputs: vec![output.into()],
            attributes,
        });
        output.into()
    }

    fn constant(&mut self, output: &str, attribute: &str, value: AttributeValue) -> String {
        self.op("Constant", &[], output, vec![named(attribute, value)])
    }

    fn ints(&mut self, output: &str, data: &[i64]) -> String {
        let value = AttributeValue::TensorI64 {
            dims: vec![data.len() as i64],
            data: data.to_vec(),
        };
        self.constant(output, "value", value)
    }

    /// A scalar of the type that the body computes in.
    fn scalar(&mut self, output: &str, value: f64) -> String {
        let value = match self.spec.element.accumulator() {
            ElementType::F64 => AttributeValue::TensorF64 {
                dims: vec![],
                data: vec![value],
            },
            _ => AttributeValue::TensorF32 {
                dims: vec![],
                data: vec![value as f32],
            },
        };
        self.constant(output, "value", value)
    }

    fn cast(&mut self, input: &str, output: &str, to: ElementType) -> String {
        let to = AttributeValue::Int(i64::from(to.onnx_code()));
        self.op("Cast", &[input], output, vec![named("to", to)])
    }

    /// The input in the type that the body computes in, as `[B, H, ...]` with the axes of
    /// `[B, rows, H, width]` permuted by `perm`.
    fn split_heads(&mut self, input: &str, perm: [i64; 4]) -> String {
        let compute = self.spec.element.accumulator();
        let mut x = input.to_owned();
        if self.spec.element != compute {
            x = self.cast(&x, &format!("{input}_cast"), compute);
        }
        if self.spec.layout == Layout::Packed {
            let shape = self.split_shape();
            x = self.op("Reshape", &[&x, &shape], &format!("{input}_split"), vec![]);
            return self.transpose(&x, &format!("{input}_heads"), &perm);
        }
        // Already [B, H, rows, width]: only k's transpose is left to do.
        if perm == [0, 2, 3, 1] {
            x = self.transpose(&x, &format!("{input}_heads"), &[0, 1, 3, 2]);
        }
        x
    }

    /// The shape `[0, 0, num_heads, -1]`, written once.
    fn split_shape(&mut self) -> String {
        const NAME: &str = "split_shape";
        if self.nodes.iter().any(|n| n.outputs[0] == NAME) {
            return NAME.into();
        }
        match self.heads {
            Heads::Fixed(heads) => self.ints(NAME, &[0, 0, heads as i64, -1]),
            Heads::Formal => {
                let heads = self.constant(
                    "heads_scalar",
                    "value_int",
                    AttributeValue::Ref {
                        attribute: ATTR_NUM_HEADS.into(),
                        kind: RefKind::Int,
                    },
                );
                let infer = self.ints("infer", &[-1]);
                let keep = self.ints("keep", &[0, 0]);
                let heads = self.op("Reshape", &[&heads, &infer], "heads", vec![]);
                let axis = vec![named("axis", AttributeValue::Int(0))];
                self.op("Concat", &[&keep, &heads, &infer], NAME, axis)
            }
        }
    }

    fn transpose(&mut self, input: &str, output: &str, perm: &[i64]) -> String {
        let perm = vec![named("perm", AttributeValue::Ints(perm.to_vec()))];
        self.op("Transpose", &[input], output, perm)
    }

    fn merge_heads(&mut self, out: &str) -> String {
        if self.spec.layout == Layout::Heads {
            return out.into();
        }
        let rows = self.transpose(out, "out_rows", &[0, 2, 1, 3]);
        let shape = self.ints("merge_shape", &[0, 0, -1]);
        self.op("Reshape", &[&rows, &shape], "out_packed", vec![])
    }

    /// Names the result [`OUTPUT_NAME`], in q's element type.
    fn restore_element_type(&mut self, out: &str) {
        if self.spec.element == self.spec.element.accumulator() {
            if let Some(node) = self.nodes.last_mut() {
                node.outputs = vec![OUTPUT_NAME.into()];
            }
        } else if self.spec.opset >= 15 {
            self.op("CastLike", &[out, INPUT_NAMES[0]], OUTPUT_NAME, vec![]);
        } else {
            self.cast(out, OUTPUT_NAME, self.spec.element);
        }
    }
}

fn named(name: &str, value: AttributeValue) -> BodyAttribute {
    BodyAttribute {
        name: name.into(),
        value,
    }
}
