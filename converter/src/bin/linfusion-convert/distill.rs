//! `linfusion-convert distill`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use linfusion_convert::convert::{WeightsFrom, default_output};
use linfusion_convert::distill::{
    Attention, Budget, DistillError, Mid, Progress, Refinement, Report, Request, Schedule, Source,
    Together, run,
};
use linfusion_convert::plan::Selection;
use linfusion_models::checkpoint::learned_name;
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::terminal::say;

use crate::args::{AttentionArg, ConvertArgs, MethodArg, ReportAs, SelectionArgs};
use crate::{Failure, print_bytes, print_json, selection, spinner};

/// Learning weights.
#[derive(Args, Debug)]
pub struct DistillArgs {
    /// The model, or the folder of a pipeline with one.
    pub model: PathBuf,
    /// The checkpoint's folder.
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// How.
    #[command(flatten)]
    pub how: HowArgs,
    /// Sites.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
    /// How to report on stdout.
    #[arg(long, value_enum, default_value_t)]
    pub report: ReportAs,
}

/// How weights are learned.
#[derive(Args, Debug)]
pub struct HowArgs {
    /// Teacher inputs: a folder of .npz files, a sample each, with an array for each input of the graph.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["random", "pipeline"])]
    pub inputs: Option<PathBuf>,
    /// Teacher inputs at random: a JSON object with a distribution for each input of the graph, e.g.
    /// {"sample": {"normal": {}}, "timestep": {"integers": {"min": 0, "max": 999}}}.
    #[arg(long, value_name = "SPEC.json", conflicts_with = "pipeline")]
    pub random: Option<PathBuf>,
    /// Teacher inputs from a pipeline that makes images: what its denoiser is given on the way.
    #[arg(long, value_name = "FOLDER")]
    pub pipeline: Option<PathBuf>,
    /// Prompts for the pipeline, one a line [default: a list that is built in].
    #[arg(long, value_name = "FILE", conflicts_with_all = ["inputs", "random"])]
    pub prompts: Option<PathBuf>,
    /// Steps of the pipeline's sampler.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub sampler_steps: usize,
    /// Samples to learn from.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub samples: usize,
    /// Samples held out, to judge by.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub holdout: usize,
    /// Steps for each site.
    #[arg(long, value_name = "N", default_value_t = Schedule::default().steps, value_parser = steps)]
    pub steps: usize,
    /// Learning rate at the first of up to 300 steps, of more it is lower as their root; it falls to zero as a cosine.
    #[arg(long, value_name = "RATE", default_value_t = Schedule::default().learning_rate, allow_negative_numbers = true)]
    pub lr: f64,
    /// Images of a batch [default: as many as have 256 tokens]
    #[arg(long, value_name = "N")]
    pub batch: Option<usize>,
    /// Width of the MLPs: auto (as wide as the site, at most 256), a number, or -1 for none.
    #[arg(long, value_name = "auto|N|-1", default_value = "auto", value_parser = mid, allow_hyphen_values = true)]
    pub mid_dim: Mid,
    /// With --attention auto: the cheapest attention is taken that leaves no more than this share of the variance of a
    /// site's output unexplained.
    #[arg(long, value_name = "SHARE", value_parser = share, default_value_t = 0.15, allow_negative_numbers = true)]
    pub max_unexplained: f64,
    /// Do not learn again on the converted model's own activations.
    #[arg(long)]
    pub no_refine: bool,
    /// In the end let all sites learn together for so many steps, on the model's output: the paper's objective, by
    /// differentiating the graph. It takes several runs of the model a step.
    #[arg(long, value_name = "STEPS", num_args = 0..=1, default_missing_value = "200", require_equals = true)]
    pub end_to_end: Option<usize>,
    /// Learning rate of that.
    #[arg(long, value_name = "RATE", default_value_t = Together::default().learning_rate, requires = "end_to_end", allow_negative_numbers = true)]
    pub end_to_end_lr: f64,
    /// Leave softmax at the sites that serve the output worst until its PSNR is so high.
    #[arg(long, value_name = "DB", allow_negative_numbers = true)]
    pub budget_db: Option<f64>,
    /// The same as a mean squared error, relative to the square of the output's range.
    #[arg(
        long,
        value_name = "LOSS",
        conflicts_with = "budget_db",
        allow_negative_numbers = true
    )]
    pub max_loss: Option<f64>,
    /// Draw the losses as an SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Seed of everything random: the same seed makes the same weights.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Activations that may lie on the disk at once, in GiB; sites are learned in groups that fit.
    #[arg(
        long,
        value_name = "GIB",
        default_value_t = 16.0,
        allow_negative_numbers = true
    )]
    pub disk_budget: f64,
    /// Folder for activations [default: the system's for temporary files].
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// Threads [default: as many as there are processors].
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

