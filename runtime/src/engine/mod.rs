//! Engines that run ONNX graphs: ONNX Runtime, loaded when first asked for, and tract, built in.

mod cuda;
mod device;
mod environment;
mod error;
pub mod library;
mod ort;
#[cfg(feature = "tract")]
mod tract;
#[cfg(not(feature = "tract"))]
#[path = "without_tract.rs"]
mod tract;
mod value;

use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use linfusion_models::onnx::OnnxFile;
use linfusion_models::shapes::Halves;

pub use self::device::{Chosen, Device, DeviceChoice};
pub use self::environment::{execution_providers, load_library};
pub use self::error::EngineError;
pub use self::value::{Location, Value};

use crate::tensor::{DType, Tensor};

/// Bytes of memory that a model may take on a device, as far as the system tells: what is free of the machine's, all of a
/// GPU's.
pub fn memory_of(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => crate::memory::available(),
        Device::Cuda(number) => linfusion_ops::cuda::driver::total_memory(number).ok(),
    }
}

/// How an engine computes with float16 there.
pub fn halves(engine: Engine, device: Device) -> Halves {
    match (engine, device) {
        (Engine::Ort, Device::Cpu) => Halves::Widened,
        (Engine::Ort, Device::Cuda(_)) | (Engine::Tract, _) => Halves::Kept,
    }
}

/// Whether this program's own operators have CUDA kernels.
pub fn has_gpu_kernels() -> bool {
    linfusion_ops::cuda::kernels().is_some()
}

/// What runs a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// ONNX Runtime through its shared library.
    Ort,
    /// tract, in pure Rust, on one thread. It has no model-local functions: the LinFusion operators are
    /// always registered in it.
    Tract,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ort => "ort",
            Self::Tract => "tract",
        })
    }
}

/// Where ONNX Runtime takes the LinFusion operators from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Operators {
    /// Nowhere: the model's own function bodies run.
    #[default]
    None,
    /// From this program.
    InProcess,
    /// From a custom-op library.
    Library(PathBuf),
}

/// How much ONNX Runtime may rewrite a graph before running it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Optimization {
    /// Not at all, but for inlining functions.
    Off,
    /// Constant folding and redundant nodes.
    Basic,
    /// Fusions too.
    Extended,
    /// Everything, layouts included.
    #[default]
    All,
}

/// How to run a graph.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionOptions {
    /// Where the LinFusion operators come from.
    pub operators: Operators,
    /// Threads within an operator; `None` leaves it to the engine.
    pub threads: Option<NonZeroUsize>,
    /// Graph rewriting; tract always does all of its own.
    pub optimization: Optimization,
    /// ONNX Runtime's shared library; `None` searches for one (see [`library::find`]). The first library
    /// that a process loads stays for good.
    pub library: Option<PathBuf>,
    /// Where it runs; tract knows the processor only.
    pub device: Device,
    /// Bytes that ONNX Runtime may take of a GPU's memory; `None` for all.
    pub device_memory: Option<usize>,
    /// Where tensors stay that several runs of models share; `None` leaves them on the device where that is a GPU and on
    /// the host otherwise. tract has the host only.
    pub shared: Option<Location>,
    /// Begin of the name of a file for ONNX Runtime's profile; `None` for no profile.
    pub profile: Option<PathBuf>,
}

/// An input or output of a graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its dimensions; `None` if the graph leaves even the rank open.
    pub shape: Option<Vec<Dim>>,
}

/// A dimension of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dim {
    /// A fixed size.
    Fixed(usize),
    /// Any size, under a name that equal sizes share.
    Symbol(String),
    /// Any size.
    Any,
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Any => f.write_str("?"),
        }
    }
}

