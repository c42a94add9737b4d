//! What the constants of a node can stand for: every reading that the shapes of the node allow.

use std::fmt;

use linfusion_models::onnx::proto::NodeProto;

use super::columns::{Columns, Numbers};
use super::pool::Pool;
use super::reshape::reshape;
use crate::graph::{domain, input, op};
use crate::shapes::value::axis;

/// A dimension of a value of the graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dimension {
    /// The value.
    pub value: String,
    /// The axis.
    pub axis: usize,
}

/// One element of a node's size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Element {
    /// As the graph has it.
    AsIs,
    /// What remains of the Reshape's input: -1.
    Remaining,
    /// Computed: `factor` times the product of `times`, over `divisor` and the product of `over`. The
    /// division is exact.
    Computed {
        /// A fixed factor.
        factor: i64,
        /// Factors.
        times: Vec<Dimension>,
        /// Divisors.
        over: Vec<Dimension>,
        /// A fixed divisor.
        divisor: i64,
    },
}

impl Element {
    /// `factor` times the product of `times`.
    pub fn product(factor: i64, times: Vec<Dimension>) -> Self {
        Element::Computed {
            factor,
            times,
            over: Vec::new(),
            divisor: 1,
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let product = |dims: &[Dimension]| {
            let factors = dims
                .iter()
                .map(|d| format!("dimension {} of '{}'", d.axis, d.value));
            factors.collect::<Vec<_>>().join(" times ")
        };
        match self {
            Element::AsIs => f.write_str("fixed"),
            Element::Remaining => f.write_str("what remains"),
            Element::Computed {
                factor,
                times,
                over,
                divisor,
            } => {
                f.write_str(&product(times))?;
                if *factor != 1 {
                    write!(f, " times {factor}")?;
                }
                if !over.is_empty() {
                    write!(f, " over {}", product(over))?;
                }
                if *divisor != 1 {
                    write!(f, " over {divisor}")?;
                }
                Ok(())
            }
        }
    }
}

/// An element, with its value at every size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sized {
    /// How it is computed.
    pub element: Element,
    /// What that gives.
    pub numbers: Numbers,
}

/// One reading of a node: the elements of each of its inputs that hold a size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Input slots and the elements.
    pub slots: Vec<(usize, Vec<Sized>)>,
}

impl Reading {
    /// Whether nothing changes.
    pub fn is_as_is(&self) -> bool {
        let mut all = self.slots.iter().flat_map(|(_, elements)| elements);
        all.all(|e| e.element == Element::AsIs)
    }

    /// The numbers, for [`Columns::step`].
    pub fn numbers(&self) -> Vec<(usize, Vec<Numbers>)> {
        let of = |elements: &Vec<Sized>| elements.iter().map(|e| e.numbers.clone()).collect();
        self.slots.iter().map(|(slot, e)| (*slot, of(e))).collect()
    }

    /// The constants as `64 (fixed), 32 (dimension 2 of 'x')`.
    pub fn describe(&self) -> String {
        let elements = self.slots.iter().flat_map(|(_, elements)| elements);
        let list = elements.map(|e| {
            let number = e.numbers.first().copied().unwrap_or(0);
            format!("{number} ({})", e.element)
        });
        list.collect::<Vec<_>>().join(", ")
    }
}

/// More readings of one node than this are told apart by nothing.
pub const MOST: usize = 64;

/// Every reading of `node`'s constants; one without slots where they hold no size. `None`: a size of
/// the image comes from values that are known only when the model runs, or too many readings.
pub fn readings(node: &NodeProto, columns: &Columns<'_>, pool: &Pool) -> Option<Vec<Reading>> {
    let none = || Some(vec![Reading::default()]);
    if !domain(node).is_empty() {
        return none();
    }
    match op(node) {
        "Reshape" => reshape(node, columns, pool),
        "Expand" | "ConstantOfShape" | "Tile" | "Range" | "Resize" => {
            let slot = match op(node) {
                "ConstantOfShape" => 0,
                "Resize" => 3,
                _ => 1,
            };
            let Some(name) = input(node, slot) else {
                return none();
            };
            let Some(elements) = columns.ints(name) else {
                // Scales of Resize, limits in floating point: where they matter, the shape is lost.
                return none();
            };
            let options = elements.iter().enumerate().map(|(i, numbers)| {
                let mut options = options(numbers, columns, pool);
                if op(node) == "Resize" {
                    options = resize_options(node, i, numbers, options, columns);
                }
                options
            });
            combine(options.collect()).map(|all| {
                let reading = |elements| Reading {
                    slots: vec![(slot, elements)],
                };
                all.into_iter().map(reading).collect()
            })
        }
        "Slice" => slice(node, columns, pool),
        _ => none(),
    }
}

