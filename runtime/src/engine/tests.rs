//! Both engines on the same graphs. What needs ONNX Runtime is skipped where no library is found; `make test`
//! provides one.

use std::path::PathBuf;

use super::*;
use crate::npz;
use crate::test_device::{device, named};

/// How far sums of single precision are apart that are added up in another order. Here they have up to 9 · 32 terms (places and
/// channels of a convolution), of order 1 as the outputs are: √288 roundings of 2⁻²⁴, 1e-6, and some ten layers one after another.
const ANOTHER_ORDER: f64 = 1e-5;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../models/fixtures")
        .join(name)
}

fn engines() -> Vec<Engine> {
    let mut engines = vec![Engine::Tract];
    // Fails where a device is asked for that cannot be used.
    let device = device();
    match load_library(None) {
        Ok(_) => engines.push(Engine::Ort),
        Err(error) => {
            assert!(
                std::env::var_os(library::VARIABLE).is_none(),
                "{} is set: {error}",
                library::VARIABLE
            );
            assert_eq!(device, Device::Cpu, "{error}");
            eprintln!("skipping ONNX Runtime: {error}");
        }
    }
    engines
}

fn open(engine: Engine) -> Session {
    let model = fixture("sd15-tiny/unet.onnx");
    Session::from_file(engine, model, &options()).unwrap()
}

/// On the device that tests run on.
fn options() -> SessionOptions {
    SessionOptions {
        device: device(),
        ..SessionOptions::default()
    }
}

/// The case's inputs, in the types that the model takes.
fn inputs(session: &Session) -> Vec<(String, Tensor)> {
    let given = npz::read(&fixture("sd15-tiny/inputs.npz")).unwrap();
    session
        .inputs()
        .iter()
        .map(|port| {
            let (_, tensor) = given.iter().find(|(name, _)| *name == port.name).unwrap();
            (port.name.clone(), tensor.cast(port.dtype))
        })
        .collect()
}

#[test]
fn both_engines_see_the_same_ports() {
    for engine in engines() {
        let session = open(engine);
        let shown: Vec<_> = session
            .inputs()
            .iter()
            .chain(session.outputs())
            .map(|port| format!("{}: {port}", port.name))
            .collect();
        assert_eq!(
            shown,
            [
                "sample: f32[batch, 4, height, width]",
                "timestep: f32[]",
                "encoder_hidden_states: f32[batch, sequence, 12]",
                "out_sample: f32[batch, 4, height, width]",
            ],
            "{engine}"
        );
    }
}

#[test]
fn both_engines_agree_and_memory_equals_file() {
    let mut results = Vec::new();
    for engine in engines() {
        let mut session = open(engine);
        let inputs = inputs(&session);
        let outputs = session.run(&inputs).unwrap();
        assert_eq!(outputs.len(), 1);
        assert_eq!(outputs[0].1.shape(), [2, 4, 16, 16]);
        // A second run, with the inputs in another order.
        let reversed: Vec<_> = inputs.iter().cloned().rev().collect();
        assert_same(&session.run(&reversed).unwrap()[0].1, &outputs[0].1);

        let bytes = std::fs::read(fixture("sd15-tiny/unet.onnx")).unwrap();
        let options = SessionOptions {
            threads: NonZeroUsize::new(1),
            optimization: Optimization::Basic,
            ..options()
        };
        let mut memory = Session::from_bytes(engine, &bytes, &options).unwrap();
        let from_memory = memory.run(&inputs).unwrap();
        assert!(max_difference(&from_memory[0].1, &outputs[0].1) < ANOTHER_ORDER);
        results.push(outputs);
    }
    for other in &results {
        assert!(max_difference(&other[0].1, &results[0][0].1) < 2.0 * ANOTHER_ORDER);
    }
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    let difference = a.to_f64() - b.to_f64();
    difference.iter().fold(0.0, |max, d| d.abs().max(max))
}

/// Two runs of one session give the same; on a GPU the second may take other kernels, whose sums have another order.
fn assert_same(a: &Tensor, b: &Tensor) {
    match device() {
        Device::Cpu => assert_eq!(a, b),
        Device::Cuda(_) => assert!(max_difference(a, b) < ANOTHER_ORDER),
    }
}

#[test]
fn another_size_is_another_plan() {
    for engine in engines() {
        let mut session = open(engine);
        let inputs = inputs(&session);
        let mut small = inputs.clone();
        small[0].1 = Tensor::from(ndarray::Array4::<f32>::zeros((2, 4, 8, 8)));
        assert_eq!(session.run(&inputs).unwrap()[0].1.shape(), [2, 4, 16, 16]);
        assert_eq!(session.run(&small).unwrap()[0].1.shape(), [2, 4, 8, 8]);
    }
}

