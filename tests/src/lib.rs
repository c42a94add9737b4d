//! Fixtures and helpers of the end-to-end tests and the demo.

pub mod digits;

use std::path::{Path, PathBuf};

use linfusion_convert::convert::{Request, WeightsFrom};
use linfusion_convert::distill;
use linfusion_convert::plan::Selection;
use linfusion_models::checkpoint::synth::{SynthModule, SynthOptions, write_checkpoint};
use linfusion_models::checkpoint::{MlpWidth, SiteAttention};
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions, library};
use linfusion_runtime::tensor::Tensor;

/// Unpacks the export called `name` (as `linfusion_models::fixtures::exports`
/// lists it) into `folder`.
///
/// # Errors
/// The fixture cannot be read or the folder not be written.
pub fn unpack(name: &str, folder: &Path) -> std::io::Result<PathBuf> {
    let stem = name.trim_start_matches("exports/").trim_end_matches(".gz");
    let path = folder.join(stem);
    std::fs::write(&path, linfusion_models::fixtures::bytes(name)?)?;
    Ok(path)
}

/// A request that learns from `source` into `linfusion` in `folder`, where `model` is, quickly and without refinement.
#[must_use]
pub fn distillation(folder: &Path, model: PathBuf, source: distill::Source) -> distill::Request {
    distill::Request {
        model,
        out: folder.join("linfusion"),
        source,
        samples: 8,
        holdout: 4,
        schedule: distill::Schedule::default(),
        mid: distill::Mid::Auto,
        selection: Selection::default(),
        attention: distill::Attention::Planned,
        refinement: distill::Refinement::Never,
        end_to_end: None,
        budget: None,
        plot: None,
        seed: 0,
        disk_budget: 1 << 30,
        scratch: Some(folder.to_owned()),
        threads: None,
        overwrite: Overwrite::Refuse,
    }
}

/// A request that writes `out` with the weights given.
#[must_use]
pub fn request(model: &Path, out: &Path, weights: WeightsFrom) -> Request {
    Request {
        model: model.to_owned(),
        out: Some(out.to_owned()),
        weights,
        ..Request::default()
    }
}

/// Whether a libonnxruntime can be loaded here.
#[must_use]
pub fn has_ort() -> bool {
    !library::find(None).is_empty() && linfusion_runtime::engine::load_library(None).is_ok()
}

/// Runs a model on one engine.
///
/// # Errors
/// What the engine says.
pub fn run(
    engine: Engine,
    model: &Path,
    operators: Operators,
    inputs: &[(String, Tensor)],
) -> Result<Vec<(String, Tensor)>, linfusion_runtime::engine::EngineError> {
    let options = SessionOptions {
        operators,
        ..SessionOptions::default()
    };
    Session::from_file(engine, model, &options)?.run(inputs)
}

/// Writes a random checkpoint, in the official format, that fits every
/// self-attention of `model` into `folder`.
///
/// # Errors
/// A sentence on what failed.
pub fn checkpoint_for(model: &Path, folder: &Path, mid: MlpWidth) -> Result<PathBuf, String> {
    let options = SynthOptions::default();
    checkpoint_of(model, folder, mid, SiteAttention::Linear, options)
}

/// [`checkpoint_for`] with weights for any attention, of every self-attention and joint
/// attention.
///
/// # Errors
/// A sentence on what failed.
pub fn checkpoint_of(
    model: &Path,
    folder: &Path,
    mid: MlpWidth,
    attention: SiteAttention,
    options: SynthOptions,
) -> Result<PathBuf, String> {
    let file = OnnxFile::open(model).map_err(|e| e.to_string())?;
    let analysis = linfusion_convert::analysis::Analysis::of(&file);
    let modules: Vec<SynthModule> = analysis
        .own_sites()
        .filter_map(|s| {
            Some(SynthModule {
                module_name: s.module.clone()?,
                dim: usize::try_from(s.width()?).ok()?,
                heads: usize::try_from(s.heads?).ok()?,
                mid,
                attention,
            })
        })
        .collect();
    let path = folder.join("linfusion");
    write_checkpoint(&path, &modules, options).map_err(|e| e.to_string())?;
    Ok(path)
}

/// The largest absolute difference between two lists of outputs of equal shapes;
/// infinite if shapes or counts differ or a value is NaN.
#[must_use]
pub fn max_difference(a: &[(String, Tensor)], b: &[(String, Tensor)]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    a.iter().zip(b).fold(0.0, |m, ((_, a), (_, b))| {
        if a.shape() != b.shape() {
            return f64::INFINITY;
        }
        a.to_f64()
            .iter()
            .zip(&b.to_f64())
            .fold(m, |m: f64, (x, y)| {
                let d = (x - y).abs();
                if d.is_nan() { f64::INFINITY } else { m.max(d) }
            })
    })
}
