//! Token streams: an attention over text and image reads each through linear layers of
//! its own, and joins them. Where the norms or rotary embeddings behind a layer forbid
//! the strict reading, the layer itself can still be read.

use std::collections::{HashMap, VecDeque};

pub use linfusion_ops::schema::TextSide;

use super::core::{Core, Operand};
use super::exact::{Axes, Exact};
use super::plain::{Between, Layout, Matrix, Plain, Tap, between, out_projection, tap};
use super::projection::{Linear, data_inputs, roots};
use crate::graph::Graph;
use crate::shapes::Shapes;

/// The linear layers of q, k and v over a stream of `rows` tokens, read as a strict
/// reading of that stream; its `merged` output is the attention's. Where two streams have
/// as many tokens, `belongs` says of a layer's input whether it is of this one.
///
/// # Errors
/// One sentence on what stands in the way.
pub fn stream<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    core: &Core<'m>,
    exact: &Exact<'m>,
    rows: i64,
    belongs: impl Fn(&'m str) -> bool,
) -> Result<Plain<'m>, String> {
    let grid = Matrix {
        batch: exact.batch,
        tokens: rows,
        heads: exact.heads,
    };
    let layers = [&core.q, &core.k, &core.v].map(|o| layer(graph, shapes, o, &grid, &belongs));
    let [q, k, v] = layers;
    let layers = [(q?, &core.q), (k?, &core.k), (v?, &core.v)];
    let (x, x_layout, width) = input_matrix(graph, shapes, layers[0].0.source, &grid)?;
    let mut taps = Vec::with_capacity(3);
    for (i, (linear, operand)) in layers.into_iter().enumerate() {
        let channels = if i == 2 {
            exact.value_dim
        } else {
            exact.head_dim
        };
        taps.push(stream_tap(graph, shapes, operand, linear, &grid, channels)?);
    }
    let taps: [Tap<'m>; 3] = taps
        .try_into()
        .map_err(|_| "q, k and v are incomplete".to_owned())?;
    let element = shapes
        .fact(x)
        .element
        .ok_or_else(|| format!("the element type of '{x}' is unknown"))?;
    let out = (rows == exact.tokens)
        .then(|| out_projection(graph, shapes, exact.merged, &exact.merged_layout))
        .flatten();
    Ok(Plain {
        x,
        x_layout,
        width,
        batch: exact.batch,
        tokens: rows,
        heads: exact.heads,
        head_dim: exact.head_dim,
        value_dim: exact.value_dim,
        element,
        taps,
        merged: exact.merged,
        merged_layout: exact.merged_layout.clone(),
        out,
        scale: exact.scale,
    })
}

/// The one linear layer behind an operand that has this stream's rows.
fn layer<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    operand: &Operand<'m>,
    grid: &Matrix,
    belongs: &impl Fn(&'m str) -> bool,
) -> Result<Linear<'m>, String> {
    let mut fitting = roots(graph, shapes, operand.value).linears;
    fitting.retain(|l| {
        let shape = shapes.shape(l.source);
        shape.is_some_and(|s| grid.layout(s, false).is_some())
    });
    if fitting.len() > 1 {
        fitting.retain(|l| belongs(l.source));
    }
    let mut fitting = fitting.into_iter();
    match (fitting.next(), fitting.next()) {
        (Some(linear), None) => Ok(linear),
        (None, _) => Err(format!(
            "no linear layer over {} tokens lies behind '{}'",
            grid.tokens, operand.value
        )),
        (Some(a), Some(b)) => Err(format!(
            "'{}' comes from two linear layers over {} tokens, of '{}' and '{}'",
            operand.value, grid.tokens, a.source, b.source
        )),
    }
}

/// `value`, or what it was folded from, as a matrix of the stream's rows.
fn input_matrix<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    value: &'m str,
    grid: &Matrix,
) -> Result<(&'m str, Layout, i64), String> {
    let mut at = value;
    for _ in 0..16 {
        let shape = shapes.shape(at).unwrap_or(&[]);
        if shape.len() == 3
            && let Some((layout, width)) = grid.layout(shape, false)
        {
            return Ok((at, layout, width));
        }
        match graph.producer(at).and_then(|p| graph.input(p.node, 0)) {
            Some(above) => at = above,
            None => break,
        }
    }
    Err(format!(
        "'{value}' is not batch × {} tokens × channels",
        grid.tokens
    ))
}

/// The tap of a layer: the value, as near to the attention as nothing but a bias and
/// moves lie between, checked to hold heads × channels.
fn stream_tap<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    operand: &Operand<'m>,
    linear: Linear<'m>,
    grid: &Matrix,
    channels: i64,
) -> Result<Tap<'m>, String> {
    let unread = || {
        format!(
            "what lies between '{}' and its linear layer is not batch × tokens × heads × channels",
            operand.value
        )
    };
    let path = path(graph, shapes, operand.value, linear).ok_or_else(unread)?;
    let mut last = None;
    for &value in path.iter().rev() {
        let Some(port) = graph.producer(value) else {
            break;
        };
        if port.node != linear.node
            && !matches!(
                between(graph, shapes, port.node, port.slot),
                Ok(Between::Moves(..) | Between::Computes(_))
            )
        {
            break;
        }
        if let Some(found) = split_heads(shapes, value, grid, channels) {
            last = Some(found);
        }
    }
    let found = last.ok_or_else(unread)?;
    tap(graph, shapes, &found, grid, channels).map(|(tap, _)| tap)
}

/// `value` as an operand, by its shape alone.
fn split_heads<'m>(
    shapes: &Shapes,
    value: &'m str,
    grid: &Matrix,
    channels: i64,
) -> Option<Operand<'m>> {
    let shape = shapes.shape(value)?;
    let sizes = [grid.batch, grid.heads, grid.tokens, channels];
    [Axes::Split, Axes::Heads, Axes::Packed]
        .into_iter()
        .find(|axes| axes.shape(sizes) == shape)
        .and_then(|axes| {
            Some(Operand {
                value,
                shape: shape.to_vec(),
                roles: axes.roles()?,
                batch: vec![grid.batch, grid.heads],
            })
        })
}

/// The values from `from` up to the result of `linear`, both included.
fn path<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    from: &'m str,
    linear: Linear<'m>,
) -> Option<Vec<&'m str>> {
    let mut below: HashMap<&str, Option<&str>> = HashMap::from([(from, None)]);
    let mut queue = VecDeque::from([from]);
    while let Some(value) = queue.pop_front() {
        let Some(port) = graph.producer(value) else {
            continue;
        };
        if port.node == linear.node {
            let mut path = vec![value];
            while let Some(Some(next)) = path.last().and_then(|v| below.get(v)) {
                path.push(next);
            }
            path.reverse();
            return Some(path);
        }
        for above in data_inputs(graph.node(port.node)) {
            if !shapes.fact(above).constant && !below.contains_key(above) {
                below.insert(above, Some(value));
                queue.push_back(above);
            }
        }
    }
    None
}
