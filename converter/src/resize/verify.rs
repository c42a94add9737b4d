//! Runs a resized model beside the original.

use buffa::Message;
use linfusion_models::onnx::proto::{ModelProto, TensorProto};
use linfusion_models::onnx::{OnnxFile, is_external};
use linfusion_runtime::engine::library::LibraryError;
use linfusion_runtime::engine::{Engine, EngineError, Optimization, Session, SessionOptions};
use linfusion_runtime::inputs::{InputsError, Request, make};
use linfusion_runtime::tensor::{DType, Tensor};
use serde::Serialize;

/// What running showed.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct Verified {
    /// What ran it.
    pub engine: String,
    /// Largest difference from the original at the size of the export, relative to the largest
    /// magnitude of the output; null where the original made nothing finite of the random inputs.
    pub max_relative_error: Option<f64>,
    /// Another size that it ran at, height and width.
    pub also_at: [i64; 2],
}

/// Why a resized model must not be used.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It computes something else.
    #[error(
        "output '{output}' of the resized model is off by {error:.2e} of its largest value at the size of the export, more than {bound:.2e} (run on {engine})"
    )]
    Numbers {
        /// The output.
        output: String,
        /// Relative error.
        error: f64,
        /// What rounding explains.
        bound: f64,
        /// The engine.
        engine: Engine,
    },
    /// An output has another shape than was computed.
    #[error(
        "output '{output}' has the shape {found:?} at {height}x{width}, not {expected:?} (run on {engine})"
    )]
    Shape {
        /// The output.
        output: String,
        /// Its shape.
        found: Vec<usize>,
        /// What was computed.
        expected: Vec<i64>,
        /// Rows.
        height: i64,
        /// Columns.
        width: i64,
        /// The engine.
        engine: Engine,
    },
    /// It does not run at another size.
    #[error("the resized model does not run at {height}x{width}: {source}")]
    OtherSize {
        /// Rows.
        height: i64,
        /// Columns.
        width: i64,
        /// What the engine said.
        r#source: EngineError,
    },
    /// The resized model does not run at the size of the export.
    #[error("the resized model does not run: {0}")]
    Run(EngineError),
    /// The ONNX Runtime library that was named does not load.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The original does not run here.
    #[error(transparent)]
    Original(#[from] Original),
}

/// Why there is nothing to compare with.
#[derive(Debug, thiserror::Error)]
pub enum Original {
    /// The engine cannot run it.
    #[error("the original model does not run: {0}")]
    Run(EngineError),
    /// No inputs for it.
    #[error("the original model cannot be fed: {0}")]
    Inputs(InputsError),
    /// Weights that cannot be read.
    #[error("tensor '{0}' cannot be read")]
    Weights(String),
}

/// A resized model.
pub(super) struct Models<'m> {
    /// What runs at any size.
    pub any_size: &'m ModelProto,
    /// What runs at one, if that is what was asked for.
    pub one_size: Option<&'m ModelProto>,
}

/// What to check a resized model against.
#[derive(Debug)]
pub(super) struct Expected {
    /// Shapes of the inputs at the size of the export.
    pub inputs: Vec<(String, Vec<i64>)>,
    /// Another size.
    pub size: [i64; 2],
    /// Shapes of the inputs there.
    pub other_inputs: Vec<(String, Vec<i64>)>,
    /// Shapes of the outputs there.
    pub other_outputs: Vec<(String, Vec<i64>)>,
}

/// Runs the resized model and the original `file`.
pub(super) fn verify(
    file: &OnnxFile,
    resized: Models<'_>,
    expected: &Expected,
    engine: Engine,
) -> Result<Verified, VerifyError> {
    let weights = weights(file)?;
    let run = |model: &ModelProto| load(model, weights.clone(), engine);
    let mut original = run(&file.model).map_err(Original::Run)?;
    let feeds = random_inputs(&original, &expected.inputs).map_err(Original::Inputs)?;
    let before = original.run(&feeds).map_err(Original::Run)?;
    drop(original);
    let mut new = run(resized.any_size).map_err(VerifyError::Run)?;
    let after = new.run(&feeds).map_err(VerifyError::Run)?;
    let mut worst: Option<f64> = None;
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        let error = relative(before, after);
        let bound = rounding(before.dtype());
        if let Some(error) = error.filter(|&e| e > bound) {
            return Err(VerifyError::Numbers {
                output: name.clone(),
                error,
                bound,
                engine,
            });
        }
        worst = error.map_or(worst, |e| Some(worst.unwrap_or(0.0).max(e)));
    }
    let [height, width] = expected.size;
    if let Some(model) = resized.one_size {
        new = run(model).map_err(VerifyError::Run)?;
    }
    let feeds = random_inputs(&new, &expected.other_inputs).map_err(Original::Inputs)?;
    let outputs = new.run(&feeds).map_err(|source| VerifyError::OtherSize {
        height,
        width,
        source,
    })?;
    for (name, output) in &outputs {
        let Some((_, shape)) = expected.other_outputs.iter().find(|(n, _)| n == name) else {
            continue;
        };
        let same = output.shape().len() == shape.len()
            && (output.shape().iter().zip(shape)).all(|(a, b)| i64::try_from(*a) == Ok(*b));
        if !same {
            return Err(VerifyError::Shape {
                output: name.clone(),
                found: output.shape().to_vec(),
                expected: shape.clone(),
                height,
                width,
                engine,
            });
        }
    }
    Ok(Verified {
        engine: engine.to_string(),
        max_relative_error: worst,
        also_at: expected.size,
    })
}