#[test]
fn inputs_that_do_not_fit_are_refused_with_the_values() {
    for engine in engines() {
        let mut session = open(engine);
        let good = inputs(&session);
        let with = |index: usize, tensor: Tensor| {
            let mut inputs = good.clone();
            inputs[index].1 = tensor;
            inputs
        };
        let mut unknown = good.clone();
        unknown.push(("other".to_owned(), good[1].1.clone()));
        let cases = [
            (good[1..].to_vec(), "input `sample` was not given"),
            (unknown, "`other` is no input of the graph"),
            (
                with(0, good[0].1.cast(DType::F64)),
                "input `sample` is f64[2, 4, 16, 16], but the graph takes f32[batch, 4, height, width]",
            ),
            (
                with(0, Tensor::from(ndarray::Array4::<f32>::zeros((2, 3, 8, 8)))),
                "input `sample` is f32[2, 3, 8, 8]",
            ),
            (
                with(0, Tensor::from(ndarray::Array3::<f32>::zeros((2, 4, 8)))),
                "input `sample` is f32[2, 4, 8]",
            ),
        ];
        for (inputs, expected) in cases {
            let error = session.run(&inputs).unwrap_err().to_string();
            assert!(error.contains(expected), "{engine}: {error}");
        }
    }
}

#[test]
fn files_that_are_no_models_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let garbage = folder.path().join("garbage.onnx");
    std::fs::write(&garbage, [0xff; 64]).unwrap();
    for engine in engines() {
        let options = SessionOptions::default();
        let error = Session::from_file(engine, &garbage, &options)
            .err()
            .unwrap();
        assert!(error.to_string().contains("garbage.onnx"), "{error}");
        let absent = folder.path().join("absent.onnx");
        let error = Session::from_file(engine, absent, &options).err().unwrap();
        assert!(matches!(error, EngineError::Io { .. }), "{error}");
        assert!(Session::from_bytes(engine, b"", &options).is_err());
    }
}

#[test]
fn a_data_file_that_is_missing_is_named_and_nothing_else_is() {
    use linfusion_models::onnx::{ExternalRef, make};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    let mut outside = make::tensor_f32("w", &[2], &[]);
    let file = ExternalRef {
        location: "weights.bin".to_owned(),
        offset: 0,
        length: None,
    };
    file.apply(&mut outside);
    // Of a type that is not read here, which is no reason to refuse it.
    let mut words = make::tensor_f32("w", &[2], &[]);
    words.raw_data = None;
    words.data_type = Some(8);
    words.string_data = vec![b"a".to_vec().into(), b"b".to_vec().into()];
    for (weight, operator, expected) in [
        (outside, "Add", "weights.bin"),
        (words, "NoSuchOperator", "NoSuchOperator"),
    ] {
        let open = [make::Dim::Unknown];
        let model = device::of_one_node(operator, &["x", "w"], &open, vec![weight]);
        std::fs::write(&path, model).unwrap();
        // tract reads weights and operators when it is to run.
        for engine in engines().into_iter().filter(|e| *e == Engine::Ort) {
            let error = Session::from_file(engine, &path, &options()).err();
            let said = error.map(|error| error.to_string()).unwrap_or_default();
            assert!(
                said.contains("model.onnx") && said.contains(expected),
                "{engine}: {said}"
            );
        }
    }
}

#[test]
fn a_library_that_is_none_is_an_error() {
    let options = SessionOptions {
        library: Some("/nowhere/libonnxruntime.so".into()),
        ..SessionOptions::default()
    };
    let model = fixture("sd15-tiny/unet.onnx");
    let error = Session::from_file(Engine::Ort, model, &options)
        .err()
        .unwrap();
    let message = error.to_string();
    assert!(message.contains("/nowhere/libonnxruntime.so"), "{message}");
}

#[test]
fn the_cpu_provider_is_always_there() {
    if engines().contains(&Engine::Ort) {
        let providers = execution_providers(None).unwrap();
        assert!(providers.contains(&"CPUExecutionProvider".to_owned()));
    }
}

