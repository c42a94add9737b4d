//! The windows at sites that may get one. They have no weights to learn: what they make of the original's tokens is computed
//! once, and where a hybrid site's window is in a converted model is told here.

use std::collections::HashMap;
use std::path::Path;

use linfusion_models::onnx::OnnxFile;
use linfusion_ops::schema::WINDOW_ATTENTION;
use linfusion_runtime::engine::{Operators, Session, SessionOptions};
use linfusion_runtime::subgraph::{Cut, part};
use linfusion_runtime::tensor::Tensor;

use super::capture::{Teacher, Whether, given};
use super::error::DistillError;
use super::learn::Work;
use super::measure::{self, Scratch};
use super::store::Store;
use super::target::{Target, Value};
use crate::attention::plain::Layout;
use crate::convert::WeightsFrom;
use crate::graph::{input, op};
use crate::patterns::Patterns;
use crate::plan::{Method, MethodRule, Selection};

/// The windows' outputs at the targets, as the converter writes windows with the graph's own weights; `None` at those
/// that get no window.
///
/// # Errors
/// A part does not run, or the disk is full.
pub(super) fn capture(
    work: &Work<'_>,
    targets: &[Target],
) -> Result<Vec<Option<Store>>, DistillError> {
    let path = work.teacher.file.path();
    let selection = &work.request.selection;
    let scratch = converted(path, targets, selection, Method::Window, &work.scratch)?;
    let windows = OnnxFile::open(scratch.path())?;
    let options = SessionOptions {
        operators: Operators::InProcess,
        ..SessionOptions::default()
    };
    let converted = Teacher {
        file: &windows,
        options: &options,
        ..work.teacher.clone()
    };
    let mut sites = Vec::with_capacity(targets.len());
    for target in targets {
        sites.push(match target.has_window() {
            true => Window::new(work, &converted, target)?,
            false => None,
        });
    }
    let mut wanted: Vec<Cut> = Vec::new();
    for site in sites.iter().flatten() {
        for cut in &site.reads {
            if !wanted.iter().any(|w| w.name == cut.name) {
                let open = Cut {
                    shape: None,
                    ..cut.clone()
                };
                wanted.push(open);
            }
        }
    }
    let mut original = work.teacher.part(&[], &wanted)?;
    for sample in work.samples {
        let values: HashMap<String, Tensor> = original
            .run(&given(&original, &sample.inputs))?
            .into_iter()
            .collect();
        for site in sites.iter_mut().flatten() {
            let mut inputs = given(&site.session, &sample.inputs);
            for cut in &site.reads {
                let value = values
                    .get(&cut.name)
                    .ok_or_else(|| site.target.fault(&cut.name, "is not computed"))?;
                inputs.retain(|(name, _)| *name != cut.name);
                inputs.push((cut.name.clone(), value.clone()));
            }
            site.run(work, &inputs)?;
        }
        work.advance(1);
    }
    Ok(sites.into_iter().map(|s| s.map(|s| s.store)).collect())
}

/// The model at `path` with `method` at those of `targets` that may get a window, and the graph's own weights; all other sites
/// keep softmax.
pub(super) fn converted(
    path: &Path,
    targets: &[Target],
    selection: &Selection,
    method: Method,
    scratch: &Path,
) -> Result<Scratch, DistillError> {
    let near = targets.iter().filter(|t| t.has_window());
    let names = near.map(|t| t.anchor.clone()).collect();
    let selection = Selection {
        attention: vec![
            MethodRule {
                sites: None,
                method: None,
            },
            MethodRule {
                sites: Some(Patterns::of_names(names)),
                method: Some(method),
            },
        ],
        ..selection.clone()
    };
    measure::converted(path, WeightsFrom::Untrained, &selection, scratch)
}

/// The window of a hybrid site in a converted model.
pub(super) struct Near {
    /// What it makes.
    pub made: Value,
    /// Its rows and columns.
    pub grid: String,
}

/// What the window of a hybrid site gives in a converted model.
pub(super) fn of_hybrid(converted: &Teacher<'_>, target: &Target) -> Result<Value, DistillError> {
    let near = window(converted, target)?.map(|near| near.made);
    near.ok_or_else(|| {
        target.fault(
            &target.merged.name,
            "has no window in the converted model, where the site is hybrid",
        )
    })
}

/// The window of a hybrid site; `None` where it has none.
pub(super) fn window(
    converted: &Teacher<'_>,
    target: &Target,
) -> Result<Option<Near>, DistillError> {
    let mut fed = reads(converted, target)?;
    // The linear branch's; without it the part would reach back to earlier sites.
    fed.push(converted.cut(target, &target.x.name, Whether::Open)?);
    let wanted = converted.cut(target, &target.merged.name, Whether::Open)?;
    let nodes = part(converted.file, &fed, &[wanted]);
    // The last: where rows and columns are computed from what earlier sites make, their windows come before it.
    let mut nodes = nodes.graph.node.iter();
    let node = nodes.rfind(|n| op(n) == WINDOW_ATTENTION);
    Ok(node.and_then(|node| {
        let made = Value {
            name: node.output.first()?.clone(),
            layout: Layout::Tokens,
            text: target.merged.text,
        };
        let grid = input(node, 3)?.to_owned();
        Some(Near { made, grid })
    }))
}

/// What a site's window reads.
fn reads(teacher: &Teacher<'_>, target: &Target) -> Result<Vec<Cut>, DistillError> {
    let known = |name: &String| teacher.cut(target, name, Whether::Known);
    target.reads.iter().map(known).collect()
}

/// The nodes of one window.
struct Window<'t> {
    target: &'t Target,
    reads: Vec<Cut>,
    session: Session,
    store: Store,
}

impl<'t> Window<'t> {
    /// `None` where the conversion left softmax.
    fn new(
        work: &Work<'_>,
        converted: &Teacher<'_>,
        target: &'t Target,
    ) -> Result<Option<Self>, DistillError> {
        let reads = reads(converted, target)?;
        let wanted = converted.cut(target, &target.merged.name, Whether::Open)?;
        let nodes = part(converted.file, &reads, std::slice::from_ref(&wanted));
        if !nodes.graph.node.iter().any(|n| op(n) == WINDOW_ATTENTION) {
            return Ok(None);
        }
        let store = Store::new(&work.scratch, target.tokens * target.shape.dim);
        Ok(Some(Self {
            session: converted.part(&reads, &[wanted])?,
            target,
            reads,
            store: store.map_err(|source| DistillError::Scratch {
                folder: work.scratch.clone(),
                source,
            })?,
        }))
    }

    fn run(&mut self, work: &Work<'_>, inputs: &[(String, Tensor)]) -> Result<(), DistillError> {
        let merged = &self.target.merged;
        let fault = |problem: String| self.target.fault(&merged.name, problem);
        let outputs = self.session.run(inputs)?;
        let made = outputs
            .first()
            .ok_or_else(|| fault("is not computed".to_owned()))?;
        let matrix = merged.matrix(&made.1, self.target.tokens).map_err(fault)?;
        for image in matrix.outer_iter() {
            let rows = image.as_standard_layout();
            self.store
                .push(rows.as_slice().unwrap_or_default())
                .map_err(|source| DistillError::Scratch {
                    folder: work.scratch.clone(),
                    source,
                })?;
        }
        Ok(())
    }
}
