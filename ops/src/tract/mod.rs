//! The operators for tract: call [`register`] on an `Onnx` before it reads a model.
//!
//! tract keeps operators by type alone and has no model-local functions, so the builder checks the
//! node's domain itself. f32, f16 and f64 run; tract has no bfloat16.

mod window;

use ::tract_onnx::model::ParsingContext;
use ::tract_onnx::pb::NodeProto;
use ::tract_onnx::prelude::tract_itertools::Itertools;
use ::tract_onnx::tract_core::internal::*;
use ::tract_onnx::tract_hir::internal::*;
use half::f16;

use crate::cpu::{self, Element, Execution, Tensors};
use crate::schema::{
    ATTR_EPS, ATTR_NUM_HEADS, DOMAIN, Dims, INPUT_NAMES, LINFUSION_ATTENTION, Layout,
    LinFusionAttentionAttrs, WINDOW_ATTENTION,
};

/// Registers the operators of [`crate::schema::DOMAIN`].
pub fn register(onnx: &mut ::tract_onnx::Onnx) {
    onnx.op_register.insert(LINFUSION_ATTENTION, build);
    onnx.op_register.insert(WINDOW_ATTENTION, window::build);
}

fn build(
    _context: &ParsingContext,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    if node.domain != DOMAIN {
        bail!(
            "node `{}`: expected {LINFUSION_ATTENTION} of domain `{DOMAIN}`, found domain `{}`",
            node.name,
            node.domain
        );
    }
    if node.input.len() != INPUT_NAMES.len() || node.output.len() != 1 {
        bail!(
            "node `{}`: expected inputs q, k, v and one output, found {} inputs and {} outputs",
            node.name,
            node.input.len(),
            node.output.len()
        );
    }
    let heads: i64 = node.get_attr(ATTR_NUM_HEADS)?;
    let eps: Option<f32> = node.get_attr_opt(ATTR_EPS)?;
    let attrs = LinFusionAttentionAttrs::new(heads, eps)
        .with_context(|| format!("node `{}`", node.name))?;
    Ok((expand(LinFusionAttention(attrs)), vec![]))
}

/// The operator, before and after tract knows the types.
#[derive(Debug, Clone, PartialEq)]
pub struct LinFusionAttention(pub LinFusionAttentionAttrs);

// The attributes were checked to hold a finite eps, so equality is reflexive.
impl Eq for LinFusionAttention {}

impl Expansion for LinFusionAttention {
    fn name(&self) -> StaticName {
        LINFUSION_ATTENTION.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 3)?;
        check_output_arity(outputs, 1)?;
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let out = &outputs[0];
        for other in [k, v, out] {
            s.equals(&q.datum_type, &other.datum_type)?;
            s.equals(&q.rank, &other.rank)?;
        }
        s.given(&q.rank, move |s, rank| {
            let last = rank as usize - 1;
            for axis in 0..last {
                s.equals(&q.shape[axis], &out.shape[axis])?;
            }
            s.equals(&v.shape[last], &out.shape[last])?;
            s.equals(&q.shape[last], &k.shape[last])?;
            s.equals(&k.shape[last - 1], &v.shape[last - 1])
        })
    }

    fn wire(
        &self,
        prefix: &str,
        model: &mut TypedModel,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, TypedAttention(self.0), inputs)
    }
}

/// The operator in a typed model.
#[derive(Debug, Clone, PartialEq)]
struct TypedAttention(LinFusionAttentionAttrs);

impl Eq for TypedAttention {}

impl Op for TypedAttention {
    fn name(&self) -> StaticName {
        LINFUSION_ATTENTION.into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!(
            "num_heads: {}, eps: {}",
            self.0.num_heads, self.0.eps
        )])
    }

    op_as_typed_op!();
}

impl TypedOp for TypedAttention {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let &[q, k, v] = inputs else {
            bail!("expected inputs q, k and v, found {} inputs", inputs.len());
        };
        for (name, fact) in INPUT_NAMES.iter().zip([q, k, v]) {
            ensure!(
                fact.datum_type == q.datum_type,
                "input `{name}`: expected {:?} as for input `q`, found {:?}",
                q.datum_type,
                fact.datum_type
            );
            ensure!(
                Layout::from_rank(fact.rank()).is_some() && fact.rank() == q.rank(),
                "input `{name}`: expected rank 3 or 4 as for input `q`, found shape {:?}",
                fact.shape
            );
        }
        // Symbolic sizes are checked when they are known, in `eval`.
        if let (Some(q), Some(k), Some(v)) = (
            q.shape.as_concrete(),
            k.shape.as_concrete(),
            v.shape.as_concrete(),
        ) {
            Dims::new(q, k, v, &self.0)?;
        }
        let last = q.rank() - 1;
        let mut shape: TVec<TDim> = q.shape.to_tvec();
        shape[last] = v.shape[last].clone();
        Ok(tvec!(q.datum_type.fact(shape)))
    }

    fn cost(&self, inputs: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let &[q, k, v] = inputs else {
            return Ok(tvec!());
        };
        let last = q.rank() - 1;
        let batch: TDim = q.shape.iter().take(last - 1).product();
        let rows = q.shape[last - 1].clone() + &k.shape[last - 1];
        let mut products = batch * rows * &q.shape[last] * &v.shape[last];
        if q.rank() == Layout::Packed.rank() {
            products /= self.0.num_heads;
        }
        Ok(tvec!((Cost::FMA(q.datum_type), products)))
    }

    as_op!();
}

