//! One step of a converted UNet in ONNX Runtime, with and without LinFusion's operator library.
//!
//!     ORT_DYLIB_PATH=/path/to/libonnxruntime.so cargo run --release -- unet.linfusion.onnx /path/to/liblinfusion_ops.so

use std::error::Error;

use ndarray::{Array, ArrayD, Dimension, ShapeBuilder, arr0};
use ort::environment::Environment;
use ort::session::Session;
use ort::value::Tensor;

/// sin(0), sin(1), sin(2), … in this shape: the same numbers in every language.
fn waves<S: ShapeBuilder<Dim = D>, D: Dimension>(shape: S) -> Array<f32, D> {
    let mut index = 0.0_f64;
    Array::from_shape_simple_fn(shape, || {
        let value = index.sin() as f32;
        index += 1.0;
        value
    })
}

fn step(
    environment: &Environment,
    model: &str,
    library: Option<&str>,
) -> Result<ArrayD<f32>, Box<dyn Error>> {
    let mut builder = Session::builder(environment)?;
    if let Some(path) = library {
        builder = builder.with_operator_library(path)?;
    }
    let mut session = builder.commit_from_file(model)?;
    let outputs = session.run(ort::inputs![
        "sample" => Tensor::from_array(waves((2, 4, 16, 16)))?,
        "timestep" => Tensor::from_array(arr0(500.0_f32))?,
        "encoder_hidden_states" => Tensor::from_array(waves((2, 7, 12)))?,
    ])?;
    Ok(outputs["out_sample"].try_extract_array::<f32>()?.to_owned())
}

fn report(name: &str, out: &ArrayD<f32>) {
    let values = out.mapv(f64::from);
    let mean = values.sum() / values.len() as f64;
    let first: Vec<String> = values.iter().take(4).map(|v| format!("{v:.4}")).collect();
    println!(
        "{name}: mean {mean:.4} std {:.4} first {}",
        values.std(0.0),
        first.join(" ")
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, library] = arguments.as_slice() else {
        return Err("usage: linfusion-example MODEL.onnx LIBRARY.so".into());
    };
    let environment = ort::init().build()?;
    report("without library", &step(&environment, model, None)?);
    report("with library", &step(&environment, model, Some(library))?);
    Ok(())
}
