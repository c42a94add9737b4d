//! The strict reading of a self-attention that can be rewritten: q, k and v are
//! linear layers of one tensor and nothing but layout, casts and scales lies
//! between them and the attention. Every claim about layout is checked element
//! by element ([`super::layout`]) at the probe size.

use super::core::{Core, Form, Operand, Role};
use super::layout::{Move, ravel};
use super::projection::{Linear, linear};
use crate::graph::{Graph, NodeId, attr_int, input, label, op, qualified_op};
use crate::shapes::Shapes;
use crate::shapes::eval::element::is_float;

/// How a `[batch, tokens, columns]` matrix lies in a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `[B, N, C]`.
    Tokens,
    /// `[B·N, C]`.
    Rows,
    /// `[B, C, N]` or `[B, C, rows, cols]`.
    ChannelsFirst,
    /// `[B, rows, cols, C]`.
    Image,
}

impl std::fmt::Display for Layout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Layout::Tokens => "[B, N, C]",
            Layout::Rows => "[B·N, C]",
            Layout::ChannelsFirst => "[B, C, N] or [B, C, rows, cols]",
            Layout::Image => "[B, rows, cols, C]",
        })
    }
}

/// Which columns of a tap an operand takes, `head·D + channel` in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Columns {
    /// All, in order.
    All,
    /// A contiguous range.
    Range {
        /// First column.
        start: i64,
        /// Number of columns.
        len: i64,
    },
    /// Any others.
    Listed(Vec<i64>),
}

/// Where an operand can be read off the graph before heads are split.
#[derive(Clone, Debug)]
pub struct Tap<'m> {
    /// The value; for [`Form::MergedWeights`] the node's input, to be projected.
    pub value: &'m str,
    /// How it lies.
    pub layout: Layout,
    /// Which of its columns.
    pub columns: Columns,
    /// The linear layer that makes it; `None` for merged weights.
    pub linear: Option<Linear<'m>>,
}

/// The linear layer behind the attention.
#[derive(Clone, Debug)]
pub struct OutProjection<'m> {
    /// Its node.
    pub node: NodeId,
    /// Its result with the bias added: what a replacement must provide.
    pub result: &'m str,
    /// How the result lies.
    pub layout: Layout,
    /// A bias that a later, fused node adds (ONNX Runtime's
    /// SkipLayerNormalization): the node and its input.
    pub later_bias: Option<(NodeId, usize)>,
    /// Output width.
    pub width: i64,
    /// Why the layer cannot be replaced as a whole, if so.
    pub obstacle: Option<String>,
}

/// A self-attention that can be rewritten.
#[derive(Clone, Debug)]
pub struct Plain<'m> {
    /// The tensor behind q, k, v as `[B, N, C]` (or as [`Plain::x_layout`] says).
    pub x: &'m str,
    /// How x lies.
    pub x_layout: Layout,
    /// Width of x.
    pub width: i64,
    /// Batch under the probe.
    pub batch: i64,
    /// Tokens under the probe.
    pub tokens: i64,
    /// Heads.
    pub heads: i64,
    /// Channels a head of q and k.
    pub head_dim: i64,
    /// Channels a head of v.
    pub value_dim: i64,
    /// ONNX element type of x.
    pub element: i32,
    /// q, k, v before the heads are split.
    pub taps: [Tap<'m>; 3],
    /// The attention's output with heads merged: the input of the out projection.
    pub merged: &'m str,
    /// How it lies.
    pub merged_layout: Layout,
    /// The out projection, where there is one.
    pub out: Option<OutProjection<'m>>,
    /// Factor on the scores that exact attention applies.
    pub scale: f64,
}

