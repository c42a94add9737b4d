//! `linfusion-run compare`: two models on the same inputs, or two pipelines on the same prompts.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use linfusion_models::terminal::say;
use linfusion_runtime::compare::{CompareError, Difference, difference, pipelines, sites};
use linfusion_runtime::engine::Session;
use linfusion_runtime::inputs::{self, Request};
use linfusion_runtime::pipeline::{self, Folder};
use linfusion_runtime::{npz, provenance, tensor::Tensor};
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::args::{Report, Shape, Where};
use crate::failure::{OrReport, usage, usage_with};
use crate::generate::{Terminal, place};
use crate::images::{PromptArgs, SamplerArgs, prompt_outputs};
use crate::interruption::STOPPED;
use crate::output::{self, Comparison};
use crate::{print, session_options};

/// Exit code where outputs are further apart than `--tolerance`.
const TOO_FAR_APART: u8 = 3;
/// Exit code where outputs of models are infinite or NaN, so that nothing can be said of their distance.
const NOT_FINITE: u8 = 5;

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
    #[arg(long, value_name = "MAX_ABS", value_parser = tolerance, allow_negative_numbers = true)]
    pub tolerance: Option<f64>,
    /// Also each replaced attention, alone, on the first one's own activations
    #[arg(long)]
    pub sites: bool,
    #[command(flatten)]
    pub shape: Shape,
    #[command(flatten)]
    pub place: Where,
    // The heading is that of all arguments after it.
    #[command(flatten, next_help_heading = "Of pipelines")]
    pub prompts: PromptArgs,
    #[command(flatten)]
    pub sampler: SamplerArgs,
    /// Write both images and their difference, side by side, here
    #[arg(short, long, value_name = "OUT.png")]
    pub output: Option<PathBuf>,
}

