//! What the teacher is run on: recorded inputs, random ones, or a pipeline's own.

use std::path::{Path, PathBuf};

use linfusion_models::json;
use linfusion_models::random::SplitMix64;
use linfusion_runtime::engine::{Dim, Port};
use linfusion_runtime::inputs::raster_ids;
use linfusion_runtime::npz;
use linfusion_runtime::tensor::Tensor;
use ndarray::{ArrayD, IxDyn};
use serde::Deserialize;
use serde_json::Value;

use super::error::DistillError;

/// One run of the model.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Where it is from, for messages: a file, or how it was made.
    pub origin: String,
    /// The graph's inputs, by name.
    pub inputs: Vec<(String, Tensor)>,
    /// What the first output should have been, where somebody knows.
    pub truth: Option<Tensor>,
}

/// Where samples come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A folder of npz files, a sample each, with an array for each input of the graph; taken in order of their names.
    Folder(PathBuf),
    /// A JSON file that says how each input is distributed, see [`Random`].
    Random(PathBuf),
    /// A pipeline's folder: images are made from prompts, and the samples are what the denoiser was given at time steps
    /// along the way. A text file has one prompt a line; a list of prompts is built in.
    Pipeline {
        /// The folder.
        folder: PathBuf,
        /// The prompts.
        prompts: Option<PathBuf>,
        /// Steps of the sampler.
        steps: usize,
    },
}

/// How random inputs are drawn: a JSON object with an entry for each input of the graph, as
/// `{"noisy": {"normal": {"std": 80}}, "sigma": {"constant": 80}, "difficulty": {"uniform": {"min": 0, "max": 1}}}`.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct Random {
    inputs: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Debug)]
struct Drawn {
    values: Distribution,
    /// Sizes, where the graph leaves them open.
    shape: Option<Vec<usize>>,
}

/// The names of [`Distribution`]s in the file.
const DISTRIBUTIONS: [&str; 6] = [
    "normal",
    "uniform",
    "log-uniform",
    "integers",
    "constant",
    "raster-ids",
];

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
enum Distribution {
    Normal {
        #[serde(default)]
        mean: f64,
        #[serde(default = "one")]
        std: f64,
    },
    Uniform {
        min: f64,
        max: f64,
    },
    /// exp of a uniform number between the logarithms: for noise levels.
    LogUniform {
        min: f64,
        max: f64,
    },
    /// Whole numbers, both ends included.
    Integers {
        min: i64,
        max: i64,
    },
    Constant(f64),
    /// (0, row, column) of each pixel in raster order, as FLUX's `img_ids` of packed tokens: `[rows · cols, 3]`.
    RasterIds {
        rows: usize,
        cols: usize,
    },
}

fn one() -> f64 {
    1.0
}

/// Largest number of elements of an input.
const MAX_ELEMENTS: usize = 1 << 30;

/// The samples in the folder, the first `count` of them.
///
/// # Errors
/// There are fewer, or an archive does not fit the graph's inputs.
pub fn from_folder(
    folder: &Path,
    ports: &[Port],
    count: usize,
) -> Result<Vec<Sample>, DistillError> {
    archives(folder, count)?
        .iter()
        .map(|path| fitting(npz::read(path)?, ports, path.display().to_string()))
        .collect()
}

/// The array of an archive that holds what the model's first output should have been, as the noise that was added to an
/// image: what was true, where the teacher only guesses. It is none where the graph has an input of that name.
pub const TRUTH: &str = "target";

/// The first `count` archives of a folder.
fn archives(folder: &Path, count: usize) -> Result<Vec<PathBuf>, DistillError> {
    let fault = |problem: String| DistillError::Inputs {
        place: folder.display().to_string(),
        problem,
    };
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .map_err(|e| fault(format!("cannot be read: {e}")))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "npz"))
        .collect();
    paths.sort();
    if paths.len() < count {
        return Err(fault(format!(
            "has {} .npz files, and {count} samples are to be taken; give more, or lower --samples and --holdout",
            paths.len()
        )));
    }
    paths.truncate(count);
    Ok(paths)
}

