//! The memory that is counted before a generation begins, and what the generation then takes.

mod support;

use linfusion_models::onnx::proto::{GraphProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile, make};
use support::{Bench, edit, said};

#[test]
fn memory_is_counted_before_anything_begins() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    // Softmax over 512² latent pixels, 2 heads, both sides of guidance: terabytes.
    let huge = [
        "--prompt",
        "x",
        "--direct",
        "--size",
        "4096x4096",
        "--device",
        "cpu",
    ];
    let output = bench.run(&huge);
    let said_so = said(&output);
    assert_eq!(output.status.code(), Some(1));
    for part in [
        "denoise 4096x4096 needs about",
        "TB",
        "at node `",
        "--force",
    ] {
        assert!(said_so.contains(part), "{part}: {said_so}");
    }
}

/// Peak and expected bytes of the stage that denoises, at a size where attention outweighs all else.
fn peak_and_expected(bench: &Bench) -> [f64; 2] {
    let arguments = [
        "--prompt", "x", "--direct", "--size", "512x512", "--steps", "2",
    ];
    // The peak is the host's.
    let more = [
        "--scheduler",
        "ddim",
        "--vae-tile",
        "256",
        "--device",
        "cpu",
        "--report",
        "json",
        "--overwrite",
    ];
    let output = bench.run(&[&arguments[..], &more].concat());
    assert!(output.status.success(), "{}", said(&output));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let stage = &report[0]["stages"][1];
    ["peak_bytes", "expected_bytes"].map(|field| stage[field].as_f64().unwrap())
}

/// Scratch memory within operators and the allocator's rounding are not counted.
fn assert_counted([peak, expected]: [f64; 2]) {
    let ratio = peak / expected;
    assert!((0.8..1.5).contains(&ratio), "{peak:e} of {expected:e}");
}

#[test]
fn what_was_expected_is_what_is_taken() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    assert_counted(peak_and_expected(&bench));
}

/// ONNX Runtime's CPU provider computes with float16 as float32.
#[test]
fn a_model_of_float16_takes_what_one_of_float32_does() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let [single, _] = peak_and_expected(&bench);
    edit(&bench.pipeline.join("unet/model.onnx"), |file, model| {
        to_halves(file, model.graph.get_or_insert_default());
    });
    let [half, expected] = peak_and_expected(&bench);
    assert_counted([half, expected]);
    assert!(half > 0.9 * single, "{half:e} of {single:e}");
}

/// The graph in float16 throughout, as an export of a model in half precision is.
fn to_halves(file: &OnnxFile, graph: &mut GraphProto) {
    let (single, half) = (ElementType::F32, ElementType::F16);
    let scales: Vec<String> = graph
        .node
        .iter()
        .filter(|node| node.op_type.as_deref() == Some("Resize"))
        // Those and the region of interest are of float32 always.
        .flat_map(|node| node.input.iter().skip(1).cloned())
        .collect();
    let halve = |tensor: &mut TensorProto| {
        if tensor.data_type != Some(single.onnx()) {
            return;
        }
        let stored = file.tensor_bytes(tensor).unwrap();
        let values: Vec<f32> = stored
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        let encoded = make::encode_f32(half, &values).unwrap();
        let name = tensor.name.clone().unwrap_or_default();
        *tensor = make::tensor(&name, half, &tensor.dims.clone(), encoded.bytes);
    };
    let kept = |name: &Option<String>| name.as_ref().is_some_and(|n| scales.contains(n));
    let initializers = graph.initializer.iter_mut();
    initializers.filter(|t| !kept(&t.name)).for_each(&halve);
    for node in &mut graph.node {
        let kept = node.output.iter().any(|name| scales.contains(name));
        let casts = node.op_type.as_deref() == Some("Cast");
        for attribute in &mut node.attribute {
            if casts && attribute.i == Some(i64::from(single.onnx())) {
                attribute.i = Some(i64::from(half.onnx()));
            }
            if !kept && attribute.t.is_set() {
                halve(attribute.t.get_or_insert_default());
            }
        }
    }
    for value in graph.input.iter_mut().chain(&mut graph.output) {
        if let Some((element, Some(dims))) = make::tensor_type_of(value)
            && element == single
        {
            let name = value.name.clone().unwrap_or_default();
            *value = make::value_info(&name, half, &dims);
        }
    }
}
