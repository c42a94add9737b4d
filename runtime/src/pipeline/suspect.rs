//! The first node of a graph that makes a value that isn't finite.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use linfusion_models::onnx::proto::NodeProto;
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_models::shapes::Shapes;

use super::model::Place;
use crate::engine::{Optimization, SessionOptions};
use crate::subgraph::{Cut, load, part, shapes, title};
use crate::tensor::Tensor;

/// Bytes of values that are looked at in one run.
const BUDGET: u64 = 1 << 30;
/// Runs before the search gives up.
const RUNS: usize = 12;

/// Says where `inputs` first lead to a value that isn't finite, or why that cannot be told. Runs parts of the graph, with no rewriting, so
/// that every node is there.
pub(super) fn first_not_finite(path: &Path, place: &Place, inputs: &[(String, Tensor)]) -> String {
    if let Some((name, _)) = inputs.iter().find(|(_, tensor)| !tensor.is_finite()) {
        return format!("its input `{name}` has such values already");
    }
    match search(path, place, inputs) {
        Ok(Some(node)) => format!("the first is made by {node}"),
        Ok(None) => {
            "no node makes one when they are run one by one, so a fusion of the engine does"
                .to_owned()
        }
        Err(problem) => format!("the node could not be found: {problem}"),
    }
}

fn search(
    path: &Path,
    place: &Place,
    inputs: &[(String, Tensor)],
) -> Result<Option<String>, String> {
    let file = OnnxFile::open(path).map_err(|e| e.to_string())?;
    let shapes = shapes(&file, inputs);
    let mut search = Search::new(&file, &shapes, place, inputs);
    let Some((mut low, mut high)) = search.bracket()? else {
        return Ok(None);
    };
    // Between a value that is finite and the next seen one that isn't.
    while low + 1 < high && search.runs < RUNS {
        match search.look(low + 1..high)? {
            Some(bad) => high = bad,
            None => break,
        }
        low = search.last_finite_before(high).unwrap_or(low).max(low);
    }
    // What it reads may be bad from further up, on a way around the values that were looked at.
    while search.runs < RUNS {
        match search.bad_input(high)? {
            Some(earlier) => high = earlier,
            None => break,
        }
    }
    Ok(search.float_nodes.get(high).map(|node| title(node)))
}

struct Search<'a> {
    file: &'a OnnxFile,
    shapes: &'a Shapes,
    place: &'a Place,
    inputs: &'a [(String, Tensor)],
    /// Nodes whose first output is of floating-point numbers, in order.
    float_nodes: Vec<&'a NodeProto>,
    makers: HashMap<&'a str, usize>,
    /// Whether the first output of a float node is finite, where it was looked at.
    finite: HashMap<usize, bool>,
    runs: usize,
}

impl<'a> Search<'a> {
    fn new(
        file: &'a OnnxFile,
        shapes: &'a Shapes,
        place: &'a Place,
        inputs: &'a [(String, Tensor)],
    ) -> Self {
        let is_float = |node: &&NodeProto| {
            let name = node.output.first().map_or("", String::as_str);
            let fact = shapes.fact(name);
            !fact.constant && element(shapes, name).is_some()
        };
        let float_nodes: Vec<&NodeProto> = file.model.graph.node.iter().filter(is_float).collect();
        let makers = float_nodes
            .iter()
            .enumerate()
            .filter_map(|(i, n)| Some((n.output.first()?.as_str(), i)))
            .collect();
        Self {
            file,
            shapes,
            place,
            inputs,
            float_nodes,
            makers,
            finite: HashMap::new(),
            runs: 0,
        }
    }

    fn output(&self, index: usize) -> &'a str {
        self.float_nodes
            .get(index)
            .and_then(|n| n.output.first())
            .map_or("", String::as_str)
    }

    fn bytes(&self, index: usize) -> u64 {
        let fact = self.shapes.fact(self.output(index));
        let count = fact.count().and_then(|n| u64::try_from(n).ok());
        count.unwrap_or(0).saturating_mul(4).max(1)
    }

    /// A finite and, after it, the first bad one of values spread over the graph.
    fn bracket(&mut self) -> Result<Option<(usize, usize)>, String> {
        let count = self.float_nodes.len();
        let found = self.look(0..count)?;
        Ok(found.map(|bad| (self.last_finite_before(bad).unwrap_or(0), bad)))
    }

    fn last_finite_before(&self, index: usize) -> Option<usize> {
        let finite = self.finite.iter().filter(|(i, f)| **f && **i < index);
        finite.map(|(i, _)| *i).max()
    }

    /// Looks at as many values of a range as fit, evenly spread, its last among them; gives the first that isn't finite.
    fn look(&mut self, range: std::ops::Range<usize>) -> Result<Option<usize>, String> {
        let all: u64 = range.clone().map(|i| self.bytes(i)).sum();
        let stride = usize::try_from(all / BUDGET)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        let chosen: Vec<usize> = range.rev().step_by(stride).collect();
        self.run(&chosen)?;
        let bad = chosen
            .iter()
            .filter(|i| self.finite.get(*i) == Some(&false));
        Ok(bad.min().copied())
    }

    /// An input of a node that isn't finite.
    fn bad_input(&mut self, index: usize) -> Result<Option<usize>, String> {
        let Some(node) = self.float_nodes.get(index) else {
            return Ok(None);
        };
        let read: Vec<usize> = node
            .input
            .iter()
            .filter_map(|name| self.makers.get(name.as_str()).copied())
            .collect();
        let unseen: Vec<usize> = read
            .iter()
            .copied()
            .filter(|i| !self.finite.contains_key(i))
            .collect();
        if !unseen.is_empty() {
            self.run(&unseen)?;
        }
        Ok(read
            .into_iter()
            .filter(|i| self.finite.get(i) == Some(&false))
            .min())
    }

    fn run(&mut self, nodes: &[usize]) -> Result<(), String> {
        self.runs += 1;
        let wanted: Vec<Cut> = nodes
            .iter()
            .filter_map(|i| {
                let name = self.output(*i);
                Some(Cut {
                    name: name.to_owned(),
                    element: element(self.shapes, name)?,
                    shape: None,
                })
            })
            .collect();
        let model = part(self.file, &[], &wanted);
        let options = SessionOptions {
            optimization: Optimization::Off,
            ..self.place.options.clone()
        };
        let mut session =
            load(self.file, model, self.place.engine, &options).map_err(|e| e.to_string())?;
        let needed: HashSet<&str> = session.inputs().iter().map(|p| p.name.as_str()).collect();
        let inputs: Vec<(String, Tensor)> = self
            .inputs
            .iter()
            .filter(|(name, _)| needed.contains(name.as_str()))
            .cloned()
            .collect();
        for (name, value) in session.run(&inputs).map_err(|e| e.to_string())? {
            if let Some(node) = self.makers.get(name.as_str()) {
                self.finite.insert(*node, value.is_finite());
            }
        }
        Ok(())
    }
}

/// The type of a value of floating-point numbers that the engines give back.
fn element(shapes: &Shapes, name: &str) -> Option<ElementType> {
    ElementType::from_onnx(shapes.fact(name).element?).filter(|e| e.is_compute_float())
}
