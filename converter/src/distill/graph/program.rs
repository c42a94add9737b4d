//! A part of a graph, ready to compute.

use std::collections::{HashMap, HashSet};

use candle_core::{DType, Device, Tensor};
use linfusion_models::graph::{Graph, NodeId, input, label, op};
use linfusion_models::onnx::proto::TensorProto;
use linfusion_models::onnx::{ElementType, OnnxFile, TensorData, TensorFault, attr_t};
use linfusion_models::shapes::eval::element;
use linfusion_models::shapes::{Elements, Fact, Shapes};
use linfusion_runtime::tensor::{DType as Given, Tensor as Fed};

use super::GraphError;
use super::lower::{Lowered, lower, shape};
use super::op::Op;

/// An attention that a function stands in for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced<'a> {
    /// The values that it reads.
    pub inputs: Vec<&'a str>,
    /// The value that it makes.
    pub output: &'a str,
}

/// The functions: which one, and its inputs as the graph has them; gives the output as the graph has it.
pub type Sites<'s> = &'s dyn Fn(usize, &[&Tensor]) -> candle_core::Result<Tensor>;

/// Where nothing is replaced.
pub const NO_SITES: Sites<'static> = &|site, _| candle_core::bail!("there is no attention {site}");

/// A part of a graph at fixed sizes.
pub struct Program {
    pub(super) steps: Vec<Step>,
    constants: HashMap<usize, Tensor>,
    inputs: Vec<(String, usize)>,
    pub(super) wanted: Vec<usize>,
    pub(super) values: Vec<Value>,
    device: Device,
}

/// One operation.
pub(super) struct Step {
    pub label: String,
    work: Work,
    pub inputs: Vec<Option<usize>>,
    pub outputs: Vec<Option<usize>>,
}

pub(super) enum Work {
    Op(Op),
    Site(usize),
}

/// What is known of a value.
pub(super) struct Value {
    pub name: String,
    /// Elements, where they are known.
    pub elements: usize,
    /// The last step that reads it; `None`: it is wanted, or nobody does.
    pub last: Option<usize>,
}

/// Values that have been computed, by number.
pub(super) type Values = HashMap<usize, Tensor>;

impl Program {
    /// The part of the file's graph that makes `wanted`, at the sizes that `shapes` has. The values `fed` are inputs beside the
    /// graph's own.
    ///
    /// # Errors
    /// An operator cannot be differentiated, a size is unknown, or a tensor cannot be read.
    pub fn new(
        file: &OnnxFile,
        shapes: &Shapes,
        replaced: &[Replaced<'_>],
        fed: &[&str],
        wanted: &[&str],
        device: &Device,
    ) -> Result<Self, GraphError> {
        let graph = Graph::new(&file.model.graph);
        let mut builder = Builder {
            file,
            shapes,
            replaced,
            fed,
            graph: &graph,
            numbers: HashMap::new(),
            program: Self {
                steps: Vec::new(),
                constants: HashMap::new(),
                inputs: Vec::new(),
                wanted: Vec::new(),
                values: Vec::new(),
                device: device.clone(),
            },
        };
        builder.build(wanted)?;
        Ok(builder.program)
    }

    /// Computes the wanted values.
    ///
    /// # Errors
    /// An input is missing or an operation fails.
    pub fn run(
        &self,
        inputs: &[(String, Fed)],
        sites: Sites<'_>,
    ) -> Result<Vec<Tensor>, GraphError> {
        let mut values = self.begin(inputs)?;
        for (at, step) in self.steps.iter().enumerate() {
            self.step(step, &mut values, sites)?;
            self.forget(at, step, &mut values);
        }
        self.results(&values)
    }

    /// The constants and the inputs.
    pub(super) fn begin(&self, inputs: &[(String, Fed)]) -> Result<Values, GraphError> {
        let mut values = self.constants.clone();
        for (name, number) in &self.inputs {
            let given = inputs.iter().find(|(n, _)| n == name);
            let (_, tensor) =
                given.ok_or_else(|| GraphError::value(name, "is an input that is not given"))?;
            values.insert(*number, tensor_of(name, tensor, &self.device)?);
        }
        Ok(values)
    }

    pub(super) fn step(
        &self,
        step: &Step,
        values: &mut Values,
        sites: Sites<'_>,
    ) -> Result<(), GraphError> {
        let mut read = Vec::with_capacity(step.inputs.len());
        for number in &step.inputs {
            read.push(match number {
                None => None,
                Some(number) => Some(self.value(*number, values)?),
            });
        }
        let made = match &step.work {
            Work::Site(site) => {
                let given: Vec<&Tensor> = read.into_iter().flatten().collect();
                sites(*site, &given).map(|out| vec![out])
            }
            Work::Op(op) => op.apply(&read),
        };
        let made = made.map_err(GraphError::at(&step.label))?;
        for (number, tensor) in step.outputs.iter().zip(made) {
            if let Some(number) = number {
                values.insert(*number, tensor);
            }
        }
        Ok(())
    }

    fn value<'v>(&self, number: usize, values: &'v Values) -> Result<&'v Tensor, GraphError> {
        values.get(&number).ok_or_else(|| {
            let name = self.values.get(number).map_or("", |v| v.name.as_str());
            GraphError::value(name, "is read before it is made")
        })
    }

    /// Drops what no later step reads.
    pub(super) fn forget(&self, at: usize, step: &Step, values: &mut Values) {
        let numbers = step.inputs.iter().chain(&step.outputs).flatten();
        for number in numbers {
            let last = self.values.get(*number).and_then(|v| v.last);
            let spent = last.map_or(!self.wanted.contains(number), |last| last <= at);
            if spent && !self.wanted.contains(number) {
                values.remove(number);
            }
        }
    }

    pub(super) fn results(&self, values: &Values) -> Result<Vec<Tensor>, GraphError> {
        let wanted = self.wanted.iter();
        wanted.map(|n| self.value(*n, values).cloned()).collect()
    }

    pub(super) fn is_site(step: &Step) -> bool {
        matches!(step.work, Work::Site(_))
    }
}

