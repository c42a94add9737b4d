//! Which reading of each constant is right: the one under which the graph runs at every size.

use std::collections::{BTreeMap, HashMap};

use linfusion_models::onnx::proto::{ModelProto, NodeProto};

use super::ResizeError;
use super::columns::{Clash, Columns, Role, describe};
use super::image::{Images, Sizes};
use super::normaliser;
use super::pool::Pool;
use super::proof::{Open, Proof, TEXT};
use super::reading::{Reading, readings};
use crate::graph::{input, op};
use crate::shapes::{TensorReader, execution_order};

/// Open dimensions are no sizes that models have; where an export holds its batch in constants, it
/// runs at that one alone, mostly 1 or 2.
const OPEN: [Open; 3] = [
    Open {
        batch: 5,
        other: Some(7),
    },
    Open {
        batch: 1,
        other: None,
    },
    Open {
        batch: 2,
        other: None,
    },
];

const OTHER_TEXT: i64 = 11;

/// Multiples of the export's height and width at which readings are tried. No two of these rows, nor
/// their products, agree with one another or with a constant.
const MULTIPLES: [[i64; 2]; 2] = [[3, 5], [7, 2]];

/// Of constants with several readings in a row, so many are looked through at once.
const DEPTH: usize = 2;

/// Finds the reading of every constant in `model`'s graph.
pub fn prove(
    model: &ModelProto,
    read: TensorReader<'_>,
    images: &Images,
) -> Result<Proof, ResizeError> {
    let mut first = None;
    for open in OPEN {
        match Solver::new(model, read, images, open)?.solve() {
            Ok(proof) => return Ok(proof),
            // An export that holds its batch in constants runs at no other.
            Err(refused) if refused.role != Role::Image && images.has_open_batch() => {
                first.get_or_insert(*refused.error);
            }
            Err(refused) => return Err(*refused.error),
        }
    }
    Err(first.unwrap_or_else(|| scale(images)))
}

/// The sizes that readings are tried at.
fn sizes(open: Open, images: &Images) -> Vec<(Role, Sizes)> {
    let [height, width] = [images.image.height, images.image.width];
    let at = |height, width| Sizes {
        height,
        width,
        batch: open.batch,
        text: TEXT,
    };
    let mut all = vec![(Role::Export, at(height, width))];
    for [h, w] in MULTIPLES {
        let size = at(height.saturating_mul(h), width.saturating_mul(w));
        all.push((Role::Image, size));
    }
    if let Some(batch) = open.other.filter(|_| images.has_open_batch()) {
        let text = OTHER_TEXT;
        let size = at(height, width);
        all.push((
            Role::Batch,
            Sizes {
                batch,
                text,
                ..size
            },
        ));
    }
    all
}

struct Solver<'m> {
    model: &'m ModelProto,
    columns: Columns<'m>,
    roles: Vec<Role>,
    order: Vec<usize>,
    open: Open,
}

/// Why there is no proof, and at which of the sizes that showed.
struct Refused {
    role: Role,
    error: Box<ResizeError>,
}

impl Refused {
    fn new(role: Role, error: ResizeError) -> Self {
        Refused {
            role,
            error: Box::new(error),
        }
    }
}

/// A node that stands in the way, and why.
type Stuck = (usize, Clash);

impl<'m> Solver<'m> {
    fn new(
        model: &'m ModelProto,
        read: TensorReader<'m>,
        images: &Images,
        open: Open,
    ) -> Result<Self, ResizeError> {
        let sizes = sizes(open, images);
        let columns = Columns::new(model, read, images, &sizes).ok_or_else(|| scale(images))?;
        Ok(Solver {
            model,
            columns,
            roles: sizes.iter().map(|(role, _)| *role).collect(),
            order: execution_order(&model.graph),
            open,
        })
    }

    fn solve(mut self) -> Result<Proof, Refused> {
        let mut pool = Pool::new(self.last_reads());
        for input in &self.model.graph.input {
            pool.add(input.name.as_deref().unwrap_or(""), &self.columns);
        }
        let mut chosen = BTreeMap::new();
        for position in 0..self.order.len() {
            let Some((index, node)) = self.at(position) else {
                continue;
            };
            pool.now = position;
            let all = self.readings(node, &pool)?;
            let reading = match &all[..] {
                [one] => one.clone(),
                _ => self.only_survivor(position, all, &pool)?,
            };
            if let Err(clash) = self.columns.step(node, &reading.numbers()) {
                return Err(self.explain((index, clash)));
            }
            self.remember(node, &mut pool);
            if !reading.is_as_is() {
                chosen.insert(index, reading);
            }
        }
        normaliser::refuse(self.model, &self.columns)
            .map_err(|error| Refused::new(Role::Image, error))?;
        let mut dims = BTreeMap::new();
        let graph = &self.model.graph;
        let inputs = graph.input.iter().filter_map(|v| v.name.as_ref());
        for name in inputs.chain(graph.node.iter().flat_map(|n| &n.output)) {
            if let Some(shape) = self.columns.shape(name) {
                dims.insert(name.clone(), shape);
            }
        }
        let images = (0..self.roles.len()).filter(|&i| self.roles[i] != Role::Batch);
        Ok(Proof {
            images: images.collect(),
            order: self.order,
            readings: chosen,
            open: self.open,
            dims,
        })
    }

    /// By value, the position of the last node that reads it; beyond all for the graph's outputs.
    fn last_reads(&self) -> HashMap<String, usize> {
        let mut last = HashMap::new();
        for position in 0..self.order.len() {
            let inputs = self.at(position).map_or(&[][..], |(_, node)| &node.input);
            last.extend(inputs.iter().map(|i| (i.clone(), position)));
        }
        let outputs = self
            .model
            .graph
            .output
            .iter()
            .filter_map(|o| o.name.clone());
        last.extend(outputs.map(|o| (o, usize::MAX)));
        last
    }

