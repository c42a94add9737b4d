//! Output shapes of the operators that diffusion graphs are made of, standard
//! and as ONNX Runtime's optimizers rewrite them.

use crate::onnx::proto::{FunctionProto, NodeProto};
use linfusion_ops::schema::DOMAIN;

use super::TensorReader;
use super::eval::{self, element};
use super::value::{Elements, Fact, axis, broadcast, count};
use crate::graph::{attr_int, attr_ints, attr_str, attribute, domain, op};

/// Whether a domain may be implemented by model-local functions whose bodies tell their
/// outputs' shapes; those of our own operators need no look into them.
#[must_use]
pub fn is_foreign(domain: &str) -> bool {
    !matches!(domain, "" | "com.microsoft" | "ai.onnx.ml" | DOMAIN)
}

/// The fact of a `Constant` node.
#[must_use]
pub fn constant_node(node: &NodeProto, read: TensorReader<'_>) -> Fact {
    let mut fact = Fact::default();
    for attr in &node.attribute {
        let known = |shape: Vec<i64>, element: i32, elements: Elements| Fact {
            shape: Some(shape),
            element: Some(element),
            elements: Some(elements),
            constant: true,
        };
        match attr.name.as_deref() {
            Some("value") => {
                if let Some(t) = attr.t.as_option() {
                    fact = super::tensor_fact(t, read);
                }
            }
            Some("value_int") => {
                fact = known(
                    vec![],
                    element::INT64,
                    Elements::Int(vec![attr.i.unwrap_or(0)]),
                );
            }
            Some("value_ints") => {
                fact = known(
                    vec![attr.ints.len() as i64],
                    element::INT64,
                    Elements::Int(attr.ints.clone()),
                );
            }
            Some("value_float") => {
                fact = known(
                    vec![],
                    element::FLOAT,
                    Elements::Float(vec![f64::from(attr.f.unwrap_or(0.0))]),
                );
            }
            Some("value_floats") => {
                let v: Vec<f64> = attr.floats.iter().map(|&x| f64::from(x)).collect();
                fact = known(vec![v.len() as i64], element::FLOAT, Elements::Float(v));
            }
            _ => {}
        }
    }
    fact.constant = true;
    fact
}

/// A function body's node with references to the function's attributes replaced
/// by what the calling node passes (or the function's default).
#[must_use]
pub fn bind_attributes(inner: &NodeProto, function: &FunctionProto, call: &NodeProto) -> NodeProto {
    let mut bound = inner.clone();
    for attr in &mut bound.attribute {
        let Some(reference) = attr.ref_attr_name.clone().filter(|r| !r.is_empty()) else {
            continue;
        };
        let default = function
            .attribute_proto
            .iter()
            .find(|a| a.name.as_deref() == Some(&reference));
        if let Some(actual) = attribute(call, &reference).or(default) {
            let name = attr.name.take();
            *attr = actual.clone();
            attr.name = name;
        }
    }
    bound
}

/// Shapes and element types of a node's outputs, as far as they are known.
#[must_use]
pub fn infer(node: &NodeProto, inputs: &[&Fact]) -> Vec<Fact> {
    let element = inputs.first().and_then(|f| f.element);
    let outs = match domain(node) {
        "" => standard(node, inputs),
        "com.microsoft" => microsoft(node, inputs),
        "com.microsoft.nchwc" => standard(node, inputs),
        DOMAIN => attention_like(inputs).map(|s| vec![s]),
        _ => None,
    };
    let types = output_elements(node, inputs);
    // What a loop makes has nothing to do with its trip count.
    let element = element.filter(|_| !matches!(op(node), "Loop" | "Scan"));
    let shapes = outs.unwrap_or_default();
    (0..node.output.len())
        .map(|i| Fact {
            shape: shapes.get(i).cloned().filter(|s| count(s).is_some()),
            element: types.or(element),
            ..Fact::default()
        })
        .collect()
}