/// Both graphs do the same operations on the same numbers; an engine may only order its sums
/// otherwise, for which eight units in the last place of the largest value are ample.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 8.0 * f64::EPSILON,
        DType::F16 => 8.0 * 2f64.powi(-10),
        DType::BF16 => 8.0 * 2f64.powi(-7),
        _ => 8.0 * 2f64.powi(-23),
    }
}

/// Largest difference over the largest magnitude; infinite for other shapes, or where one has infinities
/// or NaN that the other lacks. `None` where nothing is finite.
fn relative(before: &Tensor, after: &Tensor) -> Option<f64> {
    if before.shape() != after.shape() {
        return Some(f64::INFINITY);
    }
    let (before, after) = (before.to_f64(), after.to_f64());
    let (mut largest, mut difference) = (None, 0.0f64);
    for (a, b) in before.iter().zip(&after) {
        match (a.is_finite(), b.is_finite()) {
            (true, true) => {
                largest = Some(largest.unwrap_or(0.0f64).max(a.abs()));
                difference = difference.max((a - b).abs());
            }
            (false, false) => {}
            _ => return Some(f64::INFINITY),
        }
    }
    largest.map(|largest| {
        if difference == 0.0 {
            0.0
        } else {
            difference / largest
        }
    })
}

/// Random inputs. Scalars and vectors are positive, as noise levels and times are.
fn random_inputs(
    session: &Session,
    shapes: &[(String, Vec<i64>)],
) -> Result<Vec<(String, Tensor)>, InputsError> {
    let mut feeds = make(session.inputs(), &request(session, shapes))?;
    for (_, tensor) in &mut feeds {
        if tensor.dtype().is_float() && tensor.shape().len() < 2 {
            *tensor = Tensor::from_f64(tensor.to_f64().mapv(f64::abs), tensor.dtype());
        }
    }
    Ok(feeds)
}

fn request(session: &Session, shapes: &[(String, Vec<i64>)]) -> Request {
    let size = |shape: &[i64]| {
        shape
            .iter()
            .filter_map(|&d| usize::try_from(d).ok())
            .collect()
    };
    let known = |name: &str| session.inputs().iter().any(|p| p.name == name);
    Request {
        shapes: (shapes.iter())
            .filter(|(name, _)| known(name))
            .map(|(name, shape)| (name.clone(), size(shape)))
            .collect(),
        ..Request::default()
    }
}

type Weights = Vec<(String, Tensor)>;

/// Weights in data files, which the resized model has too.
fn weights(file: &OnnxFile) -> Result<Weights, Original> {
    let external = file
        .model
        .graph
        .initializer
        .iter()
        .filter(|t| is_external(t));
    external
        .map(|t| {
            let name = t.name.clone().unwrap_or_default();
            match tensor(file, t) {
                Some(tensor) => Ok((name, tensor)),
                None => Err(Original::Weights(name)),
            }
        })
        .collect()
}

fn load(model: &ModelProto, weights: Weights, engine: Engine) -> Result<Session, EngineError> {
    // Fusions depend on which shapes are constants; without them, both graphs run the same kernels.
    let options = SessionOptions {
        optimization: Optimization::Off,
        ..SessionOptions::default()
    };
    Session::from_parts(engine, &model.encode_to_vec(), weights, &options)
}

fn tensor(file: &OnnxFile, stored: &TensorProto) -> Option<Tensor> {
    let dtype = DType::from_onnx(stored.data_type?)?;
    let shape: Option<Vec<usize>> = stored
        .dims
        .iter()
        .map(|&d| usize::try_from(d).ok())
        .collect();
    Tensor::from_le_bytes(dtype, &shape?, &file.tensor_bytes(stored).ok()?)
}
