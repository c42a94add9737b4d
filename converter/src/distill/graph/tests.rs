//! Programs against the engines that run ONNX, and gradients against finite differences.

use std::cell::RefCell;

use buffa::Message;
use candle_core::{Device, Tensor, Var};
use linfusion_models::fixtures;
use linfusion_models::onnx::make::{
    Dim, float, int, ints, node, opset, string, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_models::random::SplitMix64;
use linfusion_models::shapes::{Probe, Shapes};
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Operators, Session, SessionOptions};
use linfusion_runtime::tensor::{DType as Given, Tensor as Fed};
use ndarray::{ArrayD, IxDyn};
use rstest::rstest;

use super::*;
use crate::convert::{self, Partial, WeightsFrom};
use crate::plan::{Method, MethodRule, Selection};
use crate::verify::{Verify, engine};

/// The model's inputs at a small size, drawn at random.
fn inputs(file: &OnnxFile, shapes: &Shapes) -> Vec<(String, Fed)> {
    let mut random = SplitMix64::new(9);
    let stored = |name: &str| {
        let mut tensors = file.model.graph.initializer.iter();
        tensors.any(|t| t.name.as_deref() == Some(name))
    };
    let names = file.model.graph.input.iter().filter_map(|i| i.name.clone());
    names
        .filter(|name| !stored(name))
        .map(|name| {
            let fact = shapes.fact(&name);
            let dims: Vec<usize> = fact.shape.iter().flatten().map(|d| *d as usize).collect();
            let dtype = Given::from_onnx(fact.element.unwrap()).unwrap();
            let draw = || match dtype.is_float() {
                true => random.normal(),
                false => random.below(2) as f64,
            };
            let values = ArrayD::from_shape_simple_fn(IxDyn(&dims), draw);
            (name, Fed::from_f64(values, dtype))
        })
        .collect()
}

fn shapes(file: &OnnxFile) -> Shapes {
    Shapes::propagate(
        &file.model,
        &|t| file.tensor_bytes(t).ok(),
        &Probe::square(16),
    )
}

fn outputs(file: &OnnxFile) -> Vec<&str> {
    let outputs = file.model.graph.output.iter();
    outputs.filter_map(|o| o.name.as_deref()).collect()
}

/// Computes the model both ways. Each rounding of either is 2⁻²⁴ of a value; what they leave in an output after some
/// hundred layers in sequence, which scale neither up nor down on the whole, stays below 2¹⁰ of them.
fn agree(file: &OnnxFile, session: &mut Session) {
    let shapes = shapes(file);
    let names = outputs(file);
    let program = Program::new(file, &shapes, &[], &[], &names, &Device::Cpu).unwrap();
    let inputs = inputs(file, &shapes);
    let found = program.run(&inputs, NO_SITES).unwrap();
    let expected = session.run(&inputs).unwrap();
    for (found, (name, expected)) in found.iter().zip(&expected) {
        let expected: Vec<f64> = expected.to_f64().into_iter().collect();
        let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found.len(), expected.len(), "{name}");
        let peak = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let worst = expected
            .iter()
            .zip(&found)
            .map(|(e, f)| (e - f64::from(*f)).abs())
            .fold(0.0, f64::max);
        assert!(peak > 1e-3, "{name}: {peak}");
        assert!(
            worst < peak * 2.0_f64.powi(-14),
            "{name}: {worst} of {peak}"
        );
    }
}

#[rstest]
#[case("sd15-tiny/unet.onnx")]
#[case("exports/sd15-dynamo20-fix-sdpa.onnx.gz")]
#[case("exports/sd15-ts14-dyn-sdpa.onnx.gz")]
#[case("exports/sd21-ts17-dyn-sdpa.onnx.gz")]
#[case("transformers/dit-ts17-dyn-sdpa.onnx.gz")]
#[case("transformers/sit-ts17-dyn-sdpa.onnx.gz")]
#[case("transformers/pixart-ts17-dyn-sdpa.onnx.gz")]
#[case("transformers/sd3-ts17-dyn-sdpa.onnx.gz")]
fn a_program_computes_what_the_engine_does(#[case] name: &str) {
    let bytes = fixtures::bytes(name).unwrap();
    let file = OnnxFile::from_bytes(bytes.clone().into(), None).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, bytes).unwrap();
    let options = SessionOptions::default();
    agree(
        &file,
        &mut Session::from_file(engine().unwrap(), &path, &options).unwrap(),
    );
}

