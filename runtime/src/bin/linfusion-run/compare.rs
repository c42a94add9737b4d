//! `linfusion-run compare`: two models on the same inputs, or two pipelines on the same prompts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use linfusion_runtime::compare::{CompareError, difference, pipelines, sites};
use linfusion_runtime::engine::Session;
use linfusion_runtime::inputs::{self, Request};
use linfusion_runtime::pipeline::{self, Folder, Size};
use linfusion_runtime::{npz, provenance, tensor::Tensor};
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::args::{Report, Shape, Where};
use crate::generate::{STOPPED, Terminal, place, prompt_output, prompts, size};
use crate::output::{self, Comparison};
use crate::{print, session_options};

/// Exit code where outputs are further apart than `--tolerance`, or not finite.
const TOO_FAR_APART: u8 = 3;

#[derive(Args)]
pub struct CompareArgs {
    /// The model or pipeline that is right
    pub reference: PathBuf,
    /// The model or pipeline to judge
    pub other: PathBuf,
    /// Models: inputs under the models' names; random ones otherwise
    #[arg(long, value_name = "FILE.npz")]
    pub inputs: Option<PathBuf>,
    /// Models: height and width of the latent image, where they leave it open [default: 64]
    #[arg(long)]
    pub latent: Option<usize>,
    /// Fail (exit code 3) if a value, of a pipeline's latents after any step, is further off than this
    #[arg(long, value_name = "MAX_ABS")]
    pub tolerance: Option<f64>,
    /// Also each replaced attention, alone, on the first one's own activations
    #[arg(long)]
    pub sites: bool,
    /// Pipelines: what to show
    #[arg(long)]
    pub prompt: Option<String>,
    /// Pipelines: a file with a prompt a line; the second takes the next seed, and so on
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompts: Option<PathBuf>,
    /// Pipelines: steps of the sampler
    #[arg(long, default_value_t = 30)]
    pub steps: usize,
    /// Pipelines: guidance; 1 is none
    #[arg(long, default_value_t = 7.5)]
    pub guidance: f64,
    /// Pipelines: size in pixels [default: the model's own]
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<Size>,
    /// Pipelines: the sampler [default: the pipeline's]
    #[arg(long, value_name = "NAME")]
    pub scheduler: Option<String>,
    /// Pipelines: side of the tiles in which larger images go through the VAE, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 1024)]
    pub vae_tile: usize,
    /// Pipelines: begin even if less memory is free than the estimate says
    #[arg(long)]
    pub force: bool,
    /// Pipelines: where both images and their difference go, side by side
    #[arg(short, long, value_name = "OUT.png", default_value = "compare.png")]
    pub output: PathBuf,
    #[command(flatten)]
    pub shape: Shape,
    #[command(flatten)]
    pub place: Where,
}

pub fn run(args: &CompareArgs) -> miette::Result<ExitCode> {
    match (args.reference.is_dir(), args.other.is_dir()) {
        (true, true) => run_pipelines(args),
        (false, false) => run_models(args),
        _ => Err(miette!(
            help = "give two model files, or two folders with model_index.json",
            "{} and {} are a pipeline and a model",
            args.reference.display(),
            args.other.display()
        )),
    }
}

fn run_pipelines(args: &CompareArgs) -> miette::Result<ExitCode> {
    for (option, given) in [
        ("--inputs", args.inputs.is_some()),
        ("--latent", args.latent.is_some()),
        ("--set", !args.shape.set.is_empty()),
    ] {
        if given {
            return Err(miette!(
                "{option} is for models; pipelines make their inputs"
            ));
        }
    }
    let open = |path: &Path| Folder::open(path).into_diagnostic();
    let (reference, other) = (open(&args.reference)?, open(&args.other)?);
    for folder in [&reference, &other] {
        note_untrained(&folder.model(folder.denoiser()).into_diagnostic()?);
    }
    let prompts = prompts(args.prompt.as_deref(), args.prompts.as_deref())?;
    if prompts.is_empty() {
        return Err(miette!(
            "pipelines are compared by images: give --prompt or --prompts"
        ));
    }
    let requests: Vec<pipeline::Request> = prompts
        .iter()
        .enumerate()
        .map(|(number, prompt)| {
            let output = match prompts.len() {
                1 => args.output.clone(),
                _ => prompt_output(&args.output, number),
            };
            pipeline::Request {
                seed: args.shape.seed.wrapping_add(number as u64),
                steps: args.steps,
                guidance: args.guidance,
                size: args.size,
                scheduler: args.scheduler.clone(),
                vae_tile: args.vae_tile,
                force: args.force,
                ..pipeline::Request::new(prompt.clone(), output)
            }
        })
        .collect();
    let place = place(&args.place)?;
    let mut terminal = Terminal::new(place.options.device)?;
    let compared = pipelines(
        &reference,
        &other,
        &place,
        &requests,
        args.sites,
        &mut terminal,
    );
    let comparison = match compared {
        Err(CompareError::Pipeline { source, .. }) if source.is_stop() => {
            // What was kept lay in a folder for the time being.
            eprintln!("stopped");
            return Ok(ExitCode::from(STOPPED));
        }
        compared => compared.into_diagnostic()?,
    };
    print(&match args.place.report {
        Report::Json => output::json(&comparison)?,
        Report::Table => output::pipelines(&comparison),
    })?;
    let steps = comparison.images.iter().flat_map(|image| &image.steps);
    let furthest = steps.map(|s| s.max_abs).fold(0.0, f64::max);
    Ok(match args.tolerance {
        Some(limit) if furthest > limit => ExitCode::from(TOO_FAR_APART),
        _ => ExitCode::SUCCESS,
    })
}

fn note_untrained(model: &Path) {
    if provenance::is_untrained(model) {
        eprintln!(
            "note: {} was converted without trained weights: its output means nothing",
            model.display()
        );
    }
}

fn run_models(args: &CompareArgs) -> miette::Result<ExitCode> {
    let options = session_options(&args.place)?;
    let mut sessions = Vec::new();
    for model in [&args.reference, &args.other] {
        let session = Session::from_file(args.place.engine(), model, &options)
            .into_diagnostic()
            .wrap_err_with(|| format!("loading {}", model.display()))?;
        note_untrained(model);
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
    let mut comparison = compare_outputs(args, &reference, &other)?;
    if args.sites {
        let engine = args.place.engine();
        let samples = [made];
        comparison.sites =
            sites(&args.reference, &args.other, &samples, engine, &options).into_diagnostic()?;
    }
    let within = comparison.within_tolerance;
    print(&match args.place.report {
        Report::Json => output::json(&comparison)?,
        Report::Table => output::comparison(&comparison),
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
        sites: Vec::new(),
    })
}
