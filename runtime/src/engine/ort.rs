//! ONNX Runtime.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use ort::AsPointer;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::SessionInputValue;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{DynTensorValueType, DynValue, TensorElementType, TensorRef, ValueType};

use super::cuda;
use super::environment::runtime;
use super::value::Held;
use super::{
    Backend, Device, Dim, Engine, EngineError, Loaded, Location, Operators, Optimization, Port,
    SessionOptions, Value,
};
use crate::tensor::{DType, Tensor, each};

pub(super) fn load_file(path: &Path, options: &SessionOptions) -> Result<Loaded, EngineError> {
    let refused = |e: ort::Error| refused(path.display().to_string(), &e);
    // ONNX Runtime's own words for a missing file hide its name.
    std::fs::File::open(path).map_err(|source| EngineError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut builder = builder(options, refused)?;
    finish(builder.commit_from_file(path).map_err(refused)?, options)
}

pub(super) fn load_bytes(
    bytes: &[u8],
    weights: Vec<(String, Tensor)>,
    options: &SessionOptions,
) -> Result<Loaded, EngineError> {
    let refused = |e: ort::Error| refused("a model in memory".to_owned(), &e);
    let mut builder = builder(options, refused)?;
    for (name, tensor) in weights {
        let value = owned_value(tensor).map_err(refused)?;
        builder = builder
            .with_external_initializer(name, value)
            .map_err(|e| refused(e.into()))?;
    }
    finish(builder.commit_from_memory(bytes).map_err(refused)?, options)
}

fn refused(model: String, error: &ort::Error) -> EngineError {
    // It begins with the model's name where there is one, as our message does.
    let message = error.to_string();
    let named = format!("Load model from {model} failed:");
    EngineError::Load {
        engine: Engine::Ort,
        message: message.strip_prefix(&named).unwrap_or(&message).to_owned(),
        model,
    }
}

fn builder(
    options: &SessionOptions,
    refused: impl Fn(ort::Error) -> EngineError,
) -> Result<SessionBuilder, EngineError> {
    let runtime = runtime(options.library.as_deref())?;
    let level = match options.optimization {
        Optimization::Off => GraphOptimizationLevel::Disable,
        Optimization::Basic => GraphOptimizationLevel::Level1,
        Optimization::Extended => GraphOptimizationLevel::Level2,
        Optimization::All => GraphOptimizationLevel::All,
    };
    let mut builder = ort::session::Session::builder(&runtime.environment)
        .and_then(|b| Ok(b.with_optimization_level(level)?))
        // A pattern is one block of everything that a step takes, and comes on top of what the first step, which it is
        // learned from, has taken: about twice the memory, for no time gained where tensors are large.
        .and_then(|b| Ok(b.with_memory_pattern(false)?))
        .map_err(&refused)?;
    if let Some(threads) = options.threads {
        builder = builder
            .with_intra_threads(threads.get())
            .map_err(|e| refused(e.into()))?;
    }
    if let Some(prefix) = &options.profile {
        builder = builder
            .with_profiling(prefix)
            .map_err(|e| refused(e.into()))?;
    }
    if let Device::Cuda(number) = options.device {
        let provider = cuda::provider(number, options.device_memory).build();
        builder = builder
            .with_execution_providers([provider.error_on_failure()])
            .map_err(|e| refused(e.into()))?;
    }
    match &options.operators {
        Operators::None => Ok(builder),
        Operators::InProcess => register_in_process(builder),
        Operators::Library(path) => builder
            .with_operator_library(absolute(path))
            .map_err(|e| refused(e.into())),
    }
}

fn register_in_process(mut builder: SessionBuilder) -> Result<SessionBuilder, EngineError> {
    // SAFETY: the options belong to the builder, the API to the library that made them, and that library
    // stays loaded for as long as the process runs.
    unsafe { linfusion_ops::ort::register_in_process(builder.ptr_mut(), ort::api()) }?;
    Ok(builder)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn finish(session: ort::session::Session, options: &SessionOptions) -> Result<Loaded, EngineError> {
    let ports = |outlets: &[ort::value::Outlet]| {
        outlets
            .iter()
            .map(|outlet| port(outlet.name(), outlet.dtype()))
            .collect::<Result<Vec<_>, _>>()
    };
    Ok(Loaded {
        inputs: ports(session.inputs())?,
        outputs: ports(session.outputs())?,
        backend: Box::new(OrtSession {
            session,
            device: options.device,
            profiled: options.profile.is_some(),
        }),
    })
}

fn port(name: &str, value: &ValueType) -> Result<Port, EngineError> {
    let unsupported = || EngineError::ElementType {
        name: name.to_owned(),
        found: value.to_string(),
    };
    let ValueType::Tensor {
        ty,
        shape,
        dimension_symbols,
    } = value
    else {
        return Err(unsupported());
    };
    let dims = shape
        .iter()
        .enumerate()
        .map(|(axis, size)| match usize::try_from(*size) {
            Ok(size) => Dim::Fixed(size),
            Err(_) => match dimension_symbols.get(axis) {
                Some(symbol) if !symbol.is_empty() => Dim::Symbol(symbol.clone()),
                _ => Dim::Any,
            },
        })
        .collect();
    Ok(Port {
        name: name.to_owned(),
        dtype: dtype(*ty).ok_or_else(unsupported)?,
        shape: Some(dims),
    })
}

fn dtype(element: TensorElementType) -> Option<DType> {
    Some(match element {
        TensorElementType::Float32 => DType::F32,
        TensorElementType::Float16 => DType::F16,
        TensorElementType::Bfloat16 => DType::BF16,
        TensorElementType::Float64 => DType::F64,
        TensorElementType::Int64 => DType::I64,
        TensorElementType::Int32 => DType::I32,
        TensorElementType::Uint8 => DType::U8,
        TensorElementType::Int8 => DType::I8,
        TensorElementType::Bool => DType::Bool,
        _ => return None,
    })
}

/// A tensor that ONNX Runtime holds.
pub(super) struct Bound {
    value: DynValue,
    dtype: DType,
    shape: Vec<usize>,
}

impl Bound {
    /// `tensor`, in the memory that it is in.
    pub(super) fn owning(tensor: Tensor) -> Result<Self, EngineError> {
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        let tensor = match row_major(&tensor) {
            Cow::Owned(rows) => rows,
            Cow::Borrowed(_) => tensor,
        };
        let value = owned_value(tensor).map_err(failed)?;
        Ok(Self {
            value,
            dtype,
            shape,
        })
    }

    fn output(name: &str, value: DynValue) -> Result<Self, EngineError> {
        let Port { dtype, shape, .. } = port(name, value.dtype())?;
        let sizes = shape.iter().flatten().map(|dim| match dim {
            Dim::Fixed(size) => *size,
            // A tensor that is there has only sizes.
            Dim::Symbol(_) | Dim::Any => 0,
        });
        Ok(Self {
            dtype,
            shape: sizes.collect(),
            value,
        })
    }

    pub(super) fn dtype(&self) -> DType {
        self.dtype
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(super) fn device(&self) -> Device {
        let Ok(tensor) = self.value.view().downcast::<DynTensorValueType>() else {
            return Device::Cpu;
        };
        let memory = tensor.memory_info();
        match u32::try_from(memory.device_id()) {
            Ok(number) if memory.allocation_device() == AllocationDevice::CUDA => {
                Device::Cuda(number)
            }
            // Memory that is pinned for copies to a GPU is the host's, too.
            _ => Device::Cpu,
        }
    }
}

fn failed(error: ort::Error) -> EngineError {
    EngineError::Run {
        engine: Engine::Ort,
        message: error.to_string(),
    }
}

struct OrtSession {
    session: ort::session::Session,
    device: Device,
    profiled: bool,
}

impl OrtSession {
    fn memory(&self, location: Location) -> Result<MemoryInfo<'static>, EngineError> {
        let (device, number) = match (location, self.device) {
            (Location::Device, Device::Cuda(number)) => (AllocationDevice::CUDA, number),
            _ => (AllocationDevice::CPU, 0),
        };
        let number = i32::try_from(number).unwrap_or(i32::MAX);
        MemoryInfo::new(device, number, AllocatorType::Device, MemoryType::Default).map_err(failed)
    }
}

impl Backend for OrtSession {
    fn end_profiling(&mut self) -> Result<Option<PathBuf>, EngineError> {
        if !std::mem::take(&mut self.profiled) {
            return Ok(None);
        }
        let file = self.session.end_profiling().map_err(failed)?;
        Ok(Some(file.into()))
    }

    fn run(&mut self, inputs: &[(&str, &Tensor)]) -> Result<Vec<(String, Tensor)>, EngineError> {
        // Arrays in another than row-major order are copied; they must outlive the run.
        let rows: Vec<(&str, Cow<'_, Tensor>)> = inputs
            .iter()
            .map(|(name, tensor)| (*name, row_major(tensor)))
            .collect();
        let values = rows
            .iter()
            .map(|(name, tensor)| Ok((Cow::Borrowed(*name), input_value(tensor)?)))
            .collect::<Result<Vec<(Cow<'_, str>, SessionInputValue<'_>)>, ort::Error>>()
            .map_err(failed)?;
        let outputs = self.session.run(values).map_err(failed)?;
        outputs
            .iter()
            .map(|(name, value)| Ok((name.to_owned(), output_tensor(name, &value)?)))
            .collect()
    }

    /// With a binding of its own, so that the outputs of earlier runs stay what they are.
    fn run_bound(
        &mut self,
        inputs: &[(&str, &Value)],
        outputs: Location,
    ) -> Result<Vec<(String, Value)>, EngineError> {
        let mut binding = self.session.create_binding().map_err(failed)?;
        for (name, value) in inputs {
            match value.held() {
                Held::Host(tensor) => {
                    let owned = owned_value(row_major(tensor).into_owned()).map_err(failed)?;
                    binding.bind_input(*name, &owned)
                }
                Held::Ort(bound) => binding.bind_input(*name, &bound.value),
            }
            .map_err(failed)?;
        }
        let memory = self.memory(outputs)?;
        for output in self.session.outputs() {
            binding
                .bind_output_to_device(output.name(), &memory)
                .map_err(failed)?;
        }
        // Inputs may still be on their way to the device.
        binding.synchronize_inputs().map_err(failed)?;
        let given = self.session.run_binding(&binding).map_err(failed)?;
        given
            .into_iter()
            .map(|(name, value)| {
                let value = match outputs {
                    Location::Host => Value::from(output_tensor(name, &value)?),
                    Location::Device => Value::bound(Bound::output(name, value)?),
                };
                Ok((name.to_owned(), value))
            })
            .collect()
    }
}

fn owned_value(tensor: Tensor) -> Result<DynValue, ort::Error> {
    each!(tensor, a => Ok(ort::value::Tensor::from_array(a)?.into_dyn()))
}

fn row_major(tensor: &Tensor) -> Cow<'_, Tensor> {
    each!(tensor, a => match a.is_standard_layout() {
        true => Cow::Borrowed(tensor),
        false => Cow::Owned(Tensor::from(a.as_standard_layout().into_owned())),
    })
}

fn input_value(tensor: &Tensor) -> Result<SessionInputValue<'_>, ort::Error> {
    each!(tensor, a => Ok(TensorRef::from_array_view(a.view())?.into()))
}

fn output_tensor(name: &str, value: &DynValue) -> Result<Tensor, EngineError> {
    let unsupported = || EngineError::ElementType {
        name: name.to_owned(),
        found: value.dtype().to_string(),
    };
    let failed = |e: ort::Error| EngineError::Run {
        engine: Engine::Ort,
        message: format!("output `{name}`: {e}"),
    };
    let ValueType::Tensor { ty, .. } = value.dtype() else {
        return Err(unsupported());
    };
    Ok(match dtype(*ty).ok_or_else(unsupported)? {
        DType::F32 => Tensor::F32(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::F16 => Tensor::F16(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::BF16 => Tensor::BF16(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::F64 => Tensor::F64(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::I64 => Tensor::I64(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::I32 => Tensor::I32(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::U8 => Tensor::U8(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::I8 => Tensor::I8(value.try_extract_array().map_err(failed)?.into_owned()),
        DType::Bool => Tensor::Bool(value.try_extract_array().map_err(failed)?.into_owned()),
    })
}