#[rstest]
#[case("sd15-tiny/unet.onnx", Method::Linear)]
#[case("sd15-tiny/unet.onnx", Method::Hybrid)]
#[case("transformers/sd3-ts17-dyn-sdpa.onnx.gz", Method::Hybrid)]
#[case("transformers/pixart-ts17-dyn-sdpa.onnx.gz", Method::Window)]
fn a_converted_model_too(#[case] name: &str, #[case] method: Method) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("converted.onnx");
    let model = folder.path().join("model.onnx");
    std::fs::write(&model, fixtures::bytes(name).unwrap()).unwrap();
    let request = convert::Request {
        model,
        out: Some(path.clone()),
        weights: match method {
            Method::Linear => WeightsFrom::Path(fixtures::path("sd15-tiny/linfusion")),
            _ => WeightsFrom::Untrained,
        },
        selection: Selection {
            attention: vec![MethodRule {
                sites: None,
                method: Some(method),
            }],
            window: Some(WindowSpec {
                window: Window::Rect { rows: 3, cols: 2 },
                border: Border::Clamp,
            }),
            ..Selection::default()
        },
        overwrite: Overwrite::Force,
        partial: Partial::Allow,
        verify: Verify::Off,
        ..convert::Request::default()
    };
    convert::convert(&request, &mut |_| {}).unwrap();
    let options = SessionOptions {
        operators: Operators::InProcess,
        ..SessionOptions::default()
    };
    let file = OnnxFile::open(&path).unwrap();
    agree(
        &file,
        &mut Session::from_file(engine().unwrap(), &path, &options).unwrap(),
    );
}

#[test]
fn an_unknown_operator_is_named_before_anything_runs() {
    let nodes = vec![node("Det", "/mixer/Det", &["x"], &["out"], vec![])];
    let file = model(nodes, vec![], &[1, 4, 6, 6]);
    let Err(error) = Program::new(&file, &shapes(&file), &[], &[], &["out"], &Device::Cpu) else {
        panic!("a determinant is differentiated");
    };
    let told = error.to_string();
    assert!(told.contains("Det '/mixer/Det'"), "{told}");
}

/// A model of one input `x` and one output `out`.
fn model(nodes: Vec<NodeProto>, stored: Vec<TensorProto>, dims: &[i64]) -> OnnxFile {
    let sizes: Vec<Dim> = dims.iter().map(|d| Dim::Fixed(*d)).collect();
    let graph = GraphProto {
        name: Some("graph".to_owned()),
        node: nodes,
        initializer: stored,
        input: vec![value_info("x", ElementType::F32, &sizes)],
        output: vec![value_info("out", ElementType::F32, &[])],
        ..GraphProto::default()
    };
    let model = ModelProto {
        ir_version: Some(9),
        opset_import: vec![opset("", 18)],
        graph: buffa::MessageField::some(graph),
        ..ModelProto::default()
    };
    OnnxFile::from_bytes(model.encode_to_vec().into(), None).unwrap()
}

fn noise(random: &mut SplitMix64, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.symmetric() as f32).collect()
}

/// A small network of the operators that UNets and transformers have; `begin` is what is replaced.
fn network() -> OnnxFile {
    let mut random = SplitMix64::new(4);
    let mut weight = |name: &str, dims: &[i64]| {
        let count = dims.iter().product::<i64>() as usize;
        tensor_f32(name, dims, &noise(&mut random, count))
    };
    let stored = vec![
        weight("w1", &[6, 2, 3, 3]),
        weight("b1", &[6]),
        weight("scale", &[6]),
        weight("shift", &[6]),
        weight("w2", &[4, 6, 1, 1]),
        weight("w3", &[4, 8]),
        weight("w4", &[8]),
        tensor_f32("zeros", &[0], &[]),
        tensor_f32("factors", &[4], &[1.0, 1.0, 2.0, 2.0]),
        tensor_i64("shape", &[3], &[1, 4, -1]),
        tensor_i64("starts", &[1], &[-1]),
        tensor_i64("ends", &[1], &[-99]),
        tensor_i64("axes", &[1], &[1]),
        tensor_i64("back", &[1], &[-2]),
        tensor_i64("first", &[2], &[2, -1]),
    ];
    let op =
        |kind: &str, inputs: &[&str], output: &str| node(kind, output, inputs, &[output], vec![]);
    let with = |mut made: NodeProto, attributes| {
        made.attribute = attributes;
        made
    };
    let nodes = vec![
        op("Tanh", &["x"], "begin"),
        with(
            op("Conv", &["begin", "w1", "b1"], "conv"),
            vec![
                ints("pads", &[1, 0, 1, 2]),
                ints("strides", &[2, 2]),
                int("group", 2),
            ],
        ),
        with(
            op("InstanceNormalization", &["conv", "scale", "shift"], "norm"),
            vec![float("epsilon", 1e-3)],
        ),
        op("Sigmoid", &["norm"], "gate"),
        op("Mul", &["norm", "gate"], "silu"),
        with(
            op("Conv", &["silu", "w2"], "mixed"),
            vec![ints("dilations", &[2, 2])],
        ),
        with(
            op("Resize", &["mixed", "zeros", "factors"], "large"),
            vec![
                string("mode", "nearest"),
                string("coordinate_transformation_mode", "asymmetric"),
                string("nearest_mode", "floor"),
            ],
        ),
        with(
            op("AveragePool", &["large"], "small"),
            vec![ints("kernel_shape", &[2, 2]), ints("strides", &[2, 2])],
        ),
        op("Add", &["small", "mixed"], "sum"),
        op("Reshape", &["sum", "shape"], "rows"),
        with(
            op("Einsum", &["rows", "rows"], "scores"),
            vec![string("equation", "bci,bcj->bij")],
        ),
        with(op("Softmax", &["scores"], "weights"), vec![int("axis", -1)]),
        with(
            op("Einsum", &["weights", "rows"], "attended"),
            vec![string("equation", "bij,bcj->bic")],
        ),
        op("MatMul", &["attended", "w3"], "wide"),
        op("Erf", &["wide"], "erf"),
        with(
            op("LayerNormalization", &["erf", "w4"], "layer"),
            vec![int("axis", -1)],
        ),
        op(
            "Slice",
            &["layer", "starts", "ends", "axes", "back"],
            "some",
        ),
        with(
            op("Gather", &["some", "first"], "picked"),
            vec![int("axis", 2)],
        ),
        op("Exp", &["picked"], "end"),
        with(
            op("ReduceMean", &["end", "axes"], "out"),
            vec![int("keepdims", 0)],
        ),
    ];
    model(nodes, stored, &[1, 4, 9, 8])
}

