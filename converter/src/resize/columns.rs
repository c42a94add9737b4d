//! One graph walked at several sizes in step: every dimension becomes a row of numbers, one a size.

use linfusion_models::onnx::proto::{ModelProto, NodeProto};

use super::agree::agree;
use super::image::{Images, Sizes};
use crate::graph::{attr_int, collect_captures, domain, label, op, subgraphs};
use crate::shapes::eval::element;
use crate::shapes::value::axis;
use crate::shapes::{Elements, Fact, TensorReader, Walk};

/// A number at every size.
pub type Numbers = Vec<i64>;

/// What a size is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The size of the export. Always the first.
    Export,
    /// Another image.
    Image,
    /// The image of the export, other open dimensions.
    Batch,
}

/// Why a node cannot run at one of the sizes.
#[derive(Clone, Debug, PartialEq)]
pub struct Clash {
    /// Where.
    pub role: Role,
    /// What does not fit.
    pub reason: String,
    /// The stored or computed constant that is of another size, and its shape.
    pub tensor: Option<(String, Vec<i64>)>,
    /// Whether the node is beyond what is understood, at whatever size.
    pub not_understood: bool,
}

/// The walks.
pub struct Columns<'m> {
    columns: Vec<(Role, Walk<'m>)>,
}

impl<'m> Columns<'m> {
    /// Begins at the inputs. `None` if a size does not scale every image to whole numbers.
    pub fn new(
        model: &'m ModelProto,
        read: TensorReader<'m>,
        images: &Images,
        sizes: &[(Role, Sizes)],
    ) -> Option<Self> {
        let column = |(role, sizes): &(Role, Sizes)| {
            Some((*role, Walk::new(model, read, &images.shapes(sizes)?)))
        };
        Some(Columns {
            columns: sizes.iter().map(column).collect::<Option<_>>()?,
        })
    }

    /// Whether `numbers` depend on the size of the image.
    pub fn varies(&self, numbers: &[i64]) -> bool {
        let first = numbers.first();
        (self.columns.iter().zip(numbers))
            .any(|((role, _), n)| *role == Role::Image && Some(n) != first)
    }

    /// What is known of `value` at the size of the export.
    pub fn fact(&self, value: &str) -> Option<&Fact> {
        self.columns.first().map(|(_, walk)| walk.fact(value))
    }

    /// The dimensions of `value`; `None` where they are not known at every size.
    pub fn shape(&self, value: &str) -> Option<Vec<Numbers>> {
        self.rows(|walk| walk.fact(value).shape.as_deref())
    }

    /// The elements of `value`, an integer tensor; `None` where they are not known at every size.
    pub fn ints(&self, value: &str) -> Option<Vec<Numbers>> {
        self.rows(|walk| walk.fact(value).ints())
    }

