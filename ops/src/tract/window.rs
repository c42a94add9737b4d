//! `WindowAttention` for tract.

use ::tract_onnx::model::ParsingContext;
use ::tract_onnx::pb::NodeProto;
use ::tract_onnx::prelude::tract_itertools::Itertools;
use ::tract_onnx::tract_core::internal::*;
use ::tract_onnx::tract_hir::internal::*;
use half::f16;

use crate::cpu::{self, Element, Execution, Tensors};
use crate::schema::{
    ATTR_BORDER, ATTR_NUM_HEADS, ATTR_RADIUS, ATTR_SCALE, ATTR_TEXT, ATTR_WINDOW, Border, DOMAIN,
    TextSide, WINDOW_ATTENTION, WINDOW_INPUT_NAMES, Window, WindowAttentionAttrs, WindowDims,
};

pub(super) fn build(
    _context: &ParsingContext,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let name = &node.name;
    if node.domain != DOMAIN {
        let found = &node.domain;
        bail!("node `{name}`: expected {WINDOW_ATTENTION} of domain `{DOMAIN}`, found `{found}`");
    }
    if node.input.len() != WINDOW_INPUT_NAMES.len() || node.output.len() != 1 {
        let (inputs, outputs) = (node.input.len(), node.output.len());
        bail!(
            "node `{name}`: expected inputs q, k, v, grid and one output, found {inputs} inputs and {outputs} outputs"
        );
    }
    let size = |v: i64| usize::try_from(v).unwrap_or(0);
    let sides = node.get_attr_opt_tvec::<i64>(ATTR_WINDOW)?;
    let radius = node.get_attr_opt::<i64>(ATTR_RADIUS)?;
    let window = match (sides.as_deref(), radius) {
        (Some(&[rows, cols]), None) => Window::Rect {
            rows: size(rows),
            cols: size(cols),
        },
        (None, Some(radius)) => Window::Circle {
            radius: size(radius),
        },
        (sides, radius) => bail!(
            "node `{name}`: expected either `window` of two numbers or `radius`, found {sides:?} and {radius:?}"
        ),
    };
    let border = match (node.get_attr_opt::<String>(ATTR_BORDER)?.as_deref(), window) {
        (Some("clamp"), _) | (None, Window::Rect { .. }) => Border::Clamp,
        (Some("truncate"), _) | (None, Window::Circle { .. }) => Border::Truncate,
        (Some(other), _) => {
            bail!("node `{name}`: expected border clamp or truncate, found {other}")
        }
    };
    let text = match node.get_attr_opt::<String>(ATTR_TEXT)?.as_deref() {
        None | Some("prefix") => TextSide::Prefix,
        Some("suffix") => TextSide::Suffix,
        Some(other) => bail!("node `{name}`: expected text prefix or suffix, found {other}"),
    };
    let attrs = WindowAttentionAttrs {
        num_heads: size(node.get_attr(ATTR_NUM_HEADS)?),
        scale: node.get_attr_opt::<f32>(ATTR_SCALE)?.filter(|s| *s != 0.0),
        window,
        border,
        text,
    };
    attrs.check().with_context(|| format!("node `{name}`"))?;
    Ok((expand(WindowAttention(attrs)), vec![]))
}

/// The operator, before tract knows the types.
#[derive(Debug, Clone, PartialEq)]
struct WindowAttention(WindowAttentionAttrs);

// The attributes were checked to hold a finite scale, so equality is reflexive.
impl Eq for WindowAttention {}

impl Expansion for WindowAttention {
    fn name(&self) -> StaticName {
        WINDOW_ATTENTION.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, WINDOW_INPUT_NAMES.len())?;
        check_output_arity(outputs, 1)?;
        let [q, k, v, grid] = [&inputs[0], &inputs[1], &inputs[2], &inputs[3]];
        let out = &outputs[0];
        s.equals(&grid.rank, 1)?;
        for other in [k, v, out] {
            s.equals(&q.datum_type, &other.datum_type)?;
            s.equals(&q.rank, &other.rank)?;
        }
        s.given(&q.rank, move |s, rank| {
            let last = rank as usize - 1;
            for axis in 0..last {
                s.equals(&q.shape[axis], &out.shape[axis])?;
                s.equals(&q.shape[axis], &k.shape[axis])?;
                s.equals(&q.shape[axis], &v.shape[axis])?;
            }
            s.equals(&v.shape[last], &out.shape[last])?;
            s.equals(&q.shape[last], &k.shape[last])
        })
    }

    fn wire(
        &self,
        prefix: &str,
        model: &mut TypedModel,
        inputs: &[OutletId],
    ) -> TractResult<TVec<OutletId>> {
        model.wire_node(prefix, TypedWindow(self.0), inputs)
    }
}

/// The operator in a typed model.
#[derive(Debug, Clone, PartialEq)]
struct TypedWindow(WindowAttentionAttrs);

impl Eq for TypedWindow {}

impl Op for TypedWindow {
    fn name(&self) -> StaticName {
        WINDOW_ATTENTION.into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{:?}", self.0)])
    }

    op_as_typed_op!();
}

impl TypedOp for TypedWindow {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let &[q, _, v, _] = inputs else {
            bail!(
                "expected inputs q, k, v and grid, found {} inputs",
                inputs.len()
            );
        };
        ensure!(
            matches!(q.rank(), 3 | 4) && v.rank() == q.rank(),
            "input `q`: expected rank 3 or 4 as for input `v`, found shapes {:?} and {:?}",
            q.shape,
            v.shape
        );
        let last = q.rank() - 1;
        let mut shape: TVec<TDim> = q.shape.to_tvec();
        shape[last] = v.shape[last].clone();
        Ok(tvec!(q.datum_type.fact(shape)))
    }

    as_op!();
}

impl EvalOp for TypedWindow {
    op_out_of_plan!();

    fn eval(&self, _context: &EvalContext, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (q, k, v, grid) = inputs
            .iter()
            .map(|x| &**x)
            .collect_tuple()
            .with_context(|| format!("expected q, k, v and grid, found {}", inputs.len()))?;
        // tract turns sizes into symbolic dimensions on the way.
        let grid = grid.cast_to::<i64>()?;
        let &[rows, cols] = grid.try_as_plain_ram()?.as_slice::<i64>()? else {
            bail!("input `grid`: expected shape [2], found {:?}", grid.shape());
        };
        let dims = WindowDims::new(q.shape(), k.shape(), v.shape(), [rows, cols], &self.0)?;
        let out = match q.datum_type() {
            DatumType::F32 => run::<f32>(&dims, &self.0, q, k, v),
            DatumType::F16 => run::<f16>(&dims, &self.0, q, k, v),
            DatumType::F64 => run::<f64>(&dims, &self.0, q, k, v),
            other => bail!("expected float32, float16 or float64, found {other:?}"),
        }?;
        Ok(tvec!(out.into_tvalue()))
    }
}

fn run<T: Element + Datum>(
    dims: &WindowDims,
    attrs: &WindowAttentionAttrs,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> TractResult<Tensor> {
    let mut out = Tensor::zero_dt(T::datum_type(), &dims.out_shape())?;
    cpu::window_attention(
        dims,
        attrs,
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