fn output_elements(node: &NodeProto, inputs: &[&Fact]) -> Option<i32> {
    let of = |i: usize| inputs.get(i).and_then(|f| f.element);
    match op(node) {
        "Cast" => attr_int(node, "to").and_then(|v| i32::try_from(v).ok()),
        "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => Some(element::INT64),
        "Equal" | "Less" | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "Not" | "And" | "Or"
        | "IsNaN" | "IsInf" => Some(element::BOOL),
        "Where" | "CastLike" => of(1),
        "ConstantOfShape" => attribute(node, "value")
            .and_then(|a| a.t.as_option())
            .map_or(Some(element::FLOAT), |t| t.data_type),
        "DequantizeLinear" => of(1),
        "QuantizeLinear" => of(2),
        "MatMulInteger" | "ConvInteger" => Some(element::INT32),
        "DynamicQuantizeLinear" => Some(2),
        "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => Some(element::FLOAT),
        _ => None,
    }
}

type Shape = Vec<i64>;

fn standard(node: &NodeProto, inputs: &[&Fact]) -> Option<Vec<Shape>> {
    let shape = |i: usize| inputs.get(i).and_then(|f| f.shape.clone());
    let ints = |i: usize| inputs.get(i).and_then(|f| f.ints());
    let one = |s: Option<Shape>| s.map(|s| vec![s]);
    match op(node) {
        "MatMul" | "MatMulInteger" => one(matmul(&shape(0)?, &shape(1)?)),
        "QLinearMatMul" => one(matmul(&shape(0)?, &shape(3)?)),
        "Gemm" | "FusedGemm" => one(gemm(node, &shape(0)?, &shape(1)?)),
        "Conv" | "FusedConv" | "ConvInteger" => one(conv(node, &shape(0)?, &shape(1)?)),
        "QLinearConv" => one(conv(node, &shape(0)?, &shape(3)?)),
        "ConvTranspose" => one(conv_transpose(node, &shape(0)?, &shape(1)?)),
        "MaxPool" | "AveragePool" => {
            let x = shape(0)?;
            let kernel = attr_ints(node, "kernel_shape")?.to_vec();
            one(window(node, &x, *x.get(1)?, &kernel))
        }
        "GlobalAveragePool" | "GlobalMaxPool" => {
            let x = shape(0)?;
            one(Some(
                x.iter()
                    .enumerate()
                    .map(|(i, &d)| if i < 2 { d } else { 1 })
                    .collect(),
            ))
        }
        "Reshape" => one(reshape(
            &shape(0)?,
            ints(1)?,
            attr_int(node, "allowzero") == Some(1),
        )),
        "Flatten" => {
            let x = shape(0)?;
            let a = attr_int(node, "axis").unwrap_or(1);
            let a = if a == x.len() as i64 {
                x.len()
            } else {
                axis(a, x.len())?
            };
            one(Some(vec![count(&x[..a])?, count(&x[a..])?]))
        }
        "Transpose" => {
            let x = shape(0)?;
            one(Some(
                eval::permutation(node, x.len())?
                    .into_iter()
                    .map(|p| x[p])
                    .collect(),
            ))
        }
        "Squeeze" => one(squeeze(node, &shape(0)?, ints(1), inputs.get(1).is_some())),
        "Unsqueeze" => one(unsqueeze(&shape(0)?, attr_ints(node, "axes").or(ints(1))?)),
        "Concat" => {
            let mut out = shape(0)?;
            let a = axis(attr_int(node, "axis")?, out.len())?;
            for i in 1..inputs.len() {
                out[a] = out[a].checked_add(*shape(i)?.get(a)?)?;
            }
            one(Some(out))
        }
        "Split" => split(node, &shape(0)?, ints(1)),
        "Slice" => one(Some(
            eval::slice_ranges(node, inputs)?
                .iter()
                .map(|r| r.len)
                .collect(),
        )),
        "Gather" => {
            let (x, i) = (shape(0)?, shape(1)?);
            let a = axis(attr_int(node, "axis").unwrap_or(0), x.len())?;
            one(Some([&x[..a], &i, &x[a + 1..]].concat()))
        }
        "GatherElements" => one(shape(1)),
        "GatherND" if attr_int(node, "batch_dims").unwrap_or(0) == 0 => {
            let (x, i) = (shape(0)?, shape(1)?);
            let k = usize::try_from(*i.last()?).ok()?;
            one(Some([&i[..i.len() - 1], x.get(k..)?].concat()))
        }
        "Shape" => {
            let rank = shape(0)?.len() as i64;
            let clamp = |v: i64| (if v < 0 { v + rank } else { v }).clamp(0, rank);
            let (s, e) = (
                clamp(attr_int(node, "start").unwrap_or(0)),
                clamp(attr_int(node, "end").unwrap_or(rank)),
            );
            one(Some(vec![(e - s).max(0)]))
        }
        "Size" => one(Some(vec![])),
        "ConstantOfShape" => one(ints(0).map(<[i64]>::to_vec)),
        "Expand" => one(broadcast(&shape(0)?, ints(1)?)),
        "Tile" => one(shape(0)?
            .iter()
            .zip(ints(1)?)
            .map(|(&d, &r)| d.checked_mul(r))
            .collect()),
        "Range" => one(range(inputs)),
        "OneHot" => {
            let mut out = shape(0)?;
            out.push(*ints(1)?.first()?);
            one(Some(out))
        }
        "Pad" => {
            let x = shape(0)?;
            let pads = attr_ints(node, "pads").or(ints(1))?;
            let pad = |i: usize| pads.get(i)?.checked_add(*pads.get(i + x.len())?);
            one(x
                .iter()
                .enumerate()
                .map(|(i, &d)| d.checked_add(pad(i)?))
                .collect())
        }
        "Resize" | "Upsample" => one(resize(node, inputs)),
        "Einsum" => one(einsum(attr_str(node, "equation")?, inputs)),
        "Where" => one(broadcast(&broadcast(&shape(0)?, &shape(1)?)?, &shape(2)?)),
        "Attention" => one(attention_4d(node, &shape(0)?, &shape(2)?)),
        "DynamicQuantizeLinear" => Some(vec![shape(0)?, vec![], vec![]]),
        "DepthToSpace" => {
            let x = shape(0)?;
            let b = attr_int(node, "blocksize")?;
            one(Some(vec![
                *x.first()?,
                x.get(1)?.checked_div(b.checked_mul(b)?)?,
                x.get(2)? * b,
                x.get(3)? * b,
            ]))
        }
        "ReorderInput" => one(shape(0)),
        "ReorderOutput" => {
            let mut x = shape(0)?;
            *x.get_mut(1)? = attr_int(node, "channels").unwrap_or(*x.get(1)?);
            one(Some(x))
        }
        name if name.starts_with("Reduce") || matches!(name, "ArgMax" | "ArgMin") => {
            one(reduce(node, &shape(0)?, ints(1), inputs.len() > 1))
        }
        "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Max" | "Min" | "Mod" | "Equal" | "Less"
        | "LessOrEqual" | "Greater" | "GreaterOrEqual" | "And" | "Or" | "PRelu" | "Mean"
        | "Sum" => elementwise(inputs),
        name if keeps_shape(name) => one(shape(0)),
        _ => None,
    }
}

