//! tract: the engine that is always there.

use std::fs::File;
use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tract_onnx::pb;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::{TractErrorContext, bail};

use super::{Backend, Dim, Engine, EngineError, Loaded, Location, Port, Value};
use crate::tensor::{DType, Tensor as OurTensor};

pub(super) fn load_file(path: &Path) -> Result<Loaded, EngineError> {
    let file = File::open(path).map_err(|source| EngineError::Io {
        path: path.to_owned(),
        source,
    })?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_string_lossy().into_owned(),
        _ => ".".to_owned(),
    };
    load(
        &mut BufReader::new(file),
        Some(&folder),
        &path.display().to_string(),
    )
}

pub(super) fn load_bytes(mut bytes: &[u8]) -> Result<Loaded, EngineError> {
    load(&mut bytes, None, "a model in memory")
}

fn load(model: &mut dyn Read, folder: Option<&str>, name: &str) -> Result<Loaded, EngineError> {
    let refused = |message: String| EngineError::Load {
        engine: Engine::Tract,
        model: name.to_owned(),
        message,
    };
    // Exporters' shape annotations use symbols that tract cannot relate to each other; without them it
    // infers everything from the inputs' sizes.
    let mut onnx = tract_onnx::onnx()
        .with_ignore_value_info(true)
        .with_ignore_output_shapes(true);
    linfusion_ops::tract::register(&mut onnx);
    let (proto, graph) = guarded(|| {
        let proto = onnx.proto_model_for_read(model)?;
        let parsed = onnx.parse(&proto, folder)?;
        if !parsed.unresolved_inputs.is_empty() {
            bail!("nothing computes {:?}", parsed.unresolved_inputs);
        }
        Ok((proto, parsed.model))
    })
    .map_err(refused)?;

    let declared = proto.graph.as_ref();
    let defaults: Vec<&str> = declared
        .iter()
        .flat_map(|g| &g.initializer)
        .map(|t| t.name.as_str())
        .collect();
    let inputs = declared
        .iter()
        .flat_map(|g| &g.input)
        .filter(|input| !defaults.contains(&input.name.as_str()))
        .map(port)
        .collect::<Result<Vec<_>, _>>()?;
    let outputs = declared
        .iter()
        .flat_map(|g| &g.output)
        .map(port)
        .collect::<Result<Vec<_>, _>>()?;
    let session = TractSession {
        graph,
        output_names: outputs.iter().map(|port| port.name.clone()).collect(),
        compiled: None,
    };
    Ok(Loaded {
        backend: Box::new(session),
        inputs,
        outputs,
    })
}

/// tract asserts in places; a model that trips it is an error, not the end of the process.
fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("internal error: {}", text.unwrap_or("unknown")))
        }
    }
}

fn port(info: &pb::ValueInfoProto) -> Result<Port, EngineError> {
    let unsupported = |found: &str| EngineError::ElementType {
        name: info.name.clone(),
        found: found.to_owned(),
    };
    let Some(pb::type_proto::Value::TensorType(tensor)) =
        info.r#type.as_ref().and_then(|t| t.value.as_ref())
    else {
        return Err(unsupported("no tensor type"));
    };
    let dtype = DType::from_onnx(tensor.elem_type)
        .ok_or_else(|| unsupported(&format!("ONNX type {}", tensor.elem_type)))?;
    let shape = tensor.shape.as_ref().map(|shape| {
        shape
            .dim
            .iter()
            .map(|dim| match &dim.value {
                Some(pb::tensor_shape_proto::dimension::Value::DimValue(size)) => {
                    usize::try_from(*size).map_or(Dim::Any, Dim::Fixed)
                }
                Some(pb::tensor_shape_proto::dimension::Value::DimParam(name))
                    if !name.is_empty() =>
                {
                    Dim::Symbol(name.clone())
                }
                _ => Dim::Any,
            })
            .collect()
    });
    Ok(Port {
        name: info.name.clone(),
        dtype,
        shape,
    })
}

struct TractSession {
    graph: InferenceModel,
    output_names: Vec<String>,
    /// The plan for the sizes of the last run: tract plans for fixed sizes only.
    compiled: Option<Compiled>,
}

struct Compiled {
    sizes: Vec<(String, Vec<usize>)>,
    plan: Arc<TypedRunnableModel>,
    /// The graph's inputs in tract's order, as positions among the inputs of a run.
    order: Vec<usize>,
}

impl Backend for TractSession {
    fn run(
        &mut self,
        inputs: &[(&str, &OurTensor)],
    ) -> Result<Vec<(String, OurTensor)>, EngineError> {
        let failed = |message: String| EngineError::Run {
            engine: Engine::Tract,
            message,
        };
        let sizes: Vec<(String, Vec<usize>)> = inputs
            .iter()
            .map(|(name, tensor)| ((*name).to_owned(), tensor.shape().to_vec()))
            .collect();
        let compiled = match self.compiled.take() {
            Some(compiled) if compiled.sizes == sizes => compiled,
            _ => guarded(|| compile(&self.graph, inputs, sizes)).map_err(failed)?,
        };
        let values = guarded(|| {
            let values = compiled
                .order
                .iter()
                .map(|i| {
                    let (_, tensor) = inputs.get(*i).context("an input is gone")?;
                    Ok(to_tract(tensor)?.into_tvalue())
                })
                .collect::<TractResult<TVec<TValue>>>()?;
            compiled.plan.run(values)
        })
        .map_err(failed)?;
        self.compiled = Some(compiled);
        self.output_names
            .iter()
            .zip(values)
            .map(|(name, value)| Ok((name.clone(), from_tract(name, &value)?)))
            .collect()
    }

