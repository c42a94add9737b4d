//! Arithmetic in small graphs that ONNX Runtime runs on the models' device. Coefficients, bounds and ranges are inputs, so that
//! each kind of operation is loaded once.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::num::NonZeroUsize;
use std::ops::Range;

use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, make};
use ndarray::{arr0, arr1};

use super::{Arithmetic, Form, cuttable, joinable, summands, unchanged, unfit};
use crate::engine::{Engine, EngineError, Location, Operators, Session, SessionOptions, Value};
use crate::tensor::{DType, Tensor};

/// Sessions of ONNX Runtime, one for each kind of operation that was asked for, with their memory until this is dropped.
pub struct Graphs {
    options: SessionOptions,
    sessions: HashMap<Operation, Session>,
}

impl Graphs {
    /// Where models with these options run.
    pub fn new(options: &SessionOptions) -> Self {
        Self {
            options: SessionOptions {
                operators: Operators::None,
                // A pool of threads for each of the sessions would be too many, and on a GPU they have nothing to do.
                threads: NonZeroUsize::new(1),
                profile: None,
                ..options.clone()
            },
            sessions: HashMap::new(),
        }
    }

    fn session(&mut self, operation: Operation) -> Result<&mut Session, EngineError> {
        match self.sessions.entry(operation) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let bytes = buffa::Message::encode_to_vec(&entry.key().model());
                let session = Session::from_bytes(Engine::Ort, &bytes, &self.options)?;
                Ok(entry.insert(session))
            }
        }
    }

    fn run(
        &mut self,
        operation: Operation,
        inputs: &[(String, Value)],
        to: Location,
    ) -> Result<Value, EngineError> {
        let outputs = self.session(operation)?.run_values(inputs, to)?;
        let first = outputs.into_iter().next();
        first.map(|(_, value)| value).ok_or_else(nothing)
    }
}

fn nothing() -> EngineError {
    EngineError::Run {
        engine: Engine::Ort,
        message: "a graph gave no output".to_owned(),
    }
}

impl Arithmetic for Graphs {
    fn location(&self) -> Location {
        Location::Device
    }

    fn upload(&mut self, tensor: Tensor) -> Result<Value, EngineError> {
        let operation = Operation::Copy {
            of: Kind::new(tensor.dtype(), tensor.shape()),
        };
        let session = self.session(operation)?;
        let adopted = session.adopt(tensor)?;
        let outputs = session.run_values(&[(input(0), adopted)], Location::Device)?;
        let first = outputs.into_iter().next();
        first.map(|(_, value)| value).ok_or_else(nothing)
    }

    fn download(&mut self, value: &Value) -> Result<Tensor, EngineError> {
        if let Some(tensor) = value.host() {
            return Ok(tensor.clone());
        }
        let operation = Operation::Copy {
            of: Kind::of(value),
        };
        let inputs = [(input(0), value.clone())];
        let copy = self.run(operation, &inputs, Location::Host)?;
        copy.into_host().ok_or_else(nothing)
    }

    fn sum(&mut self, terms: &[(f64, &Value)], form: Form) -> Result<Value, EngineError> {
        let values = summands(terms)?;
        if !form.dtype.is_float() {
            return Err(unfit("add", &values));
        }
        if let Some(value) = unchanged(terms, form) {
            return Ok(value);
        }
        let operation = Operation::Sum {
            terms: values.iter().map(|v| v.dtype()).collect(),
            rank: values.first().map_or(0, |v| v.shape().len()),
            bounded: form.bound.is_some(),
            dtype: form.dtype,
        };
        let scalar = |v: f64| Value::from(Tensor::from(arr0(v as f32)));
        let mut inputs = Vec::new();
        for (index, (coefficient, value)) in terms.iter().enumerate() {
            inputs.push((input(index), (*value).clone()));
            inputs.push((factor(index), scalar(*coefficient)));
        }
        if let Some(bound) = form.bound {
            inputs.push((LOWEST.to_owned(), scalar(-bound)));
            inputs.push((HIGHEST.to_owned(), scalar(bound)));
        }
        self.run(operation, &inputs, Location::Device)
    }

    fn join(&mut self, axis: usize, parts: &[&Value]) -> Result<Value, EngineError> {
        joinable(axis, parts)?;
        let first = match parts {
            [] => return Err(unfit("join", parts)),
            [only] => return Ok((*only).clone()),
            [first, ..] => first,
        };
        let operation = Operation::Join {
            of: Kind::of(first),
            count: parts.len(),
            axis,
        };
        let inputs = named(parts);
        self.run(operation, &inputs, Location::Device)
    }

