//! What a model takes and gives, as Triton is to be told.

use std::collections::HashSet;
use std::path::Path;

use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::make::{Dim, tensor_type_of};
use linfusion_models::onnx::proto::ValueInfoProto;
use linfusion_ops::schema::DOMAIN;

use super::config::{DataType, Port};
use super::error::TritonError;

/// Inputs and outputs of a graph, and what else of it matters to a server.
#[derive(Debug)]
pub struct Signature {
    inputs: Vec<Declared>,
    outputs: Vec<Declared>,
    /// Whether the first dimension of everything is one batch.
    pub batch: Batch,
    /// Whether the model has LinFusion's operators.
    pub operators: Operators,
}

/// Whether Triton may put requests together along the first dimension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Batch {
    /// All inputs and outputs begin with the same open dimension.
    Open,
    /// They don't: why.
    None(String),
}

/// Whether a model has LinFusion's operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operators {
    /// It has none.
    None,
    /// With their definition in standard operators: the library makes them faster.
    Defined,
    /// Alone: the model needs the library.
    Undefined,
}

#[derive(Debug)]
struct Declared {
    name: String,
    data_type: DataType,
    dims: Vec<Dim>,
}

impl Signature {
    /// Reads it off an opened model.
    ///
    /// # Errors
    /// A tensor has a type that Triton hasn't, or no known rank.
    pub fn of(file: &OnnxFile) -> Result<Self, TritonError> {
        let graph = &*file.model.graph;
        let constants: HashSet<&str> = graph
            .initializer
            .iter()
            .filter_map(|t| t.name.as_deref())
            .collect();
        let declared = |values: &[ValueInfoProto]| {
            values
                .iter()
                .filter(|v| !constants.contains(v.name.as_deref().unwrap_or_default()))
                .map(|value| Declared::of(value, file.path()))
                .collect::<Result<Vec<_>, _>>()
        };
        let (inputs, outputs) = (declared(&graph.input)?, declared(&graph.output)?);
        Ok(Self {
            batch: batch(inputs.iter().chain(&outputs)),
            operators: operators(file),
            inputs,
            outputs,
        })
    }

    /// The inputs as Triton is told with this `max_batch_size`.
    pub fn inputs(&self, max_batch: u32) -> Vec<Port> {
        self.inputs.iter().map(|d| d.port(max_batch)).collect()
    }

    /// The outputs as Triton is told with this `max_batch_size`.
    pub fn outputs(&self, max_batch: u32) -> Vec<Port> {
        self.outputs.iter().map(|d| d.port(max_batch)).collect()
    }
}

impl Declared {
    fn of(value: &ValueInfoProto, path: &Path) -> Result<Self, TritonError> {
        let name = value.name.clone().unwrap_or_default();
        let fault = |problem: String| TritonError::Tensor {
            path: path.to_owned(),
            tensor: name.clone(),
            problem,
        };
        let (element, dims) = tensor_type_of(value).ok_or_else(|| {
            fault("is no tensor of a known type; Triton takes only tensors".to_owned())
        })?;
        let data_type = DataType::of(element).ok_or_else(|| {
            fault(format!(
                "is of type {}, which Triton hasn't",
                element.name()
            ))
        })?;
        let dims = dims.ok_or_else(|| {
            fault("has no declared shape; export the model with its shapes".to_owned())
        })?;
        Ok(Self {
            name,
            data_type,
            dims,
        })
    }

    /// Without the batch, if there is one; with a dimension of 1 in the place of none, because Triton knows no scalars.
    fn port(&self, max_batch: u32) -> Port {
        let own = match max_batch {
            0 => self.dims.as_slice(),
            _ => self.dims.get(1..).unwrap_or_default(),
        };
        let own: Vec<i64> = own.iter().map(size).collect();
        let (dims, reshape) = match (own.is_empty(), max_batch) {
            (false, _) => (own, None),
            // The backend makes a scalar of it by itself; a reshape to nothing is an error without a batch.
            (true, 0) => (vec![1], None),
            (true, _) => (vec![1], Some(own)),
        };
        Port {
            name: self.name.clone(),
            data_type: self.data_type,
            dims,
            reshape,
        }
    }
}