/// A loaded graph.
pub struct Session {
    engine: Engine,
    backend: Box<dyn Backend>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

/// What is wrong with the data files of a model that an engine refuses, which may say nothing of them.
fn data_fault(path: &Path) -> Option<EngineError> {
    let source = OnnxFile::open(path).ok()?.check_data_files().err()?;
    Some(EngineError::Data {
        model: path.display().to_string(),
        source: Box::new(source),
    })
}

/// What an engine has to do.
trait Backend: Send {
    /// `inputs` are in the order of the graph's, and fit them.
    fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, EngineError>;

    /// The same on values wherever they are, with the outputs left at `outputs`. An engine that has nothing but the
    /// host leaves them there.
    fn run_bound(
        &mut self,
        inputs: &[(&str, &Value)],
        outputs: Location,
    ) -> Result<Vec<(String, Value)>, EngineError>;

    /// Ends profiling; gives the profile's file if there is one.
    fn end_profiling(&mut self) -> Result<Option<PathBuf>, EngineError> {
        Ok(None)
    }
}

/// A backend and the ports that it found.
struct Loaded {
    backend: Box<dyn Backend>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Session {
    /// Loads the model at `path`; external data is looked for beside it.
    ///
    /// # Errors
    /// The engine is not there or refuses the model.
    pub fn from_file(
        engine: Engine,
        path: impl AsRef<Path>,
        options: &SessionOptions,
    ) -> Result<Self, EngineError> {
        let path = path.as_ref();
        let loaded = match engine {
            Engine::Ort => ort::load_file(path, options),
            Engine::Tract => tract::load_file(path),
        };
        let loaded = loaded.map_err(|error| match error {
            EngineError::Load { .. } => data_fault(path).unwrap_or(error),
            error => error,
        });
        Ok(Self::new(engine, loaded?))
    }

    /// Loads a model from memory; it must not refer to external data.
    ///
    /// # Errors
    /// The engine is not there or refuses the model.
    pub fn from_bytes(
        engine: Engine,
        bytes: &[u8],
        options: &SessionOptions,
    ) -> Result<Self, EngineError> {
        let loaded = match engine {
            Engine::Ort => ort::load_bytes(bytes, Vec::new(), options)?,
            Engine::Tract => tract::load_bytes(bytes)?,
        };
        Ok(Self::new(engine, loaded))
    }

    /// Loads a model from memory, with the values of tensors that it says are in data files.
    ///
    /// # Errors
    /// The engine is not there or refuses the model; tract, if there are such tensors.
    pub fn from_parts(
        engine: Engine,
        bytes: &[u8],
        weights: Vec<(String, Tensor)>,
        options: &SessionOptions,
    ) -> Result<Self, EngineError> {
        let loaded = match engine {
            Engine::Ort => ort::load_bytes(bytes, weights, options)?,
            Engine::Tract => tract::load_bytes(bytes)?,
        };
        Ok(Self::new(engine, loaded))
    }

    /// Ends the profile that [`SessionOptions::profile`] asked for, and gives its file.
    ///
    /// # Errors
    /// ONNX Runtime cannot write it.
    pub fn end_profiling(&mut self) -> Result<Option<PathBuf>, EngineError> {
        self.backend.end_profiling()
    }

    fn new(engine: Engine, loaded: Loaded) -> Self {
        Self {
            engine,
            backend: loaded.backend,
            inputs: loaded.inputs,
            outputs: loaded.outputs,
        }
    }

    /// What runs the graph.
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// The graph's inputs, without those that have a default.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// The graph's outputs.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// Runs the graph on named inputs, in any order; gives all outputs in the graph's order.
    ///
    /// # Errors
    /// The inputs do not fit the graph, or the engine fails.
    pub fn run(
        &mut self,
        inputs: &[(impl AsRef<str>, Tensor)],
    ) -> Result<Vec<(String, Tensor)>, EngineError> {
        let ordered = ordered(&self.inputs, inputs)?;
        self.backend.run(&ordered)
    }

    /// A tensor in the engine's keeping, without a copy, in the memory that it is in; an input that needs no copy on the host.
    ///
    /// # Errors
    /// ONNX Runtime refuses it.
    pub fn adopt(&self, tensor: Tensor) -> Result<Value, EngineError> {
        match self.engine {
            Engine::Ort => ort::Bound::owning(tensor).map(Value::bound),
            Engine::Tract => Ok(tensor.into()),
        }
    }

    /// Runs the graph on values wherever they are, and leaves its outputs at `outputs`; tract leaves them on the host.
    ///
    /// # Errors
    /// The inputs do not fit the graph, or the engine fails.
    pub fn run_values(
        &mut self,
        inputs: &[(impl AsRef<str>, Value)],
        outputs: Location,
    ) -> Result<Vec<(String, Value)>, EngineError> {
        let ordered = ordered(&self.inputs, inputs)?;
        let on_host: Option<Vec<(&str, &Tensor)>> = ordered
            .iter()
            .map(|(name, value)| Some((*name, value.host()?)))
            .collect();
        match (on_host, outputs) {
            // Needs no copies.
            (Some(tensors), Location::Host) => {
                let given = self.backend.run(&tensors)?;
                Ok(given.into_iter().map(|(n, t)| (n, t.into())).collect())
            }
            _ => self.backend.run_bound(&ordered, outputs),
        }
    }
}

/// What an input is checked by.
trait Described {
    fn dtype(&self) -> DType;
    fn shape(&self) -> &[usize];
}

impl Described for Tensor {
    fn dtype(&self) -> DType {
        self.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.shape()
    }
}

impl Described for Value {
    fn dtype(&self) -> DType {
        self.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.shape()
    }
}

/// The inputs in the order of the ports, which they fit.
fn ordered<'a, T: Described>(
    ports: &'a [Port],
    inputs: &'a [(impl AsRef<str>, T)],
) -> Result<Vec<(&'a str, &'a T)>, EngineError> {
    for (name, _) in inputs {
        if !ports.iter().any(|port| port.name == name.as_ref()) {
            return Err(EngineError::UnknownInput {
                name: name.as_ref().to_owned(),
                inputs: ports.iter().map(|p| p.name.clone()).collect(),
            });
        }
    }
    ports
        .iter()
        .map(|port| {
            let (_, given) = inputs
                .iter()
                .find(|(name, _)| name.as_ref() == port.name)
                .ok_or_else(|| EngineError::MissingInput {
                    name: port.name.clone(),
                    given: inputs.iter().map(|(n, _)| n.as_ref().to_owned()).collect(),
                })?;
            port.check(given)?;
            Ok((port.name.as_str(), given))
        })
        .collect()
}

impl Port {
    /// Whether a tensor of this shape fits, as far as the graph tells: ONNX Runtime has no dimensions for a scalar and for an
    /// input of unknown rank alike, and is asked itself.
    pub fn takes(&self, shape: &[usize]) -> bool {
        self.shape.as_ref().is_none_or(|dims| {
            let fits = |(dim, size)| !matches!(dim, &Dim::Fixed(fixed) if fixed != size);
            dims.is_empty()
                || dims.len() == shape.len() && dims.iter().zip(shape.iter().copied()).all(fits)
        })
    }

    fn check(&self, tensor: &impl Described) -> Result<(), EngineError> {
        if self.takes(tensor.shape()) && tensor.dtype() == self.dtype {
            return Ok(());
        }
        Err(EngineError::InputMismatch {
            name: self.name.clone(),
            found_dtype: tensor.dtype(),
            found: tensor.shape().to_vec(),
            expected: self.to_string(),
        })
    }
}

impl fmt::Display for Port {
    /// Type and dimensions, e.g. `f32[batch, 4, ?, ?]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.dtype)?;
        let Some(dims) = &self.shape else {
            return f.write_str(" of any rank");
        };
        let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

#[cfg(test)]
mod tests;
