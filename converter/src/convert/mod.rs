//! The whole way: open, look, plan, rewrite, write to scratch, verify, publish.

mod error;
mod patches;
mod pipeline;
mod refuse;
mod resized;
mod weights;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use linfusion_models::onnx::proto::ModelProto;
use linfusion_models::onnx::write::{
    ExternalData, Overwrite, Staged, WriteOptions, check_output, stage,
};
use linfusion_models::onnx::{ElementType, OnnxFile, make};

use crate::analysis::{Analysis, METADATA_KEY};
use crate::attention::kind::Kind;
use crate::attention::site::Site;
use crate::grid::GridSource;
use crate::plan::{Action, Method, Selection, plan};
use crate::report::{ConvertReport, ModelReport};
use crate::resize::ImageSize;
use crate::rewrite::{Emit, apply, declare_operators};
use crate::verify::{Converted, Verified, Verify, VerifyError, engine, known_problems, verify};

pub use self::error::{ConvertError, PipelineFault};
use self::patches::{of_module, patches};
pub use self::pipeline::convert_pipeline;
pub(crate) use self::refuse::refuse_converted;
use self::refuse::refuse_fewer;
use self::resized::{resize_first, write_resized};
use self::weights::{doubts, mlp_width, modules, open_checkpoint};

/// Where the LinFusion weights come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WeightsFrom {
    /// Beside the model, else in the local Hugging Face cache.
    #[default]
    Search,
    /// A folder or a safetensors file.
    Path(PathBuf),
    /// None: the graph's own projections with F = 0, for measuring speed.
    Untrained,
}

/// Whether a conversion that leaves expected sites out is an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Partial {
    /// It is.
    #[default]
    Refuse,
    /// The user wants it so.
    Allow,
}

/// Whether files are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Run {
    /// The output is written.
    #[default]
    Write,
    /// Everything but writing.
    Dry,
}

/// What to convert, and how.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The model.
    pub model: PathBuf,
    /// The output; `None`: `<stem>.linfusion.onnx` beside the model.
    pub out: Option<PathBuf>,
    /// The weights.
    pub weights: WeightsFrom,
    /// How the operator is written.
    pub emit: Emit,
    /// Which sites.
    pub selection: Selection,
    /// What becomes of external data.
    pub external: ExternalData,
    /// Whether an existing output is replaced.
    pub overwrite: Overwrite,
    /// Whether fewer sites than expected are an error.
    pub partial: Partial,
    /// How much is verified.
    pub verify: Verify,
    /// Whether anything is written.
    pub run: Run,
    /// The image size that the model is rewritten for first; where the selection keeps all attention,
    /// only that is done.
    pub resize: Option<ImageSize>,
}