    fn at(&self, position: usize) -> Option<(usize, &'m NodeProto)> {
        let index = *self.order.get(position)?;
        Some((index, self.model.graph.node.get(index)?))
    }

    fn remember(&self, node: &NodeProto, pool: &mut Pool) {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            pool.add(output, &self.columns);
        }
        if op(node) == "Reshape" {
            pool.join(node, &self.columns);
        }
    }

    fn readings(&self, node: &NodeProto, pool: &Pool) -> Result<Vec<Reading>, Refused> {
        let (name, op) = describe(node);
        match readings(node, &self.columns, pool) {
            Some(all) if !all.is_empty() => Ok(all),
            // At another batch than the export's, perhaps.
            Some(_) => Err(Refused::new(
                Role::Batch,
                ResizeError::FixedNode {
                    node: name,
                    op,
                    reason:
                        "no reading of its constants keeps the number of elements at another size"
                            .to_owned(),
                },
            )),
            None => Err(Refused::new(
                Role::Batch,
                ResizeError::NotUnderstood {
                    node: name,
                    op,
                    reason:
                        "its sizes are known only when the model runs, or have too many readings"
                            .to_owned(),
                },
            )),
        }
    }

    /// Of several readings, the one under which later nodes run.
    fn only_survivor(
        &mut self,
        position: usize,
        all: Vec<Reading>,
        pool: &Pool,
    ) -> Result<Reading, Refused> {
        let mut alive = Vec::new();
        let mut furthest: Option<(usize, Stuck)> = None;
        for reading in all {
            match self.survives(position, &reading, pool.clone(), DEPTH) {
                Ok(()) => alive.push(reading),
                Err((at, stuck)) => {
                    if furthest.as_ref().is_none_or(|(best, _)| at > *best) {
                        furthest = Some((at, stuck));
                    }
                }
            }
        }
        match (alive.len(), alive.pop(), furthest) {
            (1, Some(reading), _) => Ok(reading),
            (0, _, Some((_, stuck))) => Err(self.explain(stuck)),
            (_, last, _) => {
                alive.extend(last);
                Err(Refused::new(Role::Image, self.ambiguous(position, &alive)))
            }
        }
    }

    /// Whether the graph runs on from `position` under `reading`, as far as that can be said before
    /// `depth` more choices.
    fn survives(
        &mut self,
        position: usize,
        reading: &Reading,
        mut pool: Pool,
        depth: usize,
    ) -> Result<(), (usize, Stuck)> {
        let mut next = Some(reading.clone());
        for later in position..self.order.len() {
            let Some((index, node)) = self.at(later) else {
                continue;
            };
            pool.now = later;
            let reading = match next.take() {
                Some(reading) => reading,
                None => {
                    let mut all = readings(node, &self.columns, &pool).unwrap_or_default();
                    match (all.len(), depth) {
                        (1, _) => all.pop().unwrap_or_default(),
                        (0, _) => {
                            let clash = Clash {
                                role: Role::Image,
                                reason: "its constants have no reading at another size".to_owned(),
                                tensor: None,
                                not_understood: false,
                            };
                            return Err((later, (index, clash)));
                        }
                        (_, 0) => return Ok(()),
                        _ => {
                            let mut result = Ok(());
                            for one in all {
                                result = self.survives(later, &one, pool.clone(), depth - 1);
                                if result.is_ok() {
                                    break;
                                }
                            }
                            return result;
                        }
                    }
                }
            };
            self.columns
                .step(node, &reading.numbers())
                .map_err(|clash| (later, (index, clash)))?;
            self.remember(node, &mut pool);
        }
        Ok(())
    }

    fn ambiguous(&self, position: usize, alive: &[Reading]) -> ResizeError {
        let node = self.at(position).map(|(_, node)| node);
        let (name, op_name) = node.map(describe).unwrap_or_default();
        let slot = alive
            .first()
            .and_then(|r| r.slots.first())
            .map_or(1, |(slot, _)| *slot);
        ResizeError::Ambiguous {
            node: name,
            op: op_name,
            constant: node
                .and_then(|n| input(n, slot))
                .unwrap_or_default()
                .to_owned(),
            readings: alive.iter().map(Reading::describe).collect(),
        }
    }

    fn explain(&self, (index, clash): Stuck) -> Refused {
        let node = self.model.graph.node.get(index);
        let (name, op_name) = node.map(describe).unwrap_or_default();
        let reason = clash.reason;
        // A size in a Reshape is no tensor of one size.
        let sizes = node
            .is_some_and(|n| matches!(op(n), "Reshape" | "Expand" | "Slice" | "Tile" | "Resize"));
        let error = match clash.tensor {
            _ if clash.not_understood => ResizeError::NotUnderstood {
                node: name,
                op: op_name,
                reason,
            },
            Some((tensor, shape)) if !sizes && clash.role == Role::Image => {
                ResizeError::FixedTensor {
                    tensor,
                    shape,
                    node: name,
                    op: op_name,
                    reason,
                }
            }
            _ => ResizeError::FixedNode {
                node: name,
                op: op_name,
                reason,
            },
        };
        Refused::new(clash.role, error)
    }
}

fn scale(images: &Images) -> ResizeError {
    ResizeError::NotUnderstood {
        node: images.image.name.clone(),
        op: "input".to_owned(),
        reason: "another image input is no whole multiple or fraction of it".to_owned(),
    }
}
