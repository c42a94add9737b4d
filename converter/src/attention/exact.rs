//! The tolerant reading: q, k and v as the attention reads them, whatever made them
//! (norms, rotary embeddings, joined token streams). It is all that window attention
//! needs, and it is checked element by element like the strict one.

use super::core::{Core, Form, Operand, Role};
use super::layout::{Move, ravel};
use super::plain::{Between, Columns, Layout, Matrix, Plain, Tap, between, head_channels, merge};
use super::projection::roots;
use crate::graph::{Graph, op};
use crate::shapes::Shapes;
use crate::shapes::eval::element::is_float;

/// How q, k or v lies, for batch B, tokens N, heads H, channels D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axes {
    /// `[B, N, H·D]`
    Packed,
    /// `[B, N, H, D]`
    Split,
    /// `[B, H, N, D]`
    Heads,
    /// `[B, H, D, N]`
    HeadsTurned,
    /// `[B·H, N, D]`
    Folded,
    /// `[B·H, D, N]`
    FoldedTurned,
}

/// Cheapest first: packed is what the operator takes.
const AXES: [Axes; 6] = [
    Axes::Packed,
    Axes::Split,
    Axes::Heads,
    Axes::HeadsTurned,
    Axes::Folded,
    Axes::FoldedTurned,
];

/// A value of the graph that is q, k or v.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'m> {
    /// The value.
    pub value: &'m str,
    /// How it lies.
    pub axes: Axes,
}

/// An attention whose q, k and v can be read and whose output can be replaced.
#[derive(Clone, Debug)]
pub struct Exact<'m> {
    /// q, k and v; `None` where the strict reading has them.
    pub qkv: Option<[Reading<'m>; 3]>,
    /// The output with heads merged, `N` rows of `H·Dv`.
    pub merged: &'m str,
    /// How it lies.
    pub merged_layout: Layout,
    /// Batch under the probe.
    pub batch: i64,
    /// Tokens under the probe, text and image together.
    pub tokens: i64,
    /// Heads.
    pub heads: i64,
    /// Channels a head of q and k.
    pub head_dim: i64,
    /// Channels a head of v.
    pub value_dim: i64,
    /// ONNX element type of the output.
    pub element: i32,
    /// Factor on q·kᵀ.
    pub scale: f64,
}

impl<'m> Exact<'m> {
    /// What the strict reading found.
    #[must_use]
    pub fn of_plain(plain: &Plain<'m>) -> Self {
        Self {
            qkv: None,
            merged: plain.merged,
            merged_layout: plain.merged_layout.clone(),
            batch: plain.batch,
            tokens: plain.tokens,
            heads: plain.heads,
            head_dim: plain.head_dim,
            value_dim: plain.value_dim,
            element: plain.element,
            scale: plain.scale,
        }
    }
}

impl<'m> Exact<'m> {
    /// Sizes and output alone, where the linear layers are of no concern.
    #[must_use]
    pub fn frame(&self) -> Plain<'m> {
        let tap = |i: usize| Tap {
            value: self.qkv.as_ref().map_or(self.merged, |q| q[i].value),
            layout: Layout::Tokens,
            columns: Columns::All,
            linear: None,
        };
        Plain {
            x: self.merged,
            x_layout: self.merged_layout.clone(),
            width: self.heads * self.value_dim,
            batch: self.batch,
            tokens: self.tokens,
            heads: self.heads,
            head_dim: self.head_dim,
            value_dim: self.value_dim,
            element: self.element,
            taps: [tap(0), tap(1), tap(2)],
            merged: self.merged,
            merged_layout: self.merged_layout.clone(),
            out: None,
            scale: self.scale,
        }
    }
}

/// Reads `core` tolerantly.
///
/// # Errors
/// One sentence on what stands in the way.
pub fn exact<'m>(graph: &Graph<'m>, shapes: &Shapes, core: &Core<'m>) -> Result<Exact<'m>, String> {
    if let Some(mask) = &core.mask {
        return Err(mask.clone());
    }
    if core.form == Form::MergedWeights {
        return Err("the attention node projects q, k and v itself".to_owned());
    }
    let tokens = core.q.size(Role::Token).ok_or("the queries are unknown")?;
    if core.k.size(Role::Token) != Some(tokens) || core.v.size(Role::Token) != Some(tokens) {
        return Err("q, k and v have different numbers of tokens".to_owned());
    }
    let (batch, heads) = batch_and_heads(graph, shapes, core)?;
    let grid = Matrix {
        batch,
        tokens,
        heads,
    };
    let head_dim = head_channels(core, &core.q, heads)?;
    let value_dim = head_channels(core, &core.v, heads)?;
    let mut scale = core.scale;
    let mut read = |o: &Operand<'m>, d: i64, scales: bool| {
        let (reading, factor) = read(graph, shapes, o, &grid, d, scales)?;
        scale *= factor;
        Ok::<_, String>(reading)
    };
    let qkv = [
        read(&core.q, head_dim, true)?,
        read(&core.k, head_dim, true)?,
        read(&core.v, value_dim, false)?,
    ];
    if scale.is_nan() {
        scale = 1.0 / (head_dim as f64).sqrt();
    }
    let (merged, merged_layout) = merge(graph, shapes, core, &grid, value_dim)?;
    let element = shapes
        .fact(merged)
        .element
        .filter(|&e| is_float(e))
        .ok_or_else(|| format!("'{merged}' has no floating-point type"))?;
    Ok(Exact {
        qkv: Some(qkv),
        merged,
        merged_layout,
        batch,
        tokens,
        heads,
        head_dim,
        value_dim,
        element,
        scale,
    })
}

