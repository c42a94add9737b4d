//! From ONNX nodes to operations: everything but floating-point values is settled here, at the sizes that the shapes have.

use candle_core::{DType, Result, Tensor};
use linfusion_models::graph::{
    attr_float, attr_int, attr_ints, attr_str, domain, input, label, op, qualified_op,
};
use linfusion_models::onnx::proto::NodeProto;
use linfusion_models::shapes::eval::element;
use linfusion_models::shapes::value::axis;
use linfusion_models::shapes::{Fact, Shapes};
use linfusion_ops::LinFusionAttentionAttrs;
use linfusion_ops::schema::{
    ATTR_EPS, ATTR_NUM_HEADS, DOMAIN, LINFUSION_ATTENTION, WINDOW_ATTENTION,
};

use super::GraphError;
use super::conv::Conv;
use super::einsum::Einsum;
use super::op::{Op, Range, Reduction};
use super::window::Windowed;
use crate::rewrite::emit::window_attributes;

/// A node's operation, and the slots of the inputs that it reads; the others are settled.
pub(super) struct Lowered {
    pub op: Op,
    pub reads: Vec<usize>,
}

/// What `node` computes.
///
/// # Errors
/// [`GraphError::Operator`]: it is not known, or not in this form.
pub(super) fn lower(node: &NodeProto, shapes: &Shapes) -> std::result::Result<Lowered, GraphError> {
    let look = Look { node, shapes };
    let made = match domain(node) {
        "" => look.standard(),
        DOMAIN if op(node) == LINFUSION_ATTENTION => look.linfusion(),
        DOMAIN if op(node) == WINDOW_ATTENTION => look.window(),
        _ => Err("the operator is not known here".to_owned()),
    };
    made.map_err(|problem| GraphError::Operator {
        node: label(node).to_owned(),
        op: qualified_op(node),
        problem,
    })
}

/// One sentence on what is in the way.
type Found<T> = std::result::Result<T, String>;

struct Look<'a> {
    node: &'a NodeProto,
    shapes: &'a Shapes,
}

