//! Where an attention's tokens come from: their axis is followed up through the graph to
//! the tensor whose rows and columns it is, to the graph input that has tokens already, or
//! to where text and image are joined.

use std::cell::RefCell;
use std::collections::HashMap;

use super::layout::Move;
use super::plain::is_pointwise;
use super::projection::linear;
use crate::graph::{Graph, NodeId, attr_int, attr_str, op};
use crate::shapes::value::axis;
use crate::shapes::{Shapes, einsum_terms};

/// What a token axis is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin<'m> {
    /// Two adjacent axes of `value`, the first at `axis`: rows and columns.
    Plane {
        /// The value.
        value: &'m str,
        /// Its axis of rows.
        axis: usize,
    },
    /// The tokens of a graph input.
    Input(&'m str),
    /// Token sequences, one after the other: each with its number of tokens.
    Joined(Vec<(Origin<'m>, i64)>),
    /// Anything else, in a few words.
    Unknown(&'static str),
}

/// The digit `(index / post) % count` of a value's row-major index: an axis, a part of one,
/// or several adjacent ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Digit<'m> {
    value: &'m str,
    post: i64,
    count: i64,
}

/// Where a digit lies in a shape.
enum Place {
    /// Within one axis: that axis, and how many of its steps make one of the digit.
    Axis(usize, i64),
    /// Over these axes, of more than one element each.
    Axes(Vec<usize>),
}

/// Follows token axes through one graph; what was found once is kept.
pub struct Origins<'g, 'm> {
    graph: &'g Graph<'m>,
    shapes: &'g Shapes,
    found: RefCell<HashMap<Digit<'m>, Origin<'m>>>,
}

const NOTHING: Origin<'static> = Origin::Unknown("nothing above makes it from rows and columns");
const VOLUME: Origin<'static> =
    Origin::Unknown("they are made of more than two axes, as those of a video");

/// A digit on its way up.
struct Frame<'m> {
    digit: Digit<'m>,
    above: Vec<Digit<'m>>,
    next: usize,
    join: bool,
    parts: Vec<(Origin<'m>, i64)>,
    /// The best so far of those that are looked at one after the other.
    best: Origin<'m>,
}

/// What to do with a digit.
enum Step<'m> {
    Done(Origin<'m>),
    /// The first of these that leads somewhere tells.
    Follow(Vec<Digit<'m>>),
    /// All of these, one after the other.
    Join(Vec<Digit<'m>>),
}

impl<'g, 'm> Origins<'g, 'm> {
    /// Of a graph with these shapes.
    #[must_use]
    pub fn new(graph: &'g Graph<'m>, shapes: &'g Shapes) -> Self {
        Origins {
            graph,
            shapes,
            found: RefCell::default(),
        }
    }

    /// What axis `axis` of `value` is made of.
    #[must_use]
    pub fn of(&self, value: &'m str, axis: usize) -> Origin<'m> {
        let shape = self.shapes.shape(value).unwrap_or(&[]);
        match (shape.get(axis), suffix(shape, axis)) {
            (Some(&count), Some(post)) if count > 1 => {
                let found = self.trace(Digit { value, post, count });
                match found {
                    Origin::Plane { value, axis } => self.plane(value, axis),
                    Origin::Joined(parts) => {
                        let of_part = |(origin, n)| match origin {
                            Origin::Plane { value, axis } => (self.plane(value, axis), n),
                            other => (other, n),
                        };
                        Origin::Joined(parts.into_iter().map(of_part).collect())
                    }
                    other => other,
                }
            }
            _ => NOTHING,
        }
    }

    /// Two axes of which neither is made of others in turn.
    fn plane(&self, value: &'m str, axis: usize) -> Origin<'m> {
        let shape = self.shapes.shape(value).unwrap_or(&[]);
        for i in [axis, axis + 1] {
            let digit = shape.get(i).zip(suffix(shape, i));
            if let Some((&count, post)) = digit
                && matches!(
                    self.trace(Digit { value, post, count }),
                    Origin::Plane { .. }
                )
            {
                return VOLUME;
            }
        }
        Origin::Plane { value, axis }
    }

    /// Depth first, without recursion: graphs are thousands of nodes deep.
    fn trace(&self, start: Digit<'m>) -> Origin<'m> {
        let mut stack: Vec<Frame<'m>> = Vec::new();
        let mut result = None;
        let mut enter = Some(start);
        loop {
            if let Some(digit) = enter.take() {
                let known = self.found.borrow().get(&digit).cloned();
                match known.map_or_else(|| self.step(digit), Step::Done) {
                    Step::Done(origin) => {
                        self.found.borrow_mut().insert(digit, origin.clone());
                        result = Some(origin);
                    }
                    step => {
                        let join = matches!(step, Step::Join(_));
                        let (Step::Follow(above) | Step::Join(above)) = step else {
                            continue;
                        };
                        // What is met again on the way to itself leads nowhere.
                        self.found.borrow_mut().insert(digit, NOTHING);
                        stack.push(Frame {
                            digit,
                            above,
                            next: 0,
                            join,
                            parts: Vec::new(),
                            best: NOTHING,
                        });
                    }
                }
            }
            let Some(frame) = stack.last_mut() else {
                return result.unwrap_or(NOTHING);
            };
            if let Some(origin) = result.take() {
                let count = frame.above.get(frame.next).map_or(0, |d| d.count);
                frame.next += 1;
                if frame.join {
                    match origin {
                        Origin::Joined(parts) => frame.parts.extend(parts),
                        origin => frame.parts.push((origin, count)),
                    }
                } else {
                    if origin.telling() > frame.best.telling() {
                        frame.best = origin;
                    }
                    if frame.best.telling() == MOST {
                        frame.next = frame.above.len();
                    }
                }
            }
            match frame.above.get(frame.next) {
                Some(&digit) => enter = Some(digit),
                None => {
                    let origin = if frame.join {
                        Origin::Joined(std::mem::take(&mut frame.parts))
                    } else {
                        std::mem::replace(&mut frame.best, NOTHING)
                    };
                    self.found.borrow_mut().insert(frame.digit, origin.clone());
                    stack.pop();
                    result = Some(origin);
                }
            }
        }
    }

    fn step(&self, digit: Digit<'m>) -> Step<'m> {
        let Digit { value, post, count } = digit;
        let done = |origin| Step::Done(origin);
        let Some(shape) = self.shapes.shape(value) else {
            return done(NOTHING);
        };
        let (axis, inner) = match place(shape, post, count) {
            Some(Place::Axis(axis, inner)) => (axis, inner),
            Some(Place::Axes(axes)) => {
                return done(match axes[..] {
                    [axis, cols] if cols == axis + 1 => Origin::Plane { value, axis },
                    _ => VOLUME,
                });
            }
            None => return done(NOTHING),
        };
        let Some(port) = self.graph.producer(value) else {
            let whole = inner == 1 && shape.get(axis) == Some(&count);
            let stored = self.shapes.fact(value).constant;
            return done(if whole && !stored {
                Origin::Input(value)
            } else {
                NOTHING
            });
        };
        if self.shapes.fact(value).constant {
            return done(NOTHING);
        }
        self.above(digit, port.node, port.slot, (axis, inner))
    }

    /// The digits of a node's inputs that a digit of its output is.
    fn above(
        &self,
        digit: Digit<'m>,
        id: NodeId,
        slot: usize,
        (axis, inner): (usize, i64),
    ) -> Step<'m> {
        let node = self.graph.node(id);
        let rank = self.shapes.shape(digit.value).map_or(0, <[i64]>::len);
        if let Some(step) = Move::of(self.graph, self.shapes, id, slot) {
            let from = self.graph.input(id, 0);
            let moved = from.and_then(|from| match step {
                Move::Same => Some(Digit {
                    value: from,
                    ..digit
                }),
                Move::Refold { .. } => Some(Digit {
                    value: from,
                    ..digit
                }),
                Move::Permute(perm) => self.at(from, *perm.get(axis)?, inner, digit),
                Move::Window(_) => self.at(from, axis, inner, digit),
                Move::Pick { axis: gone, .. } => {
                    self.at(from, axis + usize::from(axis >= gone), inner, digit)
                }
            });
            return Step::Follow(moved.into_iter().collect());
        }
        let from_right = rank - axis;
        let aligned = |input: &'m str| {
            let rank = self.shapes.shape(input)?.len();
            self.at(input, rank.checked_sub(from_right)?, inner, digit)
        };
        let inputs = || {
            let names = node.input.iter().map(String::as_str);
            names.filter(|v| !v.is_empty() && !self.shapes.fact(v).constant)
        };
        let one = |slot: usize| {
            let input = self.graph.input(id, slot);
            Step::Follow(input.and_then(aligned).into_iter().collect())
        };
        match op(node) {
            "Concat" => {
                let joined = attr_int(node, "axis").and_then(|a| self::axis(a, rank));
                if joined != Some(axis) {
                    return Step::Follow(inputs().filter_map(aligned).collect());
                }
                let shape = self.shapes.shape(digit.value).unwrap_or(&[]);
                if inner != 1 || shape.get(axis) != Some(&digit.count) {
                    return Step::Done(NOTHING);
                }
                let part = |input: &'m String| {
                    let shape = self.shapes.shape(input)?;
                    Some(Digit {
                        value: input,
                        post: suffix(shape, axis)?,
                        count: *shape.get(axis)?,
                    })
                };
                let parts: Option<Vec<_>> = node.input.iter().map(part).collect();
                match parts {
                    Some(mut parts) => {
                        parts.retain(|d| d.count > 0);
                        Step::Join(parts)
                    }
                    None => Step::Done(NOTHING),
                }
            }
            "MatMul" | "FusedMatMul" | "TransposeMatMul" | "MatMulInteger" | "QLinearMatMul" => {
                let flag = |name: &str| attr_int(node, name).unwrap_or(0) == 1;
                let right = if op(node) == "QLinearMatMul" { 3 } else { 1 };
                match axis + 1 == rank {
                    true if !flag("transB") => one(right),
                    false if axis + 2 != rank || !flag("transA") => one(0),
                    _ => Step::Done(NOTHING),
                }
            }
            "Einsum" => Step::Follow(self.einsum(digit, id, (axis, inner))),
            // What an assignment to a slice leaves: other elements in some places.
            "Scatter" | "ScatterElements" | "ScatterND" => one(0),
            // These put elements elsewhere, or make one of several.
            "Gather" | "GatherElements" | "GatherND" | "TopK" | "Compress" | "ReverseSequence"
            | "Resize" | "Upsample" | "ConvTranspose" | "MaxPool" | "AveragePool" | "Pad"
            | "If" | "Loop" | "Scan" | "Range" | "CumSum" => Step::Done(NOTHING),
            name if name.contains("Conv") => match linear(self.graph, self.shapes, id) {
                Some(layer) if is_pointwise(self.graph, self.shapes, layer) => one(layer.slot),
                _ => Step::Done(NOTHING),
            },
            _ => Step::Follow(inputs().filter_map(aligned).collect()),
        }
    }

    /// The digit within axis `axis` of `value`, if that has the size that the axis below has.
    fn at(&self, value: &'m str, axis: usize, inner: i64, below: Digit<'m>) -> Option<Digit<'m>> {
        let shape = self.shapes.shape(value)?;
        let size = *shape.get(axis)?;
        let whole = size == below.count && inner == 1;
        let part = size > below.count && size % inner.checked_mul(below.count)? == 0;
        let post = suffix(shape, axis)?.checked_mul(inner)?;
        (whole || part && self.same_axis(below, size)).then_some(Digit {
            value,
            post,
            count: below.count,
        })
    }

    /// Whether the axis that `below` is a part of has `size` elements.
    fn same_axis(&self, below: Digit<'m>, size: i64) -> bool {
        let shape = self.shapes.shape(below.value).unwrap_or(&[]);
        match place(shape, below.post, below.count) {
            Some(Place::Axis(axis, _)) => shape.get(axis) == Some(&size),
            _ => false,
        }
    }

    fn einsum(&self, digit: Digit<'m>, id: NodeId, (axis, inner): (usize, i64)) -> Vec<Digit<'m>> {
        let node = self.graph.node(id);
        let terms = attr_str(node, "equation").and_then(einsum_terms);
        let Some((terms, out)) = terms else {
            return Vec::new();
        };
        let Some(letter) = out.get(axis) else {
            return Vec::new();
        };
        let of_input = |(term, input): (&Vec<char>, &'m String)| {
            let axis = term.iter().position(|l| l == letter)?;
            self.at(input, axis, inner, digit)
        };
        terms.iter().zip(&node.input).filter_map(of_input).collect()
    }
}

/// What [`Origin::telling`] gives where nothing could tell more.
const MOST: u8 = 2;

impl Origin<'_> {
    /// How much it tells: an input that is multiplied in may have as many elements as there
    /// are tokens.
    fn telling(&self) -> u8 {
        match self {
            Origin::Plane { .. } => MOST,
            Origin::Joined(parts) => parts.iter().map(|(o, _)| o.telling()).max().unwrap_or(0),
            Origin::Input(_) => 1,
            unknown if *unknown == NOTHING => 0,
            Origin::Unknown(_) => MOST,
        }
    }
}

/// The product of the dimensions behind `axis`.
fn suffix(shape: &[i64], axis: usize) -> Option<i64> {
    shape
        .get(axis + 1..)?
        .iter()
        .try_fold(1i64, |p, &d| p.checked_mul(d))
}

fn place(shape: &[i64], post: i64, count: i64) -> Option<Place> {
    let end = post.checked_mul(count)?;
    let mut axes = Vec::new();
    for axis in (0..shape.len()).rev() {
        let size = *shape.get(axis)?;
        let low = suffix(shape, axis)?;
        let high = low.checked_mul(size)?;
        if low <= post && end <= high && size > 1 {
            return (post % low == 0 && high % end == 0).then_some(Place::Axis(axis, post / low));
        }
        if size > 1 && low >= post && high <= end {
            axes.insert(0, axis);
        }
    }
    // They must make up the digit and nothing else.
    let first = *axes.first()?;
    let last = *axes.last()?;
    let low = suffix(shape, last)?;
    let high = suffix(shape, first)?.checked_mul(*shape.get(first)?)?;
    (low == post && high == end).then_some(Place::Axes(axes))
}