/// Reads `core` strictly.
///
/// # Errors
/// One sentence, with the node, on what stands in the way.
pub fn plain<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    core: &Core<'m>,
    source: &'m str,
) -> Result<Plain<'m>, String> {
    let (x, x_layout, [batch, tokens, width]) = source_matrix(graph, shapes, core, source)?;
    let element = shapes
        .fact(x)
        .element
        .ok_or_else(|| format!("the element type of '{x}' is unknown"))?;
    if !is_float(element) {
        return Err(format!(
            "'{x}' has element type {element}, not a floating-point type"
        ));
    }
    let batch_heads: i64 = core.q.batch.iter().product();
    if batch == 0 || batch_heads % batch != 0 {
        return Err(format!(
            "{batch_heads} batch·heads do not divide into batches of {batch}"
        ));
    }
    let heads = batch_heads / batch;
    let dims = |o: &Operand<'_>| head_channels(core, o, heads);
    let (head_dim, value_dim) = if core.form == Form::MergedWeights {
        merged_dims(graph, shapes, core, heads)?
    } else {
        (dims(&core.q)?, dims(&core.v)?)
    };
    for (name, operand) in [("q", &core.q), ("k", &core.k), ("v", &core.v)] {
        if let Some(n) = operand.size(Role::Token).filter(|&n| n != tokens) {
            return Err(format!(
                "{name} '{}' has {n} tokens, x '{x}' has {tokens}",
                operand.value
            ));
        }
    }
    let grid = Matrix {
        batch,
        tokens,
        heads,
    };
    let mut scale = core.scale;
    let taps = if core.form == Form::MergedWeights {
        merged_taps(x, &x_layout, heads, head_dim, value_dim)
    } else {
        let mut tap = |o: &Operand<'m>, d: i64, scales: bool| -> Result<Tap<'m>, String> {
            let (tap, factor) = tap(graph, shapes, o, &grid, d)?;
            if scales {
                scale *= factor;
            } else if (factor - 1.0).abs() > 1e-6 {
                return Err(format!("v '{}' is scaled by {factor}", o.value));
            }
            Ok(tap)
        };
        [
            tap(&core.q, head_dim, true)?,
            tap(&core.k, head_dim, true)?,
            tap(&core.v, value_dim, false)?,
        ]
    };
    if scale.is_nan() {
        scale = 1.0 / (head_dim as f64).sqrt();
    }
    let (merged, merged_layout) = merge(graph, shapes, core, &grid, value_dim)?;
    let out = out_projection(graph, shapes, merged, &merged_layout);
    Ok(Plain {
        x,
        x_layout,
        width,
        batch,
        tokens,
        heads,
        head_dim,
        value_dim,
        element,
        taps,
        merged,
        merged_layout,
        out,
        scale,
    })
}

/// Sizes of the `[batch, tokens, …]` matrices of one site.
pub(super) struct Matrix {
    pub batch: i64,
    pub tokens: i64,
    pub heads: i64,
}

impl Matrix {
    /// Splits an index of a tensor that lies as `layout` into (batch, token, column).
    fn decode(&self, layout: &Layout, at: &[i64], shape: &[i64]) -> Option<[i64; 3]> {
        Some(match (layout, at) {
            (Layout::Tokens, &[b, n, c]) => [b, n, c],
            (Layout::Rows, &[r, c]) => [r / self.tokens, r % self.tokens, c],
            (Layout::ChannelsFirst, &[b, c, n]) => [b, n, c],
            (Layout::ChannelsFirst, &[b, c, y, x]) => [b, y * shape.get(3)? + x, c],
            (Layout::Image, &[b, y, x, c]) => [b, y * shape.get(2)? + x, c],
            _ => return None,
        })
    }

    /// The inverse of [`Matrix::decode`].
    fn encode(&self, layout: &Layout, [b, n, c]: [i64; 3], shape: &[i64]) -> Option<Vec<i64>> {
        Some(match (layout, shape.len()) {
            (Layout::Tokens, 3) => vec![b, n, c],
            (Layout::Rows, 2) => vec![b.checked_mul(self.tokens)?.checked_add(n)?, c],
            (Layout::ChannelsFirst, 3) => vec![b, c, n],
            (Layout::ChannelsFirst, 4) => {
                vec![b, c, n.checked_div(shape[3])?, n.checked_rem(shape[3])?]
            }
            (Layout::Image, 4) => vec![b, n.checked_div(shape[2])?, n.checked_rem(shape[2])?, c],
            _ => return None,
        })
    }

