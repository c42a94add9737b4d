//! `linfusion-run`: compares, measures and diagnoses. Reports go to standard output, everything else to
//! standard error.

#![deny(clippy::print_stdout, clippy::print_stderr)] // They panic where `terminal` does not.

mod args;
mod bench;
mod compare;
mod export_triton;
mod failure;
mod generate;
mod images;
mod interruption;
mod origin;
mod output;

use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use linfusion_models::terminal::{self, say};
use miette::{IntoDiagnostic, MietteDiagnostic, Report};

use args::{Arguments, Command, DoctorArgs, Where};
use linfusion_runtime::bench::{OperatorsFrom, work};
use linfusion_runtime::doctor;
use linfusion_runtime::engine::library::LibraryError;
use linfusion_runtime::engine::{Device, Engine, SessionOptions};

/// Exit code of wrong usage, as the argument parser has it.
const WRONG_USAGE: u8 = 2;
/// Exit code of `doctor` where something is missing or broken.
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
        // Whoever closed standard error is not told that it is closed.
        .log_internal_errors(false)
        .init();
    // As it is, or the terminal breaks commands and paths to be copied in the middle.
    // Fails only where there is one already.
    let _ = miette::set_hook(Box::new(|_| {
        let options = miette::MietteHandlerOpts::new();
        Box::new(options.wrap_lines(false).break_words(false).build())
    }));
    let done = interruption::handle().and_then(|()| run(&arguments.command));
    done.unwrap_or_else(|report| {
        say(format_args!("{report:?}"));
        match failure::is_usage(&report) {
            true => ExitCode::from(WRONG_USAGE),
            false => ExitCode::FAILURE,
        }
    })
}

fn run(command: &Command) -> miette::Result<ExitCode> {
    match command {
        Command::Doctor(args) => run_doctor(args),
        Command::Compare(args) => compare::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Generate(args) => generate::run(args),
        Command::ExportTriton(args) => export_triton::run(args),
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
        Command::MeasureWorker { arguments } => {
            work(arguments).into_diagnostic()?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_doctor(args: &DoctorArgs) -> miette::Result<ExitCode> {
    let diagnosis = doctor::diagnose(
        args.ort_library.as_deref(),
        args.operator_library.as_deref(),
    );
    let well = diagnosis.onnx_runtime.is_some()
        && diagnosis
            .operator_library
            .as_ref()
            .is_none_or(|library| library.problem.is_none());
    print(&match args.report {
        args::Report::Json => output::json(&diagnosis)?,
        args::Report::Table => output::diagnosis(&diagnosis),
    })?;
    Ok(if well {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(NOT_WELL)
    })
}

fn session_options(place: &Where) -> miette::Result<SessionOptions> {
    if place.engine() == Engine::Ort {
        linfusion_runtime::engine::load_library(place.ort_library.as_deref()).map_err(unloaded)?;
    }
    let chosen = place
        .device
        .choose(place.engine(), place.ort_library.as_deref())
        .into_diagnostic()?;
    if place.gpu_memory.is_some() && chosen.device == Device::Cpu {
        return Err(failure::usage(
            "--gpu-memory: the models run on the processor; --device cuda insists on a GPU",
        ));
    }
    if let Some(note) = chosen.note {
        say(format_args!("note: running on the processor: {note}"));
    }
    if chosen.device != Device::Cpu
        && place.operators == OperatorsFrom::InProcess
        && !linfusion_runtime::engine::has_gpu_kernels()
    {
        say(
            "note: this program has no CUDA kernels, and its operators will run on the processor; give the library that \
             `make cuda lib` builds with --operators",
        );
    }
    Ok(SessionOptions {
        device: chosen.device,
        device_memory: place.gpu_memory,
        operators: place.operators.clone().into(),
        threads: place.threads,
        library: place.ort_library.clone(),
        ..SessionOptions::default()
    })
}

fn unloaded(error: LibraryError) -> Report {
    let told = MietteDiagnostic::new(error.to_string());
    Report::from(match error.hint() {
        Some(hint) => told.with_help(hint),
        None => told,
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

/// The same of a report about what is there all the same.
fn print_beside(written: &str, text: &str) -> miette::Result<()> {
    let lost = |error: miette::Report| {
        miette::miette!("{error}; {written} written, only the report is lost")
    };
    print(text).map_err(lost)
}

fn print(text: &str) -> miette::Result<()> {
    terminal::print(text).into_diagnostic()
}