    fn rows<'a>(&'a self, of: impl Fn(&'a Walk<'m>) -> Option<&'a [i64]>) -> Option<Vec<Numbers>> {
        let columns: Vec<&[i64]> = (self.columns.iter())
            .map(|(_, walk)| of(walk))
            .collect::<Option<_>>()?;
        let rank = columns.first()?.len();
        if columns.iter().any(|c| c.len() != rank) {
            return None;
        }
        (0..rank)
            .map(|i| columns.iter().map(|c| c.get(i).copied()).collect())
            .collect()
    }

    /// Evaluates `node` at every size, with `sizes` in place of the constants at some of its inputs.
    ///
    /// # Errors
    /// A size at which it cannot run.
    pub fn step(&mut self, node: &NodeProto, sizes: &[(usize, Vec<Numbers>)]) -> Result<(), Clash> {
        self.refuse_subgraphs(node)?;
        self.refuse_fixed_indices(node)?;
        let mut node = node.clone();
        for (slot, elements) in sizes {
            let Some(input) = node.input.get_mut(*slot) else {
                continue;
            };
            let old = std::mem::replace(input, format!("\0size/{slot}"));
            for (column, (_, walk)) in self.columns.iter_mut().enumerate() {
                let numbers = elements.iter().map(|n| n.get(column).copied().unwrap_or(0));
                let before = walk.fact(&old);
                let fact = Fact {
                    shape: before.shape.clone(),
                    element: before.element.or(Some(element::INT64)),
                    elements: Some(Elements::Int(numbers.collect())),
                    constant: false,
                };
                walk.assume(&format!("\0size/{slot}"), fact);
            }
        }
        for column in 0..self.columns.len() {
            self.step_column(&node, column)?;
        }
        self.refuse_unknown(&node)
    }

    fn step_column(&mut self, node: &NodeProto, column: usize) -> Result<(), Clash> {
        let Some((role, walk)) = self.columns.get_mut(column) else {
            return Ok(());
        };
        let role = *role;
        let facts: Vec<&Fact> = node.input.iter().map(|i| walk.fact(i)).collect();
        let misfit = agree(node, &facts).err();
        let shapes = shapes_of(&facts);
        if misfit.is_none() {
            walk.step(node);
        }
        let first = self.columns.first().map(|(_, walk)| walk);
        let here = self.columns.get(column).map(|(_, walk)| walk);
        let lost = node.output.iter().filter(|o| !o.is_empty()).any(|output| {
            let known =
                |walk: Option<&Walk<'_>>| walk.is_some_and(|w| w.fact(output).shape.is_some());
            known(first) && !known(here)
        });
        let reason = match misfit {
            Some(reason) => reason,
            None if lost => format!("its inputs {shapes} do not fit"),
            None => return Ok(()),
        };
        Err(Clash {
            role,
            reason,
            tensor: self.constant_input(node),
            not_understood: false,
        })
    }

    /// The largest constant that `node` reads, if it is no scalar.
    fn constant_input(&self, node: &NodeProto) -> Option<(String, Vec<i64>)> {
        let constants = node.input.iter().filter_map(|input| {
            let fact = self.fact(input).filter(|f| f.constant)?;
            let count = fact.count().filter(|&n| n > 1)?;
            Some((count, input.clone(), fact.shape.clone()?))
        });
        let (_, name, shape) = constants.max_by_key(|(count, _, _)| *count)?;
        Some((name, shape))
    }

    /// Where a node has graphs inside, their constants are not looked at.
    fn refuse_subgraphs(&self, node: &NodeProto) -> Result<(), Clash> {
        let mut inside = std::collections::HashSet::new();
        for graph in subgraphs(node) {
            collect_captures(graph, &mut inside);
        }
        let depends = |value: &&str| {
            let sized =
                |rows: Option<Vec<Numbers>>| rows.is_some_and(|r| r.iter().any(|n| self.varies(n)));
            sized(self.shape(value)) || sized(self.ints(value))
        };
        match inside.iter().find(|v| depends(v)) {
            Some(value) => Err(not_understood(format!("a graph inside it reads '{value}'"))),
            None => Ok(()),
        }
    }

    /// Stored indices into an axis of the image choose places of one size.
    fn refuse_fixed_indices(&self, node: &NodeProto) -> Result<(), Clash> {
        let slot = match (domain(node), op(node)) {
            ("", "Gather" | "GatherElements" | "GatherND" | "ScatterND" | "ScatterElements") => 1,
            _ => return Ok(()),
        };
        let (Some(data), Some(indices)) = (node.input.first(), node.input.get(slot)) else {
            return Ok(());
        };
        let Some(shape) = self.shape(data) else {
            return Ok(());
        };
        let stored = self.fact(indices).filter(|f| f.constant);
        let Some(count) = stored.and_then(Fact::count).filter(|&n| n > 1) else {
            return Ok(());
        };
        let along = match op(node) {
            "Gather" | "GatherElements" | "ScatterElements" => {
                axis(attr_int(node, "axis").unwrap_or(0), shape.len())
            }
            _ => None,
        };
        let chosen = |i: usize| along.is_none_or(|a| a == i);
        if (shape.iter().enumerate()).any(|(i, n)| chosen(i) && self.varies(n)) {
            return Err(Clash {
                role: Role::Image,
                reason: format!("{count} stored indices into a dimension of the image"),
                tensor: Some((
                    indices.clone(),
                    stored.and_then(|f| f.shape.clone()).unwrap_or_default(),
                )),
                not_understood: false,
            });
        }
        Ok(())
    }

    /// A node of unknown output shape hides what depends on the image.
    fn refuse_unknown(&self, node: &NodeProto) -> Result<(), Clash> {
        let unknown = |value: &&String| !value.is_empty() && self.shape(value).is_none();
        let first = node.output.first();
        let Some(output) = first.filter(unknown) else {
            return Ok(());
        };
        let depends = node.input.iter().any(|input| {
            self.shape(input)
                .is_none_or(|rows| rows.iter().any(|n| self.varies(n)))
                && !input.is_empty()
        });
        if depends {
            return Err(not_understood(format!(
                "the shape of its output '{output}' cannot be told"
            )));
        }
        Ok(())
    }
}

fn not_understood(reason: String) -> Clash {
    Clash {
        role: Role::Export,
        reason,
        tensor: None,
        not_understood: true,
    }
}

fn shapes_of(facts: &[&Fact]) -> String {
    let shapes = facts.iter().filter_map(|f| f.shape.as_ref());
    let list: Vec<String> = shapes.map(|s| format!("{s:?}")).collect();
    list.join(", ")
}

/// A node's name and operator, for messages.
pub fn describe(node: &NodeProto) -> (String, String) {
    (label(node).to_owned(), crate::graph::qualified_op(node))
}

/// The product at every size.
pub fn multiply(a: &Numbers, b: &Numbers) -> Option<Numbers> {
    a.iter().zip(b).map(|(x, y)| x.checked_mul(*y)).collect()
}

/// As [`multiply`], where nothing yet counts as ones.
pub fn product(so_far: Numbers, more: &Numbers) -> Option<Numbers> {
    if so_far.is_empty() {
        return Some(more.clone());
    }
    multiply(&so_far, more)
}

/// The exact quotient; `None` where there is none.
pub fn divide(total: &Numbers, by: &Numbers) -> Option<Numbers> {
    if by.is_empty() {
        return Some(total.clone());
    }
    total
        .iter()
        .zip(by)
        .map(|(t, b)| (*b > 0 && t % b == 0).then(|| t / b))
        .collect()
}