    /// How a matrix of `batch × tokens` rows lies in `shape`, with its width.
    pub fn layout(&self, shape: &[i64], channels_first: bool) -> Option<(Layout, i64)> {
        let (b, n) = (self.batch, self.tokens);
        Some(match *shape {
            [x, y, c] if x == b && y == n && !channels_first => (Layout::Tokens, c),
            [x, c, y] if x == b && y == n && channels_first => (Layout::ChannelsFirst, c),
            [x, c, h, w] if x == b && h.checked_mul(w) == Some(n) && channels_first => {
                (Layout::ChannelsFirst, c)
            }
            [x, h, w, c] if x == b && h.checked_mul(w) == Some(n) && !channels_first => {
                (Layout::Image, c)
            }
            [r, c] if b.checked_mul(n) == Some(r) && !channels_first => (Layout::Rows, c),
            _ => return None,
        })
    }

    /// Sampled (batch, token) pairs: the corners and a few inside.
    pub fn rows(&self) -> Vec<(i64, i64)> {
        let (b, n) = (self.batch, self.tokens);
        let mut rows: Vec<(i64, i64)> = [0, 1, n / 3, n / 2 + 1, n - 1]
            .into_iter()
            .flat_map(|t| [(0, t), (b - 1, t)])
            .filter(|&(i, t)| (0..b).contains(&i) && (0..n).contains(&t))
            .collect();
        rows.dedup();
        rows
    }
}

/// The tensor behind q, k and v: the projections' own input where it is a
/// `[B, N, C]` or channels-first tensor, else the tensor it was folded from.
fn source_matrix<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    core: &Core<'m>,
    source: &'m str,
) -> Result<(&'m str, Layout, [i64; 3]), String> {
    let first = if core.form == Form::MergedWeights {
        core.q.value
    } else {
        super::projection::roots(graph, shapes, core.q.value)
            .linears
            .first()
            .map_or(source, |l| l.source)
    };
    let channels_first = graph.readers(first).iter().any(|p| {
        matches!(
            op(graph.node(p.node)),
            "Conv" | "FusedConv" | "ConvInteger" | "QLinearConv"
        ) || (op(graph.node(p.node)) == "MatMul" && p.slot == 1)
    });
    let tokens = match core.form {
        Form::MergedWeights => shapes.shape(first).and_then(|s| s.get(1).copied()),
        _ => core.q.size(Role::Token),
    }
    .ok_or("the number of tokens is unknown")?;
    // The nearest tensor that still has a batch axis, at or above the input of q's layer.
    let mut value = first;
    for _ in 0..16 {
        let shape = shapes
            .shape(value)
            .ok_or_else(|| format!("the shape of '{value}' is unknown"))?;
        let floating = shapes.fact(value).element.is_some_and(is_float);
        if floating && let Some(&batch) = shape.first().filter(|_| shape.len() > 2) {
            let grid = Matrix {
                batch,
                tokens,
                heads: 0,
            };
            if let Some((layout, width)) = grid.layout(shape, channels_first) {
                return Ok((value, layout, [batch, tokens, width]));
            }
        }
        if value == source {
            break;
        }
        let above = graph.producer(value).and_then(|p| graph.input(p.node, 0));
        match above {
            Some(v) => value = v,
            None => break,
        }
    }
    Err(format!(
        "the tensor behind q, k, v, '{first}' of shape {:?}, has no batch × {tokens} tokens",
        shapes.shape(first).unwrap_or(&[])
    ))
}

pub(super) fn head_channels(
    core: &Core<'_>,
    operand: &Operand<'_>,
    heads: i64,
) -> Result<i64, String> {
    if let Some(d) = operand.size(Role::Channel) {
        return Ok(d);
    }
    match operand.size(Role::HeadChannel) {
        Some(c) if heads > 0 && c % heads == 0 => Ok(c / heads),
        other => Err(format!(
            "'{}' has width {other:?}, which {heads} heads do not divide ({:?})",
            operand.value, core.form
        )),
    }
}

fn merged_dims(
    graph: &Graph<'_>,
    shapes: &Shapes,
    core: &Core<'_>,
    heads: i64,
) -> Result<(i64, i64), String> {
    let node = graph.node(core.anchor);
    if op(node) == "QAttention" {
        return Err(format!(
            "'{}' keeps its weights quantized inside the node (QAttention)",
            label(node)
        ));
    }
    let width = input(node, 1)
        .and_then(|w| shapes.shape(w))
        .and_then(|s| s.last().copied())
        .ok_or("the merged weights have no known shape")?;
    let (qk, v) = match crate::graph::attr_ints(node, "qkv_hidden_sizes") {
        Some(&[q, k, v]) if q == k => (q, v),
        Some(sizes) => return Err(format!("qkv_hidden_sizes {sizes:?}")),
        None => (width / 3, width / 3),
    };
    if heads <= 0 || qk % heads != 0 || v % heads != 0 {
        return Err(format!(
            "merged weights of width {width} do not divide into {heads} heads"
        ));
    }
    Ok((qk / heads, v / heads))
}