pub fn run(args: &CompareArgs) -> miette::Result<ExitCode> {
    match (args.reference.is_dir(), args.other.is_dir()) {
        (true, true) => run_pipelines(args),
        (false, false) => run_models(args),
        _ => Err(usage_with(
            format!(
                "{} and {} are a pipeline and a model",
                args.reference.display(),
                args.other.display()
            ),
            "give two model files, or two folders with model_index.json",
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
            return Err(usage(format!(
                "{option} is for models; pipelines make their inputs"
            )));
        }
    }
    let prompts = args.prompts.read()?;
    let pictures = args.output.as_deref();
    let pictures = pictures.map_or(Vec::new(), |path| prompt_outputs(path, prompts.len()));
    let open = |path: &Path| Folder::open(path).or_report();
    let (reference, other) = (open(&args.reference)?, open(&args.other)?);
    for folder in [&reference, &other] {
        note_untrained(&folder.model(folder.denoiser()).or_report()?);
    }
    let requests: Vec<pipeline::Request> = prompts
        .into_iter()
        .enumerate()
        .map(|(number, prompt)| pipeline::Request {
            seed: args.shape.seed.wrapping_add(number as u64),
            steps: args.sampler.steps,
            guidance: args.sampler.guidance,
            size: args.sampler.size,
            scheduler: args.sampler.scheduler.clone(),
            vae_tile: args.sampler.vae_tile,
            force: args.sampler.force,
            overwrite: args.sampler.overwrite(),
            ..pipeline::Request::new(prompt, PathBuf::new())
        })
        .collect();
    let place = place(&args.place)?;
    let mut terminal = Terminal::new(place.options.device);
    let compared = pipelines(
        &reference,
        &other,
        &place,
        &requests,
        &pictures,
        args.sites,
        &mut terminal,
    );
    let comparison = match compared {
        Err(CompareError::Pipeline { source, .. }) if source.is_stop() => {
            // What was kept lay in a folder for the time being.
            say("stopped");
            return Ok(ExitCode::from(STOPPED));
        }
        compared => compared.or_report()?,
    };
    print(&match args.place.report {
        Report::Json => output::json(&comparison)?,
        Report::Table => output::pipelines(&comparison),
    })?;
    let steps = comparison.images.iter().flat_map(|image| &image.steps);
    let furthest = steps.map(|s| s.max_abs).fold(0.0, f64::max);
    let Some(limit) = args.tolerance else {
        return Ok(ExitCode::SUCCESS);
    };
    let (what, code) = match furthest > limit {
        true => ("beyond", ExitCode::from(TOO_FAR_APART)),
        false => ("within", ExitCode::SUCCESS),
    };
    say(format_args!(
        "latents are up to {furthest:.1e} apart: {what} the tolerance of {limit:e}"
    ));
    Ok(code)
}

fn tolerance(text: &str) -> Result<f64, String> {
    let limit = text.parse::<f64>().ok().filter(|limit| *limit >= 0.0);
    limit.ok_or_else(|| format!("'{text}' is no number from 0 up"))
}

fn note_untrained(model: &Path) {
    if provenance::is_untrained(model) {
        say(format_args!(
            "note: {} was converted without trained weights: its output means nothing",
            model.display()
        ));
    }
}

fn run_models(args: &CompareArgs) -> miette::Result<ExitCode> {
    if args.prompts.are_given() {
        return Err(usage_with(
            "a prompt is for pipelines, and these are models",
            "give inputs with --inputs FILE.npz, or nothing for random ones",
        ));
    }
    if args.output.is_some() {
        return Err(usage(
            "--output is for pictures of pipelines, and these are models",
        ));
    }
    let options = session_options(&args.place)?;
    let mut sessions = Vec::new();
    for model in [&args.reference, &args.other] {
        let session = Session::from_file(args.place.engine(), model, &options).into_diagnostic()?;
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
            inputs::make(first.inputs(), &request).or_report()?
        }
    };
    let (mut outputs, mut taken) = (Vec::new(), Vec::new());
    for (model, session) in &mut sessions {
        let fitted = fitting(session, &made, model, args.inputs.as_deref())?;
        let hint = inputs::ids_hint(session.inputs(), &fitted);
        let result = session.run(&fitted).into_diagnostic().wrap_err_with(|| {
            let hint = hint.map_or(String::new(), |hint| format!("; {hint}"));
            let described = inputs::described(&fitted);
            let from = args
                .inputs
                .iter()
                .map(|path| format!(" of {}", path.display()));
            let from: String = from.collect();
            format!("running {} on {described}{from}{hint}", model.display())
        })?;
        outputs.push(result);
        taken = fitted;
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
    let verdict = match comparison.within_tolerance {
        _ if comparison.outputs.iter().any(|d| d.not_finite != [0, 0]) => NOT_FINITE,
        false => TOO_FAR_APART,
        true => 0,
    };
    print(&match args.place.report {
        Report::Json => output::json(&comparison)?,
        Report::Table => output::comparison(&comparison),
    })?;
    if verdict == NOT_FINITE {
        say(not_finite(args, &taken, &comparison.outputs));
    }
    Ok(ExitCode::from(verdict))
}

/// What to do about outputs that are not finite.
fn not_finite(args: &CompareArgs, taken: &[(String, Tensor)], outputs: &[Difference]) -> String {
    let mut broken = taken.iter().filter(|(_, tensor)| !tensor.is_finite());
    if let (Some((name, tensor)), Some(path)) = (broken.next(), &args.inputs) {
        let values = tensor.to_f64();
        let count = |of: &dyn Fn(&f64) -> bool| values.iter().filter(|v| of(v)).count();
        return format!(
            "hint: of the {} values of `{name}` in {} {} are NaN and {} infinite themselves",
            values.len(),
            path.display(),
            count(&|v| v.is_nan()),
            count(&|v| v.is_infinite())
        );
    }
    let reference = outputs.iter().any(|d| d.not_finite[0] > 0);
    match (reference, &args.inputs) {
        (true, None) => format!(
            "hint: {} itself makes infinities or NaN of random inputs, which are none that it was made for; give real \
             ones with --inputs FILE.npz, or compare the pipelines' folders with --prompt",
            args.reference.display()
        ),
        (true, Some(inputs)) => format!(
            "hint: {} itself makes infinities or NaN of the inputs in {}; are they in the order of magnitude that it was \
             made for?",
            args.reference.display(),
            inputs.display()
        ),
        (false, _) => format!(
            "hint: only {} makes infinities or NaN; `linfusion-convert verify` checks a converted model site by site",
            args.other.display()
        ),
    }
}

/// The tensors that the model takes, in its types; what it does not take is left out.
fn fitting(
    session: &Session,
    tensors: &[(String, Tensor)],
    model: &Path,
    from: Option<&Path>,
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
                    let from = match from {
                        Some(path) => format!("among those of {}", path.display()),
                        None => "among those of the first model".to_owned(),
                    };
                    miette!(
                        help = "give its inputs with --inputs FILE.npz, under the model's names",
                        "{} takes an input `{}` that is not {from}, {names:?}",
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