/// A site that scales each channel by a weight.
fn scaled(scale: &Tensor, x: &Tensor) -> candle_core::Result<Tensor> {
    x.tanh()?.broadcast_mul(&scale.reshape((1, 4, 1, 1))?)
}

/// Values along the way, so that a wrong gradient is found at its operator.
#[rstest]
fn gradients_are_those_of_finite_differences(
    #[values(
        "begin", "conv", "norm", "silu", "mixed", "large", "small", "sum", "scores", "weights",
        "attended", "erf", "layer", "some", "picked", "out"
    )]
    wanted: &str,
) {
    let file = network();
    let shapes = shapes(&file);
    let replaced = [Replaced {
        inputs: vec!["x"],
        output: "begin",
    }];
    // The site's own output has a gradient of the loss beside the one through the graph.
    let both = [wanted, "begin"];
    let program = Program::new(&file, &shapes, &replaced, &[], &both, &Device::Cpu).unwrap();
    let inputs = inputs(&file, &shapes);
    let scale = Var::from_slice(&[0.7_f32, -0.4, 1.1, 0.9], 4, &Device::Cpu).unwrap();
    let seen = RefCell::new(0);
    let sites = |_: usize, given: &[&Tensor]| {
        *seen.borrow_mut() += 1;
        scaled(scale.as_tensor(), given[0])
    };
    // A sum with other factors for neighbours: what a norm or softmax makes has a sum that never changes.
    let loss = |results: &[Tensor]| {
        let count = results[0].elem_count();
        let factors: Vec<f32> = (0..count).map(|i| (1.7 * i as f32).sin()).collect();
        let factors = Tensor::from_vec(factors, results[0].shape(), &Device::Cpu)?;
        (&results[0] * factors)?.sum_all()? + (results[1].sqr()?.sum_all()? * 0.01)?
    };
    let gradient = program
        .gradient(&inputs, &sites, std::slice::from_ref(&scale), &loss)
        .unwrap();
    // Once on the way there and once on the way back.
    assert_eq!(*seen.borrow(), 2);
    let exact: Vec<f32> = gradient.by.get(&scale).unwrap().to_vec1().unwrap();
    let value = || -> f64 {
        let results = program.run(&inputs, &sites).unwrap();
        f64::from(loss(&results).unwrap().to_scalar::<f32>().unwrap())
    };
    let at: Vec<f32> = scale.to_vec1().unwrap();
    let largest = exact.iter().fold(0.0_f32, |m, g| m.max(g.abs()));
    let results = program.run(&inputs, &sites).unwrap();
    let size = |t: &Tensor| t.abs()?.sum_all()?.to_scalar::<f32>();
    let size = f64::from(size(&results[0]).unwrap() + size(&results[1]).unwrap());
    for (i, exact) in exact.iter().enumerate() {
        let moved = |by: f64| {
            let mut to = at.clone();
            to[i] += by as f32;
            let to = Tensor::from_vec(to, 4, &Device::Cpu).unwrap();
            scale.set(&to).unwrap();
            value()
        };
        let slope = |step: f64| (moved(step) - moved(-step)) / (2.0 * step);
        // Extrapolated, so that the error is of the fourth order.
        const STEP: f64 = 1.0 / 64.0;
        let numeric = (4.0 * slope(STEP / 2.0) - slope(STEP)) / 3.0;
        moved(0.0);
        // The terms of the loss are rounded to 2⁻²⁴ of each a few times, which the step's inverse makes 2⁻¹⁶; a fifth
        // derivative 10⁴ times the gradient adds less than 10⁴ · step⁴ / 30 of it, below 2⁻¹⁵.
        let bound = size * 2.0_f64.powi(-15) + f64::from(largest) * 2.0_f64.powi(-14);
        let error = (numeric - f64::from(*exact)).abs();
        assert!(
            error < bound,
            "{i}: {numeric} {exact}, {error} over {bound}"
        );
    }
    assert!(largest > 0.1, "{exact:?}");
}

#[test]
fn the_network_is_what_the_engine_computes() {
    let file = network();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, file.model.encode_to_vec()).unwrap();
    let options = SessionOptions::default();
    agree(
        &file,
        &mut Session::from_file(engine().unwrap(), &path, &options).unwrap(),
    );
}