fn keeps_shape(name: &str) -> bool {
    matches!(
        name,
        "Identity"
            | "Cast"
            | "CastLike"
            | "Dropout"
            | "Softmax"
            | "LogSoftmax"
            | "Relu"
            | "LeakyRelu"
            | "Elu"
            | "Selu"
            | "Gelu"
            | "Sigmoid"
            | "HardSigmoid"
            | "HardSwish"
            | "Swish"
            | "Mish"
            | "Tanh"
            | "Erf"
            | "Exp"
            | "Log"
            | "Sqrt"
            | "Reciprocal"
            | "Neg"
            | "Abs"
            | "Floor"
            | "Ceil"
            | "Round"
            | "Sign"
            | "Sin"
            | "Cos"
            | "Clip"
            | "Not"
            | "IsNaN"
            | "IsInf"
            | "Softplus"
            | "LayerNormalization"
            | "InstanceNormalization"
            | "GroupNormalization"
            | "BatchNormalization"
            | "RMSNormalization"
            | "LpNormalization"
            | "MeanVarianceNormalization"
            | "QuantizeLinear"
            | "DequantizeLinear"
            | "ScatterND"
            | "ScatterElements"
            | "Scatter"
            | "Trilu"
            | "CumSum"
            | "RandomNormalLike"
            | "RotaryEmbedding"
            | "SimplifiedLayerNormalization"
    )
}