fn size(dim: &Dim) -> i64 {
    match dim {
        Dim::Fixed(size) => *size,
        Dim::Named(_) | Dim::Unknown => -1,
    }
}

fn batch<'d>(tensors: impl Iterator<Item = &'d Declared>) -> Batch {
    let mut common: Option<(&str, &str)> = None;
    for tensor in tensors {
        let name = &tensor.name;
        let first = match tensor.dims.first() {
            Some(Dim::Named(first)) => first,
            Some(Dim::Fixed(size)) => {
                return Batch::None(format!("the first dimension of `{name}` is always {size}"));
            }
            Some(Dim::Unknown) => {
                return Batch::None(format!("the first dimension of `{name}` has no name"));
            }
            None => return Batch::None(format!("`{name}` is one number for a whole batch")),
        };
        match common {
            Some((other, symbol)) if symbol != first => {
                return Batch::None(format!(
                    "`{other}` begins with the dimension `{symbol}`, `{name}` with `{first}`"
                ));
            }
            Some(_) => {}
            None => common = Some((name, first)),
        }
    }
    Batch::Open
}

fn operators(file: &OnnxFile) -> Operators {
    let ours = |domain: &Option<String>| domain.as_deref() == Some(DOMAIN);
    let model = &file.model;
    let defined = model.functions.iter().any(|f| ours(&f.domain));
    let used = model.opset_import.iter().any(|o| ours(&o.domain));
    match (defined, used) {
        (true, _) => Operators::Defined,
        (false, true) => Operators::Undefined,
        (false, false) => Operators::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linfusion_models::onnx::ElementType;
    use linfusion_models::onnx::make::value_info;

    fn declared(name: &str, dims: &[Dim]) -> Declared {
        Declared::of(
            &value_info(name, ElementType::F32, dims),
            Path::new("m.onnx"),
        )
        .unwrap()
    }

    fn named(name: &str) -> Dim {
        Dim::Named(name.to_owned())
    }

    #[test]
    fn a_batch_is_one_open_dimension_of_everything() {
        let sample = declared("sample", &[named("batch"), Dim::Fixed(4)]);
        let step = declared("timestep", &[named("batch")]);
        assert_eq!(batch([&sample, &step].into_iter()), Batch::Open);
        let misses = [
            (vec![], "`t` is one number"),
            (vec![named("steps")], "`batch`, `t` with `steps`"),
            (vec![Dim::Fixed(2)], "`t` is always 2"),
            (vec![Dim::Unknown], "`t` has no name"),
        ];
        for (dims, expected) in misses {
            let other = declared("t", &dims);
            let Batch::None(why) = batch([&sample, &other].into_iter()) else {
                panic!("{dims:?} is a batch");
            };
            assert!(why.contains(expected), "{why}");
        }
    }

    #[test]
    fn nothing_is_left_without_dimensions() {
        let step = declared("timestep", &[named("batch")]);
        let port = step.port(4);
        assert_eq!((port.dims, port.reshape), (vec![1], Some(vec![])));
        let port = step.port(0);
        assert_eq!((port.dims, port.reshape), (vec![-1], None));
        let scalar = declared("timestep", &[]).port(0);
        assert_eq!((scalar.dims, scalar.reshape), (vec![1], None));
    }

    #[test]
    fn what_triton_lacks_is_refused_by_name() {
        let odd = value_info("x", ElementType::Complex64, &[Dim::Fixed(1)]);
        let error = Declared::of(&odd, Path::new("m.onnx"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("m.onnx: `x` is of type complex64"),
            "{error}"
        );
        let open = ValueInfoProto {
            name: Some("y".to_owned()),
            r#type: linfusion_models::onnx::make::tensor_type(ElementType::F32, None).into(),
            ..ValueInfoProto::default()
        };
        let error = Declared::of(&open, Path::new("m.onnx"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("`y` has no declared shape"), "{error}");
    }
}
