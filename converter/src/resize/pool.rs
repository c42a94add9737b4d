//! Sizes of the image that a graph has so far: what a constant may stand for, and where to read it from.

use std::collections::HashMap;
use std::rc::Rc;

use linfusion_models::onnx::proto::NodeProto;

use super::columns::{Columns, Numbers, multiply, product};
use super::reading::{Dimension, Element, Sized};
use super::reshape::{first_column, groups, is_one};
use crate::graph::input;

/// Sizes of the image that values so far have, and what was joined from them.
#[derive(Clone, Debug)]
pub struct Pool {
    /// Position of the node that is looked at, in execution order.
    pub now: usize,
    last_read: Rc<HashMap<String, usize>>,
    sizes: HashMap<Numbers, Vec<Witness>>,
    /// By their product, the axes that a Reshape joined or cut anew, without ones.
    pub joined: HashMap<Numbers, Vec<Vec<Numbers>>>,
}

/// A value that has a size.
#[derive(Clone, Debug)]
struct Witness {
    element: Element,
    /// Position of the last node that reads the value.
    last_read: usize,
    /// Whether it is an image, not tokens or an attention's weights.
    is_image: bool,
}

impl Pool {
    /// `last_read`: the position of the last node that reads a value.
    pub fn new(last_read: HashMap<String, usize>) -> Self {
        Pool {
            now: 0,
            last_read: Rc::new(last_read),
            sizes: HashMap::new(),
            joined: HashMap::new(),
        }
    }

    /// Takes in the dimensions of `value`.
    pub fn add(&mut self, value: &str, columns: &Columns<'_>) {
        let Some(shape) = columns.shape(value) else {
            return;
        };
        let varying: Vec<&Numbers> = shape.iter().filter(|n| columns.varies(n)).collect();
        // Weights of an attention have their tokens twice; a Shape of them would keep them alive.
        if (1..varying.len()).any(|i| varying.get(..i).is_some_and(|v| v.contains(&varying[i]))) {
            return;
        }
        let dimension = |axis: usize| Dimension {
            value: value.to_owned(),
            axis,
        };
        let is_image = shape.len() == 4 && varying.len() == 2;
        // Rows times columns, which an image's tokens are counted by.
        if is_image
            && let [.., height, width] = &shape[..]
            && let (true, Some(tokens)) = (columns.varies(height), multiply(height, width))
        {
            let axes = vec![dimension(shape.len() - 2), dimension(shape.len() - 1)];
            self.insert(value, tokens, Element::product(1, axes), is_image);
        }
        for (axis, numbers) in shape.into_iter().enumerate() {
            if columns.varies(&numbers) {
                self.insert(
                    value,
                    numbers,
                    Element::product(1, vec![dimension(axis)]),
                    is_image,
                );
            }
        }
    }

    fn insert(&mut self, value: &str, numbers: Numbers, element: Element, is_image: bool) {
        let witness = Witness {
            element,
            last_read: self.last_read.get(value).copied().unwrap_or(0),
            is_image,
        };
        let known = self.sizes.entry(numbers).or_default();
        let last = known.len().saturating_sub(1);
        let mut place = 0;
        known.retain(|w| {
            place += 1;
            w.last_read > self.now || place > last
        });
        known.push(witness);
    }

    /// The value to read a size from: the last image that other nodes need later anyway, since reading
    /// its shape keeps it in memory, and since what is inside an attention may be rewritten.
    pub fn get(&self, numbers: &Numbers) -> Option<&Element> {
        let all = self.sizes.get(numbers)?;
        let last = |good: &dyn Fn(&&Witness) -> bool| all.iter().rev().find(good);
        let alive = last(&|w| w.is_image && w.last_read > self.now);
        let best = alive
            .or_else(|| last(&|w| w.is_image))
            .or_else(|| last(&|_| true));
        best.map(|w| &w.element)
    }

    /// Takes in which axes the Reshape `node` joins; its output is known.
    pub fn join(&mut self, node: &NodeProto, columns: &Columns<'_>) {
        let shape = |name: Option<&str>| name.and_then(|n| columns.shape(n));
        let (Some(from), Some(to)) = (
            shape(input(node, 0)),
            shape(node.output.first().map(String::as_str)),
        ) else {
            return;
        };
        for (ins, outs) in groups(&first_column(&from), &first_column(&to)) {
            let (Some(ins), Some(outs)) = (from.get(ins), to.get(outs)) else {
                continue;
            };
            let factors: Vec<Numbers> = ins.iter().filter(|n| !is_one(n)).cloned().collect();
            let made = outs.iter().filter(|n| !is_one(n));
            if factors.len() < 2
                || made.count() > factors.len()
                || !factors.iter().any(|n| columns.varies(n))
            {
                continue;
            }
            let Some(total) = factors.iter().try_fold(vec![], product) else {
                continue;
            };
            let known = self.joined.entry(total).or_default();
            if !known.contains(&factors) {
                known.push(factors);
            }
        }
    }

    /// What a constant of these numbers may be instead: sizes that agree at the export's.
    pub fn matching(&self, numbers: &Numbers) -> Vec<Sized> {
        let first = numbers.first().copied();
        if first.is_none_or(|n| n <= 1) {
            return Vec::new();
        }
        let same = self.sizes.keys().filter(|n| n.first().copied() == first);
        let mut found: Vec<Sized> = same
            .filter_map(|numbers| {
                Some(Sized {
                    element: self.get(numbers)?.clone(),
                    numbers: numbers.clone(),
                })
            })
            .collect();
        found.sort_by(|a, b| a.numbers.cmp(&b.numbers));
        found
    }
}
