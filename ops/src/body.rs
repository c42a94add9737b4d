//! `LinFusionAttention` in standard ONNX operators, as plain values.
//!
//! The nodes are protobuf-free so that whoever writes models can turn them into a model-local
//! `FunctionProto` ([`linfusion_attention_body`]) or splice them into a graph
//! ([`linfusion_attention_inline`]).
//!
//! ONNX Runtime inlines a model-local function under the *model's* opset, whatever the function
//! itself imports, so a body is generated for one opset. Everything in it is linear in the number
//! of queries and keys: the only products are φ(k)ᵀv and φ(q) times that.
//!
//! The bodies keep symbolic dimensions (`Reshape` with 0 and -1). `Reshape` with -1 refuses empty
//! tensors, so unlike the kernels a body needs B, N and M of at least 1.

use thiserror::Error;

use crate::schema::{
    ATTR_EPS, ATTR_NUM_HEADS, AttrError, DEFAULT_EPS, ElementType, INPUT_NAMES,
    LINFUSION_ATTENTION, Layout, LinFusionAttentionAttrs, OUTPUT_NAME,
};

/// The oldest opset whose `Constant` can refer to a function's attribute.
pub const MIN_FUNCTION_OPSET: i64 = 12;
/// The oldest opset that [`linfusion_attention_inline`] serves.
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
    /// `AttributeProto.FLOAT`.
    Float,
}

/// The body of the model-local function `ai.linfusion::LinFusionAttention`.
///
/// # Errors
/// [`BodyError`] when the opset has no function attributes or is outside the range served.
pub fn linfusion_attention_body(spec: BodySpec) -> Result<BodyFunction, BodyError> {
    if spec.opset == MIN_INLINE_OPSET {
        return Err(BodyError::NoFunctionAttributes { opset: spec.opset });
    }
    check_spec(spec, MIN_FUNCTION_OPSET)?;
    let mut function = build(spec, Attributes::Formal);
    function.attributes = vec![
        FormalAttribute {
            name: ATTR_NUM_HEADS.into(),
            default: None,
        },
        FormalAttribute {
            name: ATTR_EPS.into(),
            default: Some(AttributeValue::Float(DEFAULT_EPS)),
        },
    ];
    Ok(function)
}

