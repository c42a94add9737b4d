//! `linfusion-run bench`: time and memory of models, or of whole pipelines, over image size.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use linfusion_runtime::bench::{self, Images, Job, Plan, Profiling, WorkerCommand};
use linfusion_runtime::whole::write_whole;
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::args::{Report, Shape, Where};
use crate::{output, print, session_options};

#[derive(Args)]
pub struct BenchArgs {
    /// The models, or pipelines' folders; the others are compared with the first
    #[arg(required = true)]
    pub models: Vec<PathBuf>,
    /// Height and width of square images in pixels, divisible by 8
    #[arg(long, value_delimiter = ',', default_value = "512,768,1024", value_parser = latent_size)]
    pub sizes: Vec<usize>,
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

/// Image pixels of one latent pixel.
const LATENT: usize = 8;

fn latent_size(text: &str) -> Result<usize, String> {
    let pixels: usize = text.parse().map_err(|_| format!("`{text}` is no number"))?;
    match pixels {
        0 => Err("0 is no size".to_owned()),
        _ if pixels.is_multiple_of(LATENT) => Ok(pixels / LATENT),
        _ => Err(format!("{pixels} pixels are not divisible by {LATENT}")),
    }
}

pub fn run(args: &BenchArgs) -> miette::Result<ExitCode> {
    let folders = args.models.iter().filter(|m| m.is_dir()).count();
    if folders != 0 && folders != args.models.len() {
        return Err(miette!(
            "models and pipelines' folders are measured apart: a step of the former, a whole image of the latter"
        ));
    }
    for path in args.plot.iter().chain(&args.json) {
        let folder = path.parent().filter(|f| !f.as_os_str().is_empty());
        if let Some(folder) = folder.filter(|f| !f.is_dir()) {
            return Err(miette!("{} is no folder to write to", folder.display()));
        }
    }
    let options = session_options(&args.place)?;
    let plan = Plan {
        worker: WorkerCommand {
            program: std::env::current_exe().into_diagnostic()?,
            arguments: vec!["measure-worker".to_owned()],
        },
        models: args.models.clone(),
        latents: args.sizes.clone(),
        repeats: args.repeats.get(),
        template: Job {
            model: PathBuf::new(),
            engine: args.place.engine_name(),
            threads: options.threads,
            operators: args.place.operators.clone(),
            library: options.library,
            device: options.device,
            device_memory: options.device_memory,
            latent: 0,
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
    let progress = indicatif::ProgressBar::new_spinner();
    progress.enable_steady_tick(std::time::Duration::from_millis(200));
    let report = bench::run(&plan, |what| progress.set_message(what.to_owned())).into_diagnostic();
    progress.finish_and_clear();
    let report = report?;
    print(&match args.place.report {
        Report::Json => output::json(&report)?,
        Report::Table if args.profile => output::bench(&report) + &output::profiles(&report),
        Report::Table => output::bench(&report),
    })?;
    if let Some(path) = &args.json {
        write_whole(path, output::json(&report)?.as_bytes())
            .into_diagnostic()
            .wrap_err_with(|| format!("writing {}", path.display()))?;
    }
    if let Some(path) = &args.plot {
        bench::plot::write(&report, path).into_diagnostic()?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_pixels() {
        assert_eq!(latent_size("64"), Ok(8));
        assert_eq!(latent_size("256"), Ok(32));
        assert_eq!(latent_size("1024"), Ok(128));
        for wrong in ["0", "255", "1001", "-8", "x"] {
            assert!(latent_size(wrong).is_err(), "{wrong}");
        }
    }
}