fn elementwise(inputs: &[&Fact]) -> Option<Vec<Shape>> {
    let mut shapes = inputs.iter().map(|f| f.shape.as_deref());
    let mut out = shapes.next()??.to_vec();
    for s in shapes {
        let s = s?;
        // Optional conditioning inputs may not fit the probe sizes (a
        // ControlNet residual of a deeper level): the larger side is the graph's own.
        out = match broadcast(&out, s) {
            Some(b) => b,
            None if count(&out) >= count(s) => out,
            None => s.to_vec(),
        };
    }
    Some(vec![out])
}

fn matmul(a: &[i64], b: &[i64]) -> Option<Shape> {
    match (a, b) {
        ([k], [j]) if k == j => Some(vec![]),
        ([..], [_]) => Some(a[..a.len().checked_sub(1)?].to_vec()),
        ([_], [batch @ .., _, n]) => Some([batch, &[*n]].concat()),
        ([ab @ .., m, k], [bb @ .., j, n]) if k == j => {
            let mut out = broadcast(ab, bb)?;
            out.extend([*m, *n]);
            Some(out)
        }
        _ => None,
    }
}

fn gemm(node: &NodeProto, a: &[i64], b: &[i64]) -> Option<Shape> {
    let m = *a.get(usize::from(attr_int(node, "transA") == Some(1)))?;
    let n = *b.get(usize::from(attr_int(node, "transB") != Some(1)))?;
    Some(vec![m, n])
}

fn conv(node: &NodeProto, x: &[i64], w: &[i64]) -> Option<Shape> {
    let kernel = w.get(2..)?.to_vec();
    window(node, x, *w.first()?, &kernel)
}

fn window(node: &NodeProto, x: &[i64], channels: i64, kernel: &[i64]) -> Option<Shape> {
    let at = |name: &str, i: usize, default: i64| {
        attr_ints(node, name)
            .and_then(|v| v.get(i).copied())
            .unwrap_or(default)
    };
    let n = kernel.len();
    let mut out = vec![*x.first()?, channels];
    for (i, &k) in kernel.iter().enumerate() {
        let d = *x.get(i + 2)?;
        let (stride, dilation) = (at("strides", i, 1), at("dilations", i, 1));
        let padding = at("pads", i, 0).checked_add(at("pads", i + n, 0))?;
        let reach = (k - 1).checked_mul(dilation)?.checked_add(1)?;
        out.push(match attr_str(node, "auto_pad") {
            Some("SAME_UPPER" | "SAME_LOWER") => d.checked_add(stride - 1)?.checked_div(stride)?,
            _ => d
                .checked_add(padding)?
                .checked_sub(reach)?
                .checked_div(stride)?
                .checked_add(1)?,
        });
    }
    Some(out)
}