#[test]
fn values_run_wherever_they_are() {
    for engine in engines() {
        let mut session = open(engine);
        let inputs = inputs(&session);
        let expected = session.run(&inputs).unwrap();
        let on_host: Vec<(String, Value)> = inputs
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.clone().into()))
            .collect();
        // Each input in the engine's keeping, and the timestep on the host.
        let adopted: Vec<(String, Value)> = inputs
            .iter()
            .map(|(name, tensor)| match name.as_str() {
                "timestep" => (name.clone(), tensor.clone().into()),
                _ => (name.clone(), session.adopt(tensor.clone()).unwrap()),
            })
            .collect();
        // tract adopts on the host, and takes a second for a plan.
        let both = [&adopted, &on_host];
        let count = if engine == Engine::Ort { 2 } else { 1 };
        for given in &both[..count] {
            let outputs = session.run_values(given, Location::Host).unwrap();
            assert_eq!(outputs[0].0, expected[0].0);
            assert_same(outputs[0].1.host().unwrap(), &expected[0].1);
            let first = session.run_values(given, Location::Device).unwrap();
            let mut other = given.to_vec();
            other[0].1 = Tensor::from(ndarray::Array4::<f32>::zeros((2, 4, 8, 8))).into();
            let second = session.run_values(&other, Location::Device).unwrap();
            let (first, second) = (&first[0].1, &second[0].1);
            assert_eq!(first.dtype(), DType::F32);
            assert_eq!(
                (first.shape(), second.shape()),
                (&[2, 4, 16, 16][..], &[2, 4, 8, 8][..])
            );
            assert_eq!(first.host().is_some(), engine == Engine::Tract);
            let there = match engine {
                Engine::Ort => device(),
                Engine::Tract => Device::Cpu,
            };
            assert_eq!((first.device(), second.device()), (there, there));
            // A result is an input like any other, and no later run changes it.
            let again = [
                (given[0].0.clone(), first.clone()),
                given[1].clone(),
                given[2].clone(),
            ];
            let mut as_tensors = inputs.clone();
            as_tensors[0].1 = expected[0].1.clone();
            let outputs = session.run_values(&again, Location::Host).unwrap();
            let expected = session.run(&as_tensors).unwrap();
            assert_same(outputs[0].1.host().unwrap(), &expected[0].1);
        }
        let mut wrong = adopted.clone();
        wrong[0].1 = session.adopt(inputs[0].1.cast(DType::F64)).unwrap();
        let error = session.run_values(&wrong, Location::Device).err().unwrap();
        let message = error.to_string();
        assert!(
            message.contains("input `sample` is f64[2, 4, 16, 16]"),
            "{message}"
        );
    }
}

#[test]
fn tract_cannot_reach_what_onnx_runtime_holds() {
    if !engines().contains(&Engine::Ort) {
        return;
    }
    let held = open(Engine::Ort);
    let mut session = open(Engine::Tract);
    let inputs: Vec<(String, Value)> = inputs(&held)
        .into_iter()
        .map(|(name, tensor)| (name, held.adopt(tensor).unwrap()))
        .collect();
    let error = session.run_values(&inputs, Location::Host).err().unwrap();
    assert!(error.to_string().contains("`sample`"), "{error}");
}

#[test]
fn a_test_device_that_cannot_be_used_is_no_processor() {
    assert_eq!(named("cpu"), Ok(Device::Cpu));
    for wrong in ["", "auto", "gpu", "cuda:x"] {
        let problem = named(wrong).unwrap_err();
        assert!(
            problem.contains(&format!("`{wrong}`")) || wrong == "cuda:x",
            "{problem}"
        );
    }
    // No machine has so many.
    assert!(named("cuda:4000000000").is_err());
}

/// A graph of one node that takes `x` and a weight of these dimensions, the identity.
fn with_identity(operator: &str, dims: &[usize]) -> Vec<u8> {
    use linfusion_models::onnx::make;
    let side = dims[0];
    let mut identity = vec![0.0_f32; side * side];
    identity.iter_mut().step_by(side + 1).for_each(|v| *v = 1.0);
    let signed: Vec<i64> = dims.iter().map(|d| i64::try_from(*d).unwrap()).collect();
    let weight = make::tensor_f32("w", &signed, &identity);
    let open = vec![make::Dim::Unknown; dims.len()];
    device::of_one_node(operator, &["x", "w"], &open, vec![weight])
}

/// 1 + 2⁻¹² is 1 in TF32, which rounds to 11 bits.
#[test]
fn products_are_of_single_precision() {
    let x = 1.0 + 2.0_f32.powi(-12);
    for engine in engines() {
        for (operator, weight, input) in [
            ("MatMul", &[64, 64][..], &[64, 64][..]),
            ("Conv", &[64, 64, 1, 1], &[1, 64, 16, 16]),
        ] {
            let bytes = with_identity(operator, weight);
            let mut session = Session::from_bytes(engine, &bytes, &options()).unwrap();
            let given = Tensor::from(ndarray::ArrayD::from_elem(input, x));
            let found = session.run(&[("x", given.clone())]).unwrap();
            // Algorithms that transform their input round as often as sums have terms.
            let bound = 2.0_f64.powi(-16);
            assert!(
                max_difference(&found[0].1, &given) < bound,
                "{engine}, {operator}"
            );
        }
    }
}

/// The limit is for ONNX Runtime's arena.
#[test]
#[ignore = "needs a GPU, which LINFUSION_TEST_DEVICE names"]
fn a_gpu_gives_no_more_than_it_may() {
    assert_ne!(device(), Device::Cpu, "LINFUSION_TEST_DEVICE names no GPU");
    let options = SessionOptions {
        device_memory: Some(1 << 16),
        ..options()
    };
    let model = fixture("sd15-tiny/unet.onnx");
    let error = Session::from_file(Engine::Ort, model, &options)
        .and_then(|mut session| session.run(&inputs(&session)))
        .err();
    let message = error.unwrap().to_string().to_lowercase();
    assert!(message.contains("memory"), "{message}");
}
