//! `digits TEACHER.onnx [STUDENT.onnx] [--samples N] [--seed N]`: how often a classifier recognises the digits
//! that a model makes, and whether a converted one's are recognised as often. `digits TEACHER.onnx --record DIR [--samples N]
//! [--seed N]`: writes what the model is given on the way, to distil it from.

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use linfusion_models::fixtures;
use linfusion_runtime::engine::Engine;
use linfusion_tests::digits::{Experiment, record};
use linfusion_tests::has_ort;

const USAGE: &str = "usage: digits TEACHER.onnx [STUDENT.onnx] [--samples N] [--seed N]
       digits TEACHER.onnx --record DIR [--samples N] [--seed N]";

fn main() -> ExitCode {
    match digits() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn digits() -> Result<(), Box<dyn Error>> {
    let (mut models, mut samples, mut seed, mut recorded) = (Vec::new(), 1000, 0, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(USAGE);
        match argument.as_str() {
            "--samples" => samples = value()?.parse()?,
            "--seed" => seed = value()?.parse()?,
            "--record" => recorded = Some(PathBuf::from(value()?)),
            option if option.starts_with("--") => return Err(USAGE.into()),
            model => models.push(PathBuf::from(model)),
        }
    }
    if models.is_empty() || models.len() > 2 || samples == 0 {
        return Err(USAGE.into());
    }
    let engine = if has_ort() {
        Engine::Ort
    } else {
        Engine::Tract
    };
    if let Some(folder) = recorded {
        let [model] = models.as_slice() else {
            return Err(USAGE.into());
        };
        return record(engine, model, &folder, samples, seed);
    }
    let classifier = fixtures::path("digits").join("classifier.onnx");
    let mut experiment = Experiment::new(engine, &classifier, samples, seed)?;
    let mut rates = Vec::new();
    for model in &models {
        let began = std::time::Instant::now();
        let mut tell = |done| eprint!("\r{done}/{samples}");
        let result = experiment.run(model, &mut tell)?;
        eprint!("\r");
        println!(
            "{}: {} of {} recognised, {:.1} % ({:.0} s on {engine})",
            model.display(),
            result.right,
            result.of,
            100.0 * result.rate(),
            began.elapsed().as_secs_f64()
        );
        rates.push(result.rate());
    }
    if let [teacher, student] = rates[..] {
        println!("difference: {:+.1} %", 100.0 * (student - teacher));
    }
    Ok(())
}