fn merged_taps<'m>(
    x: &'m str,
    layout: &Layout,
    heads: i64,
    head_dim: i64,
    value_dim: i64,
) -> [Tap<'m>; 3] {
    let (qk, v) = (heads * head_dim, heads * value_dim);
    [(0, qk), (qk, qk), (2 * qk, v)].map(|(start, len)| Tap {
        value: x,
        layout: layout.clone(),
        columns: Columns::Range { start, len },
        linear: None,
    })
}

/// A node between a linear layer and the attention.
pub(super) enum Between<'m> {
    /// Moves elements.
    Moves(Move, &'m str),
    /// Multiplies by a known number (the attention's scale).
    Scales(f64, &'m str),
    /// Computes: adds a bias, undoes quantization. A tap lies below it.
    Computes(&'m str),
}

/// Reads an operand off the graph: walks up to its linear layer and checks that
/// what lies between only moves and scales. Returns the tap and the scale.
pub(super) fn tap<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    operand: &Operand<'m>,
    grid: &Matrix,
    channels: i64,
) -> Result<(Tap<'m>, f64), String> {
    let (mut value, mut moves, mut scale) = (operand.value, Vec::new(), 1.0);
    // The value nearest to the attention below which nothing computes.
    let mut tap_value = None::<&str>;
    let linear = loop {
        let Some(port) = graph.producer(value) else {
            return Err(format!(
                "'{}' comes straight from '{value}', with no linear layer",
                operand.value
            ));
        };
        if let Some(linear) = linear(graph, shapes, port.node) {
            break linear;
        }
        match between(graph, shapes, port.node, port.slot)? {
            Between::Moves(step, above) => {
                if tap_value.is_none() {
                    moves.push(step);
                } else if step != Move::Same {
                    return Err(format!(
                        "'{}' moves elements between a linear layer and its bias",
                        label(graph.node(port.node))
                    ));
                }
                value = above;
            }
            Between::Scales(factor, above) => {
                if tap_value.is_none() {
                    scale *= factor;
                }
                value = above;
            }
            Between::Computes(above) => {
                tap_value.get_or_insert(value);
                value = above;
            }
        }
        if moves.len() > 64 {
            return Err(format!(
                "more than 64 layout nodes above '{}'",
                operand.value
            ));
        }
    };
    let tap_value = tap_value.unwrap_or(value);
    let shape = shapes
        .shape(tap_value)
        .ok_or_else(|| format!("the shape of '{tap_value}' is unknown"))?;
    if !shapes.fact(tap_value).element.is_some_and(is_float) {
        return Err(format!("'{tap_value}' is quantized"));
    }
    let proto = graph.node(linear.node);
    let channels_first = op(proto).contains("Conv") && op(proto) != "NhwcConv"
        || (op(proto) == "MatMul" && linear.slot == 1);
    if channels_first && op(proto).contains("Conv") && !is_pointwise(graph, shapes, linear) {
        return Err(format!(
            "'{}' is a convolution over more than one pixel",
            label(proto)
        ));
    }
    let (layout, width) = grid.layout(shape, channels_first).ok_or_else(|| {
        format!(
            "'{tap_value}' has shape {shape:?}, not {} × {} rows",
            grid.batch, grid.tokens
        )
    })?;
    let columns =
        columns(operand, &moves, grid, channels, &layout, shape, width).ok_or_else(|| {
            format!(
                "'{}' is not '{tap_value}' with its heads split: the layout differs",
                operand.value
            )
        })?;
    Ok((
        Tap {
            value: tap_value,
            layout,
            columns,
            linear: Some(linear),
        },
        scale,
    ))
}

/// What the node at `id` does between a linear layer and the attention.
pub(super) fn between<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    id: NodeId,
    slot: usize,
) -> Result<Between<'m>, String> {
    let node = graph.node(id);
    let first = input(node, 0);
    if op(node) == "DequantizeLinear"
        && let Some(above) = first
        && graph
            .producer(above)
            .is_none_or(|p| op(graph.node(p.node)) != "QuantizeLinear")
    {
        return Ok(Between::Computes(above));
    }
    if let (Some(step), Some(above)) = (Move::of(graph, shapes, id, slot), first) {
        return Ok(Between::Moves(step, above));
    }
    let operands = (input(node, 0), input(node, 1));
    if let ("Mul" | "Div", (Some(a), Some(b))) = (op(node), operands) {
        let small = |v: &str| shapes.fact(v).count() == Some(1);
        let stored = |v: &str| shapes.fact(v).constant;
        let (data, other) = if small(b) && (stored(b) || !stored(a)) {
            (a, b)
        } else {
            (b, a)
        };
        if small(other) && (op(node) == "Mul" || other == b) {
            return Ok(match shapes.fact(other).scalar() {
                Some(c) => Between::Scales(if op(node) == "Mul" { c } else { 1.0 / c }, data),
                // A quantization scale, known only at run time or per channel.
                None => Between::Computes(data),
            });
        }
        // Per-channel scales of an integer product.
        for (data, other) in [(a, b), (b, a)] {
            if op(node) == "Mul" && is_vector(shapes, other) && from_integer(graph, data) {
                return Ok(Between::Computes(data));
            }
        }
    }
    if let ("Add" | "BiasAdd", (Some(a), Some(b))) = (op(node), operands) {
        let bias = |v: &str| shapes.fact(v).constant && is_vector(shapes, v);
        if bias(b) || bias(a) {
            return Ok(Between::Computes(if bias(b) { a } else { b }));
        }
    }
    Err(format!(
        "{} '{}' lies between the linear layer and the attention",
        qualified_op(node),
        label(node)
    ))
}