fn conv_transpose(node: &NodeProto, x: &[i64], w: &[i64]) -> Option<Shape> {
    let at = |name: &str, i: usize, default: i64| {
        attr_ints(node, name)
            .and_then(|v| v.get(i).copied())
            .unwrap_or(default)
    };
    let n = w.len().checked_sub(2)?;
    let mut out = vec![
        *x.first()?,
        w.get(1)?
            .checked_mul(attr_int(node, "group").unwrap_or(1))?,
    ];
    for i in 0..n {
        let pads = at("pads", i, 0) + at("pads", i + n, 0);
        let reach = (w[i + 2] - 1).checked_mul(at("dilations", i, 1))?;
        let full = (x.get(i + 2)? - 1).checked_mul(at("strides", i, 1))?;
        out.push(full + reach + 1 + at("output_padding", i, 0) - pads);
    }
    Some(out)
}

/// ONNX `Reshape`: `0` copies a dimension, `-1` is what remains.
fn reshape(x: &[i64], target: &[i64], allow_zero: bool) -> Option<Shape> {
    let mut out = Vec::with_capacity(target.len());
    for (i, &t) in target.iter().enumerate() {
        out.push(if t == 0 && !allow_zero { *x.get(i)? } else { t });
    }
    let total = count(x)?;
    if let Some(hole) = out.iter().position(|&d| d == -1) {
        out[hole] = 1;
        let rest = count(&out)?;
        out[hole] = if rest == 0 { 0 } else { total / rest };
    }
    (count(&out)? == total).then_some(out)
}

fn squeeze(
    node: &NodeProto,
    x: &[i64],
    by_input: Option<&[i64]>,
    has_input: bool,
) -> Option<Shape> {
    let axes = attr_ints(node, "axes").or(by_input);
    if axes.is_none() && has_input {
        return None;
    }
    let drop: Vec<usize> = match axes {
        Some(a) => a.iter().map(|&a| axis(a, x.len())).collect::<Option<_>>()?,
        None => (0..x.len()).filter(|&i| x[i] == 1).collect(),
    };
    Some(
        x.iter()
            .enumerate()
            .filter(|(i, _)| !drop.contains(i))
            .map(|(_, &d)| d)
            .collect(),
    )
}

fn unsqueeze(x: &[i64], axes: &[i64]) -> Option<Shape> {
    let rank = x.len() + axes.len();
    let add: Vec<usize> = axes.iter().map(|&a| axis(a, rank)).collect::<Option<_>>()?;
    let mut rest = x.iter();
    (0..rank)
        .map(|i| {
            if add.contains(&i) {
                Some(1)
            } else {
                rest.next().copied()
            }
        })
        .collect()
}

fn split(node: &NodeProto, x: &[i64], by_input: Option<&[i64]>) -> Option<Vec<Shape>> {
    let a = axis(attr_int(node, "axis").unwrap_or(0), x.len())?;
    let parts = node.output.len() as i64;
    let sizes: Vec<i64> = match attr_ints(node, "split").or(by_input) {
        Some(s) => s.to_vec(),
        None => {
            let chunk = (x[a] + parts - 1).checked_div(parts)?;
            (0..parts)
                .map(|i| chunk.min(x[a] - chunk * i).max(0))
                .collect()
        }
    };
    Some(
        sizes
            .into_iter()
            .map(|s| {
                let mut out = x.to_vec();
                out[a] = s;
                out
            })
            .collect(),
    )
}

fn range(inputs: &[&Fact]) -> Option<Shape> {
    let (s, l, d) = (
        inputs.first()?.scalar()?,
        inputs.get(1)?.scalar()?,
        inputs.get(2)?.scalar()?,
    );
    let n = ((l - s) / d).ceil().max(0.0);
    (n < 1e12).then(|| vec![n as i64])
}

