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
/// its own inputs, which are fed noise. The second list names those that cannot be read
/// back.
#[must_use]
pub fn converted_sites(file: &OnnxFile) -> (Vec<Converted>, Vec<String>) {
    let read = |t: &TensorProto| file.tensor_bytes(t).ok();
    let probe = Probe::TRACE;
    let shapes = Shapes::propagate(&file.model, &read, &probe);
    let graph = Graph::new(&file.model.graph);
    let site = |n: &NodeProto| {
        let out = n.output.first()?.clone();
        let operator = n.op_type.as_deref()?;
        let [q, k, v] = [0, 1, 2].map(|i| n.input.get(i).cloned());
        let qkv = [q?, k?, v?];
        let element = ElementType::from_onnx(shapes.fact(&qkv[0]).element?)?;
        let mut inputs = Vec::new();
        for name in &qkv {
            inputs.push(CutInput {
                name: name.clone(),
                feed: Feed::Noise {
                    shape: shapes.shape(name)?.to_vec(),
                    element,
                },
            });
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
            let tokens = *shapes.shape(&qkv[0])?.get(1)?;
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
            inputs.push(CutInput {
                name: grid.clone(),
                feed: Feed::Grid(size),
            });
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
            module: label(n)
                .trim_start_matches('/')
                .trim_end_matches(operator)
                .trim_end_matches('/')
                .trim_end_matches(SUFFIX)
                .to_owned(),
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
    let (mut sites, mut unread) = (Vec::new(), Vec::new());
    let ours = |n: &NodeProto| {
        n.domain.as_deref() == Some(DOMAIN)
            && matches!(
                n.op_type.as_deref(),
                Some(LINFUSION_ATTENTION | WINDOW_ATTENTION)
            )
    };
    for (_, node) in graph.nodes().filter(|(_, n)| ours(n)) {
        match site(node) {
            Some(site) => sites.push(site),
            None => unread.push(label(node).to_owned()),
        }
    }
    (sites, unread)
}
