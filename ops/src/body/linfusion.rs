//! `LinFusionAttention`: the only products are φ(k)ᵀv and φ(q) times that.

use super::{
    AttributeValue, BodyError, BodyFunction, BodySpec, Builder, FormalAttribute, Heads,
    MIN_FUNCTION_OPSET, MIN_INLINE_OPSET, RefKind, check_spec, named,
};
use crate::schema::{
    ATTR_EPS, ATTR_NUM_HEADS, DEFAULT_EPS, ElementType, INPUT_NAMES, LINFUSION_ATTENTION,
    LinFusionAttentionAttrs, OUTPUT_NAME,
};

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

fn build(spec: BodySpec, attributes: Attributes) -> BodyFunction {
    let heads = match attributes {
        Attributes::Formal => Heads::Formal,
        Attributes::Fixed(attrs) => Heads::Fixed(attrs.num_heads),
    };
    let mut b = Builder {
        spec,
        heads,
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
    let eps = b.eps(attributes);
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

impl Builder {
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

    fn eps(&mut self, attributes: Attributes) -> String {
        let attrs = match attributes {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::{MAX_OPSET, MIN_BF16_OPSET};
    use crate::schema::Layout;
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
