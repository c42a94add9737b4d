//! `linfusion-convert`: reports go to stdout, progress and diagnostics to stderr.

#![deny(clippy::print_stdout, clippy::print_stderr)] // They panic where `terminal` does not.

mod args;
#[cfg(feature = "distill")]
mod distill;
mod verify;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use args::{
    Cli, Command, ConvertArgs, DiffArgs, InspectArgs, MethodArg, PrintArgs, ReportAs, SelectionArgs,
};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches};
use indicatif::{ProgressBar, ProgressStyle};
use linfusion_convert::convert::{
    ConvertError, Partial, Request, Run, WeightsFrom, convert, convert_pipeline, inspect,
};
use linfusion_convert::diff;
use linfusion_convert::grid::GridSize;
use linfusion_convert::patterns::{BadPattern, Patterns};
use linfusion_convert::plan::{MethodRule, Selection};
use linfusion_convert::report::ConvertReport;
use linfusion_convert::verify::VerifyError;
use linfusion_models::onnx::text::{Elided, PrintOptions, print_model};
use linfusion_models::onnx::write::{Overwrite, clean_up_unfinished};
use linfusion_models::onnx::{OnnxFile, ReadError};
use linfusion_models::terminal::say;
use linfusion_models::{leftovers, signals, terminal};

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LINFUSION_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        // Whoever closed standard error is not told that it is closed.
        .log_internal_errors(false)
        .init();
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    // Runs on a thread of its own. Without it a signal would still leave no output,
    // but perhaps a hidden scratch file. The exit runs no destructors: those of ONNX Runtime
    // would take from its threads what they still use. Reports are flushed as they are printed.
    let handler = signals::on_each(|| {
        clean_up_unfinished();
        leftovers::remove_all();
        #[cfg(feature = "distill")]
        distill::tell_what_is_kept();
        signal_hook::low_level::exit(INTERRUPTED);
    });
    if let Err(error) = handler {
        tracing::warn!("signals are not handled: {error}");
    }
    let outcome = match cli.command {
        Some(Command::Inspect(a)) => run_inspect(&a),
        #[cfg(feature = "distill")]
        Some(Command::Distill(a)) => distill::run_distill(&a),
        Some(Command::Verify(a)) => verify::run_verify(&a),
        Some(Command::Print(a)) => run_print(&a),
        Some(Command::Diff(a)) => run_diff(&a),
        Some(Command::Completions { shell }) => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "linfusion-convert", &mut script);
            print_bytes(&script)
        }
        Some(Command::Man) => {
            let mut page = Vec::new();
            match clap_mangen::Man::new(Cli::command()).render(&mut page) {
                Ok(()) => print_bytes(&page),
                Err(e) => Err(Failure::new(1, e)),
            }
        }
        None => run_convert(&cli.convert, &matches),
    };
    // An interruption or an error leaves no scratch file behind.
    clean_up_unfinished();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                say(format_args!("error: {}", failure.message));
            }
            ExitCode::from(failure.code)
        }
    }
}

/// Exit code after SIGINT, SIGTERM or SIGHUP, as shells have it for the first.
const INTERRUPTED: i32 = 130;

/// An exit code and what to say.
struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    fn new(code: u8, error: impl std::fmt::Display) -> Self {
        Failure {
            code,
            message: error.to_string(),
        }
    }

    /// The same, of a report about what is there all the same.
    fn although_written(mut self, output: impl std::fmt::Display) -> Self {
        self.message += &format!("; {output} was written, only its report is lost");
        self
    }
}

impl From<ConvertError> for Failure {
    fn from(error: ConvertError) -> Self {
        let code = match &error {
            ConvertError::NoWeights { .. } | ConvertError::ManyWeights { .. } => 3,
            ConvertError::Fewer { .. } => 4,
            ConvertError::AlreadyConverted { .. } => 5,
            // Nothing was verified.
            ConvertError::Verify(VerifyError::Library(_)) => 1,
            ConvertError::Verify(_) | ConvertError::ResizedWrong { .. } => 6,
            ConvertError::Pattern(_)
            | ConvertError::OtherAttention { .. }
            | ConvertError::NothingToDo { .. } => 2,
            _ => 1,
        };
        Failure::new(code, error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        Failure::new(1, error)
    }
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        ConvertError::from(error).into()
    }
}

