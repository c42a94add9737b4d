//! Every sampler against diffusers' (models/scripts/make_schedules.py).

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{NAMES, Run, SchedulerError, from_config};

#[derive(Deserialize)]
struct Case {
    scheduler: Value,
    steps: usize,
    first: usize,
    eta: f64,
    image_tokens: Option<usize>,
    timesteps: Vec<f64>,
    init_noise_sigma: f64,
    original: Vec<f32>,
    noise: Vec<f32>,
    noised: Vec<f32>,
    sample: Vec<f32>,
    evaluations: Vec<Evaluation>,
}

#[derive(Deserialize)]
struct Evaluation {
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

fn replay(case: &Case) -> Result<(), String> {
    let run = Run {
        steps: case.steps,
        image_tokens: case.image_tokens,
        eta: case.eta,
    };
    let config = case.scheduler.to_string();
    let mut scheduler = from_config(&config, None, &run).map_err(|e| e.to_string())?;
    let found: Vec<f32> = scheduler.timesteps().iter().map(|t| *t as f32).collect();
    let expected: Vec<f32> = case.timesteps.iter().map(|t| *t as f32).collect();
    compare("timesteps", &found, &expected)?;
    compare(
        "init_noise_sigma",
        &[scheduler.init_noise_sigma() as f32],
        &[case.init_noise_sigma as f32],
    )?;
    scheduler.begin(case.first);
    let mut noised = case.original.clone();
    scheduler.add_noise(&mut noised, &case.noise, case.first);
    compare("add_noise", &noised, &case.noised)?;
    for (index, evaluation) in case.evaluations.iter().enumerate() {
        let index = case.first + index;
        // From the recorded sample each time, so that each step is judged alone.
        let before = index
            .checked_sub(case.first + 1)
            .and_then(|i| case.evaluations.get(i));
        let mut sample = before.map_or_else(|| case.sample.clone(), |e| e.sample.clone());
        let mut input = sample.clone();
        scheduler.scale_model_input(&mut input, index);
        compare(&format!("input {index}"), &input, &evaluation.input)?;
        let noise = evaluation.noise.clone();
        scheduler.step(&evaluation.output, index, &mut sample, &mut |_| {
            noise.clone()
        });
        let start = before.map_or(&case.sample, |e| &e.sample);
        compare_after(
            &format!("sample after {index}"),
            &sample,
            &evaluation.sample,
            start,
        )?;
        if scheduler
            .predicted_original()
            .is_none_or(|clean| clean.len() != sample.len())
        {
            return Err("no clean sample".to_owned());
        }
    }
    Ok(())
}

#[test]
fn samplers_step_as_those_of_diffusers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/fixtures/schedules.json");
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            replay(case)
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

const RUN: Run = Run {
    steps: 4,
    image_tokens: None,
    eta: 0.0,
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