impl Look<'_> {
    fn standard(&self) -> Found<Lowered> {
        let name = op(self.node);
        if let Some(f) = unary(name) {
            return Ok(self.reading(Op::Unary(f), &[0]));
        }
        if let Some(f) = binary(name) {
            return Ok(self.reading_all(Op::Binary(f)));
        }
        let first = |op: Op| Ok(self.reading(op, &[0]));
        match name {
            "LeakyRelu" => first(Op::LeakyRelu(self.float("alpha", 0.01))),
            "Elu" => first(Op::Elu(self.float("alpha", 1.0))),
            "Gelu" => first(Op::Unary(match attr_str(self.node, "approximate") {
                Some("tanh") => Tensor::gelu,
                _ => Tensor::gelu_erf,
            })),
            "Pow" => Ok(match self.scalar(1) {
                Some(exponent) => self.reading(Op::Power(exponent), &[0]),
                None => self.reading_all(Op::Binary(Tensor::broadcast_pow)),
            }),
            "Clip" => self.clip(),
            "Where" => Ok(self.reading_all(Op::Where)),
            "Cast" | "CastLike" => first(Op::Cast(self.dtype(0)?)),
            "MatMul" => Ok(self.reading_all(Op::MatMul)),
            "Gemm" => Ok(self.reading_all(Op::Gemm {
                alpha: self.float("alpha", 1.0),
                beta: self.float("beta", 1.0),
                turned: ["transA", "transB"].map(|name| self.flag(name)),
            })),
            "Conv" => self.conv(),
            "Einsum" => {
                let equation = attr_str(self.node, "equation").unwrap_or_default();
                let parsed = Einsum::parse(equation).ok_or_else(|| {
                    format!("'{equation}' is no equation of one or two operands that each have a letter once")
                })?;
                Ok(self.reading_all(Op::Einsum(parsed)))
            }
            "AveragePool" => self.average_pool(),
            "GlobalAveragePool" => {
                let axes = (2..self.dims(0)?.len()).collect();
                self.reduction(Reduction::Mean, axes)
            }
            "Resize" | "Upsample" => self.resize(),
            "Softmax" => self.softmax(),
            "LayerNormalization" => Ok(self.reading_all(Op::LayerNorm {
                axis: self.axis("axis", -1)?,
                epsilon: self.float("epsilon", 1e-5),
            })),
            "RMSNormalization" | "SimplifiedLayerNormalization" => {
                Ok(self.reading_all(Op::RmsNorm {
                    axis: self.axis("axis", -1)?,
                    epsilon: self.float("epsilon", 1e-5),
                }))
            }
            "InstanceNormalization" => Ok(self.reading_all(Op::GroupNorm {
                groups: self.channels()?,
                epsilon: self.float("epsilon", 1e-5),
            })),
            "GroupNormalization" => {
                let groups = self.size(attr_int(self.node, "num_groups").unwrap_or(0))?;
                let channels = self.channels()?;
                match groups > 0 && channels.is_multiple_of(groups) {
                    true => Ok(self.reading_all(Op::GroupNorm {
                        groups,
                        epsilon: self.float("epsilon", 1e-5),
                    })),
                    false => Err(format!("{groups} groups of {channels} channels")),
                }
            }
            "BatchNormalization" => match self.flag("training_mode") {
                true => Err("it is in training mode".to_owned()),
                false => Ok(self.reading_all(Op::BatchNorm {
                    epsilon: self.float("epsilon", 1e-5),
                })),
            },
            "ReduceMean" => self.reduce(Reduction::Mean),
            "ReduceSum" => self.reduce(Reduction::Sum),
            "ReduceSumSquare" => self.reduce(Reduction::SumSquare),
            "ReduceL2" => self.reduce(Reduction::L2),
            "ReduceMax" => self.reduce(Reduction::Max),
            "ReduceMin" => self.reduce(Reduction::Min),
            "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => first(Op::Reshape(self.out(0)?)),
            "Expand" => first(Op::Expand(self.out(0)?)),
            "Transpose" => self.transpose(),
            "Tile" => {
                let repeats = self.ints(1, "repeats")?;
                first(Op::Tile(self.sizes(&repeats)?))
            }
            "Concat" => {
                let axis = attr_int(self.node, "axis").ok_or("it has no axis")?;
                let axis = self.axis_of(axis, 0)?;
                Ok(self.reading_all(Op::Concat { axis }))
            }
            "Split" => {
                let axis = self.axis("axis", 0)?;
                let lengths = (0..self.node.output.len())
                    .map(|i| {
                        self.out(i)?
                            .get(axis)
                            .copied()
                            .ok_or("an output has no such axis".to_owned())
                    })
                    .collect::<Found<Vec<usize>>>()?;
                first(Op::Split { axis, lengths })
            }
            "Slice" => self.slice(),
            "Gather" => {
                let axis = self.axis("axis", 0)?;
                Ok(self.reading(Op::Gather { axis }, &[0, 1]))
            }
            "Pad" => self.pad(),
            _ if !self
                .node
                .attribute
                .iter()
                .all(|a| a.g.as_option().is_none()) =>
            {
                Err("it holds a graph of its own, and which branch is taken is unknown".to_owned())
            }
            _ => Err("the operator is not known here".to_owned()),
        }
    }

    fn reading(&self, op: Op, reads: &[usize]) -> Lowered {
        Lowered {
            op,
            reads: reads.to_vec(),
        }
    }

    fn reading_all(&self, op: Op) -> Lowered {
        Lowered {
            op,
            reads: (0..self.node.input.len()).collect(),
        }
    }

    fn linfusion(&self) -> Found<Lowered> {
        let heads = attr_int(self.node, ATTR_NUM_HEADS).unwrap_or(0);
        let attributes = LinFusionAttentionAttrs::new(heads, attr_float(self.node, ATTR_EPS))
            .map_err(|e| e.to_string())?;
        Ok(self.reading_all(Op::LinFusion {
            heads: attributes.num_heads,
            epsilon: f64::from(attributes.eps),
        }))
    }

    fn window(&self) -> Found<Lowered> {
        let attributes = window_attributes(self.node).ok_or("its attributes are no window's")?;
        attributes.check().map_err(|e| e.to_string())?;
        Ok(self.reading_all(Op::Window(Windowed { attributes })))
    }

    fn clip(&self) -> Found<Lowered> {
        let bound = |slot: usize, name: &str| match (input(self.node, slot), self.scalar(slot)) {
            (Some(value), None) => Err(format!("its bound '{value}' is not constant")),
            (Some(_), bound) => Ok(bound),
            (None, _) => Ok(attr_float(self.node, name).map(f64::from)),
        };
        let bounds = [bound(1, "min")?, bound(2, "max")?];
        Ok(self.reading(Op::Clip(bounds), &[0]))
    }

    fn conv(&self) -> Found<Lowered> {
        let rank = self.dims(0)?.len();
        if !(3..=4).contains(&rank) {
            return Err(format!("its input has {rank} dimensions, not 3 or 4"));
        }
        let alike = |name: &str| match attr_ints(self.node, name) {
            None => Ok(1),
            Some([first, rest @ ..]) if *first > 0 && rest.iter().all(|r| r == first) => {
                self.size(*first)
            }
            Some(other) => Err(format!(
                "{name} is {other:?}, not the same for rows and columns"
            )),
        };
        let auto = attr_str(self.node, "auto_pad").unwrap_or("NOTSET");
        let pads = match (auto, attr_ints(self.node, "pads")) {
            ("NOTSET", Some(&[top, left, bottom, right])) => [top, bottom, left, right],
            ("NOTSET", Some(&[left, right])) => [0, 0, left, right],
            ("NOTSET", None) | ("VALID", _) => [0; 4],
            (auto, pads) => return Err(format!("auto_pad is {auto} and pads are {pads:?}")),
        };
        let pads = self.sizes(&pads)?;
        let pads = <[usize; 4]>::try_from(pads).map_err(|p| format!("pads are {p:?}"))?;
        let groups = self.size(attr_int(self.node, "group").unwrap_or(1))?;
        if groups == 0 {
            return Err("it has 0 groups".to_owned());
        }
        Ok(self.reading_all(Op::Conv(Conv {
            pads,
            stride: alike("strides")?,
            dilation: alike("dilations")?,
            groups,
        })))
    }

    fn average_pool(&self) -> Found<Lowered> {
        let kernel = attr_ints(self.node, "kernel_shape").unwrap_or_default();
        let strides = attr_ints(self.node, "strides").unwrap_or(&[1, 1]);
        let pads = attr_ints(self.node, "pads").unwrap_or_default();
        let dims = self.dims(0)?;
        let (&[rows, cols], &[_, _, height, width]) = (kernel, dims.as_slice()) else {
            return Err(format!(
                "kernel {kernel:?} on {dims:?}: not two-dimensional"
            ));
        };
        let size = [self.size(rows)?, self.size(cols)?];
        let whole = size
            .iter()
            .zip([height, width])
            .all(|(k, n)| *k > 0 && n.is_multiple_of(*k));
        let padded = pads.iter().any(|p| *p != 0);
        match strides == kernel && whole && !padded {
            true => Ok(self.reading(Op::AveragePool(size), &[0])),
            false => Err(format!(
                "kernel {kernel:?}, strides {strides:?} and pads {pads:?} on {dims:?}: not blocks side by side"
            )),
        }
    }

    fn resize(&self) -> Found<Lowered> {
        let (dims, out) = (self.dims(0)?, self.out(0)?);
        if dims == out {
            return Ok(self.reading(Op::Reshape(out), &[0]));
        }
        let mode = attr_str(self.node, "mode").unwrap_or("nearest");
        let places = attr_str(self.node, "coordinate_transformation_mode");
        let places = places.unwrap_or(if op(self.node) == "Upsample" {
            "asymmetric"
        } else {
            "half_pixel"
        });
        let rounding = attr_str(self.node, "nearest_mode").unwrap_or("round_prefer_floor");
        let rounding = match op(self.node) {
            "Upsample" => "floor",
            _ => rounding,
        };
        let (&[b, c, h, w], &[out_b, out_c, rows, cols]) = (dims.as_slice(), out.as_slice()) else {
            return Err(format!("{dims:?} to {out:?}: not an image"));
        };
        let times = |from: usize, to: usize| {
            (from > 0 && to.is_multiple_of(from)).then(|| to / from.max(1))
        };
        let factors = (times(h, rows), times(w, cols));
        let (Some(down), Some(across)) = factors else {
            return Err(format!("{dims:?} to {out:?}: not a whole multiple"));
        };
        // Each pixel falls `factor` times onto itself.
        let repeats = match (places, rounding) {
            ("asymmetric", "floor") => true,
            ("half_pixel" | "pytorch_half_pixel", "round_prefer_floor" | "round_prefer_ceil") => {
                true
            }
            ("asymmetric", "round_prefer_floor") => down <= 2 && across <= 2,
            _ => false,
        };
        match mode == "nearest" && repeats && (b, c) == (out_b, out_c) {
            true => Ok(self.reading(Op::Nearest([rows, cols]), &[0])),
            false => Err(format!(
                "{mode}, {places}, {rounding} from {dims:?} to {out:?}: only repeated pixels are known"
            )),
        }
    }

    fn softmax(&self) -> Found<Lowered> {
        // Until opset 12 the last axes were taken together.
        let flat = self.shapes.opset() < 13;
        let axis = self.axis("axis", if flat { 1 } else { -1 })?;
        let dims = self.dims(0)?;
        Ok(self.reading(
            match flat && axis + 1 != dims.len() {
                true => Op::FlatSoftmax {
                    outer: dims.iter().take(axis).product(),
                },
                false => Op::Softmax { axis },
            },
            &[0],
        ))
    }

    fn reduce(&self, kind: Reduction) -> Found<Lowered> {
        let rank = self.dims(0)?.len();
        let given = match (attr_ints(self.node, "axes"), input(self.node, 1)) {
            (Some(axes), _) => axes.to_vec(),
            (None, Some(_)) => self.ints(1, "axes")?,
            (None, None) => Vec::new(),
        };
        if given.is_empty() && self.flag("noop_with_empty_axes") {
            return Ok(self.reading(Op::Reshape(self.out(0)?), &[0]));
        }
        let axes = given
            .iter()
            .map(|a| self.axis_of(*a, 0))
            .collect::<Found<Vec<_>>>()?;
        match axes.is_empty() {
            true => self.reduction(kind, (0..rank).collect()),
            false => self.reduction(kind, axes),
        }
    }

    fn reduction(&self, kind: Reduction, axes: Vec<usize>) -> Found<Lowered> {
        let shape = self.out(0)?;
        Ok(self.reading(Op::Reduce { kind, axes, shape }, &[0]))
    }

    fn transpose(&self) -> Found<Lowered> {
        let rank = self.dims(0)?.len();
        let axes = match attr_ints(self.node, "perm") {
            Some(perm) => self.sizes(perm)?,
            None => (0..rank).rev().collect(),
        };
        Ok(self.reading(Op::Transpose(axes), &[0]))
    }

    fn slice(&self) -> Found<Lowered> {
        let (dims, out) = (self.dims(0)?, self.out(0)?);
        let listed = attr_ints(self.node, "starts");
        let starts = listed.map_or_else(|| self.ints(1, "starts"), |s| Ok(s.to_vec()))?;
        let axes = match (attr_ints(self.node, "axes"), input(self.node, 3)) {
            (Some(axes), _) => axes.to_vec(),
            (None, Some(_)) => self.ints(3, "axes")?,
            (None, None) => (0..starts.len() as i64).collect(),
        };
        let steps = match input(self.node, 4) {
            Some(_) => self.ints(4, "steps")?,
            None => vec![1; starts.len()],
        };
        let mut ranges = Vec::with_capacity(axes.len());
        for ((axis, start), step) in axes.iter().zip(starts).zip(steps) {
            let axis = self.axis_of(*axis, 0)?;
            let (Some(size), Some(len)) = (dims.get(axis), out.get(axis)) else {
                return Err(format!("{dims:?} to {out:?}"));
            };
            let size = *size as i64;
            let start = if start < 0 {
                start.saturating_add(size)
            } else {
                start
            };
            let last = if step < 0 { size - 1 } else { size };
            ranges.push(Range {
                axis,
                start: start.clamp(0, last.max(0)),
                step,
                len: *len,
            });
        }
        Ok(self.reading(Op::Slice(ranges), &[0]))
    }

    fn pad(&self) -> Found<Lowered> {
        let rank = self.dims(0)?.len();
        let mode = attr_str(self.node, "mode").unwrap_or("constant");
        let value = match (input(self.node, 2), attr_float(self.node, "value")) {
            (Some(_), _) => self.scalar(2),
            (None, value) => Some(f64::from(value.unwrap_or(0.0))),
        };
        if mode != "constant" || value != Some(0.0) || input(self.node, 3).is_some() {
            return Err(format!(
                "mode {mode} with value {value:?}: only zeros on all axes are known"
            ));
        }
        let listed = attr_ints(self.node, "pads");
        let pads = listed.map_or_else(|| self.ints(1, "pads"), |p| Ok(p.to_vec()))?;
        let pads = self.sizes(&pads)?;
        let (Some(before), Some(after)) = (pads.get(..rank), pads.get(rank..2 * rank)) else {
            return Err(format!("pads {pads:?} for {rank} axes"));
        };
        let both = before.iter().zip(after).map(|(b, a)| [*b, *a]).collect();
        Ok(self.reading(Op::Pad(both), &[0]))
    }

    fn float(&self, name: &str, default: f64) -> f64 {
        attr_float(self.node, name).map_or(default, f64::from)
    }

    fn flag(&self, name: &str) -> bool {
        attr_int(self.node, name).is_some_and(|v| v != 0)
    }

    fn fact(&self, slot: usize) -> Option<&Fact> {
        input(self.node, slot).map(|value| self.shapes.fact(value))
    }

    fn scalar(&self, slot: usize) -> Option<f64> {
        self.fact(slot)?.scalar()
    }

    /// Integers that an input must be known to hold.
    fn ints(&self, slot: usize, what: &str) -> Found<Vec<i64>> {
        let known = self.fact(slot).and_then(Fact::ints).map(<[i64]>::to_vec);
        known.ok_or_else(|| format!("its {what} are not known at the samples' size"))
    }

    fn dims(&self, slot: usize) -> Found<Vec<usize>> {
        let name = input(self.node, slot).ok_or_else(|| format!("input {slot} is missing"))?;
        shape(self.shapes, name)
    }

    fn out(&self, slot: usize) -> Found<Vec<usize>> {
        let name = self.node.output.get(slot).map_or("", String::as_str);
        shape(self.shapes, name)
    }

    fn channels(&self) -> Found<usize> {
        let dims = self.dims(0)?;
        dims.get(1)
            .copied()
            .ok_or_else(|| format!("{dims:?} has no channels"))
    }

    fn axis(&self, name: &str, default: i64) -> Found<usize> {
        self.axis_of(attr_int(self.node, name).unwrap_or(default), 0)
    }

    fn axis_of(&self, number: i64, slot: usize) -> Found<usize> {
        let rank = self.dims(slot)?.len();
        axis(number, rank).ok_or_else(|| format!("axis {number} of {rank}"))
    }

    fn size(&self, value: i64) -> Found<usize> {
        usize::try_from(value).map_err(|_| format!("a size is {value}"))
    }

    fn sizes(&self, values: &[i64]) -> Found<Vec<usize>> {
        values.iter().map(|v| self.size(*v)).collect()
    }

    fn dtype(&self, slot: usize) -> Found<DType> {
        let name = self.node.output.get(slot).map_or("", String::as_str);
        let element = self.shapes.fact(name).element;
        element
            .and_then(dtype)
            .ok_or_else(|| format!("element type {element:?} of '{name}' is not known here"))
    }
}