fn is_vector(shapes: &Shapes, value: &str) -> bool {
    shapes
        .shape(value)
        .is_some_and(|s| s.iter().filter(|&&d| d != 1).count() <= 1)
}

/// Whether `value` is an integer product, cast to float.
pub(super) fn from_integer(graph: &Graph<'_>, value: &str) -> bool {
    graph.producer(value).is_some_and(|p| {
        let node = graph.node(p.node);
        op(node) == "MatMulInteger"
            || (op(node) == "Cast" && input(node, 0).is_some_and(|v| from_integer(graph, v)))
    })
}

pub(super) fn is_pointwise(graph: &Graph<'_>, shapes: &Shapes, linear: Linear<'_>) -> bool {
    let node = graph.node(linear.node);
    let slot = if op(node) == "QLinearConv" { 3 } else { 1 };
    let kernel = input(node, slot)
        .and_then(|w| shapes.shape(w))
        .and_then(|s| s.get(2..));
    let ones =
        |name: &str| crate::graph::attr_ints(node, name).is_none_or(|v| v.iter().all(|&x| x == 1));
    kernel.is_some_and(|k| k.iter().all(|&d| d == 1))
        && ones("strides")
        && attr_int(node, "group").unwrap_or(1) == 1
}

/// The columns of the tap that operand (head, channel) reads, checked to be the
/// same for every sampled row.
fn columns(
    operand: &Operand<'_>,
    moves: &[Move],
    grid: &Matrix,
    channels: i64,
    layout: &Layout,
    shape: &[i64],
    width: i64,
) -> Option<Columns> {
    let locate = |b: i64, n: i64, h: i64, d: i64| -> Option<[i64; 3]> {
        let at = operand.index(b * grid.heads + h, grid.heads, n, d, channels)?;
        ravel(&at, &operand.shape)?;
        let at = moves.iter().try_fold(at, |at, step| step.back(&at))?;
        ravel(&at, shape)?;
        grid.decode(layout, &at, shape)
    };
    let total = grid.heads.checked_mul(channels)?;
    let mut list = Vec::with_capacity(usize::try_from(total).ok()?);
    for h in 0..grid.heads {
        for d in 0..channels {
            let [b, n, c] = locate(0, 0, h, d)?;
            if (b, n) != (0, 0) {
                return None;
            }
            list.push(c);
        }
    }
    for (b, n) in grid.rows() {
        for (i, d) in [
            (0, 0),
            (grid.heads - 1, channels - 1),
            (grid.heads / 2, channels / 2),
        ] {
            let expected = list.get(usize::try_from(i * channels + d).ok()?)?;
            if locate(b, n, i, d)? != [b, n, *expected] {
                return None;
            }
        }
    }
    let start = *list.first()?;
    if list.iter().zip(start..).any(|(&c, i)| c != i) {
        return Some(Columns::Listed(list));
    }
    Some(if start == 0 && total == width {
        Columns::All
    } else {
        Columns::Range { start, len: total }
    })
}