fn resize(node: &NodeProto, inputs: &[&Fact]) -> Option<Shape> {
    let x = inputs.first()?.shape.as_ref()?;
    // Upsample and Resize-10 have scales as input 1; Resize-11 roi, scales, sizes.
    if let Some(sizes) = inputs
        .get(3)
        .and_then(|f| f.ints())
        .filter(|s| s.len() == x.len())
    {
        return Some(sizes.to_vec());
    }
    // ONNX Runtime's blocked layout has whole factors in an attribute.
    if let Some(scales) = attr_ints(node, "scales").filter(|s| s.len() == x.len()) {
        let product = x.iter().zip(scales).map(|(d, s)| d.checked_mul(*s));
        return product.collect();
    }
    let scales = inputs.iter().skip(1).rev().find_map(|f| {
        let e = f.elements.as_ref()?;
        (e.len() == x.len() && e.ints().is_none()).then_some(e)
    })?;
    x.iter()
        .enumerate()
        .map(|(i, &d)| Some((d as f64 * scales.float(i)?).floor() as i64))
        .collect()
}

fn reduce(node: &NodeProto, x: &[i64], by_input: Option<&[i64]>, has_input: bool) -> Option<Shape> {
    let keep = attr_int(node, "keepdims").unwrap_or(1) == 1;
    let axes = match (op(node), attr_ints(node, "axes").or(by_input)) {
        ("ArgMax" | "ArgMin", _) => vec![axis(attr_int(node, "axis").unwrap_or(0), x.len())?],
        (_, Some([])) => (0..x.len()).collect(),
        (_, Some(a)) => a.iter().map(|&a| axis(a, x.len())).collect::<Option<_>>()?,
        (_, None) if has_input => return None,
        (_, None) => (0..x.len()).collect(),
    };
    Some(
        x.iter()
            .enumerate()
            .filter(|(i, _)| keep || !axes.contains(i))
            .map(|(i, &d)| if axes.contains(&i) { 1 } else { d })
            .collect(),
    )
}

fn einsum(equation: &str, inputs: &[&Fact]) -> Option<Shape> {
    let (terms, out) = einsum_terms(equation)?;
    let mut sizes = std::collections::HashMap::new();
    for (term, fact) in terms.iter().zip(inputs) {
        let shape = fact.shape.as_ref()?;
        if term.len() != shape.len() {
            return None;
        }
        for (&l, &d) in term.iter().zip(shape) {
            let e = sizes.entry(l).or_insert(d);
            *e = (*e).max(d);
        }
    }
    out.iter().map(|l| sizes.get(l).copied()).collect()
}

/// The index letters of each operand and of the result. `None` for an ellipsis.
#[must_use]
pub fn einsum_terms(equation: &str) -> Option<(Vec<Vec<char>>, Vec<char>)> {
    let equation: String = equation.chars().filter(|c| !c.is_whitespace()).collect();
    if equation.contains('.') {
        return None;
    }
    let (lhs, rhs) = equation.split_once("->")?;
    Some((
        lhs.split(',').map(|t| t.chars().collect()).collect(),
        rhs.chars().collect(),
    ))
}

/// ONNX `Attention` (opset 23+) and 4-D attention in general.
fn attention_4d(node: &NodeProto, q: &[i64], v: &[i64]) -> Option<Shape> {
    match (q, v) {
        ([b, h, n, _], [.., dv]) if q.len() == 4 => Some(vec![*b, *h, *n, *dv]),
        ([b, n, _], [_, _, c]) => {
            let (hq, hk) = (
                attr_int(node, "q_num_heads")?,
                attr_int(node, "kv_num_heads")?,
            );
            Some(vec![*b, *n, c.checked_div(hk)?.checked_mul(hq)?])
        }
        _ => None,
    }
}

fn attention_like(inputs: &[&Fact]) -> Option<Shape> {
    let mut out = inputs.first()?.shape.clone()?;
    *out.last_mut()? = *inputs.get(2)?.shape.as_ref()?.last()?;
    Some(out)
}

