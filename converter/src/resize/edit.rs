//! Puts what was proven into the graph.

use std::collections::{BTreeMap, HashMap, HashSet};

use linfusion_models::onnx::make::{self, Dim};
use linfusion_models::onnx::proto::{
    GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto,
};

use super::columns::{Columns, describe};
use super::image::Images;
use super::proof::{Proof, compute};
use super::reading::{Dimension, Element, Reading, Sized};
use super::{ImageSize, ResizeError, ResizedNode};
use crate::graph::{Graph, attr_int, collect_names, input, op};
use crate::rewrite::prune;
use crate::shapes::TensorReader;
use crate::shapes::eval::element;

/// A rewritten model.
pub struct Rewritten {
    /// The model.
    pub model: ModelProto,
    /// What was changed.
    pub nodes: Vec<ResizedNode>,
}

/// Metadata key under which a resized file says so.
const METADATA_KEY: &str = "linfusion.resized";

/// Rewrites `model` for `size`.
pub fn rewrite(
    model: &ModelProto,
    read: TensorReader<'_>,
    images: &Images,
    proof: &Proof,
    size: ImageSize,
    multiple_of: i64,
) -> Result<Rewritten, ResizeError> {
    let export = [images.image.height, images.image.width];
    let before = walk(model, read, images, proof, export, multiple_of)?;
    let after = match size {
        ImageSize::Dynamic => None,
        ImageSize::Fixed { height, width } => Some(walk(
            model,
            read,
            images,
            proof,
            [height, width],
            multiple_of,
        )?),
    };
    let mut names = HashSet::new();
    collect_names(&model.graph, &mut names);
    let mut writer = Writer {
        graph: Graph::new(&model.graph),
        proof,
        before: &before,
        after: after.as_ref(),
        names: names.into_iter().map(str::to_owned).collect(),
        shapes: HashMap::new(),
        indices: HashMap::new(),
        initializers: Vec::new(),
        new: Vec::new(),
    };
    let mut insert: BTreeMap<usize, Edit> = BTreeMap::new();
    let mut nodes = Vec::new();
    for (&index, reading) in &proof.readings {
        let Some(node) = model.graph.node.get(index) else {
            continue;
        };
        let inputs = writer.node(node, reading)?;
        let new = std::mem::take(&mut writer.new);
        insert.insert(index, Edit { new, inputs });
        let (name, op) = describe(node);
        nodes.push(ResizedNode {
            node: name,
            op,
            change: reading.describe(),
        });
    }
    let initializers = writer.initializers;
    let mut model = model.clone();
    let graph = model.graph.get_or_insert_default();
    graph.initializer.extend(initializers);
    let mut orphans = Vec::new();
    for (index, mut node) in std::mem::take(&mut graph.node).into_iter().enumerate() {
        if let Some(edit) = insert.remove(&index) {
            graph.node.extend(edit.new);
            for (slot, value) in edit.inputs {
                if let Some(old) = node.input.get_mut(slot) {
                    orphans.push(std::mem::replace(old, value));
                }
            }
        }
        graph.node.push(node);
    }
    declare(graph, images, proof, after.as_ref());
    prune(graph, orphans);
    let [height, width] = export;
    let entry = make::metadata(METADATA_KEY, &format!("{height}x{width} to {size}"));
    model.metadata_props.push(entry);
    Ok(Rewritten { model, nodes })
}

fn walk<'m>(
    model: &'m ModelProto,
    read: TensorReader<'m>,
    images: &Images,
    proof: &Proof,
    size: [i64; 2],
    multiple_of: i64,
) -> Result<Columns<'m>, ResizeError> {
    proof.walk(model, read, images, size).map_err(|stuck| {
        let reason = match stuck {
            None => "another image input is no whole multiple or fraction of it".to_owned(),
            Some((index, clash)) => {
                let node = model.graph.node.get(index);
                let (name, op) = node.map(describe).unwrap_or_default();
                format!("{op} '{name}' cannot run: {}", clash.reason)
            }
        };
        ResizeError::Size {
            height: size[0],
            width: size[1],
            reason,
            multiple_of,
        }
    })
}

/// What becomes of a node: those before it, and what it reads at some of its input slots.
struct Edit {
    new: Vec<NodeProto>,
    inputs: Vec<(usize, String)>,
}

/// Part of a size.
enum Piece {
    /// A number.
    Number(i64),
    /// An element of the old size, which is computed in the graph.
    Kept(usize),
    /// A size of the image.
    Size(Element),
}

struct Writer<'a, 'm> {
    graph: Graph<'m>,
    proof: &'a Proof,
    before: &'a Columns<'m>,
    /// At the size to write, if it is one.
    after: Option<&'a Columns<'m>>,
    names: HashSet<String>,
    shapes: HashMap<String, String>,
    indices: HashMap<(usize, bool), String>,
    initializers: Vec<TensorProto>,
    new: Vec<NodeProto>,
}

