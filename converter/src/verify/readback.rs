//! The converted sites of a file, from its operator nodes.

use linfusion_models::onnx::proto::{NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_ops::schema::{ATTR_NUM_HEADS, DOMAIN, LINFUSION_ATTENTION, WINDOW_ATTENTION};

use super::{Converted, CutInput, Feed};
use crate::graph::{Graph, NodeId, attr_int, input, label, op};
use crate::grid::GridSize;
use crate::plan::Method;
use crate::rewrite::emit::window_attributes;
use crate::rewrite::site::{LinearPart, SUFFIX};
use crate::rewrite::window::{Mixed, WindowPart};
use crate::shapes::{Probe, Shapes};

/// A converted site that cannot be cut out to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// Its module.
    pub module: String,
    /// What of it cannot be told, and of which node.
    pub reason: String,
}

/// The converted sites of a written model, from its operator nodes: each is cut off at
/// its own inputs, which are fed noise. The second list has those that cannot be read
/// back.
#[must_use]
pub fn converted_sites(file: &OnnxFile) -> (Vec<Converted>, Vec<Unread>) {
    let read = |t: &TensorProto| file.tensor_bytes(t).ok();
    let reader = Reader {
        file,
        shapes: &Shapes::propagate(&file.model, &read, &Probe::TRACE),
        graph: &Graph::new(&file.model.graph),
    };
    // Windows first: a linear branch may be told by its window.
    let (windows, linear): (Vec<_>, Vec<_>) = reader
        .graph
        .nodes()
        .map(|(_, node)| node)
        .filter(|node| is_ours(node))
        .partition(|node| node.op_type.as_deref() == Some(WINDOW_ATTENTION));
    let (mut sites, mut unread): (Vec<Converted>, Vec<Unread>) = (Vec::new(), Vec::new());
    for node in windows.into_iter().chain(linear) {
        let module = module(node);
        let branch = sites.iter_mut().find(|other| {
            // A hybrid site has one of each.
            let is_linear = node.op_type.as_deref() == Some(LINFUSION_ATTENTION);
            other.module == module && is_linear && other.linear.is_none()
        });
        let read = match branch {
            Some(window) => reader.join(window, node),
            None => reader.site(node, None).map(|site| sites.push(site)),
        };
        if let Err(reason) = read {
            unread.push(Unread { module, reason });
        }
    }
    // Half a site is none.
    sites.retain(|site| unread.iter().all(|u| u.module != site.module));
    (sites, unread)
}

fn is_ours(node: &NodeProto) -> bool {
    node.domain.as_deref() == Some(DOMAIN)
        && matches!(
            node.op_type.as_deref(),
            Some(LINFUSION_ATTENTION | WINDOW_ATTENTION)
        )
}

/// The module that an operator of ours stands for.
fn module(node: &NodeProto) -> String {
    label(node)
        .trim_start_matches('/')
        .trim_end_matches(node.op_type.as_deref().unwrap_or_default())
        .trim_end_matches('/')
        .trim_end_matches(SUFFIX)
        .to_owned()
}

struct Reader<'f> {
    file: &'f OnnxFile,
    shapes: &'f Shapes,
    graph: &'f Graph<'f>,
}