fn mid(text: &str) -> Result<Mid, String> {
    match (text, text.parse::<usize>()) {
        ("auto", _) => Ok(Mid::Auto),
        ("-1", _) => Ok(Mid::Identity),
        (_, Ok(width)) if (1..=1 << 20).contains(&width) => Ok(Mid::Width(width)),
        _ => Err(format!(
            "'{text}' is none of auto, -1 and a width of 1 or more"
        )),
    }
}

fn steps(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("without a step nothing is learned; `linfusion-convert MODEL --weights none` writes an untrained model".to_owned()),
        Ok(steps) => Ok(steps),
        Err(_) => Err(format!("'{text}' is no number of steps")),
    }
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse::<f64>().ok().filter(|s| (0.0..=1.0).contains(s));
    share.ok_or_else(|| format!("'{text}' is no share of 0 to 1"))
}

pub fn run_distill(args: &DistillArgs) -> Result<(), Failure> {
    let overwrite = if args.force {
        Overwrite::Force
    } else {
        Overwrite::Refuse
    };
    let request = request(
        &args.how,
        &args.selection,
        &args.model,
        &args.out,
        overwrite,
    )?;
    let report = watched(&request)?;
    let printed = match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(report.table().as_bytes()),
    };
    printed.map_err(|failure| failure.although_written(&report.output))
}

/// Learns weights into `MODEL.linfusion-weights`, beside the conversion's output; what the conversion takes then.
pub fn for_conversion(
    args: &ConvertArgs,
    model: &Path,
) -> Result<(WeightsFrom, Selection), Failure> {
    if args.dry_run {
        return Err(Failure::new(
            2,
            "--dry-run: --weights distill has to work to tell",
        ));
    }
    // Before the work, not after it.
    let converted = args.out.clone().unwrap_or_else(|| default_output(model));
    if converted.exists() && !args.force {
        return Err(Failure::new(
            1,
            format!(
                "{} exists already; --force replaces it",
                converted.display()
            ),
        ));
    }
    let name = learned_name(model);
    let out = args.out.as_deref().unwrap_or(model).with_file_name(name);
    if out.symlink_metadata().is_ok() && !args.force {
        let there = out.display();
        return Err(Failure::new(
            1,
            format!(
                "{there} exists already: --weights {there} uses it, --force learns anew and replaces both outputs"
            ),
        ));
    }
    let overwrite = if args.force {
        Overwrite::Force
    } else {
        Overwrite::Refuse
    };
    let request = request(&args.how, &args.selection, model, &out, overwrite)?;
    let report = watched(&request)?;
    if args.report == ReportAs::Table {
        print_bytes(report.table().as_bytes())
            .map_err(|failure| failure.although_written(&report.output))?;
    }
    let selection = Selection {
        // The checkpoint says what each site becomes.
        attention: Vec::new(),
        ..request.selection
    };
    Ok((WeightsFrom::Path(out), selection))
}

fn request(
    how: &HowArgs,
    sites: &SelectionArgs,
    model: &Path,
    out: &Path,
    overwrite: Overwrite,
) -> Result<Request, Failure> {
    let is_auto = |rule: &&AttentionArg| rule.method == MethodArg::Auto;
    let auto = sites.attention.iter().any(|rule| is_auto(&rule));
    let fixed = SelectionArgs {
        attention: sites
            .attention
            .iter()
            .filter(|r| !is_auto(r))
            .cloned()
            .collect(),
        ..sites.clone()
    };
    Ok(Request {
        model: model.to_owned(),
        out: out.to_owned(),
        source: source(how, model)?,
        samples: how.samples,
        holdout: how.holdout,
        schedule: Schedule {
            steps: how.steps,
            learning_rate: how.lr,
            batch: how.batch,
        },
        mid: how.mid_dim,
        selection: selection(&fixed)?,
        attention: match auto {
            true => Attention::Auto {
                unexplained: how.max_unexplained,
            },
            false => Attention::Planned,
        },
        refinement: match how.no_refine {
            true => Refinement::Never,
            false => Refinement::IfBetter,
        },
        end_to_end: how.end_to_end.map(|steps| Together {
            steps,
            learning_rate: how.end_to_end_lr,
        }),
        budget: how
            .budget_db
            .map(Budget::Psnr)
            .or(how.max_loss.map(Budget::Loss)),
        plot: how.plot.clone(),
        seed: how.seed,
        disk_budget: bytes(how.disk_budget)?,
        scratch: how.scratch.clone(),
        threads: how.threads,
        overwrite,
    })
}