fn batch_and_heads(
    graph: &Graph<'_>,
    shapes: &Shapes,
    core: &Core<'_>,
) -> Result<(i64, i64), String> {
    let all: i64 = core.q.batch.iter().product();
    let linears = roots(graph, shapes, core.q.value).linears;
    let sources = linears.iter().filter_map(|l| shapes.shape(l.source));
    let batch = sources.filter(|s| s.len() > 2).find_map(|s| s.first());
    let batch = match (&core.q.batch[..], batch, core.heads) {
        (&[batch, _], ..) => batch,
        (_, Some(&batch), _) => batch,
        (_, None, Some(heads)) if heads > 0 => all / heads,
        _ => return Err("batch and heads cannot be told apart".to_owned()),
    };
    if batch <= 0 || all % batch != 0 {
        return Err(format!(
            "{all} batch·heads do not divide into batches of {batch}"
        ));
    }
    Ok((batch, all / batch))
}

/// The best value to read an operand from, and the factor below it: walks up while
/// nodes only move elements or scale them by a known number.
fn read<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    operand: &Operand<'m>,
    grid: &Matrix,
    channels: i64,
    scales: bool,
) -> Result<(Reading<'m>, f64), String> {
    let (mut value, mut moves, mut factor) = (operand.value, Vec::<Move>::new(), 1.0);
    let mut best: Option<(usize, Reading<'m>, f64)> = None;
    for _ in 0..64 {
        let Some(shape) = shapes.shape(value) else {
            break;
        };
        if shapes.fact(value).element.is_some_and(is_float) {
            for (rank, &axes) in AXES.iter().enumerate() {
                if best.as_ref().is_none_or(|(r, ..)| rank < *r)
                    && lies(operand, &moves, grid, channels, axes, shape)
                {
                    best = Some((rank, Reading { value, axes }, factor));
                }
            }
        }
        let Some(port) = graph.producer(value) else {
            break;
        };
        if op(graph.node(port.node)).ends_with("QuantizeLinear")
            || op(graph.node(port.node)) == "DequantizeLinear"
        {
            break;
        }
        match between(graph, shapes, port.node, port.slot) {
            Ok(Between::Moves(step, above)) => {
                moves.push(step);
                value = above;
            }
            Ok(Between::Scales(by, above)) if scales => {
                factor *= by;
                value = above;
            }
            _ => break,
        }
    }
    best.map(|(_, reading, factor)| (reading, factor))
        .ok_or_else(|| {
            format!(
                "'{}' of shape {:?} is not batch × tokens × heads × channels",
                operand.value, operand.shape
            )
        })
}

impl Axes {
    /// The index of element (b, h, n, c) and the shape, for these axes.
    fn place(self, [b, h, n, c]: [i64; 4], [bs, hs, ns, cs]: [i64; 4]) -> (Vec<i64>, Vec<i64>) {
        match self {
            Axes::Packed => (vec![b, n, h * cs + c], vec![bs, ns, hs * cs]),
            Axes::Split => (vec![b, n, h, c], vec![bs, ns, hs, cs]),
            Axes::Heads => (vec![b, h, n, c], vec![bs, hs, ns, cs]),
            Axes::HeadsTurned => (vec![b, h, c, n], vec![bs, hs, cs, ns]),
            Axes::Folded => (vec![b * hs + h, n, c], vec![bs * hs, ns, cs]),
            Axes::FoldedTurned => (vec![b * hs + h, c, n], vec![bs * hs, cs, ns]),
        }
    }

    /// The shape, for (B, H, N, D) of these sizes.
    #[must_use]
    pub fn shape(self, sizes: [i64; 4]) -> Vec<i64> {
        self.place([0; 4], sizes).1
    }

    /// The roles of the axes, for an operand of this form.
    #[must_use]
    pub fn roles(self) -> Option<Vec<Role>> {
        Some(match self {
            Axes::Packed => vec![Role::Batch(0), Role::Token, Role::HeadChannel],
            Axes::Split => vec![Role::Batch(0), Role::Token, Role::Batch(1), Role::Channel],
            Axes::Heads => vec![Role::Batch(0), Role::Batch(1), Role::Token, Role::Channel],
            _ => return None,
        })
    }
}

/// Whether the value `moves` above `operand`, of shape `shape`, is the operand with
/// its elements lying as `axes` says.
fn lies(
    operand: &Operand<'_>,
    moves: &[Move],
    grid: &Matrix,
    channels: i64,
    axes: Axes,
    shape: &[i64],
) -> bool {
    let sizes = [grid.batch, grid.heads, grid.tokens, channels];
    let (_, expected_shape) = axes.place([0; 4], sizes);
    if expected_shape != shape {
        return false;
    }
    let same = |b: i64, h: i64, n: i64, c: i64| -> Option<bool> {
        let at = operand.index(b * grid.heads + h, grid.heads, n, c, channels)?;
        ravel(&at, &operand.shape)?;
        let at = moves.iter().try_fold(at, |at, step| step.back(&at))?;
        Some(at == axes.place([b, h, n, c], sizes).0)
    };
    grid.rows().into_iter().enumerate().all(|(i, (b, n))| {
        (0..grid.heads).all(|h| {
            (0..channels)
                .filter(|c| i == 0 || c % 7 == 0 || c + 1 == channels)
                .all(|c| same(b, h, n, c) == Some(true))
        })
    })
}