impl Reader<'_> {
    /// The site of one operator; its operands have the shape `beside` where the graph tells none.
    fn site(&self, node: &NodeProto, beside: Option<&[i64]>) -> Result<Converted, String> {
        let name = label(node);
        let operand = |slot: usize| {
            let value = input(node, slot).map(str::to_owned);
            value.ok_or_else(|| format!("{name} has no input {slot}"))
        };
        let attended = node.output.first().cloned();
        let attended = attended.ok_or_else(|| format!("{name} has no output"))?;
        let qkv = [operand(0)?, operand(1)?, operand(2)?];
        let element = self.shapes.fact(&qkv[0]).element;
        let element = element
            .and_then(ElementType::from_onnx)
            .ok_or_else(|| format!("the element type of '{}' cannot be told", qkv[0]))?;
        // All three have one shape in self-attention. Where an image is cut out from beside text, theirs hang on a count of
        // pixels that is an input's value; the attention takes any count.
        let known = qkv.iter().find_map(|name| self.shapes.shape(name));
        let known = known
            .or(beside)
            .ok_or_else(|| format!("the shape of '{}' cannot be told", qkv[0]))?;
        let mut inputs: Vec<CutInput> = Vec::new();
        for name in &qkv {
            let shape = self.shapes.shape(name).unwrap_or(known).to_vec();
            add(&mut inputs, name, Feed::Noise { shape, element });
        }
        let (mut linear, mut window) = (None, None);
        if node.op_type.as_deref() == Some(LINFUSION_ATTENTION) {
            let heads = attr_int(node, ATTR_NUM_HEADS);
            linear = Some(LinearPart {
                tokens: qkv[0].clone(),
                attended: attended.clone(),
                projected: None,
                heads: heads.ok_or_else(|| format!("{name} has no {ATTR_NUM_HEADS}"))?,
                weights: None,
                qkv,
            });
        } else {
            let attrs = window_attributes(node);
            let attrs = attrs.ok_or_else(|| format!("the attributes of {name} cannot be read"))?;
            let tokens = known.get(1).copied().unwrap_or_default();
            let grid = operand(3)?;
            let size = self.known_grid(&grid).unwrap_or(any_grid(tokens));
            add(&mut inputs, &grid, Feed::Grid(size));
            window = Some(WindowPart {
                qkv,
                grid,
                size,
                attended: attended.clone(),
                attrs,
                mixed: None,
            });
        }
        Ok(Converted {
            module: module(node),
            method: match linear {
                Some(_) => Method::Linear,
                None => Method::Window,
            },
            inputs,
            linear,
            window,
            target: attended,
            element,
        })
    }

    fn known_grid(&self, grid: &str) -> Option<GridSize> {
        match self.shapes.fact(grid).ints() {
            Some(&[rows, cols]) => Some(GridSize { rows, cols }),
            _ => None,
        }
    }

    /// Makes a site of window attention a hybrid one, `node` being its linear branch.
    fn join(&self, site: &mut Converted, node: &NodeProto) -> Result<(), String> {
        let Some(window) = &mut site.window else {
            return Err(format!("{} has no window beside it", label(node)));
        };
        let beside = site.inputs.iter().find_map(|input| match &input.feed {
            Feed::Noise { shape, .. } => Some(shape.clone()),
            Feed::Grid(_) => None,
        });
        let branch = self.site(node, beside.as_deref())?;
        for input in branch.inputs {
            if let (Feed::Noise { shape, .. }, None) = (&input.feed, self.known_grid(&window.grid))
            {
                // The image is what the linear branch is of.
                window.size = any_grid(shape.get(1).copied().unwrap_or_default());
            }
            add(&mut site.inputs, &input.name, input.feed);
        }
        for input in &mut site.inputs {
            if let Feed::Grid(size) = &mut input.feed {
                *size = window.size;
            }
        }
        let linear = branch
            .linear
            .ok_or_else(|| format!("{} is not linear", label(node)))?;
        window.mixed = Some(self.mixed(&linear, &window.attended)?);
        site.linear = Some(linear);
        site.method = Method::Hybrid;
        Ok(())
    }

    /// The sum of a hybrid site's branches: each is multiplied by a factor a head, then added.
    fn mixed(&self, linear: &LinearPart, window: &str) -> Result<Mixed, String> {
        let other = |node: NodeId, value: &str| {
            let inputs = self.graph.node(node).input.iter().map(String::as_str);
            inputs.into_iter().find(|name| *name != value)
        };
        let reader = |value: &str, wanted: &str| {
            let mut readers = self.graph.readers(value).iter().map(|port| port.node);
            let found = readers.find(|node| op(self.graph.node(*node)) == wanted);
            found.ok_or_else(|| format!("no {wanted} reads '{value}'"))
        };
        let output = |node: NodeId| {
            let node = self.graph.node(node);
            let value = node.output.first().map(String::as_str);
            value.ok_or_else(|| format!("{} has no output", label(node)))
        };
        let factors = |node: NodeId, value: &str| {
            let name = label(self.graph.node(node));
            let stored = other(node, value).and_then(|factor| self.graph.constant(factor));
            let stored = stored.ok_or_else(|| format!("{name} has no stored factors"))?;
            let values = self.file.tensor(stored).map_err(|e| e.to_string())?;
            let values = values.to_f64_vec();
            let values = values.map_err(|e| format!("the factors of {name}: {e}"))?;
            per_head(&values, linear.heads)
                .ok_or_else(|| format!("the factors of {name} are not one for each head"))
        };
        let far = reader(&linear.attended, "Mul")?;
        let sum = reader(output(far)?, "Add")?;
        let near = other(sum, output(far)?).and_then(|value| self.graph.producer(value));
        let near = near.map(|port| port.node);
        let near = near.filter(|node| op(self.graph.node(*node)) == "Mul");
        let near = near.ok_or_else(|| {
            let name = label(self.graph.node(sum));
            format!("{name} does not add a window's output times factors")
        })?;
        let is_stored = |value: &&String| self.graph.constant(value).is_some();
        let values = self.graph.node(near).input.iter();
        let image = values.into_iter().find(|value| !is_stored(value));
        let image = image.map(String::as_str).unwrap_or_default();
        // Text beside the image is cut off.
        let cut = self.graph.producer(image).map(|port| port.node);
        let cut = cut.filter(|node| op(self.graph.node(*node)) == "Slice");
        let whole = cut.and_then(|node| self.graph.input(node, 0));
        if image != window && whole != Some(window) {
            return Err(format!(
                "'{image}' is not the window attention's '{window}'"
            ));
        }
        Ok(Mixed {
            local: factors(near, image)?,
            global: factors(far, &linear.attended)?,
            window: image.to_owned(),
            linear: linear.attended.clone(),
            value: output(sum)?.to_owned(),
        })
    }
}

/// Any grid of so many tokens, where its rows are an input's value.
fn any_grid(tokens: i64) -> GridSize {
    GridSize {
        rows: 1,
        cols: tokens,
    }
}

/// The factor of each head, of one for each channel.
fn per_head(values: &[f64], heads: i64) -> Option<Vec<f64>> {
    let heads = usize::try_from(heads).ok().filter(|heads| *heads > 0)?;
    let channels = values.len() / heads;
    if channels == 0 || !values.len().is_multiple_of(heads) {
        return None;
    }
    let one = |head: &[f64]| {
        let first = head.first().copied()?;
        head.iter().all(|v| *v == first).then_some(first)
    };
    values.chunks(channels).map(one).collect()
}

fn add(inputs: &mut Vec<CutInput>, name: &str, feed: Feed) {
    if inputs.iter().all(|input| input.name != name) {
        let name = name.to_owned();
        inputs.push(CutInput { name, feed });
    }
}
