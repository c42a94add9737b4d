//! `linfusion-run bench`: time and memory of models, or of whole pipelines, over image size.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::terminal::say;
use linfusion_runtime::bench::{
    self, BenchReport, Images, Job, Observer, Plan, Profiling, Sizes, WorkerCommand,
};
use linfusion_runtime::whole::{check_place, write_whole};
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::args::{Report, Shape, Where};
use crate::failure::{OrReport, usage};
use crate::interruption::{self, STOPPED};
use crate::{output, print, session_options};

#[derive(Args)]
pub struct BenchArgs {
    /// The models, or pipelines' folders; the others are compared with the first
    #[arg(required = true)]
    pub models: Vec<PathBuf>,
    /// Height and width of square images in pixels [default: the size that the models are fixed at or --set gives, else
    /// 512,768,1024]
    #[arg(long, value_delimiter = ',', value_parser = side)]
    pub sizes: Vec<usize>,
    /// Pixels along an edge for one row or column of the models' image input [default: 1 if it has 1 or 3 channels, else 8]
    #[arg(long, value_name = "N", value_parser = side)]
    pub pixels_per_latent: Option<usize>,
    /// Runs that count; of a model after one that does not
    #[arg(long, default_value = "5")]
    pub repeats: NonZeroUsize,
    /// Also tell where each model's time goes, operator by operator, at the largest size
    #[arg(long)]
    pub profile: bool,
    /// Also write the plot here
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    /// Also write the measurements here
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Replace files that are there
    #[arg(long, alias = "force")]
    pub overwrite: bool,
    #[command(flatten)]
    pub images: ImageArgs,
    #[command(flatten)]
    pub shape: Shape,
    #[command(flatten)]
    pub place: Where,
}

/// What pipelines make.
#[derive(Args)]
pub struct ImageArgs {
    /// Of pipelines: what to show
    #[arg(long, default_value_t = Images::default().prompt)]
    prompt: String,
    /// Of pipelines: steps of the sampler
    #[arg(long, default_value_t = Images::default().steps)]
    steps: usize,
    /// Of pipelines: guidance; 1 is none
    #[arg(long, default_value_t = Images::default().guidance)]
    guidance: f64,
    /// Of pipelines: side of the VAE's tiles in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = Images::default().vae_tile)]
    vae_tile: usize,
}

/// Sides of square images where neither models nor the command line say others.
const USUAL: [usize; 3] = [512, 768, 1024];

fn side(text: &str) -> Result<usize, String> {
    let side = text.parse().ok().filter(|side| *side > 0);
    side.ok_or_else(|| format!("`{text}` is no number of pixels"))
}

pub fn run(args: &BenchArgs) -> miette::Result<ExitCode> {
    let folders = args.models.iter().filter(|m| m.is_dir()).count();
    if folders != 0 && folders != args.models.len() {
        return Err(usage(
            "models and pipelines' folders are measured apart: a step of the former, a whole image of the latter",
        ));
    }
    if args.plot.is_some() && args.plot == args.json {
        return Err(usage("--json and --plot name one file"));
    }
    for path in args.plot.iter().chain(&args.json) {
        let overwrite = match args.overwrite {
            true => Overwrite::Force,
            false => Overwrite::Refuse,
        };
        check_place(path, overwrite).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => miette!(
                help = "give another name, or --overwrite",
                "{} exists already",
                path.display()
            ),
            _ => miette!("{} cannot be written: {error}", path.display()),
        })?;
    }
    let options = session_options(&args.place)?;
    let plan = Plan {
        worker: WorkerCommand {
            program: std::env::current_exe().into_diagnostic()?,
            arguments: vec!["measure-worker".to_owned()],
        },
        models: args.models.clone(),
        sizes: match args.sizes.is_empty() {
            true => Sizes::Fixed {
                otherwise: USUAL.to_vec(),
            },
            false => Sizes::Sides(args.sizes.clone()),
        },
        repeats: args.repeats.get(),
        template: Job {
            model: PathBuf::new(),
            engine: args.place.engine_name(),
            threads: options.threads,
            operators: args.place.operators.clone(),
            library: options.library,
            device: options.device,
            device_memory: options.device_memory,
            side: None,
            scale: args.pixels_per_latent,
            batch: args.shape.batch,
            sequence: args.shape.sequence,
            shapes: args.shape.set.clone(),
            seed: args.shape.seed,
            images: Images {
                prompt: args.images.prompt.clone(),
                steps: args.images.steps,
                guidance: args.images.guidance,
                vae_tile: args.images.vae_tile,
            },
            profiling: Profiling::On,
        },
    };
    let watch = Watch(indicatif::ProgressBar::new_spinner());
    watch
        .0
        .enable_steady_tick(std::time::Duration::from_millis(200));
    interruption::asks("stopping; Ctrl-C again stops at once");
    let report = bench::run(&plan, &watch).or_report();
    watch.0.finish_and_clear();
    let report = report?;
    let Some(size) = &report.stopped_at else {
        return write(args, &report).map(|()| ExitCode::SUCCESS);
    };
    match report.sizes.last() {
        Some(_) => {
            write(args, &report)?;
            say(format_args!(
                "stopped at {size}, which is not in the report"
            ));
        }
        None => say(format_args!("stopped at {size}; nothing is measured")),
    }
    Ok(ExitCode::from(STOPPED))
}

/// Files first: what was measured is in them even where standard output takes no more.
fn write(args: &BenchArgs, report: &BenchReport) -> miette::Result<()> {
    if let Some(path) = &args.json {
        write_whole(path, output::json(report)?.as_bytes())
            .into_diagnostic()
            .wrap_err_with(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        bench::plot::write(report, path).into_diagnostic()?;
    }
    print(&match args.place.report {
        Report::Json => output::json(report)?,
        Report::Table if args.profile => output::bench(report) + &output::profiles(report),
        Report::Table => output::bench(report),
    })
}

/// Shows what is being done, and stops after Ctrl-C.
struct Watch(indicatif::ProgressBar);

impl Observer for Watch {
    fn progress(&self, what: &str) {
        self.0.set_message(what.to_owned());
    }

    fn stopped(&self) -> bool {
        interruption::is_asked_for()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pixels() {
        assert_eq!(side("255"), Ok(255));
        for wrong in ["0", "-8", "x", ""] {
            assert!(side(wrong).is_err(), "{wrong}");
        }
    }
}