struct Builder<'a> {
    file: &'a OnnxFile,
    shapes: &'a Shapes,
    replaced: &'a [Replaced<'a>],
    fed: &'a [&'a str],
    graph: &'a Graph<'a>,
    numbers: HashMap<String, usize>,
    program: Program,
}

impl<'a> Builder<'a> {
    fn build(&mut self, wanted: &[&'a str]) -> Result<(), GraphError> {
        let mut lowered: HashMap<NodeId, Lowered> = HashMap::new();
        let mut sites: HashMap<NodeId, usize> = HashMap::new();
        let mut seen: HashSet<&str> = HashSet::new();
        let mut stack: Vec<&str> = wanted.to_vec();
        while let Some(value) = stack.pop() {
            if !seen.insert(value) {
                continue;
            }
            let site = self.replaced.iter().position(|r| r.output == value);
            let producer = self.graph.producer(value).map(|port| port.node);
            if let (Some(site), Some(node), Some(replaced)) =
                (site, producer, site.and_then(|s| self.replaced.get(s)))
            {
                sites.insert(node, site);
                stack.extend(&replaced.inputs);
                continue;
            }
            if let Some(constant) = self.constant(value)? {
                let number = self.number(value);
                self.program.constants.insert(number, constant);
                continue;
            }
            let Some(id) = producer.filter(|_| !self.fed.contains(&value)) else {
                if !self.is_input(value) {
                    return Err(GraphError::value(
                        value,
                        "is neither made nor stored nor an input",
                    ));
                }
                let number = self.number(value);
                self.program.inputs.push((value.to_owned(), number));
                continue;
            };
            if lowered.contains_key(&id) {
                continue;
            }
            let node = self.graph.node(id);
            let found = lower(node, self.shapes)?;
            stack.extend(found.reads.iter().filter_map(|slot| input(node, *slot)));
            lowered.insert(id, found);
        }
        self.steps(lowered, &sites)?;
        for value in wanted {
            let number = self.number(value);
            self.program.wanted.push(number);
        }
        self.settle();
        Ok(())
    }

    fn is_input(&self, value: &str) -> bool {
        let mut own = self.graph.proto.input.iter();
        self.fed.contains(&value) || own.any(|i| i.name.as_deref() == Some(value))
    }

    fn steps(
        &mut self,
        mut lowered: HashMap<NodeId, Lowered>,
        sites: &HashMap<NodeId, usize>,
    ) -> Result<(), GraphError> {
        for (id, node) in self.graph.nodes() {
            let (work, inputs, outputs) = if let Some(site) = sites.get(&id) {
                let Some(replaced) = self.replaced.get(*site) else {
                    continue;
                };
                let inputs = replaced.inputs.iter();
                let inputs = inputs.map(|name| Some(self.number(name))).collect();
                let output = self.number(replaced.output);
                (Work::Site(*site), inputs, vec![Some(output)])
            } else if let Some(found) = lowered.remove(&id) {
                let slots = found.reads.iter();
                let inputs: Vec<Option<usize>> = slots
                    .map(|slot| input(node, *slot).map(|name| self.number(name)))
                    .collect();
                let named = |name: &String| (!name.is_empty()).then(|| self.number(name));
                let outputs = node.output.iter().map(named).collect();
                (Work::Op(found.op), inputs, outputs)
            } else {
                continue;
            };
            let step = Step {
                label: label(node).to_owned(),
                work,
                inputs,
                outputs,
            };
            self.add(step)?;
        }
        Ok(())
    }

    /// Takes a step, or its result where all that it reads is constant.
    fn add(&mut self, step: Step) -> Result<(), GraphError> {
        let known = |n: &usize| self.program.constants.contains_key(n);
        let constant = !Program::is_site(&step) && step.inputs.iter().flatten().all(known);
        match constant {
            true => {
                let mut values = std::mem::take(&mut self.program.constants);
                let done = self.program.step(&step, &mut values, NO_SITES);
                self.program.constants = values;
                done
            }
            false => {
                self.program.steps.push(step);
                Ok(())
            }
        }
    }

    /// Who reads what last, and which constants stay.
    fn settle(&mut self) {
        let program = &mut self.program;
        for (at, step) in program.steps.iter().enumerate() {
            for number in step.inputs.iter().flatten() {
                if let Some(value) = program.values.get_mut(*number) {
                    value.last = Some(at);
                }
            }
        }
        let (values, wanted) = (&program.values, &program.wanted);
        let read = |n: &usize| values.get(*n).is_some_and(|v| v.last.is_some());
        program
            .constants
            .retain(|n, _| read(n) || wanted.contains(n));
    }

    fn number(&mut self, name: &str) -> usize {
        if let Some(number) = self.numbers.get(name) {
            return *number;
        }
        let number = self.program.values.len();
        self.numbers.insert(name.to_owned(), number);
        let dims = shape(self.shapes, name).unwrap_or_default();
        self.program.values.push(Value {
            name: name.to_owned(),
            elements: dims.iter().product(),
            last: None,
        });
        number
    }

    /// The value, where it is stored or follows from the sizes.
    fn constant(&self, value: &str) -> Result<Option<Tensor>, GraphError> {
        if let Some(stored) = self.graph.constant(value) {
            return self.stored(value, stored).map(Some);
        }
        let fact = self.shapes.fact(value);
        let made = match (&fact.elements, &fact.shape, filled(self.graph, value)) {
            (Some(elements), Some(_), _) => known(elements, fact, &self.program.device),
            (None, Some(_), Some(one)) => {
                let dims = shape(self.shapes, value).map_err(|p| GraphError::value(value, p))?;
                Tensor::full(one, dims, &self.program.device)
            }
            _ => return Ok(None),
        };
        made.map(Some).map_err(GraphError::at(value))
    }

    fn stored(&self, name: &str, tensor: &TensorProto) -> Result<Tensor, GraphError> {
        let data = self.file.tensor(tensor)?;
        let dims: Vec<usize> = data.dims.iter().map(|d| *d as usize).collect();
        let unreadable = |e: TensorFault| GraphError::value(name, format!("cannot be read: {e}"));
        let device = &self.program.device;
        let made = match data.element.is_compute_float() {
            true => Tensor::from_vec(data.to_f32_vec().map_err(unreadable)?, dims, device),
            false => {
                let values = data.to_i64_vec().map_err(unreadable)?;
                Tensor::from_vec(values, dims, device).and_then(|t| match data.element {
                    ElementType::Bool => t.to_dtype(DType::U8),
                    _ => Ok(t),
                })
            }
        };
        made.map_err(GraphError::at(name))
    }
}

/// The number that a large `ConstantOfShape` repeats.
fn filled(graph: &Graph<'_>, value: &str) -> Option<f32> {
    let node = graph.node(graph.producer(value)?.node);
    if op(node) != "ConstantOfShape" {
        return None;
    }
    let Some(one) = attr_t(node, "value") else {
        return Some(0.0);
    };
    let data = TensorData::inline(one).ok()?;
    data.to_f32_vec().ok()?.first().copied()
}

fn known(elements: &Elements, fact: &Fact, device: &Device) -> candle_core::Result<Tensor> {
    let dims: Vec<usize> = fact.shape.iter().flatten().map(|d| *d as usize).collect();
    match elements {
        Elements::Float(values) => {
            let values: Vec<f32> = values.iter().map(|v| *v as f32).collect();
            Tensor::from_vec(values, dims, device)
        }
        Elements::Int(values) => {
            let tensor = Tensor::from_vec(values.clone(), dims, device)?;
            match fact.element {
                Some(element::BOOL) => tensor.to_dtype(DType::U8),
                _ => Ok(tensor),
            }
        }
    }
}

/// A tensor as the program computes with it.
fn tensor_of(name: &str, tensor: &Fed, device: &Device) -> Result<Tensor, GraphError> {
    let dims = tensor.shape().to_vec();
    let kind = match tensor.dtype() {
        Given::Bool => Given::U8,
        float if float.is_float() => Given::F32,
        _ => Given::I64,
    };
    let made = match tensor.cast(kind) {
        Fed::F32(values) => Tensor::from_vec(values.into_iter().collect(), dims, device),
        Fed::U8(values) => Tensor::from_vec(values.into_iter().collect(), dims, device),
        Fed::I64(values) => Tensor::from_vec(values.into_iter().collect(), dims, device),
        _ => return Err(GraphError::value(name, "has a type that is not known here")),
    };
    made.map_err(GraphError::at(name))
}
