//! Reshapes, whose constants mix sizes of the image with everything else.

use linfusion_models::onnx::proto::NodeProto;

use super::columns::{Columns, Numbers, divide, product};
use super::pool::Pool;
use super::reading::{Dimension, Element, MOST, Reading, Sized, as_is, combine, options};
use crate::graph::{attr_int, input};

/// A Reshape keeps the boundaries between axes that it keeps at the size of the export: it falls
/// apart into groups of input and output axes of equal product.
pub fn reshape(node: &NodeProto, columns: &Columns<'_>, pool: &Pool) -> Option<Vec<Reading>> {
    let none = || Some(vec![Reading::default()]);
    let (Some(x), Some(target)) = (input(node, 0), input(node, 1)) else {
        return none();
    };
    let Some(from) = columns.shape(x) else {
        return none();
    };
    if !from.iter().any(|n| columns.varies(n)) {
        return none();
    }
    let target = columns.ints(target)?;
    let keep_zero = attr_int(node, "allowzero") == Some(1);
    // -1 is what remains; all else is known, 0 as the input's.
    let mut to: Vec<Option<Numbers>> = Vec::new();
    for (i, numbers) in target.iter().enumerate() {
        to.push(match numbers.first() {
            Some(-1) => None,
            Some(0) if !keep_zero => Some(from.get(i)?.clone()),
            _ => Some(numbers.clone()),
        });
    }
    let known = count(to.iter().flatten())?;
    let total = count(from.iter())?;
    let hole = total.checked_div(known).unwrap_or(0);
    let holes = to.iter().filter(|n| n.is_none()).count();
    if known.checked_mul(if holes == 0 { 1 } else { hole }) != Some(total) {
        // Not even as it is: the batch of the export, perhaps, is another.
        return Some(Vec::new());
    }
    let first = |n: &Numbers| n.first().copied().unwrap_or(0);
    let before = first_column(&from);
    let after: Vec<i64> = to.iter().map(|n| n.as_ref().map_or(hole, first)).collect();
    let mut parts: Vec<Vec<Vec<Sized>>> = Vec::new();
    for (ins, outs) in groups(&before, &after) {
        let dims = from.get(ins.clone())?;
        let sizes = to.get(outs.clone())?;
        let as_it_is = || {
            let kept = target.get(outs.clone()).unwrap_or(&[]);
            vec![kept.iter().map(as_is).collect::<Vec<_>>()]
        };
        let free = |n: &Option<Numbers>, given: &Numbers| {
            n.is_some() && given.first().is_some_and(|&g| g > 0) && !columns.varies(given)
        };
        let free: Vec<bool> = (sizes.iter().zip(target.get(outs.clone())?))
            .map(|(n, given)| free(n, given))
            .collect();
        if !dims.iter().any(|n| columns.varies(n)) || !free.contains(&true) {
            parts.push(as_it_is());
            continue;
        }
        let axes = ins.clone().map(|axis| Dimension {
            value: x.to_owned(),
            axis,
        });
        let group = Group {
            axes: axes.zip(dims.iter().cloned()).collect(),
            sizes: sizes.to_vec(),
            given: target.get(outs.clone())?.to_vec(),
            free,
        };
        parts.push(group.readings(columns, pool)?);
    }
    // One reading of each group.
    let mut all: Vec<Vec<Sized>> = vec![Vec::new()];
    for part in parts {
        all = (all.iter())
            .flat_map(|so_far| {
                part.iter()
                    .map(move |more| [&so_far[..], &more[..]].concat())
            })
            .collect();
        if all.len() > MOST {
            return None;
        }
    }
    let reading = |elements| Reading {
        slots: vec![(1, elements)],
    };
    Some(all.into_iter().map(reading).collect())
}

/// Axes next to each other.
pub type Range = std::ops::Range<usize>;

/// The product of sizes at the size of the export.
fn count<'a>(mut sizes: impl Iterator<Item = &'a Numbers>) -> Option<i64> {
    sizes.try_fold(1i64, |all, n| all.checked_mul(*n.first()?))
}

/// The sizes at the size of the export.
pub fn first_column(shape: &[Numbers]) -> Vec<i64> {
    shape
        .iter()
        .map(|n| n.first().copied().unwrap_or(0))
        .collect()
}

/// Whether a dimension is 1 at every size.
pub fn is_one(numbers: &Numbers) -> bool {
    numbers.iter().all(|&n| n == 1)
}

/// The shortest runs of axes whose products agree.
pub fn groups(before: &[i64], after: &[i64]) -> Vec<(Range, Range)> {
    let mut groups = Vec::new();
    let (mut i, mut j) = (0, 0);
    while i < before.len() || j < after.len() {
        let (from_i, from_j) = (i, j);
        let (mut left, mut right) = (1i128, 1i128);
        loop {
            let take_left = i < before.len() && (left <= right || j >= after.len());
            if take_left && (i == from_i || left < right || j >= after.len()) {
                left = left.saturating_mul(i128::from(before[i]));
                i += 1;
            } else if j < after.len() {
                right = right.saturating_mul(i128::from(after[j]));
                j += 1;
            } else {
                break;
            }
            if left == right && i > from_i && j > from_j {
                break;
            }
        }
        // Ones at the end belong to what is before them.
        if i == before.len() || j == after.len() {
            let rest_is_ones = before[i..].iter().chain(&after[j..]).all(|&d| d == 1);
            if rest_is_ones {
                (i, j) = (before.len(), after.len());
            }
        }
        groups.push((from_i..i, from_j..j));
    }
    groups
}

