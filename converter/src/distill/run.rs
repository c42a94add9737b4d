//! The whole way of a distillation.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use linfusion_models::onnx::{ExternalRef, OnnxFile, is_external};
use linfusion_models::shapes::Shapes;
use linfusion_runtime::engine::{Engine, EngineError, Session, SessionOptions};
use linfusion_runtime::memory;
use linfusion_runtime::pipeline::{Folder, Place};
use linfusion_runtime::subgraph;
use sha2::{Digest, Sha256};

use super::capture::Teacher;
use super::choose;
use super::device::device;
use super::end_to_end::Whole;
use super::error::{DistillError, learning};
use super::inputs::{self, Sample, Source};
use super::learn::{Learned, Work, modules};
use super::output;
use super::pipeline;
use super::report::{Report, SiteReport, doubts, mean};
use super::state::{Claim, State, unfinished};
use super::target::Target;
use super::{Attention, Progress, Refinement, Request};
use crate::analysis::Analysis;
use crate::convert::refuse_converted;
use crate::plan::{Action, Method, plan};
use crate::verify::engine;

/// Learns the weights of every attention of a model that linear attention can replace, and writes them as a checkpoint.
///
/// # Errors
/// [`DistillError`]; no output is written then, an older one is as it was, and sites that are done are kept for the next
/// run of the same request.
pub fn run(
    request: &Request,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Report, DistillError> {
    let started = Instant::now();
    memory::reset_peak();
    check(request)?;
    output::check(&request.out, request.overwrite)?;
    if let Some(plot) = &request.plot {
        output::check_file(plot, request.overwrite)?;
    }
    let claim = Claim::of(&request.out)?;
    progress(Progress::Claimed(unfinished(&request.out)));
    let path = model_path(&request.model)?;
    let file = OnnxFile::open(&path)?;
    let model = path.display().to_string();
    refuse_converted(&file.model, &model).map_err(|_| DistillError::AlreadyConverted {
        model: model.clone(),
    })?;
    let analysis = Analysis::with_grid(&file, request.selection.grid);
    request.selection.check(&analysis.sites)?;

    let device = device()?;
    let engine = engine().map_err(EngineError::from)?;
    let options = SessionOptions::default();
    progress(Progress::Note(format!("the original runs on {engine}")));
    let samples = samples(request, &path, engine, &options, progress)?;
    let shapes = subgraph::shapes(&file, samples.first().map_or(&[][..], |s| &s.inputs));
    let teacher = Teacher {
        file: &file,
        shapes: &shapes,
        engine,
        options: &options,
    };
    let (targets, skipped) = targets(request, &analysis, &shapes)?;
    // What the graph cannot do is told before anything is learned.
    let whole = match request.end_to_end {
        Some(together) => Some(Whole::new(
            &teacher,
            &targets,
            &samples,
            &request.selection,
            &scratch_folder(request),
            &device,
            together,
        )?),
        None => None,
    };
    let work = Work {
        request,
        teacher,
        samples: &samples,
        device,
        scratch: scratch_folder(request),
        state: State::of(&request.out, &fingerprint(request, &file, engine, &samples)),
        progress,
        outputs: Default::default(),
    };
    let mut notes = Vec::new();
    let resumed = work.taken_over(&targets);
    if claim.resumes {
        let kept = unfinished(&request.out);
        let kept = kept.display();
        if resumed > 0 {
            progress(Progress::Kept);
        }
        progress(Progress::Note(match resumed {
            0 => format!(
                "{kept} is of an interrupted run with another request, or damaged; all sites are learned anew, and it goes when they are"
            ),
            _ => format!(
                "{resumed} of {} sites are taken over from an interrupted run ({kept})",
                targets.len()
            ),
        }));
    }
    let learned = work.learn(&targets)?;
    if request.schedule.steps == 0 {
        notes.push("nothing was learned: --steps 0 leaves the graph's own projections, with MLPs that give zero".to_owned());
    }
    let expected = work.expected()?;
    let untrained = work
        .judged(untrained(&learned, request.seed)?, &expected)?
        .end_to_end;
    let mut best = work.judged(learned, &expected)?;
    if request.refinement == Refinement::IfBetter {
        let (refined, told) = work.refine(&best.sites)?;
        let refined = work.judged(refined, &expected)?;
        let what = format!("refinement on the converted model's own activations ({told})");
        best = best.or_better(refined, &what, &mut notes);
    }
    if let Some(whole) = whole {
        match whole.refine(&work, &best.sites)? {
            Some(sites) => {
                let together = work.judged(sites, &expected)?;
                best = best.or_better(together, "end to end", &mut notes);
            }
            None => notes.push(
                "end to end: every site is window attention, which has nothing to learn".to_owned(),
            ),
        }
    }
    let unlimited = best.end_to_end.clone();
    if let Some(budget) = request.budget {
        best = choose::within(&work, best, budget, &expected, &mut notes)?;
    }
    let staged = output::stage(&request.out, &modules(&best.sites))?;
    let costs = choose::costs(&analysis, &targets, &best.sites, edge(&samples));
    output::publish(staged, request.overwrite)?;
    progress(Progress::Written);
    work.state.clear();
    let sites: Vec<SiteReport> = best
        .sites
        .into_iter()
        .map(|site| site.done.report)
        .collect();
    let warnings = doubts(&sites, &best.end_to_end);
    let mut report = Report {
        model,
        output: request.out.display().to_string(),
        engine: engine.to_string(),
        samples: request.samples,
        holdout: request.holdout,
        mean: mean(sites.iter().map(|s| s.after)),
        sites,
        skipped,
        end_to_end: best.end_to_end,
        untrained,
        all_sites: unlimited,
        kept: best.kept,
        costs,
        seconds: started.elapsed().as_secs_f64(),
        peak_bytes: memory::peak(),
        resumed,
        notes,
        warnings,
    };
    if let Some(path) = &request.plot {
        // The weights are there, and what is to be told of them is not lost for a picture.
        if let Err(error) = super::plot::write(&report, path) {
            report.warnings.push(error.to_string());
        }
    }
    Ok(report)
}

/// The sites as they are before anything is learned: the graph's projections, MLPs that give zero, both halves of a mixture
/// equal.
fn untrained(learned: &[Learned], seed: u64) -> Result<Vec<Learned>, DistillError> {
    let begin = |site: &Learned| {
        let failed = learning(&site.target.module);
        let mut site = site.clone();
        if let Some(student) = site.beginning(seed, &Device::Cpu).map_err(&failed)? {
            site.done.weights = student.weights().map_err(&failed)?;
        }
        Ok(site)
    };
    learned.iter().map(begin).collect()
}

/// The model's file: of a pipeline's folder, that of its denoiser.
fn model_path(model: &Path) -> Result<PathBuf, DistillError> {
    if !model.is_dir() {
        return Ok(model.to_owned());
    }
    let folder = Folder::open(model)?;
    Ok(folder.model(folder.denoiser())?)
}

fn check(request: &Request) -> Result<(), DistillError> {
    let fault = |option: &'static str, problem: &str| {
        Err(DistillError::Setting {
            option,
            problem: problem.to_owned(),
        })
    };
    let schedule = &request.schedule;
    if request
        .end_to_end
        .is_some_and(|together| together.steps == 0)
    {
        return fault("--end-to-end", "is 0: nothing would be learned");
    }
    if request.samples == 0 {
        return fault("--samples", "is 0: nothing to learn from");
    }
    if request.holdout == 0 {
        return fault(
            "--holdout",
            "is 0: nothing would tell how good the weights are",
        );
    }
    if schedule.batch == Some(0) {
        return fault("--batch", "is 0");
    }
    if request.budget.is_some_and(|b| !b.psnr().is_finite()) {
        return fault(
            "--budget-db or --max-loss",
            "is no number that can be kept to",
        );
    }
    if !(schedule.learning_rate.is_finite() && schedule.learning_rate > 0.0) {
        return fault("--lr", "is no positive number");
    }
    Ok(())
}

