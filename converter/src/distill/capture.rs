//! Running the teacher and keeping what it computes at the sites.

use std::collections::HashMap;
use std::path::Path;

use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_models::shapes::Shapes;
use linfusion_runtime::engine::{Engine, Session, SessionOptions};
use linfusion_runtime::memory::shown;
use linfusion_runtime::subgraph::{Cut, load, part};
use linfusion_runtime::tensor::Tensor;

use super::error::DistillError;
use super::inputs::Sample;
use super::store::Store;
use super::target::{Target, Value};

/// What runs the teacher, and the shapes that its samples have in it.
#[derive(Clone)]
pub struct Teacher<'a> {
    /// The model.
    pub file: &'a OnnxFile,
    /// Shapes at the samples' size.
    pub shapes: &'a Shapes,
    /// What runs it.
    pub engine: Engine,
    /// How.
    pub options: &'a SessionOptions,
}

impl Teacher<'_> {
    /// A value as the begin of a part: with its shape; or as the end of one, without.
    pub(super) fn cut(
        &self,
        target: &Target,
        name: &str,
        shape: Whether,
    ) -> Result<Cut, DistillError> {
        let fact = self.shapes.fact(name);
        let element = fact.element.and_then(ElementType::from_onnx);
        let element = element.ok_or_else(|| target.fault(name, "has no known element type"))?;
        Ok(Cut {
            name: name.to_owned(),
            element,
            shape: match shape {
                Whether::Known => fact.shape.clone(),
                Whether::Open => None,
            },
        })
    }

    /// The part of the model between `fed` and `wanted`, ready to run.
    pub(super) fn part(&self, fed: &[Cut], wanted: &[Cut]) -> Result<Session, DistillError> {
        let part = part(self.file, fed, wanted);
        Ok(load(self.file, part, self.engine, self.options)?)
    }
}

/// Whether a cut's shape is stated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whether {
    /// It is.
    Known,
    /// It is left open.
    Open,
}

/// One value of one site.
pub(super) type Wanted<'t> = (&'t Target, &'t Value);

/// Runs the teacher on all `samples` and stores `wanted`, in this order, an entry for each image of a batch.
///
/// # Errors
/// It does not run, a value is not finite or of another size than the analysis says, or the disk is full.
pub(super) fn capture(
    teacher: &Teacher<'_>,
    wanted: &[Wanted<'_>],
    samples: &[Sample],
    folder: &Path,
    tick: &dyn Fn(),
) -> Result<Vec<Store>, DistillError> {
    let mut cuts: Vec<Cut> = Vec::new();
    for (target, value) in wanted {
        if !cuts.iter().any(|c| c.name == value.name) {
            cuts.push(teacher.cut(target, &value.name, Whether::Open)?);
        }
    }
    let scratch = |source| DistillError::Scratch {
        folder: folder.to_owned(),
        source,
    };
    let mut stores = Vec::with_capacity(wanted.len());
    for (target, _) in wanted {
        let len = target.tokens * target.shape.dim;
        stores.push(Store::new(folder, len).map_err(scratch)?);
    }
    let mut session = teacher.part(&[], &cuts)?;
    for sample in samples {
        let values: HashMap<String, Tensor> = session
            .run(&given(&session, &sample.inputs))?
            .into_iter()
            .collect();
        for ((target, value), store) in wanted.iter().zip(&mut stores) {
            let tensor = values
                .get(&value.name)
                .ok_or_else(|| target.fault(&value.name, "is not computed"))?;
            let matrix = value
                .matrix(tensor, target.tokens)
                .map_err(|problem| target.fault(&value.name, problem))?;
            if matrix.iter().any(|v| !v.is_finite()) {
                return Err(DistillError::NotFinite {
                    module: target.module.clone(),
                    value: value.name.clone(),
                    sample: sample.origin.clone(),
                });
            }
            if matrix.shape().get(2) != Some(&target.shape.dim) {
                let problem = format!(
                    "has {:?} channels, not {}",
                    matrix.shape().get(2),
                    target.shape.dim
                );
                return Err(target.fault(&value.name, problem));
            }
            for image in matrix.outer_iter() {
                let rows = image.as_standard_layout();
                store
                    .push(rows.as_slice().unwrap_or_default())
                    .map_err(scratch)?;
            }
        }
        tick();
    }
    Ok(stores)
}

/// Those of a sample's inputs that the session takes.
pub(super) fn given(session: &Session, inputs: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    let takes = |name: &str| session.inputs().iter().any(|p| p.name == name);
    inputs
        .iter()
        .filter(|(name, _)| takes(name))
        .cloned()
        .collect()
}

/// Sites whose activations fit on the disk together, in order.
///
/// # Errors
/// Those of one site alone do not.
pub(super) fn groups(
    targets: &[Target],
    images: usize,
    budget: u64,
) -> Result<Vec<&[Target]>, DistillError> {
    // Two matrices for each image, or three where a window's output is kept.
    const VALUES: u64 = 3;
    let bytes = |t: &Target| VALUES * images as u64 * Store::bytes(t.tokens * t.shape.dim);
    let mut groups = Vec::new();
    let (mut start, mut taken) = (0, 0_u64);
    for (index, target) in targets.iter().enumerate() {
        let more = bytes(target);
        if more > budget {
            return Err(DistillError::Budget {
                module: target.module.clone(),
                samples: images,
                needed: shown(more),
                budget: shown(budget),
            });
        }
        if taken + more > budget {
            groups.extend(targets.get(start..index));
            (start, taken) = (index, 0);
        }
        taken += more;
    }
    groups.extend(targets.get(start..));
    groups.retain(|group| !group.is_empty());
    Ok(groups)
}