/// Walks down from the attention to where its heads are merged.
pub(super) fn merge<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    core: &Core<'m>,
    grid: &Matrix,
    channels: i64,
) -> Result<(&'m str, Layout), String> {
    let (mut value, mut moves) = (core.out.value, Vec::<Move>::new());
    let width = grid.heads * channels;
    let mut found = None;
    for _ in 0..32 {
        let shape = shapes
            .shape(value)
            .ok_or_else(|| format!("the shape of '{value}' is unknown"))?;
        for channels_first in [false, true] {
            if let Some((layout, _)) = grid
                .layout(shape, channels_first)
                .filter(|(_, w)| *w == width)
                && shapes.fact(value).element.is_some_and(is_float)
                && merges(core, &moves, grid, channels, &layout, shape) == Some(true)
            {
                found = Some((value, layout));
                break;
            }
        }
        let readers: Vec<_> = graph
            .readers(value)
            .iter()
            .filter(|p| !matches!(op(graph.node(p.node)), "Shape" | "Size"))
            .collect();
        let &[reader] = &readers[..] else { break };
        if reader.slot != 0 || graph.is_observed(value) {
            break;
        }
        // The out projection of a channels-first or 2-D graph may need one more fold.
        let node = graph.node(reader.node);
        match Move::of(graph, shapes, reader.node, 0) {
            Some(step) if op(node) != "DynamicQuantizeLinear" => {
                moves.push(step);
                value = node.output.first().map_or("", String::as_str);
            }
            _ => break,
        }
    }
    found.ok_or_else(|| {
        format!(
            "the heads of '{}' are not merged into {width} channels a token",
            core.out.value
        )
    })
}

/// Whether `value` is the attention's output with channel `c` = head·D + d.
fn merges(
    core: &Core<'_>,
    moves: &[Move],
    grid: &Matrix,
    channels: i64,
    layout: &Layout,
    shape: &[i64],
) -> Option<bool> {
    let locate = |b: i64, n: i64, c: i64| -> Option<Vec<i64>> {
        let at = grid.encode(layout, [b, n, c], shape)?;
        ravel(&at, shape)?;
        moves.iter().rev().try_fold(at, |at, step| step.back(&at))
    };
    for (i, (b, n)) in grid.rows().into_iter().enumerate() {
        let all = i == 0;
        for c in 0..grid.heads * channels {
            if !all && c % 7 != 0 && c + 1 != grid.heads * channels {
                continue;
            }
            let expected = core.out.index(
                b * grid.heads + c / channels,
                grid.heads,
                n,
                c % channels,
                channels,
            )?;
            if locate(b, n, c)? != expected {
                return Some(false);
            }
        }
    }
    Some(true)
}

/// The linear layer that reads the merged output, if it is all that reads it.
pub(super) fn out_projection<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    merged: &'m str,
    layout: &Layout,
) -> Option<OutProjection<'m>> {
    let mut value = merged;
    let node = loop {
        let readers: Vec<_> = graph
            .readers(value)
            .iter()
            .filter(|p| !matches!(op(graph.node(p.node)), "Shape" | "Size"))
            .collect();
        // DynamicQuantizeLinear's scale and zero point are read elsewhere.
        let &[reader] = &readers[..] else { return None };
        if let Some(l) = linear(graph, shapes, reader.node) {
            if l.source != value
                || (op(graph.node(l.node)).contains("Conv") && !is_pointwise(graph, shapes, l))
            {
                return None;
            }
            break reader.node;
        }
        match op(graph.node(reader.node)) {
            "QuantizeLinear"
            | "DequantizeLinear"
            | "DynamicQuantizeLinear"
            | "Cast"
            | "Identity" => {
                value = graph.node(reader.node).output.first()?;
            }
            _ => return None,
        }
    };
    whole_layer(graph, shapes, node, layout)
}