/// The same body with the attributes as constants, to be spliced into a graph: rename the inputs
/// `q`, `k`, `v`, the output `out` and every inner name (each is written once).
///
/// # Errors
/// [`BodyError`] when the opset is outside the range served or an attribute out of range.
pub fn linfusion_attention_inline(
    spec: BodySpec,
    attrs: LinFusionAttentionAttrs,
) -> Result<BodyFunction, BodyError> {
    check_spec(spec, MIN_INLINE_OPSET)?;
    attrs.check()?;
    Ok(build(spec, Attributes::Fixed(attrs)))
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

fn build(spec: BodySpec, attributes: Attributes) -> BodyFunction {
    let mut b = Builder {
        spec,
        attributes,
        nodes: Vec::new(),
    };
    let [q, k, v] = INPUT_NAMES;
    let one = b.scalar("one", 1.0);

    let q_heads = b.split_heads(q, [0, 2, 1, 3]);
    let k_heads = b.split_heads(k, [0, 2, 3, 1]);
    let v_heads = b.split_heads(v, [0, 2, 1, 3]);
    let q_features = b.feature_map("q", &q_heads, &one);
    let k_features = b.feature_map("k", &k_heads, &one);

    // 1/M is applied after the sums, as in the kernels: dividing v first would lose f16 values
    // to underflow if a converter later runs the body in half precision.
    let keys = b.number_of_keys(k, &one);
    let sums = b.op("MatMul", &[&k_features, &v_heads], "kv_sum", vec![]);
    let mean_kv = b.op("Div", &[&sums, &keys], "kv_mean", vec![]);
    let key_sum = b.sum_last_axis(&k_features);
    let mean_key = b.op("Div", &[&key_sum, &keys], "key_mean", vec![]);

    let weighted = b.op("MatMul", &[&q_features, &mean_kv], "weighted", vec![]);
    let overlap = b.op("MatMul", &[&q_features, &mean_key], "overlap", vec![]);
    let eps = b.eps();
    let normaliser = b.op("Add", &[&overlap, &eps], "normaliser", vec![]);
    let out = b.op("Div", &[&weighted, &normaliser], "out_heads", vec![]);
    let out = b.merge_heads(&out);
    b.restore_element_type(&out);

    BodyFunction {
        name: LINFUSION_ATTENTION.into(),
        inputs: INPUT_NAMES.map(String::from).to_vec(),
        outputs: vec![OUTPUT_NAME.into()],
        attributes: vec![],
        nodes: b.nodes,
    }
}

/// Where the node's attributes come from.
#[derive(Clone, Copy)]
enum Attributes {
    /// From the function's formal attributes.
    Formal,
    /// Written into the body.
    Fixed(LinFusionAttentionAttrs),
}

struct Builder {
    spec: BodySpec,
    attributes: Attributes,
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
        match self.attributes {
            Attributes::Fixed(attrs) => self.ints(NAME, &[0, 0, attrs.num_heads as i64, -1]),
            Attributes::Formal => {
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

    fn feature_map(&mut self, prefix: &str, x: &str, one: &str) -> String {
        let features = format!("{prefix}_features");
        if self.spec.element.accumulator() != ElementType::F64 {
            let elu = self.op("Elu", &[x], &format!("{prefix}_elu"), vec![]);
            return self.op("Add", &[&elu, one], &features, vec![]);
        }
        // ONNX Runtime's CPU provider has no Elu for doubles: exp(min(x, 0)) + max(x, 0).
        let zero = self.scalar(&format!("{prefix}_zero"), 0.0);
        let negative = self.op("Min", &[x, &zero], &format!("{prefix}_negative"), vec![]);
        let decay = self.op("Exp", &[&negative], &format!("{prefix}_decay"), vec![]);
        let positive = self.op("Relu", &[x], &format!("{prefix}_positive"), vec![]);
        self.op("Add", &[&decay, &positive], &features, vec![])
    }

    /// max(M, 1), read from k at run time.
    fn number_of_keys(&mut self, k: &str, one: &str) -> String {
        let axis = self.spec.layout.rank() as i64 - 2;
        let shape = self.op("Shape", &[k], "k_shape", vec![]);
        let index = self.ints("keys_axis", &[axis]);
        let count = self.op("Gather", &[&shape, &index], "keys_int", vec![]);
        let count = self.cast(&count, "keys_float", self.spec.element.accumulator());
        self.op("Max", &[&count, one], "keys", vec![])
    }

    fn sum_last_axis(&mut self, x: &str) -> String {
        // The axes moved from an attribute to an input in opset 13.
        if self.spec.opset < 13 {
            let axes = vec![named("axes", AttributeValue::Ints(vec![-1]))];
            return self.op("ReduceSum", &[x], "key_sum", axes);
        }
        let axes = self.ints("last_axis", &[-1]);
        self.op("ReduceSum", &[x, &axes], "key_sum", vec![])
    }

    fn eps(&mut self) -> String {
        let attrs = match self.attributes {
            Attributes::Fixed(attrs) => attrs,
            Attributes::Formal => {
                let value = AttributeValue::Ref {
                    attribute: ATTR_EPS.into(),
                    kind: RefKind::Float,
                };
                let eps = self.constant("eps_f32", "value_float", value);
                return match self.spec.element.accumulator() {
                    ElementType::F64 => self.cast(&eps, "eps", ElementType::F64),
                    _ => eps,
                };
            }
        };
        self.scalar("eps", f64::from(attrs.eps))
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn every_spec() -> Vec<BodySpec> {
        let mut specs = Vec::new();
        for opset in MIN_INLINE_OPSET..=MAX_OPSET {
            for layout in [Layout::Packed, Layout::Heads] {
                for element in ElementType::ALL {
                    if element == ElementType::Bf16 && opset < MIN_BF16_OPSET {
                        continue;
                    }
                    specs.push(BodySpec {
                        opset,
                        layout,
                        element,
                    });
                }
            }
        }
        specs
    }

    #[test]
    fn every_name_is_written_once_and_before_it_is_read() {
        let attrs = LinFusionAttentionAttrs::new(4, None).unwrap();
        for spec in every_spec() {
            let mut bodies = vec![linfusion_attention_inline(spec, attrs).unwrap()];
            if spec.opset >= MIN_FUNCTION_OPSET {
                bodies.push(linfusion_attention_body(spec).unwrap());
            }
            for body in bodies {
                let mut known: HashSet<&str> = body.inputs.iter().map(String::as_str).collect();
                for node in &body.nodes {
                    for input in &node.inputs {
                        assert!(known.contains(input.as_str()), "{spec:?}: {input}");
                    }
                    for output in &node.outputs {
                        assert!(known.insert(output), "{spec:?}: {output} written twice");
                    }
                }
                assert!(known.contains(OUTPUT_NAME), "{spec:?}");
            }
        }
    }

    #[test]
    fn opsets_outside_the_range_are_refused() {
        let spec = |opset| BodySpec {
            opset,
            layout: Layout::Packed,
            element: ElementType::F32,
        };
        let attrs = LinFusionAttentionAttrs::new(4, None).unwrap();
        let at_11 = linfusion_attention_body(spec(11)).unwrap_err();
        assert!(at_11.to_string().contains("`standard`"), "{at_11}");
        assert!(linfusion_attention_inline(spec(11), attrs).is_ok());
        let bf16 = BodySpec {
            element: ElementType::Bf16,
            ..spec(12)
        };
        assert_eq!(
            linfusion_attention_body(bf16),
            Err(BodyError::NoBf16 { opset: 12 })
        );
        for opset in [i64::MIN, 0, 10, 29] {
            assert!(linfusion_attention_body(spec(opset)).is_err(), "{opset}");
            assert!(
                linfusion_attention_inline(spec(opset), attrs).is_err(),
                "{opset}"
            );
        }
    }

    #[test]
    fn an_inlined_body_refers_to_no_attribute() {
        let attrs = LinFusionAttentionAttrs::new(4, None).unwrap();
        for spec in every_spec() {
            let body = linfusion_attention_inline(spec, attrs).unwrap();
            let refers = body
                .nodes
                .iter()
                .flat_map(|n| &n.attributes)
                .any(|a| matches!(a.value, AttributeValue::Ref { .. }));
            assert!(!refers && body.attributes.is_empty(), "{spec:?}");
        }
    }
}