/// What a value of an ONNX element type is computed in.
pub(super) fn dtype(onnx: i32) -> Option<DType> {
    match onnx {
        element::BOOL => Some(DType::U8),
        element::INT64 | element::INT32 => Some(DType::I64),
        float if element::is_float(float) => Some(DType::F32),
        _ => None,
    }
}

/// The shape of a value, which must be known.
pub(in crate::distill) fn shape(shapes: &Shapes, name: &str) -> Found<Vec<usize>> {
    shapes
        .shape(name)
        .and_then(|dims| dims.iter().map(|d| usize::try_from(*d).ok()).collect())
        .ok_or_else(|| format!("the shape of '{name}' at the samples' size is unknown"))
}

fn unary(name: &str) -> Option<fn(&Tensor) -> Result<Tensor>> {
    Some(match name {
        "Identity" | "Dropout" => |x| Ok(x.clone()),
        "Sqrt" => Tensor::sqrt,
        "Exp" => Tensor::exp,
        "Log" => Tensor::log,
        "Erf" => Tensor::erf,
        "Tanh" => Tensor::tanh,
        "Sigmoid" => candle_nn::ops::sigmoid,
        "Swish" => Tensor::silu,
        "Relu" => Tensor::relu,
        "Softplus" => |x| {
            // log(1 + exp x) without overflow.
            let small = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
            x.relu()? + small
        },
        "Neg" => Tensor::neg,
        "Reciprocal" => Tensor::recip,
        "Abs" => Tensor::abs,
        "Sin" => Tensor::sin,
        "Cos" => Tensor::cos,
        "Floor" => Tensor::floor,
        "Ceil" => Tensor::ceil,
        "Not" => |x| x.eq(&x.zeros_like()?),
        _ => return None,
    })
}

fn binary(name: &str) -> Option<fn(&Tensor, &Tensor) -> Result<Tensor>> {
    Some(match name {
        "Add" | "Sum" => Tensor::broadcast_add,
        "Sub" => Tensor::broadcast_sub,
        "Mul" => Tensor::broadcast_mul,
        "Div" => Tensor::broadcast_div,
        "Max" => Tensor::broadcast_maximum,
        "Min" => Tensor::broadcast_minimum,
        "Equal" => Tensor::broadcast_eq,
        "Greater" => Tensor::broadcast_gt,
        "GreaterOrEqual" => Tensor::broadcast_ge,
        "Less" => Tensor::broadcast_lt,
        "LessOrEqual" => Tensor::broadcast_le,
        "And" => Tensor::broadcast_minimum,
        "Or" => Tensor::broadcast_maximum,
        _ => return None,
    })
}
