//! Every sampler against diffusers' (models/scripts/make_schedules.py).

use std::path::Path;

use serde::Deserialize;

use super::{Evaluation, NAMES, Run, SchedulerError, Slot, State, from_config, kept};
use crate::arithmetic::{Arithmetic, Form, Graphs, Host};
use crate::engine::{EngineError, Location, SessionOptions, Value, load_library};
use crate::tensor::{DType, Tensor};

#[derive(Deserialize)]
struct Case {
    scheduler: serde_json::Value,
    steps: usize,
    first: usize,
    eta: f64,
    strength: f64,
    image_tokens: Option<usize>,
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
    original: Vec<f32>,
    noise: Vec<f32>,
    noised: Vec<f32>,
    sample: Vec<f32>,
    evaluations: Vec<Recorded>,
}

#[derive(Deserialize)]
struct Recorded {
    input: Vec<f32>,
    output: Vec<f32>,
    noise: Vec<f32>,
    sample: Vec<f32>,
}

/// What single precision may lose: coefficients that diffusers computes in it err by some of its units, more where ᾱ is
/// next to 0 or 1, and clean samples come from dividing by √ᾱ.
const TOLERANCE: f32 = 2e-5;

fn compare(what: &str, found: &[f32], expected: &[f32]) -> Result<(), String> {
    compare_after(what, found, expected, &[])
}

/// A step from noise of 4096 to numbers of 1 loses what such noise rounds.
fn compare_after(
    what: &str,
    found: &[f32],
    expected: &[f32],
    before: &[f32],
) -> Result<(), String> {
    let largest = expected
        .iter()
        .chain(before)
        .fold(1.0_f32, |m, v| m.max(v.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()));
    if found.len() == expected.len() && worst <= TOLERANCE * largest {
        return Ok(());
    }
    Err(format!("{what}: {found:?}, expected {expected:?}"))
}

fn tensor(values: &[f32]) -> Tensor {
    Tensor::from(ndarray::arr1(values))
}

fn replay(case: &Case, arithmetic: &mut dyn Arithmetic) -> Result<(), String> {
    let failed = |e: EngineError| e.to_string();
    let run = Run {
        steps: case.steps,
        image_tokens: case.image_tokens,
        eta: case.eta,
        strength: case.strength,
    };
    let config = case.scheduler.to_string();
    let scheduler = from_config(&config, None, &run).map_err(|e| e.to_string())?;
    let found: Vec<f32> = scheduler.timesteps().iter().map(|t| *t as f32).collect();
    let expected: Vec<f32> = case.timesteps.iter().map(|t| *t as f32).collect();
    compare("timesteps", &found, &expected)?;
    compare(
        "init_noise_sigma",
        &[scheduler.init_noise_sigma() as f32],
        &[case.init_noise_sigma as f32],
    )?;
    let values = |value: &Value, arithmetic: &mut dyn Arithmetic| {
        let tensor = arithmetic.download(value).map_err(failed)?;
        Ok::<Vec<f32>, String>(tensor.to_f64().iter().map(|v| *v as f32).collect())
    };
    let [signal, level] = scheduler.noising(case.first);
    let original = arithmetic.upload(tensor(&case.original)).map_err(failed)?;
    let noise = arithmetic.upload(tensor(&case.noise)).map_err(failed)?;
    let noised = arithmetic
        .sum(
            &[(signal, &original), (level, &noise)],
            Form::of(DType::F32),
        )
        .map_err(failed)?;
    compare("add_noise", &values(&noised, arithmetic)?, &case.noised)?;
    let mut state = State::new(arithmetic.upload(tensor(&case.sample)).map_err(failed)?);
    let mut before = &case.sample;
    for (index, evaluation) in case.evaluations.iter().enumerate() {
        let index = case.first + index;
        // From the recorded sample each time, so that each step is judged alone.
        state.restart(arithmetic.upload(tensor(before)).map_err(failed)?);
        let scale = scheduler.input_scale(index);
        let input = arithmetic
            .sum(&[(scale, state.sample())], Form::of(DType::F32))
            .map_err(failed)?;
        compare(
            &format!("input {index}"),
            &values(&input, arithmetic)?,
            &evaluation.input,
        )?;
        let output = arithmetic
            .upload(tensor(&evaluation.output))
            .map_err(failed)?;
        let recipe = scheduler.step(Evaluation {
            index,
            first: case.first,
        });
        let noise = match recipe.reads(Slot::Noise) {
            true => Some(
                arithmetic
                    .upload(tensor(&evaluation.noise))
                    .map_err(failed)?,
            ),
            false => None,
        };
        state
            .step(&recipe, output, noise, arithmetic)
            .map_err(failed)?;
        compare_after(
            &format!("sample after {index}"),
            &values(state.sample(), arithmetic)?,
            &evaluation.sample,
            before,
        )?;
        let clean = state.clean().ok_or("no clean sample")?;
        if clean.shape() != state.sample().shape() {
            return Err("a clean sample of another shape".to_owned());
        }
        before = &evaluation.sample;
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fixtures/schedules.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn replay_all(arithmetic: &mut dyn Arithmetic) {
    let cases = cases();
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            replay(case, arithmetic)
                .err()
                .map(|e| format!("{} steps {}: {e}", case.scheduler, case.steps))
        })
        .collect();
    assert!(
        failures.is_empty(),
        "{} of {}:\n{}",
        failures.len(),
        cases.len(),
        failures.join("\n")
    );
}