    fn run_bound(
        &mut self,
        inputs: &[(&str, &Value)],
        _: Location,
    ) -> Result<Vec<(String, Value)>, EngineError> {
        let tensors = inputs
            .iter()
            .map(|(name, value)| {
                let unreachable = || EngineError::Unreachable {
                    engine: Engine::Tract,
                    name: (*name).to_owned(),
                };
                Ok((*name, value.host().ok_or_else(unreachable)?))
            })
            .collect::<Result<Vec<_>, EngineError>>()?;
        let given = self.run(&tensors)?;
        Ok(given.into_iter().map(|(n, t)| (n, t.into())).collect())
    }
}

fn compile(
    graph: &InferenceModel,
    inputs: &[(&str, &OurTensor)],
    sizes: Vec<(String, Vec<usize>)>,
) -> TractResult<Compiled> {
    let mut graph = graph.clone();
    let mut order = Vec::new();
    for (slot, outlet) in graph.input_outlets()?.to_vec().into_iter().enumerate() {
        let name = graph.node(outlet.node).name.clone();
        let position = inputs
            .iter()
            .position(|(given, _)| *given == name)
            .with_context(|| format!("input `{name}` was not given"))?;
        let (_, tensor) = inputs.get(position).context("an input is gone")?;
        let fact = InferenceFact::dt_shape(datum_type(tensor.dtype())?, tensor.shape());
        graph.set_input_fact(slot, fact)?;
        order.push(position);
    }
    let plan = graph.into_optimized()?.into_runnable()?;
    Ok(Compiled { sizes, plan, order })
}

fn datum_type(dtype: DType) -> TractResult<DatumType> {
    Ok(match dtype {
        DType::F32 => DatumType::F32,
        DType::F16 => DatumType::F16,
        DType::F64 => DatumType::F64,
        DType::I64 => DatumType::I64,
        DType::I32 => DatumType::I32,
        DType::U8 => DatumType::U8,
        DType::I8 => DatumType::I8,
        DType::Bool => DatumType::Bool,
        DType::BF16 => bail!("tract has no bf16"),
    })
}

fn to_tract(tensor: &OurTensor) -> TractResult<Tensor> {
    /// Through a slice: tract's ndarray is another version than ours.
    fn copy<T: Datum + Copy>(array: &ndarray::ArrayD<T>) -> TractResult<Tensor> {
        let rows = array.as_standard_layout();
        let data = rows.as_slice().context("rows are contiguous")?;
        Tensor::from_shape(array.shape(), data)
    }
    match tensor {
        OurTensor::F32(a) => copy(a),
        OurTensor::F16(a) => copy(a),
        OurTensor::F64(a) => copy(a),
        OurTensor::I64(a) => copy(a),
        OurTensor::I32(a) => copy(a),
        OurTensor::U8(a) => copy(a),
        OurTensor::I8(a) => copy(a),
        OurTensor::Bool(a) => copy(a),
        OurTensor::BF16(_) => bail!("tract has no bf16"),
    }
}

fn from_tract(name: &str, tensor: &Tensor) -> Result<OurTensor, EngineError> {
    fn copy<T: Datum + Copy>(tensor: &Tensor) -> TractResult<ndarray::ArrayD<T>> {
        let view = tensor.to_plain_array_view::<T>()?;
        let data: Vec<T> = view.iter().copied().collect();
        Ok(ndarray::ArrayD::from_shape_vec(tensor.shape(), data)?)
    }
    // Integer results of tract's shape arithmetic come as its symbolic dimensions.
    let plain = match tensor.datum_type() {
        DatumType::TDim => tensor.cast_to::<i64>(),
        _ => Ok(std::borrow::Cow::Borrowed(tensor)),
    };
    let converted = plain.and_then(|plain| {
        Ok(match plain.datum_type() {
            DatumType::F32 => OurTensor::F32(copy(&plain)?),
            DatumType::F16 => OurTensor::F16(copy(&plain)?),
            DatumType::F64 => OurTensor::F64(copy(&plain)?),
            DatumType::I64 => OurTensor::I64(copy(&plain)?),
            DatumType::I32 => OurTensor::I32(copy(&plain)?),
            DatumType::U8 => OurTensor::U8(copy(&plain)?),
            DatumType::I8 => OurTensor::I8(copy(&plain)?),
            DatumType::Bool => OurTensor::Bool(copy(&plain)?),
            other => bail!("{other:?}"),
        })
    });
    converted.map_err(|e| EngineError::ElementType {
        name: name.to_owned(),
        found: format!("{e:#}"),
    })
}