fn microsoft(node: &NodeProto, inputs: &[&Fact]) -> Option<Vec<Shape>> {
    let shape = |i: usize| inputs.get(i).and_then(|f| f.shape.clone());
    let one = |s: Option<Shape>| s.map(|s| vec![s]);
    match op(node) {
        "FusedMatMul" | "TransposeMatMul" => {
            let swap = |mut s: Shape, name: &str| {
                if attr_int(node, name) == Some(1) && s.len() >= 2 {
                    let n = s.len();
                    s.swap(n - 1, n - 2);
                }
                s
            };
            one(matmul(
                &swap(shape(0)?, "transA"),
                &swap(shape(1)?, "transB"),
            ))
        }
        "DynamicQuantizeMatMul" | "MatMulIntegerToFloat" => one(matmul(&shape(0)?, &shape(1)?)),
        "QGemm" => one(gemm(node, &shape(0)?, &shape(3)?)),
        "MatMulNBits" | "MatMulBnb4" => {
            let mut x = shape(0)?;
            *x.last_mut()? = attr_int(node, "N")?;
            one(Some(x))
        }
        "MultiHeadAttention" => {
            let q = shape(0)?;
            if let [b, n, h, 3, d] = q[..] {
                return one(Some(vec![b, n, h.checked_mul(d)?]));
            }
            let v = shape(2).or_else(|| {
                // Packed key and value: [B, M, H, 2, D].
                let k = shape(1)?;
                if let [b, m, h, 2, d] = k[..] {
                    Some(vec![b, m, h * d])
                } else {
                    Some(q.clone())
                }
            })?;
            let width = if let [_, h, _, d] = v[..] {
                h.checked_mul(d)?
            } else {
                *v.last()?
            };
            one(Some(vec![*q.first()?, *q.get(1)?, width]))
        }
        "Attention" | "QAttention" => {
            let (x, w) = (shape(0)?, shape(1)?);
            let width = match attr_ints(node, "qkv_hidden_sizes") {
                Some([_, _, v]) => *v,
                _ => w.last()? / 3,
            };
            one(Some(vec![*x.first()?, *x.get(1)?, width]))
        }
        "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization" => {
            let x = shape(0)?;
            Some(vec![x.clone(), vec![0], vec![0], x])
        }
        "BiasSplitGelu" => {
            let mut x = shape(0)?;
            *x.last_mut()? /= 2;
            one(Some(x))
        }
        "SkipGroupNorm" => Some(vec![shape(0)?, shape(0)?]),
        "NhwcConv" => {
            let (x, w) = (shape(0)?, shape(1)?);
            let (&[b, h, wd, c], &[o, kh, kw, _]) = (&x[..], &w[..]) else {
                return None;
            };
            let (x, w) = ([b, c, h, wd], [o, c, kh, kw]);
            let out = conv(node, &x, &w)?;
            one(Some(vec![out[0], out[2], out[3], out[1]]))
        }
        "FusedConv" => one(conv(node, &shape(0)?, &shape(1)?)),
        "FusedGemm" => one(gemm(node, &shape(0)?, &shape(1)?)),
        "QLinearAdd" | "QLinearMul" => {
            let (a, b) = (inputs.first()?, inputs.get(3)?);
            elementwise(&[a, b])
        }
        "QLinearConcat" => {
            let mut out = shape(2)?;
            let a = axis(attr_int(node, "axis")?, out.len())?;
            for i in (5..inputs.len()).step_by(3) {
                out[a] = out[a].checked_add(*shape(i)?.get(a)?)?;
            }
            one(Some(out))
        }
        "BiasAdd" | "BiasGelu" | "FastGelu" | "QuickGelu" | "Gelu" | "GroupNorm"
        | "QLinearSigmoid" | "QLinearLeakyRelu" | "QLinearSoftmax" | "QuantizeLinear"
        | "DequantizeLinear" | "RotaryEmbedding" | "BiasSoftmax" | "BiasDropout"
        | "FusedSoftmax" => one(shape(0)),
        _ => None,
    }
}