#[test]
fn samplers_step_as_those_of_diffusers() {
    replay_all(&mut Host);
}

/// Sums in graphs, each beside the one on the host.
struct Both {
    graphs: Graphs,
    sums: usize,
}

impl Arithmetic for Both {
    fn location(&self) -> Location {
        self.graphs.location()
    }

    fn upload(&mut self, tensor: Tensor) -> Result<Value, EngineError> {
        self.graphs.upload(tensor)
    }

    fn download(&mut self, value: &Value) -> Result<Tensor, EngineError> {
        self.graphs.download(value)
    }

    fn sum(&mut self, terms: &[(f64, &Value)], form: Form) -> Result<Value, EngineError> {
        self.sums += 1;
        let found = self.graphs.sum(terms, form)?;
        let on_host = terms
            .iter()
            .map(|(factor, value)| Ok((*factor, Value::from(self.download(value)?))))
            .collect::<Result<Vec<_>, EngineError>>()?;
        let on_host: Vec<(f64, &Value)> = on_host.iter().map(|(f, v)| (*f, v)).collect();
        let expected = Host.sum(&on_host, form)?;
        // Each coefficient, product and partial sum, and the result on the host, is rounded once in single precision.
        let roundings = terms.len() as f64 + 3.0;
        let magnitudes: Vec<_> = on_host
            .iter()
            .map(|(factor, value)| value.host().unwrap().to_f64().mapv(|v| (factor * v).abs()))
            .collect();
        let found_values = self.download(&found)?.to_f64();
        let differences = found_values - expected.host().unwrap().to_f64();
        for (place, difference) in differences.indexed_iter() {
            let sum: f64 = magnitudes.iter().map(|m| m[&place]).sum();
            let tolerance = roundings * sum * f64::from(f32::EPSILON) / 2.0;
            assert!(
                difference.abs() <= tolerance,
                "{difference:e} above {tolerance:e}"
            );
        }
        Ok(found)
    }

    fn join(&mut self, axis: usize, parts: &[&Value]) -> Result<Value, EngineError> {
        self.graphs.join(axis, parts)
    }

    fn part(
        &mut self,
        value: &Value,
        axis: usize,
        range: std::ops::Range<usize>,
    ) -> Result<Value, EngineError> {
        self.graphs.part(value, axis, range)
    }

    fn finite(&mut self, values: &[&Value]) -> Result<bool, EngineError> {
        self.graphs.finite(values)
    }
}

#[test]
fn samplers_step_in_graphs_as_on_the_host() {
    if load_library(None).is_err() {
        println!("skipped: no ONNX Runtime library");
        return;
    }
    let mut both = Both {
        graphs: Graphs::new(&SessionOptions::default()),
        sums: 0,
    };
    replay_all(&mut both);
    assert!(both.sums > 500, "{}", both.sums);
}

#[test]
fn a_part_of_lcms_schedule_has_steps_of_its_own() {
    let lcm = |steps, strength| {
        from_config(
            r#"{"_class_name": "LCMScheduler"}"#,
            None,
            &Run {
                steps,
                strength,
                ..RUN
            },
        )
    };
    assert!(!lcm(4, 1.0).unwrap().is_cut());
    let part = lcm(4, 0.1).unwrap();
    assert!(part.is_cut());
    assert_eq!(part.timesteps(), [99.0, 79.0, 59.0, 39.0]);
    let error = lcm(6, 0.1).err().unwrap().to_string();
    assert!(
        error.contains("1 to 5 (original_inference_steps, 50, times the strength, 0.1)"),
        "{error}"
    );
    // A fault of the configuration, not of what was asked.
    let config = r#"{"_class_name": "LCMScheduler", "original_inference_steps": 1001}"#;
    let fault = from_config(config, None, &RUN).err().unwrap();
    assert!(
        matches!(&fault, SchedulerError::Field { field, .. } if field == "original_inference_steps"),
        "{fault}"
    );
}