impl Writer<'_, '_> {
    /// The new inputs of `node`, with their slots.
    fn node(
        &mut self,
        node: &NodeProto,
        reading: &Reading,
    ) -> Result<Vec<(usize, String)>, ResizeError> {
        let (name, op) = describe(node);
        let mut inputs = Vec::new();
        for (slot, elements) in &reading.slots {
            let Some(old) = input(node, *slot) else {
                continue;
            };
            let not_understood = |reason: &str| ResizeError::NotUnderstood {
                node: name.clone(),
                op: op.clone(),
                reason: reason.to_owned(),
            };
            let pieces = self
                .pieces(node, old, elements)
                .ok_or_else(|| not_understood("two of its sizes are what remains"))?;
            let base = format!("{name}/size{slot}");
            let old = old.to_owned();
            inputs.push((*slot, self.size(&base, &old, pieces)));
        }
        Ok(inputs)
    }

    fn pieces(&self, node: &NodeProto, old: &str, elements: &[Sized]) -> Option<Vec<Piece>> {
        let fact = self.before.fact(old)?;
        let given = fact.ints()?;
        let reshape = op(node) == "Reshape";
        let keeps_zero = attr_int(node, "allowzero") == Some(1);
        let from = input(node, 0).and_then(|x| self.proof.dims.get(x));
        // A Reshape takes one dimension to be what remains: the last that is computed.
        let mut rest = elements
            .iter()
            .rposition(|e| e.element != Element::AsIs)
            .filter(|_| reshape && !given.contains(&-1));
        if let Some(must) = elements
            .iter()
            .position(|e| e.element == Element::Remaining)
        {
            let others = elements.iter().filter(|e| e.element == Element::Remaining);
            if others.count() > 1 || given.contains(&-1) {
                return None;
            }
            rest = Some(must);
        }
        let piece = |(i, sized): (usize, &Sized)| -> Option<Piece> {
            let same = reshape && from.is_some_and(|f| f.get(i) == Some(&sized.numbers));
            Some(match &sized.element {
                Element::AsIs if fact.constant => Piece::Number(*given.get(i)?),
                Element::AsIs => Piece::Kept(i),
                Element::Remaining => Piece::Number(-1),
                computed => match self.after {
                    Some(after) => Piece::Number(compute(computed, after)?),
                    None if same && !keeps_zero => Piece::Number(0),
                    None if rest == Some(i) => Piece::Number(-1),
                    None => Piece::Size(computed.clone()),
                },
            })
        };
        elements.iter().enumerate().map(piece).collect()
    }

    /// The value that has `pieces` as its elements, in the form of `old`.
    fn size(&mut self, base: &str, old: &str, pieces: Vec<Piece>) -> String {
        let fact = self.before.fact(old);
        let scalar = fact.is_some_and(|f| f.shape.as_deref() == Some(&[]));
        let narrow = fact
            .and_then(|f| f.element)
            .filter(|e| *e != element::INT64);
        let numbers: Option<Vec<i64>> = pieces
            .iter()
            .map(|p| match p {
                Piece::Number(n) => Some(*n),
                _ => None,
            })
            .collect();
        let value = match numbers {
            Some(numbers) => {
                let dims: &[i64] = if scalar { &[] } else { &[numbers.len() as i64] };
                self.ints(base, dims, &numbers)
            }
            None => {
                let mut parts: Vec<String> = Vec::new();
                let mut run: Vec<i64> = Vec::new();
                for piece in pieces {
                    if let Piece::Number(n) = piece {
                        run.push(n);
                        continue;
                    }
                    self.flush(base, &mut run, &mut parts);
                    parts.push(match piece {
                        Piece::Kept(i) => self.kept(base, old, i),
                        Piece::Size(element) => self.computed(base, &element, scalar),
                        Piece::Number(_) => continue,
                    });
                }
                self.flush(base, &mut run, &mut parts);
                match &parts[..] {
                    [one] => one.clone(),
                    _ => {
                        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                        self.op("Concat", base, &parts, vec![make::int("axis", 0)])
                    }
                }
            }
        };
        match narrow {
            Some(to) => self.op(
                "Cast",
                base,
                &[&value],
                vec![make::int("to", i64::from(to))],
            ),
            None => value,
        }
    }

    fn flush(&mut self, base: &str, run: &mut Vec<i64>, parts: &mut Vec<String>) {
        if !run.is_empty() {
            parts.push(self.ints(base, &[run.len() as i64], run));
            run.clear();
        }
    }

    /// Element `i` of `old`, as a vector: what it was joined from, if it was.
    fn kept(&mut self, base: &str, old: &str, i: usize) -> String {
        let producer = self.graph.producer(old).map(|p| self.graph.node(p.node));
        if let Some(concat) = producer.filter(|n| op(n) == "Concat") {
            let single = |v: &String| {
                let shape = self.before.fact(v).and_then(|f| f.shape.as_deref());
                shape == Some(&[1])
            };
            if concat.input.iter().all(single)
                && let Some(part) = concat.input.get(i)
            {
                return part.clone();
            }
        }
        let index = self.index(i, false);
        self.op("Gather", base, &[old, &index], vec![make::int("axis", 0)])
    }