/// The linear layer at `node` with the bias that later nodes add, for an input that lies
/// as `layout`.
pub(super) fn whole_layer<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    node: NodeId,
    layout: &Layout,
) -> Option<OutProjection<'m>> {
    let result = graph.node(node).output.first()?.as_str();
    let width = {
        let shape = shapes.shape(result)?;
        if *layout == Layout::ChannelsFirst {
            *shape.get(1)?
        } else {
            *shape.last()?
        }
    };
    let mut out = OutProjection {
        node,
        result,
        layout: layout.clone(),
        later_bias: None,
        width,
        obstacle: None,
    };
    if !has_bias(graph.node(node)) {
        find_bias(graph, shapes, &mut out);
    }
    Some(out)
}

/// Whether a linear layer adds its bias itself.
fn has_bias(node: &linfusion_models::onnx::proto::NodeProto) -> bool {
    bias_slot(node).is_some_and(|slot| input(node, slot).is_some())
}

/// The input of a linear layer's node that holds its bias, if it can have one.
pub(super) fn bias_slot(node: &linfusion_models::onnx::proto::NodeProto) -> Option<usize> {
    Some(match op(node) {
        "Gemm" | "FusedGemm" | "Conv" | "FusedConv" | "NhwcConv" => 2,
        "DynamicQuantizeMatMul" => 4,
        "MatMulNBits" => 5,
        "MatMulIntegerToFloat" | "QGemm" => 6,
        "QLinearConv" => 8,
        _ => return None,
    })
}

/// Walks down from the product to the layer's bias, through what undoes
/// quantization: [`OutProjection::result`] becomes the sum.
fn find_bias<'m>(graph: &Graph<'m>, shapes: &Shapes, out: &mut OutProjection<'m>) {
    let (mut value, mut shared, mut moved) = (out.result, false, false);
    for _ in 0..8 {
        let readers: Vec<_> = graph
            .readers(value)
            .iter()
            .filter(|p| !matches!(op(graph.node(p.node)), "Shape" | "Size"))
            .collect();
        shared |= graph.is_observed(value) || readers.len() > 1;
        let is_bias = |node: &linfusion_models::onnx::proto::NodeProto| {
            matches!(op(node), "Add" | "BiasAdd")
                && node.input.iter().any(|v| {
                    v != value && shapes.fact(v).constant && {
                        let shape = shapes.shape(v).unwrap_or(&[]);
                        is_vector(shapes, v) && shape.iter().product::<i64>() == out.width
                    }
                })
        };
        let bias = readers.iter().find(|p| is_bias(graph.node(p.node)));
        if let Some(reader) = bias {
            let below = graph.node(reader.node);
            if shared || moved {
                out.obstacle = Some(format!(
                    "the bias that '{}' adds to '{}' cannot be replaced with the layer: {}",
                    label(below),
                    out.result,
                    if shared {
                        "something else reads the product"
                    } else {
                        "elements are moved in between"
                    }
                ));
            } else if let Some(sum) = below.output.first() {
                out.result = sum;
            }
            return;
        }
        let Some(reader) = readers.first().filter(|_| readers.len() == 1) else {
            return;
        };
        let below = graph.node(reader.node);
        if matches!(
            op(below),
            "SkipLayerNormalization" | "SkipSimplifiedLayerNormalization"
        ) {
            let slot = if op(below) == "SkipLayerNormalization" {
                4
            } else {
                3
            };
            if reader.slot < 2 && !shared && !moved && input(below, slot).is_some() {
                out.later_bias = Some((reader.node, slot));
            }
            return;
        }
        let Some(next) = below
            .output
            .first()
            .filter(|_| reader.slot == 0 || op(below) == "Mul")
        else {
            return;
        };
        match between(graph, shapes, reader.node, 0) {
            Ok(Between::Computes(_)) if !shared && !moved => out.result = next,
            Ok(Between::Moves(Move::Same, _)) => {
                // From integers back to numbers: part of the layer.
                if !shapes.fact(value).element.is_some_and(is_float) && !shared && !moved {
                    out.result = next;
                }
            }
            Ok(Between::Moves(..)) => moved = true,
            _ => return,
        }
        value = next;
    }
}