/// Arrays, in the order and types of the graph's inputs, and perhaps one of the [`TRUTH`].
///
/// # Errors
/// One is missing, of another shape, or not finite.
pub(super) fn fitting(
    mut arrays: Vec<(String, Tensor)>,
    ports: &[Port],
    origin: String,
) -> Result<Sample, DistillError> {
    let fault = |problem: String| DistillError::Inputs {
        place: origin.clone(),
        problem,
    };
    let given: Vec<String> = arrays.iter().map(|(name, _)| name.clone()).collect();
    let mut taken = Vec::with_capacity(ports.len());
    for port in ports {
        let found = arrays.iter().position(|(name, _)| *name == port.name);
        let Some(found) = found else {
            return Err(fault(format!(
                "has no '{}' {port}, which the graph takes; it has {given:?}",
                port.name
            )));
        };
        let (name, tensor) = arrays.swap_remove(found);
        let fits = port.shape.as_ref().is_none_or(|dims| {
            let same = |(dim, size): (&Dim, &usize)| !matches!(dim, Dim::Fixed(d) if d != size);
            dims.len() == tensor.shape().len() && dims.iter().zip(tensor.shape()).all(same)
        });
        if !fits {
            return Err(fault(format!(
                "'{name}' is {}{:?}, and the graph takes {port}",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        // Infinities may be meant: a mask hides with them.
        if tensor.to_f64().iter().any(|v| v.is_nan()) {
            return Err(fault(format!("'{name}' has NaN")));
        }
        taken.push((name, tensor.cast(port.dtype)));
    }
    let truth = arrays.into_iter().find(|(name, _)| name == TRUTH);
    if let Some((name, truth)) = &truth
        && truth.to_f64().iter().any(|v| !v.is_finite())
    {
        return Err(fault(format!("'{name}' has NaN or infinities")));
    }
    Ok(Sample {
        origin,
        inputs: taken,
        truth: truth.map(|(_, tensor)| tensor),
    })
}

/// `count` samples drawn as the file `path` says.
///
/// # Errors
/// The file is no such description, or an input is missing in it or has open sizes.
pub fn random(
    path: &Path,
    ports: &[Port],
    count: usize,
    seed: u64,
) -> Result<Vec<Sample>, DistillError> {
    let fault = |problem: String| DistillError::Inputs {
        place: path.display().to_string(),
        problem,
    };
    let text = std::fs::read_to_string(path).map_err(|e| fault(format!("cannot be read: {e}")))?;
    let spec: Random = serde_json::from_str(&text)
        .map_err(|e| fault(format!("is no JSON object of distributions: {e}")))?;
    let names: Vec<&str> = ports.iter().map(|p| p.name.as_str()).collect();
    if let Some(unknown) = spec
        .inputs
        .keys()
        .find(|name| !names.contains(&name.as_str()))
    {
        return Err(fault(format!(
            "'{unknown}' is no input of the graph, whose inputs are {names:?}"
        )));
    }
    let mut random = SplitMix64::new(seed);
    let mut drawn = Vec::new();
    for port in ports {
        let entry = spec.inputs.get(&port.name).ok_or_else(|| {
            fault(format!(
                "says nothing of the input '{}' {port}; e.g. \"{}\": {{\"normal\": {{}}}}",
                port.name, port.name
            ))
        })?;
        let entry = Drawn::read(entry).map_err(|e| fault(format!("'{}': {e}", port.name)))?;
        entry
            .values
            .check()
            .map_err(|e| fault(format!("'{}': {e}", port.name)))?;
        let stated = match (entry.values.shape(port), entry.shape) {
            (Some(own), Some(other)) if own.last_chunk::<2>() != other.last_chunk::<2>() => {
                return Err(fault(format!(
                    "'{}': shape is {other:?}, and its rows and columns make {own:?}",
                    port.name
                )));
            }
            // The same ids for each image of a batch.
            (Some(_), Some(other)) => Some(other),
            (own, stated) => own.or(stated),
        };
        let shape = shape(port, stated.as_deref()).map_err(&fault)?;
        drawn.push((port, entry.values, shape));
    }
    let sample = |index| {
        let inputs = drawn.iter().map(|(port, values, shape)| {
            let mut draws = values.draws(&mut random);
            let array = ArrayD::from_shape_simple_fn(IxDyn(shape), &mut draws);
            (port.name.clone(), Tensor::from_f64(array, port.dtype))
        });
        Sample {
            inputs: inputs.collect(),
            origin: format!("sample {} drawn as {} says", index + 1, path.display()),
            truth: None,
        }
    };
    Ok((0..count).map(sample).collect())
}

/// The sizes of an input: the graph's, and `stated` ones or 1 for the batch where it leaves them open.
fn shape(port: &Port, stated: Option<&[usize]>) -> Result<Vec<usize>, String> {
    let name = &port.name;
    let shape: Vec<usize> = match (&port.shape, stated) {
        (Some(dims), Some(stated)) => {
            let differs = |(dim, size): (&Dim, &usize)| matches!(dim, Dim::Fixed(d) if d != size);
            if dims.len() != stated.len() || dims.iter().zip(stated).any(differs) {
                return Err(format!(
                    "'{name}' has shape {stated:?}, and the graph takes {port}"
                ));
            }
            stated.to_vec()
        }
        (None, Some(stated)) => stated.to_vec(),
        (None, None) => return Err(format!("'{name}' needs a shape: the graph tells none")),
        (Some(dims), None) => dims
            .iter()
            .enumerate()
            .map(|(axis, dim)| match dim {
                Dim::Fixed(size) => Ok(*size),
                _ if axis == 0 => Ok(1),
                _ => Err(format!(
                    "'{name}' {port} has an open size; give it as \"shape\""
                )),
            })
            .collect::<Result<_, _>>()?,
    };
    let count = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
    match count.filter(|n| (1..=MAX_ELEMENTS).contains(n)) {
        Some(_) => Ok(shape),
        None => Err(format!(
            "'{name}' has shape {shape:?}: 1 to {MAX_ELEMENTS} elements are possible"
        )),
    }
}

impl Drawn {
    /// An object with one distribution, and perhaps a shape.
    fn read(entry: &Value) -> Result<Self, String> {
        let wrong = || {
            format!(
                "is {entry}; expected an object with one of {}, and perhaps shape",
                DISTRIBUTIONS.join(", ")
            )
        };
        let mut fields = entry.as_object().cloned().ok_or_else(wrong)?;
        let shape = match fields.remove("shape") {
            Some(shape) => Some(
                serde_json::from_value(shape.clone())
                    .map_err(|_| format!("shape is {shape}; expected sizes, as [1, 4, 64, 64]"))?,
            ),
            None => None,
        };
        let mut names = fields.keys().cloned();
        let name = match (names.next(), names.next()) {
            (Some(name), None) if DISTRIBUTIONS.contains(&name.as_str()) => name,
            _ => return Err(wrong()),
        };
        let values = serde_json::from_value(Value::Object(fields))
            .map_err(|e| format!("{name}: {}", json::problem(&e)))?;
        Ok(Self { values, shape })
    }
}

impl Distribution {
    fn check(&self) -> Result<(), String> {
        let ordered = |min: f64, max: f64| min.is_finite() && max.is_finite() && min <= max;
        match *self {
            Self::Normal { mean, std } if mean.is_finite() && std.is_finite() && std >= 0.0 => {
                Ok(())
            }
            Self::Uniform { min, max } if ordered(min, max) => Ok(()),
            Self::LogUniform { min, max } if ordered(min, max) && min > 0.0 => Ok(()),
            Self::Integers { min, max } if min <= max && max.checked_sub(min).is_some() => Ok(()),
            Self::Constant(value) if value.is_finite() => Ok(()),
            Self::RasterIds { rows, cols } if rows > 0 && cols > 0 => Ok(()),
            _ => Err(format!("{self:?} is impossible")),
        }
    }

    /// The shape of a distribution that has one.
    fn shape(&self, port: &Port) -> Option<Vec<usize>> {
        let Self::RasterIds { rows, cols } = *self else {
            return None;
        };
        let ids = [rows.saturating_mul(cols), 3];
        match port.shape.as_ref().map(Vec::len) {
            Some(3) => Some([&[1], &ids[..]].concat()),
            _ => Some(ids.to_vec()),
        }
    }

    /// The elements of a tensor, one after the other.
    fn draws<'r>(&'r self, random: &'r mut SplitMix64) -> Box<dyn FnMut() -> f64 + 'r> {
        match *self {
            Self::Normal { mean, std } => Box::new(move || mean + std * random.normal()),
            Self::Uniform { min, max } => Box::new(move || min + (max - min) * random.unit()),
            Self::LogUniform { min, max } => {
                Box::new(move || (min.ln() + (max.ln() - min.ln()) * random.unit()).exp())
            }
            Self::Integers { min, max } => {
                let span = usize::try_from(max - min)
                    .unwrap_or(usize::MAX)
                    .saturating_add(1);
                Box::new(move || min as f64 + random.below(span) as f64)
            }
            Self::Constant(value) => Box::new(move || value),
            Self::RasterIds { rows, cols } => {
                let mut ids = raster_ids(rows, cols).cycle();
                Box::new(move || ids.next().unwrap_or_default())
            }
        }
    }
}