/// What the teacher is run on: those to learn from, then those held out.
fn samples(
    request: &Request,
    model: &Path,
    engine: Engine,
    options: &SessionOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Vec<Sample>, DistillError> {
    let count = request.samples + request.holdout;
    let ports = || -> Result<_, DistillError> {
        let session = Session::from_file(engine, model, options)?;
        Ok(session.inputs().to_vec())
    };
    let samples = match &request.source {
        Source::Folder(folder) => inputs::from_folder(folder, &ports()?, count)?,
        Source::Random(spec) => inputs::random(spec, &ports()?, count, request.seed)?,
        Source::Pipeline {
            folder,
            prompts,
            steps,
        } => {
            progress(Progress::Begin {
                stage: "making images".to_owned(),
                steps: count as u64,
            });
            let asked = pipeline::Asked {
                folder,
                prompts: prompts.as_deref(),
                steps: *steps,
                count,
                seed: request.seed,
            };
            let place = Place {
                engine,
                options: options.clone(),
            };
            // Samples are what the pipeline's own model took.
            let ports = ports()?;
            let fit = |s: Sample| inputs::fitting(s.inputs, &ports, s.origin);
            pipeline::samples(&asked, &place, &fit, &|| progress(Progress::Advance(1)))?
        }
    };
    let sizes = |sample: &Sample| -> Vec<Vec<usize>> {
        let inputs = sample.inputs.iter();
        inputs.map(|(_, t)| t.shape().to_vec()).collect()
    };
    if let Some((first, rest)) = samples.split_first()
        && let Some(odd) = rest.iter().find(|sample| sizes(sample) != sizes(first))
    {
        return Err(DistillError::Inputs {
            place: odd.origin.clone(),
            problem: format!(
                "its inputs have sizes {:?}, those of {} {:?}; all must be equal",
                sizes(odd),
                first.origin,
                sizes(first)
            ),
        });
    }
    Ok(samples)
}

/// The height of the image that the samples have.
fn edge(samples: &[Sample]) -> Option<u64> {
    let mut images = samples.first()?.inputs.iter().map(|(_, t)| t.shape());
    images.find_map(|shape| match *shape {
        [_, _, height, _] => u64::try_from(height).ok(),
        _ => None,
    })
}

/// The sites to learn, and why the other attentions are not.
fn targets(
    request: &Request,
    analysis: &Analysis<'_>,
    shapes: &Shapes,
) -> Result<(Vec<Target>, Vec<String>), DistillError> {
    let (mut targets, mut skipped) = (Vec::new(), Vec::new());
    for (site, action) in analysis
        .sites
        .iter()
        .zip(plan(analysis, &request.selection, &[]))
    {
        let methods = match (action.method(), request.attention) {
            (Some(_), Attention::Auto { .. }) => ALL.to_vec(),
            (Some(method), Attention::Planned) => vec![method],
            // What cannot become the planned method can perhaps become another.
            (None, Attention::Auto { .. }) if matches!(action, Action::Cannot(_)) => ALL.to_vec(),
            (None, _) => Vec::new(),
        };
        let target = match methods.is_empty() {
            true => Err(action.reason().unwrap_or_default().to_owned()),
            false => Target::new(analysis, site, shapes, &methods),
        };
        match target {
            Ok(target) => targets.push(target),
            Err(reason) => skipped.push(format!(
                "{} [{}]: {reason}",
                site.module.as_deref().unwrap_or(&site.anchor),
                site.kind
            )),
        }
    }
    if targets.is_empty() {
        return Err(DistillError::NoSites {
            model: request.model.display().to_string(),
            reasons: skipped
                .iter()
                .take(12)
                .map(|s| format!("  {s}"))
                .collect::<Vec<_>>()
                .join("\n"),
        });
    }
    Ok((targets, skipped))
}

/// Cheapest to write down first.
const ALL: [Method; 3] = [Method::Linear, Method::Window, Method::Hybrid];

fn scratch_folder(request: &Request) -> PathBuf {
    request.scratch.clone().unwrap_or_else(std::env::temp_dir)
}

/// To be raised when the same request gives other weights than before: what is unfinished is not mixed then.
const LEARNING: u32 = 2;

/// Everything that a site's weights depend on.
fn fingerprint(request: &Request, file: &OnnxFile, engine: Engine, samples: &[Sample]) -> String {
    let stamp = |path: &Path| {
        let stamp = std::fs::metadata(path).and_then(|m| Ok((m.len(), m.modified()?)));
        stamp.ok()
    };
    let folder = file.path().parent().unwrap_or(Path::new(""));
    let stored = file.model.graph.initializer.iter();
    let data: BTreeSet<String> = stored
        .filter(|tensor| is_external(tensor))
        .filter_map(|tensor| Some(ExternalRef::of(tensor).ok()?.location))
        .collect();
    let stamps: Vec<_> = data.iter().map(|name| stamp(&folder.join(name))).collect();
    let mut given = Sha256::new();
    for (name, tensor) in samples.iter().flat_map(|s| &s.inputs) {
        given.update(name);
        given.update(format!("{:?}", tensor.shape()));
        for value in tensor.to_f64() {
            given.update(value.to_le_bytes());
        }
    }
    format!(
        "{LEARNING} {} {} {engine:?} {:?} {stamps:?} {:?} {:?} {:?} {:?} {:?} {:?} {} {} {:?} {:?} {}",
        env!("CARGO_PKG_VERSION"),
        cfg!(feature = "distill-cuda"),
        given.finalize(),
        std::fs::canonicalize(file.path()).ok(),
        stamp(file.path()),
        request.attention,
        request.selection.window,
        request.selection.grid,
        request.source,
        request.samples,
        request.holdout,
        request.schedule,
        request.mid,
        request.seed
    )
}
