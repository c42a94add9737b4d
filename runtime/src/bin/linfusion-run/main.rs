//! `linfusion-run`: compares, measures and diagnoses. Reports go to standard output, everything else to
//! standard error.

mod args;
mod generate;
mod output;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use miette::{IntoDiagnostic, WrapErr, miette};

use args::{Arguments, BenchArgs, Command, CompareArgs, DoctorArgs, Where};
use linfusion_runtime::bench::{self, Job, Plan, WorkerCommand};
use linfusion_runtime::compare::difference;
use linfusion_runtime::engine::{Engine, Session, SessionOptions};
use linfusion_runtime::inputs::{self, Request};
use linfusion_runtime::{doctor, npz, provenance, tensor::Tensor};
use output::Comparison;

/// Exit codes beyond success (0), failure (1) and wrong usage (2, from the argument parser).
const TOO_FAR_APART: u8 = 3;
const NOT_WELL: u8 = 4;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("LINFUSION_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    let done = match &arguments.command {
        Command::Doctor(args) => run_doctor(args),
        Command::Compare(args) => run_compare(args),
        Command::Bench(args) => run_bench(args),
        Command::Generate(args) => generate::run(args),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(
                *shell,
                &mut Arguments::command(),
                "linfusion-run",
                &mut text,
            );
            print(&String::from_utf8_lossy(&text)).map(|()| ExitCode::SUCCESS)
        }
        Command::Man => man(),
        Command::MeasureWorker { job } => bench::serve(job, io::stdin().lock(), io::stdout())
            .into_diagnostic()
            .map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|report| {
        eprintln!("{report:?}");
        ExitCode::FAILURE
    })
}

fn run_doctor(args: &DoctorArgs) -> miette::Result<ExitCode> {
    let diagnosis = doctor::diagnose(
        args.place.ort_library.as_deref(),
        args.operator_library.as_deref(),
    );
    let well = diagnosis.onnx_runtime.is_some()
        && diagnosis
            .operator_library
            .as_ref()
            .is_none_or(|library| library.problem.is_none());
    print(&match args.place.report {
        args::Report::Json => output::json(&diagnosis)?,
        args::Report::Table => output::diagnosis(&diagnosis),
    })?;
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_WELL)
    })
}

fn run_compare(args: &CompareArgs) -> miette::Result<ExitCode> {
    let options = session_options(&args.place)?;
    let mut sessions = Vec::new();
    for model in [&args.reference, &args.other] {
        let session = Session::from_file(args.place.engine(), model, &options)
            .into_diagnostic()
            .wrap_err_with(|| format!("loading {}", model.display()))?;
        if provenance::is_untrained(model) {
            eprintln!(
                "note: {} was converted without trained weights: its output means nothing",
                model.display()
            );
        }
        sessions.push((model, session));
    }
    let given = match &args.inputs {
        Some(path) => Some(npz::read(path).into_diagnostic()?),
        None => None,
    };
    let request = Request {
        latent: args.latent,
        batch: args.shape.batch,
        sequence: args.shape.sequence,
        shapes: args.shape.set.clone(),
        seed: args.shape.seed,
    };
    let made = match &given {
        Some(given) => given.clone(),
        None => {
            // The first model's, so that both run on the same values.
            let (_, first) = sessions.first().ok_or_else(|| miette!("no model"))?;
            inputs::make(first.inputs(), &request).into_diagnostic()?
        }
    };
    let mut outputs = Vec::new();
    for (model, session) in &mut sessions {
        let inputs = fitting(session, &made, model)?;
        let result = session
            .run(&inputs)
            .into_diagnostic()
            .wrap_err_with(|| format!("running {}", model.display()))?;
        outputs.push(result);
    }
    let [reference, other] = <[Vec<(String, Tensor)>; 2]>::try_from(outputs)
        .map_err(|_| miette!("two models give two results"))?;
    let comparison = compare_outputs(args, &reference, &other)?;
    let within = comparison.within_tolerance;
    print(&match args.place.report {
        args::Report::Json => output::json(&comparison)?,
        args::Report::Table => output::comparison(&comparison),
    })?;
    Ok(if within {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(TOO_FAR_APART)
    })
}