impl From<BadPattern> for Failure {
    fn from(error: BadPattern) -> Self {
        Failure::new(2, error)
    }
}

fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    terminal::print(bytes).map_err(|error| Failure::new(1, error))
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut text = serde_json::to_string_pretty(value).map_err(|e| Failure::new(1, e))?;
    text.push('\n');
    print_bytes(text.as_bytes())
}

fn selection(args: &SelectionArgs) -> Result<Selection, Failure> {
    let mut attention = Vec::new();
    for rule in &args.attention {
        attention.push(MethodRule {
            sites: match &rule.glob {
                Some(glob) => Some(Patterns::new("--attention", std::slice::from_ref(glob))?),
                None => None,
            },
            method: match rule.method {
                MethodArg::Keep => None,
                MethodArg::Fixed(method) => Some(method),
                MethodArg::Auto => {
                    return Err(Failure::new(
                        2,
                        "--attention auto tries what is learned: it goes with `distill` and --weights distill",
                    ));
                }
            },
        });
    }
    Ok(Selection {
        attention,
        window: args.window_spec().map_err(|e| Failure::new(2, e))?,
        grid: args.grid.map(|[rows, cols]| GridSize {
            rows: i64::from(rows),
            cols: i64::from(cols),
        }),
        keep: Patterns::new("--keep", &args.keep)?,
        only: if args.only.is_empty() {
            None
        } else {
            Some(Patterns::new("--only", &args.only)?)
        },
        keep_every: args.keep_every.and_then(|n| usize::try_from(n).ok()),
        min_tokens: i64::from(args.min_tokens),
    })
}

fn run_inspect(args: &InspectArgs) -> Result<(), Failure> {
    let report = inspect(&args.model, &selection(&args.selection)?)?;
    match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(report.table().as_bytes()),
    }
}

fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn run_convert(args: &ConvertArgs, matches: &ArgMatches) -> Result<(), Failure> {
    let model = args.model.clone().unwrap_or_default();
    let learns = args.weights.as_deref() == Some("distill");
    if !learns {
        refuse_learning(matches)?;
    }
    let (weights, selection) = match learns {
        true => learned(args, &model)?,
        false => (args.weights(), selection(&args.selection)?),
    };
    let request = Request {
        model,
        out: args.out.clone(),
        weights,
        emit: args.emit,
        selection,
        external: args.external_data.into(),
        overwrite: if args.force {
            Overwrite::Force
        } else {
            Overwrite::Refuse
        },
        // Sites that a budget keeps are kept on purpose.
        partial: if args.allow_partial || learns {
            Partial::Allow
        } else {
            Partial::Refuse
        },
        verify: args.verify,
        run: if args.dry_run { Run::Dry } else { Run::Write },
        resize: args.resize,
    };
    let bar = spinner();
    let convert = if request.model.is_dir() {
        convert_pipeline
    } else {
        convert
    };
    let result = convert(&request, &mut |step| bar.set_message(step.to_owned()));
    bar.finish_and_clear();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            if let (true, WeightsFrom::Path(learned)) = (learns, &request.weights) {
                say(format_args!(
                    "note: the weights are learned, and --weights {} uses them",
                    learned.display()
                ));
            }
            if let (ConvertError::Fewer { report, .. }, ReportAs::Json) = (&error, args.report) {
                print_json(report)?;
            }
            return Err(error.into());
        }
    };
    for warning in &report.warnings {
        say(format_args!("warning: {warning}"));
    }
    let printed = match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(summary(&report, &request.weights, args.explain).as_bytes()),
    };
    printed.map_err(|failure| match &report.output {
        Some(output) => failure.although_written(output),
        None => failure,
    })
}

/// Learns weights for `model`, beside the output; what the conversion takes then.
#[cfg(feature = "distill")]
fn learned(args: &ConvertArgs, model: &Path) -> Result<(WeightsFrom, Selection), Failure> {
    distill::for_conversion(args, model)
}

