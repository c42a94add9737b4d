//! What the learned weights are worth: the converted model against the original, on samples held out.

use std::path::{Path, PathBuf};

use linfusion_models::leftovers::TemporaryFolder;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::compare::difference;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::tensor::Tensor;

use super::error::DistillError;
use super::inputs::Sample;
use super::learn::Learned;
use super::report::{EXACT_DB, EndToEnd};
use crate::convert::{self, Partial, WeightsFrom, convert};
use crate::plan::Selection;
use crate::verify::Verify;

/// A model's outputs for each sample.
pub(super) type Outputs = Vec<Vec<(String, Tensor)>>;

/// Runs the model at `path` on `samples`.
///
/// # Errors
/// It does not run.
pub(super) fn outputs(
    path: &Path,
    samples: &[Sample],
    engine: Engine,
    tick: &dyn Fn(),
) -> Result<Outputs, DistillError> {
    let options = SessionOptions {
        operators: Operators::InProcess,
        ..SessionOptions::default()
    };
    let mut session = Session::from_file(engine, path, &options)?;
    let mut outputs = Vec::with_capacity(samples.len());
    for sample in samples {
        outputs.push(session.run(&sample.inputs)?);
        tick();
    }
    Ok(outputs)
}

/// A converted model in a folder that goes with it.
pub(super) struct Scratch {
    folder: TemporaryFolder,
}

impl Scratch {
    /// The model.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("student.onnx")
    }
}

/// Converts `model` with the weights in `checkpoint` to a new folder in `scratch`.
///
/// # Errors
/// The weights do not fit, or the disk is full.
pub(super) fn converted(
    model: &Path,
    weights: WeightsFrom,
    selection: &Selection,
    scratch: &Path,
) -> Result<Scratch, DistillError> {
    let builder = tempfile::Builder::new();
    let folder =
        TemporaryFolder::within(scratch, &builder).map_err(|source| DistillError::Scratch {
            folder: scratch.to_owned(),
            source,
        })?;
    let converted = Scratch { folder };
    let request = convert::Request {
        model: model.to_owned(),
        out: Some(converted.path()),
        weights,
        selection: selection.clone(),
        overwrite: Overwrite::Force,
        partial: Partial::Allow,
        verify: Verify::Off,
        ..convert::Request::default()
    };
    convert(&request, &mut |_| {})?;
    Ok(converted)
}

/// Weights and what they are worth.
pub(super) struct Judged {
    /// The sites that are converted.
    pub sites: Vec<Learned>,
    /// Modules that keep softmax, to stay within a budget.
    pub kept: Vec<String>,
    /// On the samples held out.
    pub end_to_end: EndToEnd,
}

impl Judged {
    /// What serves the samples held out better; `notes` hear of it under the name of `what` made the other.
    pub fn or_better(self, other: Self, what: &str, notes: &mut Vec<String>) -> Self {
        let (before, after) = (self.end_to_end.mean(), other.end_to_end.mean());
        let better = after > before;
        notes.push(format!(
            "{what}: {before:.2} dB before, {after:.2} dB after; {}",
            if better { "kept" } else { "not kept" }
        ));
        if better { other } else { self }
    }
}

/// How far `found` is from `expected`, sample by sample.
pub(super) fn distance(expected: &Outputs, found: &Outputs) -> EndToEnd {
    let mut psnr_db = Vec::with_capacity(expected.len());
    // Mean squared error over the square of the peak.
    let (mut noise, mut terms) = (0.0, 0);
    for (expected, found) in expected.iter().zip(found) {
        let mut worst: Option<f64> = None;
        for ((name, expected), (_, found)) in expected.iter().zip(found) {
            let Some(difference) = difference(name, expected, found) else {
                worst = Some(f64::NEG_INFINITY);
                continue;
            };
            let broken = difference.not_finite != [0, 0];
            let psnr = match broken {
                true => Some(f64::NEG_INFINITY),
                false => difference.psnr_db,
            };
            if let Some(psnr) = psnr {
                worst = Some(worst.map_or(psnr, |w| w.min(psnr)));
                noise += 10.0_f64.powf(-psnr / 10.0);
            }
            terms += 1;
        }
        psnr_db.push(worst);
    }
    let mean = noise / f64::from(terms.max(1));
    let ratios = psnr_db.iter().map(|db| db.unwrap_or(EXACT_DB));
    let sum: f64 = ratios.sum();
    EndToEnd {
        mean_psnr_db: (!psnr_db.is_empty()).then(|| sum / psnr_db.len() as f64),
        psnr_db,
        pooled_psnr_db: (mean > 0.0).then(|| -10.0 * mean.log10()),
    }
}
