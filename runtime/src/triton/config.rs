//! A model's configuration, `config.pbtxt`: the fields of `inference.ModelConfig` that are written here.

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::num::NonZeroU32;

use linfusion_models::onnx::ElementType;

use super::text_format::Fields;

/// `ModelConfig`. [`fmt::Display`] writes it in protobuf's text format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelConfig {
    /// The model's name, which is that of its folder.
    pub name: String,
    /// What runs it.
    pub platform: Platform,
    /// The largest batch that Triton makes of several requests, or takes in one; 0 if the first dimension is no batch to
    /// Triton, which then passes tensors on as they are.
    pub max_batch_size: u32,
    /// What it takes.
    pub inputs: Vec<Port>,
    /// What it gives.
    pub outputs: Vec<Port>,
    /// How requests are put together.
    pub dynamic_batching: Option<DynamicBatching>,
    /// Copies that run at once; an ensemble has none.
    pub instances: Option<InstanceGroup>,
    /// Paths, as the server sees them, of libraries of ONNX Runtime operators.
    pub operator_libraries: Vec<String>,
    /// Parameters of the backend.
    pub parameters: BTreeMap<&'static str, String>,
    /// An ensemble's models.
    pub steps: Vec<Step>,
}

/// `ModelConfig.platform`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// An ONNX file in ONNX Runtime.
    OnnxRuntime,
    /// Other models, wired up.
    Ensemble,
}

/// `ModelInput` or `ModelOutput`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    /// Its name in the graph.
    pub name: String,
    /// Its element type.
    pub data_type: DataType,
    /// Its dimensions without the batch, −1 for any size. Triton wants at least one.
    pub dims: Vec<i64>,
    /// The model's own dimensions where `dims` had to have one more.
    pub reshape: Option<Vec<i64>>,
}

/// `DataType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names are the documentation
pub enum DataType {
    Bool,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Int8,
    Int16,
    Int32,
    Int64,
    Fp16,
    Fp32,
    Fp64,
    String,
    Bf16,
}

/// `ModelDynamicBatching`, with all defaults: requests that wait are put together, and none is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DynamicBatching;

/// `ModelInstanceGroup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InstanceGroup {
    /// On what.
    pub kind: InstanceKind,
    /// How many; with [`InstanceKind::Gpu`] on each GPU.
    pub count: NonZeroU32,
}

/// `ModelInstanceGroup.Kind`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceKind {
    /// On the server's GPUs if it has any, else on its processor.
    Auto,
    /// On each of the server's GPUs.
    Gpu,
    /// On the processor.
    Cpu,
}

/// `ModelEnsembling.Step`: one model of an ensemble.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The model; its newest version runs.
    pub model: String,
    /// From the model's inputs to the ensemble's tensors.
    pub inputs: BTreeMap<String, String>,
    /// From the model's outputs to the ensemble's tensors.
    pub outputs: BTreeMap<String, String>,
}

impl DataType {
    /// The type that stands for an ONNX one; `None` where Triton has none.
    pub fn of(element: ElementType) -> Option<Self> {
        Some(match element {
            ElementType::Bool => Self::Bool,
            ElementType::U8 => Self::Uint8,
            ElementType::U16 => Self::Uint16,
            ElementType::U32 => Self::Uint32,
            ElementType::U64 => Self::Uint64,
            ElementType::I8 => Self::Int8,
            ElementType::I16 => Self::Int16,
            ElementType::I32 => Self::Int32,
            ElementType::I64 => Self::Int64,
            ElementType::F16 => Self::Fp16,
            ElementType::F32 => Self::Fp32,
            ElementType::F64 => Self::Fp64,
            ElementType::String => Self::String,
            ElementType::Bf16 => Self::Bf16,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Bool => "TYPE_BOOL",
            Self::Uint8 => "TYPE_UINT8",
            Self::Uint16 => "TYPE_UINT16",
            Self::Uint32 => "TYPE_UINT32",
            Self::Uint64 => "TYPE_UINT64",
            Self::Int8 => "TYPE_INT8",
            Self::Int16 => "TYPE_INT16",
            Self::Int32 => "TYPE_INT32",
            Self::Int64 => "TYPE_INT64",
            Self::Fp16 => "TYPE_FP16",
            Self::Fp32 => "TYPE_FP32",
            Self::Fp64 => "TYPE_FP64",
            Self::String => "TYPE_STRING",
            Self::Bf16 => "TYPE_BF16",
        }
    }
}

impl Platform {
    fn name(self) -> &'static str {
        match self {
            Self::OnnxRuntime => "onnxruntime_onnx",
            Self::Ensemble => "ensemble",
        }
    }
}

impl InstanceKind {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "KIND_AUTO",
            Self::Gpu => "KIND_GPU",
            Self::Cpu => "KIND_CPU",
        }
    }
}

impl Port {
    fn write<W: Write>(&self, fields: &mut Fields<'_, W>) -> fmt::Result {
        fields.string("name", &self.name)?;
        fields.plain("data_type", self.data_type.name())?;
        fields.list("dims", &self.dims)?;
        match &self.reshape {
            Some(shape) => fields.message("reshape", |inner| inner.list("shape", shape)),
            None => Ok(()),
        }
    }
}

impl Step {
    fn write<W: Write>(&self, fields: &mut Fields<'_, W>) -> fmt::Result {
        fields.string("model_name", &self.model)?;
        fields.plain("model_version", -1)?;
        for (model, ensemble) in &self.inputs {
            fields.entry("input_map", model, ensemble)?;
        }
        for (model, ensemble) in &self.outputs {
            fields.entry("output_map", model, ensemble)?;
        }
        Ok(())
    }
}

impl fmt::Display for ModelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut fields = Fields::new(f);
        fields.string("name", &self.name)?;
        fields.string("platform", self.platform.name())?;
        fields.plain("max_batch_size", self.max_batch_size)?;
        for port in &self.inputs {
            fields.message("input", |inner| port.write(inner))?;
        }
        for port in &self.outputs {
            fields.message("output", |inner| port.write(inner))?;
        }
        if let Some(DynamicBatching) = self.dynamic_batching {
            fields.message("dynamic_batching", |_| Ok(()))?;
        }
        if let Some(group) = self.instances {
            fields.message("instance_group", |inner| {
                inner.plain("kind", group.kind.name())?;
                inner.plain("count", group.count)
            })?;
        }
        if !self.operator_libraries.is_empty() {
            fields.message("model_operations", |inner| {
                let mut paths = self.operator_libraries.iter();
                paths.try_for_each(|path| inner.string("op_library_filename", path))
            })?;
        }
        for (key, value) in &self.parameters {
            fields.message("parameters", |inner| {
                inner.string("key", key)?;
                inner.message("value", |v| v.string("string_value", value))
            })?;
        }
        if !self.steps.is_empty() {
            fields.message("ensemble_scheduling", |inner| {
                let mut steps = self.steps.iter();
                steps.try_for_each(|step| inner.message("step", |s| step.write(s)))
            })?;
        }
        Ok(())
    }
}