#[cfg(not(feature = "distill"))]
fn learned(_: &ConvertArgs, _: &Path) -> Result<(WeightsFrom, Selection), Failure> {
    Err(Failure::new(
        2,
        "--weights distill: this program was built without the feature `distill`",
    ))
}

/// An option that says how weights are learned would have no effect where none are.
#[cfg(feature = "distill")]
fn refuse_learning(matches: &ArgMatches) -> Result<(), Failure> {
    use clap::Args;
    let options = distill::HowArgs::augment_args(clap::Command::new("learning"));
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut options = options.get_arguments();
    let Some(option) = options.find(|option| given(option.get_id().as_str())) else {
        return Ok(());
    };
    Err(Failure::new(
        2,
        format!(
            "--{} says how weights are learned: it goes with --weights distill",
            option.get_long().unwrap_or_default()
        ),
    ))
}

#[cfg(not(feature = "distill"))]
fn refuse_learning(_: &ArgMatches) -> Result<(), Failure> {
    Ok(())
}

fn summary(report: &ConvertReport, weights: &WeightsFrom, explain: bool) -> String {
    let mut text = if explain {
        report.model.table()
    } else {
        String::new()
    };
    if let Some(resized) = &report.resized {
        text += &resized.text();
    }
    let wrote = |output: &str| {
        let companions = match report.companions.is_empty() {
            true => String::new(),
            false => format!(" (keep {} with it)", report.companions.join(", ")),
        };
        format!("wrote {output}{companions}\n")
    };
    let nothing = || "dry run: nothing written\n".to_owned();
    if report.converted == 0 && report.resized.is_some() {
        return text + &report.output.as_deref().map_or_else(nothing, wrote);
    }
    let kept = report.model.sites.len() - report.converted;
    text += &format!(
        "{}: {} of {} attention sites converted, {kept} kept ({} cross)\n",
        report.model.architecture,
        report.converted,
        report.model.sites.len(),
        report
            .model
            .count(linfusion_convert::attention::kind::Kind::Cross),
    );
    if let Some(checkpoint) = &report.checkpoint {
        let how = match weights {
            WeightsFrom::Search => "weights found: ",
            _ => "weights: ",
        };
        text += &format!("{how}{checkpoint}\n");
    }
    match &report.output {
        None => text += &nothing(),
        Some(output) => {
            text += &wrote(output);
            match &report.verified {
                None => text += "not verified (--verify off)\n",
                Some(v) => {
                    if v.sites == 0 && report.converted > 0 {
                        text += "verified: the structure alone\n";
                    } else {
                        text += &format!(
                            "verified: structure, and {} sites run on {} within {:.1e} of the reference\n",
                            v.sites,
                            v.engine.as_deref().unwrap_or("nothing"),
                            v.max_relative_error
                        );
                    }
                    for skipped in v.skipped.iter().take(4) {
                        text += &format!("  not run: {skipped}\n");
                    }
                    if v.skipped.len() > 4 {
                        text += &format!("  and {} more not run\n", v.skipped.len() - 4);
                    }
                }
            }
        }
    }
    text
}

fn run_print(args: &PrintArgs) -> Result<(), Failure> {
    let file = OnnxFile::open(&args.model)?;
    let options = PrintOptions {
        max_elements: args.max_elements,
        elided: if args.hash {
            Elided::Hash
        } else {
            Elided::Size
        },
        file: Some(&file),
    };
    print_bytes(print_model(&file.model, options).to_string().as_bytes())
}

/// A data file that is missing or cut off says nothing of a rewrite.
fn data_is_there(file: &OnnxFile) -> Result<(), Failure> {
    file.check_data_files()
        .map_err(|error| Failure::new(1, format!("'{}': {error}", file.path().display())))
}

fn run_diff(args: &DiffArgs) -> Result<(), Failure> {
    let (before, after) = (OnnxFile::open(&args.before)?, OnnxFile::open(&args.after)?);
    data_is_there(&before)?;
    data_is_there(&after)?;
    let difference = diff::diff(&before, &after);
    match args.report {
        ReportAs::Json => print_json(&difference)?,
        ReportAs::Table => print_bytes(difference.text().as_bytes())?,
    }
    if difference.outside.is_empty() {
        return Ok(());
    }
    Err(Failure {
        code: 6,
        message: String::new(),
    })
}
