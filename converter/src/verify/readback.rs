//! The converted sites of a file, from its operator nodes.

use linfusion_models::onnx::proto::{NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_ops::schema::{ATTR_NUM_HEADS, DOMAIN, LINFUSION_ATTENTION, WINDOW_ATTENTION};

use super::{Converted, CutInput, Feed};
use crate::graph::{Graph, attr_int, label};
use crate::grid::GridSize;
use crate::plan::Method;
use crate::rewrite::emit::window_attributes;
use crate::rewrite::site::{LinearPart, SUFFIX};
use crate::rewrite::window::WindowPart;
use crate::shapes::{Probe, Shapes};

/// The converted sites of a written model, from its operator nodes: each is cut off at
/// its own inputs, which are fed noise. The second list names nodes that cannot be read
/// back.
#[must_use]
pub fn converted_sites(file: &OnnxFile) -> (Vec<Converted>, Vec<String>) {
    let read = |t: &TensorProto| file.tensor_bytes(t).ok();
    let probe = Probe::TRACE;
    let shapes = Shapes::propagate(&file.model, &read, &probe);
    let graph = Graph::new(&file.model.graph);
    let site = |n: &NodeProto, beside: Option<&[i64]>| {
        let out = n.output.first()?.clone();
        let operator = n.op_type.as_deref()?;
        let [q, k, v] = [0, 1, 2].map(|i| n.input.get(i).cloned());
        let qkv = [q?, k?, v?];
        let element = ElementType::from_onnx(shapes.fact(&qkv[0]).element?)?;
        // All three have one shape in self-attention. Where an image is cut out from beside text, theirs hang on a count of
        // pixels that is an input's value; the attention takes any count.
        let known = qkv.iter().find_map(|name| shapes.shape(name));
        let known = known.or(beside)?;
        let mut inputs: Vec<CutInput> = Vec::new();
        for name in &qkv {
            let shape = shapes.shape(name).unwrap_or(known).to_vec();
            add(&mut inputs, name, Feed::Noise { shape, element });
        }
        let (mut linear, mut window) = (None, None);
        if operator == LINFUSION_ATTENTION {
            linear = Some(LinearPart {
                tokens: qkv[0].clone(),
                attended: out.clone(),
                projected: None,
                heads: attr_int(n, ATTR_NUM_HEADS)?,
                weights: None,
                qkv,
            });
        } else {
            let attrs = window_attributes(n)?;
            let tokens = *known.get(1)?;
            let grid = n.input.get(3)?.clone();
            let known = shapes.fact(&grid).ints();
            let size = match known {
                Some(&[rows, cols]) => GridSize { rows, cols },
                // The ids' values are not known under a probe: any grid that fits serves.
                _ => GridSize {
                    rows: 1,
                    cols: tokens,
                },
            };
            add(&mut inputs, &grid, Feed::Grid(size));
            window = Some(WindowPart {
                qkv,
                grid,
                size,
                attended: out.clone(),
                attrs,
                mixed: None,
            });
        }
        Some(Converted {
            module: module(n),
            method: if window.is_some() {
                Method::Window
            } else {
                Method::Linear
            },
            inputs,
            linear,
            window,
            target: out,
            element,
        })
    };
    let (mut sites, mut unread): (Vec<Converted>, _) = (Vec::new(), Vec::new());
    let ours = |n: &NodeProto| {
        n.domain.as_deref() == Some(DOMAIN)
            && matches!(
                n.op_type.as_deref(),
                Some(LINFUSION_ATTENTION | WINDOW_ATTENTION)
            )
    };
    // Windows first: a linear branch may be told by its window.
    let (windows, linear): (Vec<_>, Vec<_>) = graph
        .nodes()
        .map(|(_, node)| node)
        .filter(|node| ours(node))
        .partition(|node| node.op_type.as_deref() == Some(WINDOW_ATTENTION));
    for node in windows.into_iter().chain(linear) {
        let window = sites.iter().find(|s| s.module == module(node));
        let beside = window.and_then(|site| match &site.inputs.first()?.feed {
            Feed::Noise { shape, .. } => Some(shape.clone()),
            Feed::Grid(_) => None,
        });
        match site(node, beside.as_deref()) {
            Some(site) => match sites.iter_mut().find(|other| are_branches(other, &site)) {
                Some(branch) => join(branch, site),
                None => sites.push(site),
            },
            None => unread.push(label(node).to_owned()),
        }
    }
    (sites, unread)
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

fn add(inputs: &mut Vec<CutInput>, name: &str, feed: Feed) {
    if inputs.iter().all(|input| input.name != name) {
        let name = name.to_owned();
        inputs.push(CutInput { name, feed });
    }
}

/// Whether two are the linear and the window attention of one hybrid site.
fn are_branches(one: &Converted, other: &Converted) -> bool {
    one.module == other.module
        && one.linear.is_some() != other.linear.is_some()
        && one.window.is_some() != other.window.is_some()
}

fn join(site: &mut Converted, branch: Converted) {
    site.method = Method::Hybrid;
    site.linear = site.linear.take().or(branch.linear);
    site.window = site.window.take().or(branch.window);
    for input in branch.inputs {
        add(&mut site.inputs, &input.name, input.feed);
    }
}