    fn part(
        &mut self,
        value: &Value,
        axis: usize,
        range: Range<usize>,
    ) -> Result<Value, EngineError> {
        cuttable(value, axis, &range)?;
        if value.shape().get(axis) == Some(&range.len()) {
            return Ok(value.clone());
        }
        let operation = Operation::Part {
            of: Kind::of(value),
        };
        let index = |v: usize| {
            let v = i64::try_from(v).unwrap_or(i64::MAX);
            Value::from(Tensor::from(arr1(&[v])))
        };
        let mut inputs = named(&[value]);
        for (name, position) in [(START, range.start), (END, range.end), (AXIS, axis)] {
            inputs.push((name.to_owned(), index(position)));
        }
        self.run(operation, &inputs, Location::Device)
    }

    fn finite(&mut self, values: &[&Value]) -> Result<bool, EngineError> {
        let is_float = |value: &&Value| value.dtype().is_float();
        let floats: Vec<&Value> = values.iter().copied().filter(is_float).collect();
        if floats.is_empty() {
            return Ok(true);
        }
        let operation = Operation::Nought {
            of: floats.iter().map(|v| Kind::of(v)).collect(),
        };
        let sum = self.run(operation, &named(&floats), Location::Host)?;
        Ok(sum.host().is_some_and(Tensor::is_finite))
    }
}

fn named(values: &[&Value]) -> Vec<(String, Value)> {
    let named = values.iter().enumerate();
    named.map(|(i, v)| (input(i), (*v).clone())).collect()
}

fn input(index: usize) -> String {
    format!("x{index}")
}

fn factor(index: usize) -> String {
    format!("c{index}")
}

const LOWEST: &str = "lowest";
const HIGHEST: &str = "highest";
const START: &str = "start";
const END: &str = "end";
const AXIS: &str = "axis";
const RESULT: &str = "y";

/// Type and number of axes, which an input declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    dtype: DType,
    rank: usize,
}

impl Kind {
    fn new(dtype: DType, shape: &[usize]) -> Self {
        Self {
            dtype,
            rank: shape.len(),
        }
    }

    fn of(value: &Value) -> Self {
        Self::new(value.dtype(), value.shape())
    }
}

/// A graph of standard operators.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Operation {
    Copy {
        of: Kind,
    },
    /// In single precision.
    Sum {
        terms: Vec<DType>,
        rank: usize,
        bounded: bool,
        dtype: DType,
    },
    Join {
        of: Kind,
        count: usize,
        axis: usize,
    },
    Part {
        of: Kind,
    },
    /// The sum of all elements' products with 0: 0 where they are finite, else not a number.
    Nought {
        of: Vec<Kind>,
    },
}

/// A graph that grows node by node.
#[derive(Default)]
struct Builder {
    graph: GraphProto,
}

impl Builder {
    fn input(&mut self, name: String, kind: Kind) -> String {
        let dims = vec![make::Dim::Unknown; kind.rank];
        let info = make::value_info(&name, element(kind.dtype), &dims);
        self.graph.input.push(info);
        name
    }

    /// Adds a node and gives the name of its output.
    fn node(&mut self, op: &str, inputs: &[&str]) -> String {
        let name = format!("v{}", self.graph.node.len());
        let node = make::node(op, &name, inputs, &[&name], vec![]);
        self.graph.node.push(node);
        name
    }

    fn last(&mut self) -> Option<&mut NodeProto> {
        self.graph.node.last_mut()
    }

    fn cast(&mut self, value: String, from: DType, to: DType) -> String {
        if from == to {
            return value;
        }
        let cast = self.node("Cast", &[&value]);
        if let Some(node) = self.last() {
            let to = i64::from(element(to).onnx());
            node.attribute.push(make::int("to", to));
        }
        cast
    }

    fn add(&mut self, terms: &[String]) -> String {
        let names: Vec<&str> = terms.iter().map(String::as_str).collect();
        match names.as_slice() {
            [only] => (*only).to_owned(),
            _ => self.node("Sum", &names),
        }
    }