    fn computed(&mut self, base: &str, element: &Element, scalar: bool) -> String {
        let Element::Computed {
            factor,
            times,
            over,
            divisor,
        } = element
        else {
            return String::new();
        };
        let dims: &[i64] = if scalar { &[] } else { &[1] };
        let mut result: Option<String> = None;
        for dimension in times {
            let size = self.dimension(base, dimension, scalar);
            result = Some(match result {
                None => size,
                Some(so_far) => self.op("Mul", base, &[&so_far, &size], vec![]),
            });
        }
        let mut result = result.unwrap_or_else(|| self.ints(base, dims, &[1]));
        if *factor != 1 {
            let factor = self.ints(base, dims, &[*factor]);
            result = self.op("Mul", base, &[&result, &factor], vec![]);
        }
        for dimension in over {
            let size = self.dimension(base, dimension, scalar);
            result = self.op("Div", base, &[&result, &size], vec![]);
        }
        if *divisor != 1 {
            let divisor = self.ints(base, dims, &[*divisor]);
            result = self.op("Div", base, &[&result, &divisor], vec![]);
        }
        result
    }

    fn dimension(&mut self, base: &str, dimension: &Dimension, scalar: bool) -> String {
        let shape = match self.shapes.get(&dimension.value) {
            Some(shape) => shape.clone(),
            None => {
                let shape = self.op("Shape", &dimension.value, &[&dimension.value], vec![]);
                self.shapes.insert(dimension.value.clone(), shape.clone());
                shape
            }
        };
        let index = self.index(dimension.axis, scalar);
        self.op(
            "Gather",
            base,
            &[&shape, &index],
            vec![make::int("axis", 0)],
        )
    }

    fn index(&mut self, i: usize, scalar: bool) -> String {
        if let Some(name) = self.indices.get(&(i, scalar)) {
            return name.clone();
        }
        let dims: &[i64] = if scalar { &[] } else { &[1] };
        let name = self.ints(&format!("resize/index{i}"), dims, &[i as i64]);
        self.indices.insert((i, scalar), name.clone());
        name
    }

    fn ints(&mut self, base: &str, dims: &[i64], values: &[i64]) -> String {
        let name = self.fresh(base);
        self.initializers
            .push(make::tensor_i64(&name, dims, values));
        name
    }

    fn op(
        &mut self,
        op: &str,
        base: &str,
        inputs: &[&str],
        attributes: Vec<linfusion_models::onnx::proto::AttributeProto>,
    ) -> String {
        let name = self.fresh(&format!("{base}/{op}"));
        self.new
            .push(make::node(op, &name, inputs, &[&name], attributes));
        name
    }

    fn fresh(&mut self, base: &str) -> String {
        let mut name = base.to_owned();
        let mut number = 1;
        while !self.names.insert(name.clone()) {
            number += 1;
            name = format!("{base}_{number}");
        }
        name
    }
}

/// Declares the new sizes of inputs, outputs and inner values.
fn declare(graph: &mut GraphProto, images: &Images, proof: &Proof, after: Option<&Columns<'_>>) {
    let image = proof.dims.get(&images.image.name);
    let side = |axis: usize| image.and_then(|dims| dims.get(axis)).cloned();
    let (height, width) = (side(2), side(3));
    let resized = |info: &ValueInfoProto, is_input: bool| -> Option<ValueInfoProto> {
        let name = info.name.as_deref()?;
        let (element, dims) = make::tensor_type_of(info)?;
        let dims = dims?;
        let rows = proof.dims.get(name);
        let new = dims.iter().enumerate().map(|(axis, dim)| {
            let numbers = rows.and_then(|r| r.get(axis));
            let varies = numbers.is_none_or(|n| {
                let mut sizes = proof.images.iter().filter_map(|&i| n.get(i));
                let first = sizes.next();
                sizes.any(|s| Some(s) != first)
            });
            if !varies || !matches!(dim, Dim::Fixed(_)) {
                return dim.clone();
            }
            if let Some(after) = after {
                let size = after
                    .shape(name)
                    .and_then(|s| s.get(axis)?.first().copied());
                return size.map_or(Dim::Unknown, Dim::Fixed);
            }
            match numbers {
                n if n.is_some() && n == height.as_ref() => Dim::Named("height".to_owned()),
                n if n.is_some() && n == width.as_ref() => Dim::Named("width".to_owned()),
                _ if is_input && axis == 2 => Dim::Named(format!("{name}_height")),
                _ if is_input => Dim::Named(format!("{name}_width")),
                _ => Dim::Unknown,
            }
        });
        Some(make::value_info(name, element, &new.collect::<Vec<_>>()))
    };
    let update = |infos: &mut Vec<ValueInfoProto>, is_input: bool| {
        for info in infos {
            if let Some(new) = resized(info, is_input) {
                info.r#type = new.r#type;
            }
        }
    };
    update(&mut graph.input, true);
    update(&mut graph.output, false);
    update(&mut graph.value_info, false);
}