/// Converts a model.
///
/// `progress` hears of each step in a few words.
///
/// # Errors
/// [`ConvertError`]; no output exists then, and an older one is as it was.
pub fn convert(
    request: &Request,
    progress: &mut dyn FnMut(&str),
) -> Result<ConvertReport, ConvertError> {
    if request.run == Run::Write && request.verify != Verify::Off {
        // A library that was named and does not load is told of before the work, not after it.
        engine().map_err(VerifyError::Library)?;
    }
    progress("reading the model");
    let mut file = OnnxFile::open(&request.model)?;
    let name = request.model.display().to_string();
    refuse_converted(&file.model, &name)?;
    let mut warnings = Vec::new();
    let resized = match request.resize {
        None if request.selection.keeps_all() => {
            return Err(ConvertError::NothingToDo { model: name });
        }
        None => None,
        Some(size) => {
            let resized = resize_first(request, &mut file, size, &mut warnings, progress)?;
            if request.selection.keeps_all() {
                return write_resized(request, &file, resized, warnings, progress);
            }
            Some(resized)
        }
    };
    progress("looking for attention");
    let analysis = Analysis::with_grid(&file, request.selection.grid);
    request.selection.check(&analysis.sites)?;
    let mut actions = plan(&analysis, &request.selection, &[]);
    // A model with nothing to convert needs no checkpoint to say so.
    let enough = refuse_fewer(&name, &analysis, &actions, request.partial);
    // Window attention alone does with the graph's own weights, whatever lies beside the model.
    let mut methods = actions.iter().filter_map(Action::method);
    let windows = enough.is_ok() && methods.all(|m| m == Method::Window);
    let checkpoint = match windows && matches!(request.weights, WeightsFrom::Search) {
        true => None,
        false => match open_checkpoint(request, &name, &analysis) {
            Ok(checkpoint) => checkpoint,
            Err(e) => return enough.and(Err(e)),
        },
    };
    let modules = match modules(&analysis, checkpoint.as_ref()) {
        Ok(modules) => modules,
        Err(e) => return enough.and(Err(e)),
    };
    if checkpoint.is_some() {
        let learned: Vec<Option<Method>> = modules
            .iter()
            .map(|module| module.map(|m| of_module(m, None).0))
            .collect();
        actions = plan(&analysis, &request.selection, &learned);
        refuse_fewer(&name, &analysis, &actions, request.partial)?;
    } else {
        enough?;
    }
    if let Some(checkpoint) = &checkpoint {
        warnings.extend(doubts(&analysis, checkpoint, &modules, &request.selection));
    }
    let stated = |s: &Site<'_>| {
        let image = s.image.as_ref();
        image.is_ok_and(|i| matches!(i.grid.source, GridSource::Fixed(_)))
    };
    if request.selection.grid.is_some() && !analysis.sites.iter().any(stated) {
        warnings.push(
            "--grid is not used: the graph tells its rows and columns itself, or has no attention of so many tokens".to_owned(),
        );
    }
    let (patches, converted, used) = patches(
        request,
        &analysis,
        &mut actions,
        checkpoint.as_ref(),
        &modules,
        &mut warnings,
    )?;
    refuse_fewer(&name, &analysis, &actions, request.partial)?;

    warnings.extend(request.selection.unused_window(&actions));
    let mid = checkpoint.as_ref().map_or(0, mlp_width);
    let asked = request.selection.window.unwrap_or_default();
    let mut report = ConvertReport {
        model: ModelReport::new(&name, &analysis, &actions, asked, mid),
        resized,
        output: None,
        companions: Vec::new(),
        weights: match (&checkpoint, converted.iter().any(|c| c.linear.is_some())) {
            (Some(_), _) => "checkpoint",
            (None, true) => "none",
            (None, false) => "graph",
        },
        checkpoint: checkpoint.as_ref().map(|c| c.path.display().to_string()),
        checkpoint_sha256: checkpoint.as_ref().map(|c| c.sha256().to_owned()),
        emit: request.emit,
        converted: patches.len(),
        nodes_removed: 0,
        initializers_removed: 0,
        verified: None,
        warnings,
    };
    if report.weights == "none" {
        report.warnings.push(
            "untrained: --weights none keeps the graph's own projections with F = 0; the file is for measuring speed, its images are garbage".to_owned(),
        );
    }
    let out = output(request);
    let options = write_options(request);
    if request.run == Run::Dry {
        check_output(Some(&file), &out, &options)?;
        return Ok(report);
    }
    progress("rewriting");
    let element = converted.first().map_or(ElementType::F32, |c| c.element);
    let types: BTreeSet<&str> = converted.iter().map(|c| c.element.name()).collect();
    if types.len() > 1 && request.emit == Emit::Function {
        return Err(ConvertError::MixedTypes {
            model: name,
            found: types.into_iter().collect::<Vec<_>>().join(" and "),
        });
    }
    let mut model = file.model.clone();
    let pruned = apply(&mut model, patches, &analysis.shapes, &analysis.again);
    report.nodes_removed = pruned.nodes;
    report.initializers_removed = pruned.initializers;
    if !converted.is_empty() {
        let opset = analysis.opset;
        declare_operators(&mut model, request.emit, used, opset, element).map_err(|source| {
            ConvertError::Opset {
                model: name.clone(),
                opset,
                source,
            }
        })?;
    }
    record(&mut model, &report, &converted);

    progress("writing");
    let staged = stage(&model, Some(&file), &out, &options)?;
    if request.verify != Verify::Off {
        let before = known_problems(&file);
        let written = staged.open()?;
        let mut tell = |site: &str| progress(&format!("verifying {site}"));
        let verified: Verified = verify(
            &written,
            &before,
            &converted,
            checkpoint.as_ref(),
            request.verify,
            &mut tell,
        )?;
        report.warnings.extend(verified.unchecked());
        report.verified = Some(verified);
    }
    publish(staged, &out, &mut report)?;
    Ok(report)
}