/// Axes that a Reshape makes of others, with the image among them.
struct Group {
    axes: Vec<(Dimension, Numbers)>,
    /// Sizes of the outputs; `None` for -1.
    sizes: Vec<Option<Numbers>>,
    /// The elements as they stand in the target.
    given: Vec<Numbers>,
    /// Which of them may mean something else.
    free: Vec<bool>,
}

impl Group {
    fn readings(&self, columns: &Columns<'_>, pool: &Pool) -> Option<Vec<Vec<Sized>>> {
        let hole = self.sizes.iter().position(Option::is_none);
        let rests: Vec<usize> = match hole {
            Some(hole) => vec![hole],
            None => (0..self.free.len()).filter(|&j| self.free[j]).collect(),
        };
        let total = self
            .axes
            .iter()
            .try_fold(vec![], |total: Numbers, (_, n)| product(total, n))?;
        if let Some(reading) = self.restored(&total, columns, pool) {
            return Some(vec![reading]);
        }
        let mut found: Vec<Vec<Sized>> = Vec::new();
        for rest in rests {
            // All others are chosen; this one is what remains.
            let others = (0..self.sizes.len()).map(|j| match &self.sizes[j] {
                _ if j == rest => vec![],
                Some(numbers) if self.free[j] => options(numbers, columns, pool),
                Some(numbers) => vec![Sized {
                    element: Element::AsIs,
                    numbers: numbers.clone(),
                }],
                None => vec![],
            });
            let others: Vec<Vec<Sized>> = others.filter(|o| !o.is_empty()).collect();
            for chosen in combine(others)? {
                let Some(taken) = chosen
                    .iter()
                    .try_fold(vec![], |all: Numbers, e| product(all, &e.numbers))
                else {
                    continue;
                };
                let Some(remains) = divide(&total, &taken) else {
                    continue;
                };
                let element = match hole {
                    Some(_) => Element::AsIs,
                    None => match self.own(&remains).or(pool.get(&remains).cloned()) {
                        Some(size) if chosen.len() > 1 || self.axes.len() == 1 => size,
                        _ => self.what_remains(&chosen),
                    },
                };
                let given = &self.given[rest];
                let element = if remains == *given {
                    Element::AsIs
                } else {
                    element
                };
                let numbers = if hole.is_some() {
                    given.clone()
                } else {
                    remains
                };
                let mut reading = chosen;
                reading.insert(rest, Sized { element, numbers });
                // An element of the target that is not free stands in it as it was given.
                for (j, sized) in reading.iter_mut().enumerate() {
                    if !self.free[j] {
                        sized.numbers.clone_from(&self.given[j]);
                    }
                }
                let same = |other: &Vec<Sized>| {
                    other
                        .iter()
                        .map(|e| &e.numbers)
                        .eq(reading.iter().map(|e| &e.numbers))
                };
                if !found.iter().any(same) {
                    found.push(reading);
                }
            }
        }
        Some(found)
    }

    /// The axes that were joined before, in their order, if that is what the outputs are at the size of
    /// the export: what puts every pixel back in its place there does so at every size. `None` too where
    /// several were.
    fn restored(&self, total: &Numbers, columns: &Columns<'_>, pool: &Pool) -> Option<Vec<Sized>> {
        let known = pool.joined.get(total)?;
        let mut fitting = known
            .iter()
            .filter_map(|factors| self.as_factors(factors, columns, pool));
        let first = fitting.next()?;
        fitting.next().is_none().then_some(first)
    }

    fn as_factors(
        &self,
        factors: &[Numbers],
        columns: &Columns<'_>,
        pool: &Pool,
    ) -> Option<Vec<Sized>> {
        let mut factors = factors.iter();
        let mut reading = Vec::new();
        for ((given, size), free) in self.given.iter().zip(&self.sizes).zip(&self.free) {
            let one = size.as_ref().is_some_and(is_one);
            let factor = if one { None } else { Some(factors.next()?) };
            let kept = factor.is_none_or(|f| size.as_ref().is_none_or(|s| s == f));
            reading.push(match factor {
                Some(factor) if *free && !kept => {
                    if factor.first() != given.first() || !columns.varies(factor) {
                        return None;
                    }
                    Sized {
                        element: pool.get(factor)?.clone(),
                        numbers: factor.clone(),
                    }
                }
                _ if kept => as_is(given),
                _ => return None,
            });
        }
        factors.next().is_none().then_some(reading)
    }

    /// The input axis that has a size already.
    fn own(&self, numbers: &Numbers) -> Option<Element> {
        let (dimension, _) = self.axes.iter().find(|(_, n)| n == numbers)?;
        Some(Element::product(1, vec![dimension.clone()]))
    }

    /// The product of the group's inputs over the other outputs.
    fn what_remains(&self, chosen: &[Sized]) -> Element {
        let same = |n: &Numbers| n.iter().all(|x| Some(x) == n.first());
        let axes = self.axes.iter().filter(|(_, n)| !is_one(n));
        let mut over = Vec::new();
        let mut divisor = 1i64;
        for sized in chosen {
            match &sized.element {
                Element::Computed {
                    factor: 1,
                    times,
                    over: none,
                    divisor: 1,
                } if none.is_empty() => {
                    over.extend(times.iter().cloned());
                }
                Element::AsIs if same(&sized.numbers) => {
                    divisor = divisor.saturating_mul(sized.numbers.first().copied().unwrap_or(1));
                }
                // A batch, say, that is no constant.
                _ => return Element::Remaining,
            }
        }
        Element::Computed {
            factor: 1,
            times: axes.map(|(dimension, _)| dimension.clone()).collect(),
            over,
            divisor,
        }
    }
}