fn source(how: &HowArgs, model: &Path) -> Result<Source, Failure> {
    let pipeline = |folder: &Path| Source::Pipeline {
        folder: folder.to_owned(),
        prompts: how.prompts.clone(),
        steps: how.sampler_steps,
    };
    match (&how.inputs, &how.random, &how.pipeline) {
        (Some(folder), ..) => Ok(Source::Folder(folder.clone())),
        (_, Some(spec), _) => Ok(Source::Random(spec.clone())),
        (.., Some(folder)) => Ok(pipeline(folder)),
        _ if model.is_dir() => Ok(pipeline(model)),
        // Told when it is opened.
        _ if !model.exists() => Ok(pipeline(model)),
        _ => Err(Failure::new(
            2,
            format!(
                "'{}' is a model alone: say what it is to be run on, with --pipeline FOLDER, --inputs DIR or --random SPEC.json",
                model.display()
            ),
        )),
    }
}

fn bytes(gib: f64) -> Result<u64, Failure> {
    match gib.is_finite() && gib > 0.0 {
        true => Ok((gib * f64::from(1 << 30)) as u64),
        false => Err(Failure::new(2, format!("--disk-budget {gib}: not a size"))),
    }
}

/// What an interruption leaves of weights that are being learned.
enum Learning {
    /// Nothing: none are.
    No,
    /// This folder, in which nothing is kept yet.
    Begun(PathBuf),
    /// This folder, from which the same request goes on.
    Kept(PathBuf),
}

static LEARNING: Mutex<Learning> = Mutex::new(Learning::No);

fn learning() -> MutexGuard<'static, Learning> {
    LEARNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says what an interruption leaves behind, if weights were being learned.
pub fn tell_what_is_kept() {
    match &*learning() {
        Learning::No => {}
        Learning::Begun(folder) => {
            // Fails, as it should, where another request keeps something.
            let _ = std::fs::remove_dir(folder);
            say("\ninterrupted before the first site was learned; nothing of this run is kept");
        }
        Learning::Kept(folder) => say(format_args!(
            "\ninterrupted; the sites that are learned are kept in {}, and the same command goes on from there",
            folder.display()
        )),
    }
}

fn keep() {
    let mut learning = learning();
    if let Learning::Begun(folder) = &mut *learning {
        *learning = Learning::Kept(std::mem::take(folder));
    }
}

/// Runs with a progress bar.
fn watched(request: &Request) -> Result<Report, Failure> {
    let bar: Mutex<ProgressBar> = Mutex::new(spinner());
    let show = |progress: Progress| {
        let Ok(mut bar) = bar.lock() else { return };
        match progress {
            Progress::Claimed(folder) => *learning() = Learning::Begun(folder),
            Progress::Kept => keep(),
            Progress::Written => *learning() = Learning::No,
            Progress::Advance(steps) => bar.inc(steps),
            Progress::Note(note) if bar.is_hidden() => say(note),
            Progress::Note(note) => bar.println(note),
            Progress::Begin { stage, steps } => {
                bar.finish_and_clear();
                let next = match bar.is_hidden() {
                    true => ProgressBar::hidden(),
                    false => ProgressBar::new(steps),
                };
                let look = "{elapsed} {msg} {wide_bar} {pos}/{len}, {eta} left";
                if let Ok(style) = ProgressStyle::with_template(look) {
                    next.set_style(style);
                }
                next.set_message(stage);
                *bar = next;
            }
        }
    };
    let result = run(request, &show);
    if let Ok(bar) = bar.lock() {
        bar.finish_and_clear();
    }
    let report = result?;
    for warning in &report.warnings {
        say(format_args!("warning: {warning}"));
    }
    Ok(report)
}

impl From<DistillError> for Failure {
    fn from(error: DistillError) -> Self {
        let code = match &error {
            DistillError::Setting { .. } | DistillError::Pattern(_) => 2,
            DistillError::NoSites { .. } => 4,
            DistillError::AlreadyConverted { .. } => 5,
            DistillError::Pipeline(error) if error.is_usage() => 2,
            _ => 1,
        };
        Failure::new(code, error)
    }
}