/// The tensors that the model takes, in its types; what it does not take is left out.
fn fitting(
    session: &Session,
    tensors: &[(String, Tensor)],
    model: &Path,
) -> miette::Result<Vec<(String, Tensor)>> {
    session
        .inputs()
        .iter()
        .map(|port| {
            let (_, tensor) = tensors
                .iter()
                .find(|(n, _)| *n == port.name)
                .ok_or_else(|| {
                    let names: Vec<_> = tensors.iter().map(|(n, _)| n).collect();
                    miette!(
                        help = "give its inputs with --inputs FILE.npz, under the model's names",
                        "{} takes an input `{}` that is not among {names:?}",
                        model.display(),
                        port.name
                    )
                })?;
            Ok((port.name.clone(), tensor.cast(port.dtype)))
        })
        .collect()
}

fn compare_outputs(
    args: &CompareArgs,
    reference: &[(String, Tensor)],
    other: &[(String, Tensor)],
) -> miette::Result<Comparison> {
    let mut differences = Vec::new();
    for (position, (name, expected)) in reference.iter().enumerate() {
        let found = other
            .iter()
            .find(|(n, _)| n == name)
            .or_else(|| other.get(position))
            .ok_or_else(|| miette!("{} has no output `{name}`", args.other.display()))?;
        let difference = difference(name, expected, &found.1).ok_or_else(|| {
            miette!(
                "output `{name}` is {:?} of the first model and {:?} of the second",
                expected.shape(),
                found.1.shape()
            )
        })?;
        differences.push(difference);
    }
    let finite = differences.iter().all(|d| d.not_finite == [0, 0]);
    let within = args.tolerance.is_none_or(|limit| {
        differences
            .iter()
            .all(|d| d.max_abs.is_some_and(|e| e <= limit))
    });
    Ok(Comparison {
        reference: args.reference.clone(),
        other: args.other.clone(),
        untrained: [&args.reference, &args.other].map(|m| provenance::is_untrained(m)),
        engine: args.place.engine().name().to_owned(),
        tolerance: args.tolerance,
        within_tolerance: finite && within,
        outputs: differences,
    })
}

fn run_bench(args: &BenchArgs) -> miette::Result<ExitCode> {
    let options = session_options(&args.place)?;
    let plan = Plan {
        worker: WorkerCommand {
            program: std::env::current_exe().into_diagnostic()?,
            arguments: vec!["measure-worker".to_owned()],
        },
        models: args.models.clone(),
        latents: args.latents(),
        repeats: args.repeats.get(),
        template: Job {
            model: Default::default(),
            engine: args.place.engine_name(),
            threads: options.threads,
            operators: args.place.operators.clone(),
            library: options.library,
            latent: 0,
            batch: args.shape.batch,
            sequence: args.shape.sequence,
            shapes: args.shape.set.clone(),
            seed: args.shape.seed,
        },
    };
    let progress = indicatif::ProgressBar::new_spinner();
    progress.enable_steady_tick(std::time::Duration::from_millis(200));
    let report = bench::run(&plan, |what| progress.set_message(what.to_owned())).into_diagnostic();
    progress.finish_and_clear();
    let report = report?;
    if let Some(path) = &args.plot {
        bench::plot::write(&report, path).into_diagnostic()?;
    }
    if let Some(path) = &args.json {
        std::fs::write(path, output::json(&report)?)
            .into_diagnostic()
            .wrap_err_with(|| format!("writing {}", path.display()))?;
    }
    print(&match args.place.report {
        args::Report::Json => output::json(&report)?,
        args::Report::Table => output::bench(&report),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn session_options(place: &Where) -> miette::Result<SessionOptions> {
    if place.engine() == Engine::Ort {
        linfusion_runtime::engine::load_library(place.ort_library.as_deref())
            .into_diagnostic()
            .wrap_err("`--engine tract` needs no library")?;
    }
    Ok(SessionOptions {
        operators: place.operators.clone().into(),
        threads: place.threads,
        library: place.ort_library.clone(),
        ..SessionOptions::default()
    })
}

fn man() -> miette::Result<ExitCode> {
    let mut text = Vec::new();
    clap_mangen::Man::new(Arguments::command())
        .render(&mut text)
        .into_diagnostic()?;
    print(&String::from_utf8_lossy(&text))?;
    Ok(ExitCode::SUCCESS)
}

/// A reader that went away (`| head`) is no failure.
fn print(text: &str) -> miette::Result<()> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e).into_diagnostic(),
        _ => Ok(()),
    }
}