fn write_options(request: &Request) -> WriteOptions {
    WriteOptions {
        external: request.external,
        overwrite: request.overwrite,
        ..WriteOptions::default()
    }
}

/// Gives the files their names.
fn publish(staged: Staged, out: &Path, report: &mut ConvertReport) -> Result<(), ConvertError> {
    let published = staged.publish()?;
    report.output = Some(out.display().to_string());
    report.companions = published
        .companions()
        .map(|p| p.display().to_string())
        .collect();
    if !published.reused.is_empty() && published.data.is_some() {
        report.warnings.push(format!(
            "'{}' needs all of these beside it: {}",
            out.display(),
            report.companions.join(", ")
        ));
    }
    report
        .warnings
        .extend(published.notes.iter().map(ToString::to_string));
    Ok(())
}

/// The metadata that lists the converted modules, separated by spaces.
pub const CONVERTED_KEY: &str = "linfusion.converted";

/// `<stem>.linfusion.onnx` beside the model.
#[must_use]
pub fn default_output(model: &Path) -> PathBuf {
    model.with_extension("linfusion.onnx")
}

fn output(request: &Request) -> PathBuf {
    let named = request.out.clone();
    named.unwrap_or_else(|| match request.resize {
        Some(_) if request.selection.keeps_all() => request.model.with_extension("resized.onnx"),
        _ => default_output(&request.model),
    })
}

/// Writes what was done into the model's metadata.
fn record(model: &mut ModelProto, report: &ConvertReport, converted: &[Converted]) {
    let kept: Vec<&str> = report
        .model
        .sites
        .iter()
        .filter(|s| matches!(s.kind, Kind::SelfAttention | Kind::Joint) && s.action == "keep")
        .map(|s| s.module.as_deref().unwrap_or(&s.anchor))
        .collect();
    let converted: Vec<&str> = converted.iter().map(|c| c.module.as_str()).collect();
    let entries = [
        (
            METADATA_KEY,
            format!("linfusion-convert {}", env!("CARGO_PKG_VERSION")),
        ),
        (
            "linfusion.weights",
            match report.weights {
                "none" => "none (untrained)".to_owned(),
                other => other.to_owned(),
            },
        ),
        (
            "linfusion.checkpoint_sha256",
            report.checkpoint_sha256.clone().unwrap_or_default(),
        ),
        (CONVERTED_KEY, converted.join(" ")),
        ("linfusion.kept", kept.join(" ")),
    ];
    for (key, value) in entries.iter().filter(|(_, v)| !v.is_empty()) {
        model.metadata_props.push(make::metadata(key, value));
    }
}

/// Reads a model and says what would be done with it.
///
/// # Errors
/// The model cannot be read.
pub fn inspect(model: &Path, selection: &Selection) -> Result<ModelReport, ConvertError> {
    let file = OnnxFile::open(model)?;
    let analysis = Analysis::with_grid(&file, selection.grid);
    selection.check(&analysis.sites)?;
    let actions = plan(&analysis, selection, &[]);
    let mut report = ModelReport::new(
        &model.display().to_string(),
        &analysis,
        &actions,
        selection.window.unwrap_or_default(),
        0,
    );
    report.notes.extend(selection.unused_window(&actions));
    Ok(report)
}
