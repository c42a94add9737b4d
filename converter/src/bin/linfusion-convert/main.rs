//! `linfusion-convert`: reports go to stdout, progress and diagnostics to stderr.

mod args;
#[cfg(feature = "distill")]
mod distill;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use args::{
    Cli, Command, ConvertArgs, DiffArgs, InspectArgs, MethodArg, PrintArgs, ReportAs,
    SelectionArgs, VerifyArgs,
};
use clap::{CommandFactory, Parser};
use indicatif::{ProgressBar, ProgressStyle};
use linfusion_convert::analysis::METADATA_KEY;
use linfusion_convert::convert::{
    ConvertError, Partial, Request, Run, WeightsFrom, convert, convert_pipeline, inspect,
};
use linfusion_convert::grid::GridSize;
use linfusion_convert::patterns::{BadPattern, Patterns};
use linfusion_convert::plan::{MethodRule, Selection};
use linfusion_convert::report::ConvertReport;
use linfusion_convert::verify::{StoredWeights, Verified, VerifyError};
use linfusion_convert::{diff, verify};
use linfusion_models::checkpoint::Checkpoint;
use linfusion_models::onnx::text::{Elided, PrintOptions, print_model};
use linfusion_models::onnx::write::{Overwrite, clean_up_unfinished};
use linfusion_models::onnx::{OnnxFile, ReadError};
use linfusion_models::{leftovers, signals};

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LINFUSION_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let cli = Cli::parse();
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
        Some(Command::Verify(a)) => run_verify(&a),
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
        None => run_convert(&cli.convert),
    };
    // An interruption or an error leaves no scratch file behind.
    clean_up_unfinished();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                eprintln!("error: {}", failure.message);
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

/// Writes to stdout. A reader that went away (`| head`) is no failure.
fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::new(1, e)),
        _ => Ok(()),
    }
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

fn run_convert(args: &ConvertArgs) -> Result<(), Failure> {
    let model = args.model.clone().unwrap_or_default();
    let learns = args.weights.as_deref() == Some("distill");
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
            if let (ConvertError::Fewer { report, .. }, ReportAs::Json) = (&error, args.report) {
                print_json(report)?;
            }
            return Err(error.into());
        }
    };
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(summary(&report, &request.weights, args.explain).as_bytes()),
    }
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

fn summary(report: &ConvertReport, weights: &WeightsFrom, explain: bool) -> String {
    let mut text = if explain {
        report.model.table()
    } else {
        String::new()
    };
    if let Some(resized) = &report.resized {
        text += &resized.text();
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
        None => text += "dry run: nothing written\n",
        Some(output) => {
            text += &format!(
                "wrote {output}{}\n",
                if report.companions.is_empty() {
                    String::new()
                } else {
                    format!(" (keep {} with it)", report.companions.join(", "))
                }
            );
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

fn run_verify(args: &VerifyArgs) -> Result<(), Failure> {
    let file = OnnxFile::open(&args.model)?;
    let (sites, unread) = verify::converted_sites(&file);
    let total = sites.len() + unread.len();
    let converted = file
        .model
        .metadata_props
        .iter()
        .any(|p| p.key.as_deref() == Some(METADATA_KEY));
    let name = args.model.display();
    match (total, converted, &args.weights) {
        (0, false, _) => {
            return Err(Failure::new(
                1,
                format!(
                    "'{name}' was not converted: it holds no LinFusionAttention and no WindowAttention node"
                ),
            ));
        }
        (0, true, None) => {
            return Err(Failure::new(
                1,
                format!(
                    "'{name}' was converted with --emit standard: there is no operator left in it to check (it was verified when it was converted, unless that was off)\nhint: --weights CHECKPOINT compares its weights"
                ),
            ));
        }
        _ => {}
    }
    let weights = match &args.weights {
        Some(checkpoint) => Some(same_weights(&file, checkpoint)?),
        None => None,
    };
    let mut verified = verify::verify(
        &file,
        &Default::default(),
        &sites,
        None,
        verify::Verify::Auto,
        &mut |_| {},
    )?;
    let unread = unread
        .into_iter()
        .map(|node| format!("{node}: its input cannot be told from the graph"));
    for line in unread {
        verified.not_run.push(line.clone());
        verified.skipped.push(line);
    }
    if let Some(warning) = verified.unchecked() {
        eprintln!("warning: {warning}");
    }
    let report = VerifyReport { verified, weights };
    match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(report.text(total).as_bytes()),
    }
}

/// What `verify` found.
#[derive(serde::Serialize)]
struct VerifyReport {
    #[serde(flatten)]
    verified: Verified,
    /// The comparison that `--weights` asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<SameWeights>,
}

/// Weights that were found to be a checkpoint's.
#[derive(serde::Serialize)]
struct SameWeights {
    checkpoint: String,
    #[serde(flatten)]
    stored: StoredWeights,
}

/// Compares the weights in `file` with those of the checkpoint at `path`.
fn same_weights(file: &OnnxFile, path: &Path) -> Result<SameWeights, Failure> {
    let checkpoint = Checkpoint::open(path).map_err(|e| Failure::new(1, e))?;
    let stored = verify::compare_weights(file, &checkpoint).map_err(|e| Failure::new(1, e))?;
    let checkpoint = checkpoint.path.display().to_string();
    if !stored.different.is_empty() {
        return Err(Failure::new(
            6,
            format!("the weights in the file are not those of {checkpoint}: {stored}"),
        ));
    }
    if stored.equal.is_empty() {
        return Err(Failure::new(
            6,
            format!(
                "nothing was compared with {checkpoint}: the {} converted sites of the file are window attention, which has no weights of a checkpoint",
                stored.without.len()
            ),
        ));
    }
    Ok(SameWeights { checkpoint, stored })
}

impl VerifyReport {
    /// For people; the file has so many converted sites.
    fn text(&self, sites: usize) -> String {
        let Self { verified, weights } = self;
        let mut text = match (sites, verified.sites) {
            (0, _) => "structure ok; no operator is left to run (--emit standard)\n".to_owned(),
            (_, 0) => format!("structure ok; 0 of {sites} sites run\n"),
            (_, run) => format!(
                "structure ok; {run} of {sites} sites run on {}, within {:.1e} of the reference\n",
                verified.engine.as_deref().unwrap_or("nothing"),
                verified.max_relative_error,
            ),
        };
        for skipped in &verified.skipped {
            text += &format!("  not run: {skipped}\n");
        }
        match weights {
            None => text += "weights not compared (--weights CHECKPOINT does)\n",
            Some(SameWeights { checkpoint, stored }) => {
                text += &format!(
                    "weights of {} sites compared with {checkpoint}: equal\n",
                    stored.equal.len()
                );
                if !stored.without.is_empty() {
                    text += &format!(
                        "  {} sites of window attention have no weights of a checkpoint\n",
                        stored.without.len()
                    );
                }
            }
        }
        text
    }
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

fn run_diff(args: &DiffArgs) -> Result<(), Failure> {
    let (before, after) = (OnnxFile::open(&args.before)?, OnnxFile::open(&args.after)?);
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
