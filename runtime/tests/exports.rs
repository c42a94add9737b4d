//! Every committed export runs on inputs that are made for it, and gives finite, varied numbers. Skipped
//! without ONNX Runtime, which `make test` provides: some exports use operators that tract lacks.

use linfusion_models::fixtures;
use linfusion_runtime::engine::{Engine, Session, SessionOptions, library, load_library};
use linfusion_runtime::inputs::{self, Request};

#[test]
fn every_export_runs() {
    if let Err(error) = load_library(None) {
        assert!(std::env::var_os(library::VARIABLE).is_none(), "{error}");
        eprintln!("skipped: {error}");
        return;
    }
    let names = fixtures::exports().unwrap();
    assert!(names.len() >= 16, "{names:?}");
    let failures: Vec<String> = names
        .iter()
        .filter_map(|name| Some(format!("{name}: {}", run(name).err()?)))
        .collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

fn run(name: &str) -> Result<(), Box<dyn std::error::Error>> {
    let bytes = fixtures::bytes(name)?;
    let mut session = Session::from_bytes(Engine::Ort, &bytes, &SessionOptions::default())?;
    let mut request = Request {
        sequence: 7,
        ..Request::default()
    };
    if name.contains("dyn") {
        request.latent = Some(16);
    }
    if session
        .inputs()
        .iter()
        .any(|port| port.name == "controlnet_cond")
    {
        // The tiny one halves its hint once, where the real one does so three times.
        let shape = ("controlnet_cond".to_owned(), vec![2, 3, 32, 32]);
        request.shapes.push(shape);
    }
    let inputs = inputs::make(session.inputs(), &request)?;
    for (output, tensor) in session.run(&inputs)? {
        let deviation = tensor.to_f64().std(0.0);
        if !tensor.is_finite() || deviation.partial_cmp(&1e-3) != Some(std::cmp::Ordering::Greater)
        {
            return Err(format!("output `{output}` has standard deviation {deviation}").into());
        }
    }
    Ok(())
}