#[test]
fn a_step_that_reads_what_is_not_there_is_an_error() {
    let scheduler = from_config(r#"{"_class_name": "LCMScheduler"}"#, None, &RUN).unwrap();
    let recipe = scheduler.step(Evaluation { index: 0, first: 0 });
    assert!(recipe.reads(Slot::Noise));
    let value = || Value::from(tensor(&[1.0, 2.0]));
    let mut state = State::new(value());
    let error = state.step(&recipe, value(), None, &mut Host).unwrap_err();
    assert!(error.to_string().contains("`noise`"), "{error}");
}

#[test]
fn what_a_run_keeps_is_counted() {
    let count = |name: &str| {
        let config = format!(r#"{{"_class_name": "{name}", "solver_order": 3}}"#);
        kept(
            from_config(&config, None, &Run { steps: 6, ..RUN })
                .unwrap()
                .as_ref(),
            0,
        )
    };
    // Sample and clean sample; three clean samples; these and the sample before; four outputs, the sample before and the
    // outputs gathered.
    assert_eq!(count("DDIMScheduler"), 2);
    assert_eq!(count("DPMSolverMultistepScheduler"), 2 + 3);
    assert_eq!(count("UniPCMultistepScheduler"), 2 + 3 + 1);
    assert_eq!(count("PNDMScheduler"), 2 + 4 + 2);
}

const RUN: Run = Run {
    steps: 4,
    image_tokens: None,
    eta: 0.0,
    strength: 1.0,
};

fn refusal(config: &str) -> String {
    match from_config(config, None, &RUN) {
        Ok(_) => "taken".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    let euler = |rest: &str| format!(r#"{{"_class_name": "EulerDiscreteScheduler"{rest}}}"#);
    let cases = [
        (euler(r#", "use_beta_sigmas": true"#), "use_beta_sigmas"),
        (euler(r#", "beta_schedule": "laplace""#), "beta_schedule"),
        (euler(r#", "prediction_type": 3"#), "prediction_type"),
        (euler(r#", "beta_end": 7"#), "beta_end"),
        (
            euler(r#", "num_train_timesteps": 1e12"#),
            "num_train_timesteps",
        ),
        (euler(r#", "flux_capacitor": 1"#), "flux_capacitor"),
        (
            r#"{"_class_name": "DDIMScheduler", "thresholding": true}"#.to_owned(),
            "thresholding",
        ),
        (
            r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 3}"#.to_owned(),
            "1 to 3",
        ),
        (
            r#"{"_class_name": "DEISMultistepScheduler"}"#.to_owned(),
            "DEISMultistepScheduler",
        ),
        (
            r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}"#
                .to_owned(),
            "lambda_min_clipped",
        ),
        ("{}".to_owned(), "_class_name"),
        ("[1]".to_owned(), "map"),
    ];
    for (config, named) in cases {
        let error = refusal(&config);
        assert!(error.contains(named), "{config}: {error}");
    }
    // Fields of other samplers come along in many configurations and mean nothing.
    assert_eq!(
        refusal(&euler(
            r#", "skip_prk_steps": true, "clip_sample": false, "sigma_min": null"#
        )),
        "taken"
    );
    let words =
        r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity}"#;
    assert_eq!(refusal(words), "taken");
}

#[test]
fn any_sampler_can_be_made_of_any_configuration() {
    let config = r#"{"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": true, "set_alpha_to_one": false,
        "clip_sample": false, "trained_betas": null, "num_train_timesteps": 1000}"#;
    for name in NAMES {
        let scheduler =
            from_config(config, Some(name), &RUN).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(scheduler.timesteps().len() >= 4, "{name}");
    }
    let unknown = from_config(config, Some("ddimm"), &RUN).err().unwrap();
    assert!(
        matches!(unknown, SchedulerError::Unknown { .. }),
        "{unknown}"
    );
    let none = Run { steps: 0, ..RUN };
    assert!(matches!(
        from_config(config, None, &none),
        Err(SchedulerError::Steps { .. })
    ));
}