    /// The model with that result.
    fn finish(mut self, result: &str, kind: Kind) -> ModelProto {
        let end = make::node("Identity", "end", &[result], &[RESULT], vec![]);
        self.graph.node.push(end);
        self.graph.name = Some("arithmetic".to_owned());
        let dims = vec![make::Dim::Unknown; kind.rank];
        let info = make::value_info(RESULT, element(kind.dtype), &dims);
        self.graph.output.push(info);
        ModelProto {
            ir_version: Some(8),
            opset_import: vec![make::opset("", 17)],
            graph: buffa::MessageField::some(self.graph),
            ..ModelProto::default()
        }
    }
}

const SCALAR: Kind = Kind {
    dtype: DType::F32,
    rank: 0,
};
const INDEX: Kind = Kind {
    dtype: DType::I64,
    rank: 1,
};

impl Operation {
    fn model(&self) -> ModelProto {
        let mut graph = Builder::default();
        match self {
            Self::Copy { of } => {
                let x = graph.input(input(0), *of);
                graph.finish(&x, *of)
            }
            Self::Sum {
                terms,
                rank,
                bounded,
                dtype,
            } => {
                let kind = |dtype| Kind { dtype, rank: *rank };
                let products: Vec<String> = terms
                    .iter()
                    .enumerate()
                    .map(|(index, from)| {
                        let x = graph.input(input(index), kind(*from));
                        let c = graph.input(factor(index), SCALAR);
                        let x = graph.cast(x, *from, DType::F32);
                        graph.node("Mul", &[&x, &c])
                    })
                    .collect();
                let mut sum = graph.add(&products);
                if *bounded {
                    let lowest = graph.input(LOWEST.to_owned(), SCALAR);
                    let highest = graph.input(HIGHEST.to_owned(), SCALAR);
                    sum = graph.node("Clip", &[&sum, &lowest, &highest]);
                }
                let rounded = graph.cast(sum, DType::F32, *dtype);
                graph.finish(&rounded, kind(*dtype))
            }
            Self::Join { of, count, axis } => {
                let parts: Vec<String> = (0..*count).map(|i| graph.input(input(i), *of)).collect();
                let names: Vec<&str> = parts.iter().map(String::as_str).collect();
                let joined = graph.node("Concat", &names);
                if let Some(node) = graph.last() {
                    let axis = i64::try_from(*axis).unwrap_or(i64::MAX);
                    node.attribute.push(make::int("axis", axis));
                }
                graph.finish(&joined, *of)
            }
            Self::Part { of } => {
                let x = graph.input(input(0), *of);
                let [start, end, axis] =
                    [START, END, AXIS].map(|name| graph.input(name.to_owned(), INDEX));
                let part = graph.node("Slice", &[&x, &start, &end, &axis]);
                graph.finish(&part, *of)
            }
            Self::Nought { of } => {
                let noughts: Vec<String> = of
                    .iter()
                    .enumerate()
                    .map(|(index, kind)| {
                        let x = graph.input(input(index), *kind);
                        graph.nought(x, kind.dtype)
                    })
                    .collect();
                let sum = graph.add(&noughts);
                graph.finish(&sum, SCALAR)
            }
        }
    }
}

impl Builder {
    fn nought(&mut self, x: String, dtype: DType) -> String {
        // Not all devices multiply bf16.
        let (x, dtype) = match dtype {
            DType::BF16 => (self.cast(x, dtype, DType::F32), DType::F32),
            _ => (x, dtype),
        };
        let name = format!("zero{}", self.graph.initializer.len());
        let zero: TensorProto = match make::encode_f32(element(dtype), &[0.0]) {
            Some(encoded) => make::tensor(&name, element(dtype), &[], encoded.bytes),
            None => make::tensor_f32(&name, &[], &[0.0]),
        };
        self.graph.initializer.push(zero);
        let product = self.node("Mul", &[&x, &name]);
        let sum = self.node("ReduceSum", &[&product]);
        if let Some(node) = self.last() {
            node.attribute.push(make::int("keepdims", 0));
        }
        self.cast(sum, dtype, DType::F32)
    }
}

fn element(dtype: DType) -> ElementType {
    match dtype {
        DType::F32 => ElementType::F32,
        DType::F16 => ElementType::F16,
        DType::BF16 => ElementType::Bf16,
        DType::F64 => ElementType::F64,
        DType::I64 => ElementType::I64,
        DType::I32 => ElementType::I32,
        DType::U8 => ElementType::U8,
        DType::I8 => ElementType::I8,
        DType::Bool => ElementType::Bool,
    }
}