/// A constant is fixed, or a size that it equals; what depends on the image already stays.
pub fn options(numbers: &Numbers, columns: &Columns<'_>, pool: &Pool) -> Vec<Sized> {
    let mut options = vec![as_is(numbers)];
    if !columns.varies(numbers) {
        options.extend(pool.matching(numbers));
    }
    options
}

/// An element that stays.
pub fn as_is(numbers: &Numbers) -> Sized {
    Sized {
        element: Element::AsIs,
        numbers: numbers.clone(),
    }
}

/// An image may also be resized by a whole factor.
fn resize_options(
    node: &NodeProto,
    along: usize,
    numbers: &Numbers,
    mut options: Vec<Sized>,
    columns: &Columns<'_>,
) -> Vec<Sized> {
    let Some(x) = input(node, 0) else {
        return options;
    };
    let Some(from) = columns.shape(x).and_then(|s| s.get(along).cloned()) else {
        return options;
    };
    if !columns.varies(&from) {
        options.truncate(1);
        return options;
    }
    let (Some(&before), Some(&after)) = (from.first(), numbers.first()) else {
        return options;
    };
    if before > 0 && after > before && after % before == 0 && !columns.varies(numbers) {
        let factor = after / before;
        let scaled: Option<Numbers> = from.iter().map(|n| n.checked_mul(factor)).collect();
        if let Some(numbers) = scaled
            && !options.iter().any(|o| o.numbers == numbers)
        {
            let dimension = Dimension {
                value: x.to_owned(),
                axis: along,
            };
            options.push(Sized {
                element: Element::product(factor, vec![dimension]),
                numbers,
            });
        }
    }
    options
}

fn slice(node: &NodeProto, columns: &Columns<'_>, pool: &Pool) -> Option<Vec<Reading>> {
    let none = || Some(vec![Reading::default()]);
    let (Some(x), Some(starts), Some(ends)) = (input(node, 0), input(node, 1), input(node, 2))
    else {
        return none();
    };
    let Some(shape) = columns.shape(x) else {
        return none();
    };
    let (Some(starts), Some(ends)) = (columns.ints(starts), columns.ints(ends)) else {
        return none();
    };
    let axes = match input(node, 3) {
        None => (0..starts.len() as i64).collect(),
        Some(axes) => match columns.fact(axes).and_then(|f| f.ints()) {
            Some(axes) => axes.to_vec(),
            None => return none(),
        },
    };
    // Of an axis that is not of the image, everything is as it is; so is a bound beyond the end.
    let of = |elements: &[Numbers]| -> Vec<Vec<Sized>> {
        let option = |(i, numbers): (usize, &Numbers)| {
            let along = axes.get(i).and_then(|&a| axis(a, shape.len()));
            let size = along.and_then(|a| shape.get(a));
            let inside = |size: &Numbers| numbers.first() <= size.first();
            match size.filter(|size| columns.varies(size) && inside(size)) {
                Some(_) => options(numbers, columns, pool),
                None => vec![as_is(numbers)],
            }
        };
        elements.iter().enumerate().map(option).collect()
    };
    let (count, mut both) = (starts.len(), of(&starts));
    both.extend(of(&ends));
    let reading = |elements: Vec<Sized>| {
        let (starts, ends) = elements.split_at(count.min(elements.len()));
        Reading {
            slots: vec![(1, starts.to_vec()), (2, ends.to_vec())],
        }
    };
    combine(both).map(|all| all.into_iter().map(reading).collect())
}

/// Every choice of one option each.
pub fn combine(options: Vec<Vec<Sized>>) -> Option<Vec<Vec<Sized>>> {
    let mut all: Vec<Vec<Sized>> = vec![Vec::new()];
    for option in options {
        all = (all.iter())
            .flat_map(|so_far| {
                option.iter().map(move |one| {
                    let mut longer = so_far.clone();
                    longer.push(one.clone());
                    longer
                })
            })
            .collect();
        if all.len() > MOST {
            return None;
        }
    }
    Some(all)
}
