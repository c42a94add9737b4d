//! A model of two small attentions over an image, and what it is to learn.

use std::path::{Path, PathBuf};

use buffa::Message;
use linfusion_convert::distill::{DistillError, Progress, Report, Request, Schedule, Source, run};
use linfusion_models::onnx::ElementType;
use linfusion_models::onnx::make::{
    Dim, int, ints, node, opset, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::random::SplitMix64;
use tempfile::TempDir;

pub const DIM: usize = 8;
pub const SIDE: usize = 8;
pub const MODULES: [&str; 2] = ["blocks.0.attn1", "blocks.1.attn1"];

/// What the attentions of a model look at.
#[derive(Clone, Copy, PartialEq)]
pub enum Looks {
    /// Wherever random weights lead.
    Anywhere,
    /// At their neighbours: keys and queries are the places of tokens.
    Near,
}

struct Sketch {
    nodes: Vec<NodeProto>,
    stored: Vec<TensorProto>,
    random: SplitMix64,
}

impl Sketch {
    fn op(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        let value = format!("{name}_out");
        self.nodes.push(node(op, name, inputs, &[&value], vec![]));
        value
    }

    fn turned(&mut self, name: &str, input: &str, perm: &[i64]) -> String {
        let value = self.op("Transpose", name, &[input]);
        self.nodes.last_mut().unwrap().attribute = vec![ints("perm", perm)];
        value
    }

    fn shaped(&mut self, name: &str, input: &str, to: &[i64]) -> String {
        let shape = format!("{name}/shape");
        self.stored.push(tensor_i64(&shape, &[to.len() as i64], to));
        self.op("Reshape", name, &[input, &shape])
    }

    fn weight(&mut self, name: &str, dims: &[i64], values: Option<Vec<f32>>) -> String {
        let count = dims.iter().product::<i64>() as usize;
        let random = &mut self.random;
        let mut draw = || 0.7 * random.symmetric() as f32;
        let values = values.unwrap_or_else(|| (0..count).map(|_| draw()).collect());
        self.stored.push(tensor_f32(name, dims, &values));
        name.to_owned()
    }

    fn linear(&mut self, name: &str, input: &str, weight: Option<Vec<f32>>) -> String {
        let dims = [DIM as i64, DIM as i64];
        let weight = self.weight(
            &format!("{}.weight", name.trim_start_matches('/')),
            &dims,
            weight,
        );
        self.op("MatMul", &format!("{name}/MatMul"), &[input, &weight])
    }

    fn attention(&mut self, module: &str, x: &str, looks: Looks) -> String {
        let at = |part: &str| format!("/{}/{part}", module.replace(".attn1", "/attn1"));
        // The first four channels are places.
        let sharp = |places: bool| {
            let entry = |i: usize| {
                let here = (i / DIM == i % DIM) && ((i / DIM < 4) == places);
                if here {
                    if places { 7.0 } else { 1.0 }
                } else {
                    0.0
                }
            };
            (looks == Looks::Near).then(|| (0..DIM * DIM).map(entry).collect::<Vec<f32>>())
        };
        let (heads, split): (i64, [i64; 4]) = match looks {
            Looks::Anywhere => (2, [0, 0, 2, 4]),
            Looks::Near => (1, [0, 0, 1, 8]),
        };
        let mut operand = |part: &str, perm: &[i64], weight| {
            let value = self.linear(&at(part), x, weight);
            let value = self.shaped(&at(&format!("{part}_split")), &value, &split);
            self.turned(&at(&format!("{part}_heads")), &value, perm)
        };
        let q = operand("to_q", &[0, 2, 1, 3], sharp(true));
        let k = operand("to_k", &[0, 2, 3, 1], sharp(true));
        let v = operand("to_v", &[0, 2, 1, 3], sharp(false));
        let scores = self.op("MatMul", &at("scores"), &[&q, &k]);
        let scale = (DIM as f32 / heads as f32).sqrt().recip();
        let scale = self.weight(&at("scale"), &[], Some(vec![scale]));
        let scaled = self.op("Mul", &at("scaled"), &[&scores, &scale]);
        let softmax = self.op("Softmax", &at("softmax"), &[&scaled]);
        self.nodes.last_mut().unwrap().attribute = vec![int("axis", -1)];
        let attended = self.op("MatMul", &at("attended"), &[&softmax, &v]);
        let merged = self.turned(&at("turned"), &attended, &[0, 2, 1, 3]);
        let merged = self.shaped(&at("merged"), &merged, &[0, 0, DIM as i64]);
        let out = self.linear(&at("to_out.0"), &merged, None);
        let bias = self.weight(&at("to_out.0/bias"), &[DIM as i64], None);
        let out = self.op("Add", &at("to_out.0/Add"), &[&out, &bias]);
        self.op("Add", &at("residual"), &[x, &out])
    }
}

/// `y` of an image `sample` `[1, 4, 8, 8]` and a number `t`, through two attentions.
pub fn model(folder: &Path, looks: Looks) -> PathBuf {
    let mut sketch = Sketch {
        nodes: Vec::new(),
        stored: Vec::new(),
        random: SplitMix64::new(4),
    };
    let s = &mut sketch;
    let stem = match looks {
        Looks::Anywhere => None,
        // The image goes to the last four channels.
        Looks::Near => {
            let entry = |i: usize| if i / 4 == i % 4 + 4 { 1.0 } else { 0.0 };
            Some((0..DIM * 4).map(entry).collect())
        }
    };
    let weight = s.weight("stem.weight", &[DIM as i64, 4, 1, 1], stem);
    let x = s.op("Conv", "stem", &["sample", &weight]);
    let x = s.op("Mul", "timed", &[&x, "t"]);
    let x = s.shaped("flat", &x, &[0, DIM as i64, -1]);
    let mut x = s.turned("tokens", &x, &[0, 2, 1]);
    if looks == Looks::Near {
        let angle = |i: usize| i as f32 * std::f32::consts::PI / SIDE as f32;
        let place = |token: usize| {
            let (row, column) = (angle(token / SIDE), angle(token % SIDE));
            [
                row.cos(),
                row.sin(),
                column.cos(),
                column.sin(),
                0.0,
                0.0,
                0.0,
                0.0,
            ]
        };
        let places = (0..SIDE * SIDE).flat_map(place).collect();
        let places = s.weight(
            "places",
            &[1, (SIDE * SIDE) as i64, DIM as i64],
            Some(places),
        );
        x = s.op("Add", "placed", &[&x, &places]);
    }
    for module in MODULES {
        x = s.attention(module, &x, looks);
    }
    let x = s.turned("channels", &x, &[0, 2, 1]);
    let x = s.shaped("image", &x, &[0, DIM as i64, SIDE as i64, SIDE as i64]);
    let weight = s.weight("head.weight", &[4, DIM as i64, 1, 1], None);
    s.nodes
        .push(node("Conv", "head", &[&x, &weight], &["y"], vec![]));
    let image = [1, 4, SIDE as i64, SIDE as i64].map(Dim::Fixed);
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17)],
        graph: GraphProto {
            name: Some("sketch".to_owned()),
            node: sketch.nodes,
            initializer: sketch.stored,
            input: vec![
                value_info("sample", ElementType::F32, &image),
                value_info("t", ElementType::F32, &[Dim::Fixed(1)]),
            ],
            output: vec![value_info("y", ElementType::F32, &image)],
            ..GraphProto::default()
        }
        .into(),
        ..ModelProto::default()
    };
    let path = folder.join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    path
}

pub const SPEC: &str = r#"{"sample": {"normal": {}}, "t": {"uniform": {"min": 0.5, "max": 1.5}}}"#;

pub fn request(folder: &Path, looks: Looks) -> Request {
    let spec = folder.join("spec.json");
    std::fs::write(&spec, SPEC).unwrap();
    Request {
        // Small models learn fast, and slowly at the rate of large ones.
        schedule: Schedule {
            steps: 40,
            learning_rate: 2e-2,
            ..Schedule::default()
        },
        ..linfusion_tests::distillation(folder, model(folder, looks), Source::Random(spec))
    }
}

pub fn quietly(request: &Request) -> Result<Report, DistillError> {
    run(request, &|_: Progress| {})
}

pub fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("diffusion_pytorch_model.safetensors")).unwrap()
}

/// What is in a folder, but for the model and the description of inputs.
pub fn left(folder: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names
        .filter(|n| n != "model.onnx" && n != "spec.json")
        .collect();
    names.sort();
    names
}