impl EvalOp for TypedAttention {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (q, k, v) = inputs
            .iter()
            .map(|x| &**x)
            .collect_tuple()
            .with_context(|| format!("expected inputs q, k and v, found {}", inputs.len()))?;
        let dims = Dims::new(q.shape(), k.shape(), v.shape(), &self.0)?;
        let out = match q.datum_type() {
            DatumType::F32 => run::<f32>(&dims, self.0.eps, q, k, v),
            DatumType::F16 => run::<f16>(&dims, self.0.eps, q, k, v),
            DatumType::F64 => run::<f64>(&dims, self.0.eps, q, k, v),
            other => bail!("expected float32, float16 or float64, found {other:?}"),
        }?;
        Ok(tvec!(out.into_tvalue()))
    }
}

fn run<T: Element + Datum>(
    dims: &Dims,
    eps: f32,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> TractResult<Tensor> {
    let mut out = Tensor::zero_dt(T::datum_type(), &dims.out_shape())?;
    cpu::linfusion_attention(
        dims,
        eps,
        Tensors {
            q: q.try_as_plain_ram()?.as_slice::<T>()?,
            k: k.try_as_plain_ram()?.as_slice::<T>()?,
            v: v.try_as_plain_ram()?.as_slice::<T>()?,
            out: cpu::as_output(out.try_as_plain_ram_mut()?.as_slice_mut::<T>()?),
        },
        Execution::default(),
    )?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use ::tract_onnx::pb::{AttributeProto, attribute_proto::AttributeType};
    use ndarray::ArrayD;

    fn node(domain: &str, heads: Option<i64>) -> NodeProto {
        NodeProto {
            name: "site".into(),
            op_type: LINFUSION_ATTENTION.into(),
            domain: domain.into(),
            input: INPUT_NAMES.map(String::from).to_vec(),
            output: vec!["out".into()],
            attribute: heads
                .map(|i| AttributeProto {
                    name: ATTR_NUM_HEADS.into(),
                    r#type: AttributeType::Int as i32,
                    i,
                    ..Default::default()
                })
                .into_iter()
                .collect(),
            ..Default::default()
        }
    }

    fn built(node: &NodeProto) -> TractResult<Box<dyn InferenceOp>> {
        let mut onnx = ::tract_onnx::onnx();
        register(&mut onnx);
        let model = Default::default();
        let context = ParsingContext {
            onnx_operator_set_version: 17,
            framework: &onnx,
            model: &model,
            parent_graphs: vec![],
            model_dir: None,
            template: Default::default(),
        };
        let builder = onnx.op_register.0[LINFUSION_ATTENTION];
        Ok(builder(&context, node)?.0)
    }

    #[test]
    fn foreign_domains_and_bad_attributes_are_refused() {
        assert!(built(&node(DOMAIN, Some(2))).is_ok());
        for (domain, heads, expected) in [
            ("com.example", Some(2), "domain `com.example`"),
            ("", Some(2), "domain ``"),
            (DOMAIN, Some(0), "node `site`"),
            (DOMAIN, None, ATTR_NUM_HEADS),
        ] {
            let message = format!("{:#}", built(&node(domain, heads)).unwrap_err());
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn runs_like_the_reference_and_keeps_symbols() {
        let attrs = LinFusionAttentionAttrs::new(2, None).unwrap();
        let mut model = InferenceModel::default();
        let n = model.symbols.sym("N").to_dim();
        let input = |width: i64| {
            InferenceFact::dt_shape(
                f32::datum_type(),
                tvec![1.to_dim(), n.clone(), width.to_dim()],
            )
        };
        let q = model.add_source("q", input(6)).unwrap();
        let k = model.add_source("k", input(6)).unwrap();
        let v = model.add_source("v", input(10)).unwrap();
        let op = built(&node(DOMAIN, Some(2))).unwrap();
        let out = model.wire_node("site", op, &[q, k, v]).unwrap();
        model.select_output_outlets(&out).unwrap();
        let model = model.into_optimized().unwrap();
        let fact = model.output_fact(0).unwrap();
        assert_eq!(fact.shape.to_tvec(), tvec![1.to_dim(), n, 10.to_dim()]);

        let tensor = |width: usize, salt: usize| {
            ArrayD::from_shape_fn(vec![1, 5, width], |at| {
                ((at[1] * 31 + at[2] * 7 + salt) % 13) as f32 / 6.0 - 1.0
            })
        };
        let (q, k, v) = (tensor(6, 0), tensor(6, 3), tensor(10, 5));
        let exact = reference::linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
        let value = |x: &ArrayD<f32>| {
            Tensor::from_shape(x.shape(), x.as_slice().unwrap())
                .unwrap()
                .into_tvalue()
        };
        let found = model
            .into_runnable()
            .unwrap()
            .run(tvec![value(&q), value(&k), value(&v)])
            .unwrap();
        let found = found[0].try_as_plain_ram().unwrap();
        for (f, e) in found.as_slice::<f32>().unwrap().iter().zip(&exact) {
            assert!((f64::from(*f) - e).abs() < 1e-6, "{f}, not {e}");
        }
    }
}
