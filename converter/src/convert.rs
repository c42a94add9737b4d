//! The whole way: open, look, plan, rewrite, write to scratch, verify, publish.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use linfusion_models::checkpoint::{
    Checkpoint, CheckpointError, CheckpointModule, MlpWidth, SearchPlaces, SiteAttention, discover,
    download_command,
};
use linfusion_models::onnx::proto::{ModelProto, TensorProto};
use linfusion_models::onnx::write::{
    ExternalData, Overwrite, Spill, WriteError, WriteOptions, check_output, stage,
};
use linfusion_models::onnx::{ElementType, OnnxFile, ReadError, make};
use linfusion_ops::body::{BodyError, WindowVariant};
use linfusion_ops::schema::{TextSide, WindowSpec};

use crate::analysis::{Analysis, METADATA_KEY};
use crate::attention::kind::Kind;
use crate::attention::site::Site;
use crate::graph::collect_names;
use crate::mapping::{Ambiguous, assign};
use crate::plan::{Action, Method, Selection, UnmatchedPattern, plan};
use crate::report::{ConvertReport, ModelReport};
use crate::rewrite::site::{Context, Weights, patch};
use crate::rewrite::{Emit, Patch, SiteError, Used, apply, declare_operators, window};
use crate::shapes::Shapes;
use crate::verify::{
    Converted, CutInput, Feed, Verified, Verify, VerifyError, known_problems, verify,
};

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
}

/// Why a conversion failed. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No weights were found.
    #[error(
        "no LinFusion weights for '{model}' (architecture: {architecture})\n\
         Linear attention with the original weights alone makes garbage images: its feature maps and projections are learned.\n\
         searched: {searched}\n\
         Three ways on:\n\
         \x20 1. linfusion-convert {model} --weights FOLDER-OR-FILE    (a LinFusion checkpoint that you have)\n\
         \x20 2. {download}\n\
         \x20 3. linfusion-convert {model} --weights none              (untrained: for measuring speed only)\n\
         Window attention alone needs none: --attention window"
    )]
    NoWeights {
        /// The model.
        model: String,
        /// What it is.
        architecture: String,
        /// Where was looked.
        searched: String,
        /// The command that fetches the published checkpoint.
        download: String,
    },
    /// More than one checkpoint was found.
    #[error("several LinFusion checkpoints fit '{model}': {found}; choose one with --weights")]
    ManyWeights {
        /// The model.
        model: String,
        /// The checkpoints.
        found: String,
    },
    /// The model was converted before.
    #[error("'{model}' was converted already ({how}); convert the original model instead")]
    AlreadyConverted {
        /// The model.
        model: String,
        /// What its metadata says.
        how: String,
    },
    /// Nothing, or less than expected, can be converted.
    #[error(
        "{converted} of {expected} attentions of '{model}' can be converted; --allow-partial accepts that\n{reasons}"
    )]
    Fewer {
        /// The model.
        model: String,
        /// Sites that can be converted.
        converted: usize,
        /// Sites that should be.
        expected: usize,
        /// Reasons, a line each.
        reasons: String,
        /// The report so far.
        report: Box<ModelReport>,
    },
    /// Opset or element type are outside what the operator can be written in.
    #[error(
        "'{model}' imports opset {opset}: {source}\nhint: --emit standard works from opset 11 up"
    )]
    Opset {
        /// The model.
        model: String,
        /// Its opset.
        opset: i64,
        /// Details.
        #[source]
        source: BodyError,
    },
    /// Sites and checkpoint cannot be brought together.
    #[error(transparent)]
    Ambiguous(#[from] Ambiguous),
    /// Weights are used for what they were not learned for.
    #[error(
        "{module}: the checkpoint's weights are for {learned} attention, --attention asks for {asked}\nhint: without --attention the checkpoint decides"
    )]
    OtherAttention {
        /// The module.
        module: String,
        /// What its weights are for.
        learned: Method,
        /// What was asked for.
        asked: Method,
    },
    /// A pattern matches nothing.
    #[error(transparent)]
    Pattern(#[from] UnmatchedPattern),
    /// Sites have different element types.
    #[error(
        "'{model}' has self-attention in {found}: one function in the file has one type\nhint: --emit standard, or --only for the sites of one type"
    )]
    MixedTypes {
        /// The model.
        model: String,
        /// The types.
        found: String,
    },
    /// A site cannot be rewritten.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The new weights cannot be kept beside the output.
    #[error("'{out}' cannot be written: {source}")]
    Spill {
        /// The output.
        out: String,
        /// Why: usually the disk is full.
        source: std::io::Error,
    },
    /// The output cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The written model is wrong; it was not published.
    #[error(transparent)]
    Verify(#[from] VerifyError),
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
    progress("reading the model");
    let file = OnnxFile::open(&request.model)?;
    let name = request.model.display().to_string();
    refuse_converted(&file.model, &name)?;
    progress("looking for attention");
    let analysis = Analysis::with_grid(&file, request.selection.grid);
    request.selection.check(&analysis.sites)?;
    let mut actions = plan(&analysis, &request.selection, &[]);
    // A model with nothing to convert needs no checkpoint to say so.
    let enough = refuse_fewer(&name, &analysis, &actions, request.partial);
    let checkpoint = match (open_checkpoint(request, &name, &analysis), &enough) {
        // Window attention alone does with the graph's own weights.
        (Err(ConvertError::NoWeights { .. }), Ok(()))
            if actions
                .iter()
                .filter_map(Action::method)
                .all(|m| m == Method::Window) =>
        {
            None
        }
        (Ok(checkpoint), _) => checkpoint,
        (Err(e), _) => return enough.and(Err(e)),
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
    let mut warnings = Vec::new();
    let (patches, converted, used) = patches(
        request,
        &analysis,
        &mut actions,
        checkpoint.as_ref(),
        &modules,
        &mut warnings,
    )?;
    refuse_fewer(&name, &analysis, &actions, request.partial)?;

    let mid = checkpoint.as_ref().map_or(0, mlp_width);
    let asked = request.selection.window.unwrap_or_default();
    let mut report = ConvertReport {
        model: ModelReport::new(&name, &analysis, &actions, asked, mid),
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
    let options = WriteOptions {
        external: request.external,
        overwrite: request.overwrite,
        ..WriteOptions::default()
    };
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
        report.verified = Some(verified);
    }
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
    Ok(report)
}

/// The metadata that lists the converted modules, separated by spaces.
pub const CONVERTED_KEY: &str = "linfusion.converted";

/// `<stem>.linfusion.onnx` beside the model.
#[must_use]
pub fn default_output(model: &Path) -> PathBuf {
    model.with_extension("linfusion.onnx")
}

fn refuse_converted(model: &ModelProto, name: &str) -> Result<(), ConvertError> {
    let recorded = model
        .metadata_props
        .iter()
        .find(|p| p.key.as_deref() == Some(METADATA_KEY));
    let has_node = model
        .graph
        .node
        .iter()
        .any(|n| n.domain.as_deref() == Some(linfusion_ops::schema::DOMAIN));
    if recorded.is_none() && !has_node {
        return Ok(());
    }
    let how = recorded
        .and_then(|p| p.value.clone())
        .unwrap_or_else(|| "it holds ai.linfusion nodes".to_owned());
    Err(ConvertError::AlreadyConverted {
        model: name.to_owned(),
        how,
    })
}

/// Sites the user chose to keep are no shortfall; sites that cannot be converted are.
fn refuse_fewer(
    name: &str,
    analysis: &Analysis<'_>,
    actions: &[Action],
    partial: Partial,
) -> Result<(), ConvertError> {
    let converted = actions.iter().filter(|a| a.method().is_some()).count();
    let stuck: Vec<usize> = (0..actions.len())
        .filter(|&i| matches!(actions[i], Action::Cannot(_)))
        .collect();
    let unread = stuck
        .iter()
        .filter(|&&i| analysis.sites[i].kind == Kind::Other)
        .count();
    let expected = analysis
        .recognised
        .as_ref()
        .map_or(0, |r| r.expected_self() + r.expected_joint())
        .max(analysis.own_sites().count() + unread);
    let missing = analysis.own_sites().count() < expected;
    if converted > 0 && (partial == Partial::Allow || (stuck.is_empty() && !missing)) {
        return Ok(());
    }
    let line = |i: usize| {
        let s = &analysis.sites[i];
        let reason = actions[i].reason().unwrap_or_default();
        format!(
            "  {} [{}]: {reason}",
            s.module.as_deref().unwrap_or(&s.anchor),
            s.kind
        )
    };
    let mut shown: Vec<usize> = if stuck.is_empty() {
        (0..analysis.sites.len())
            .filter(|&i| actions[i].method().is_none())
            .collect()
    } else {
        stuck
    };
    let more = shown.len().saturating_sub(12);
    shown.truncate(12);
    let mut reasons = shown.into_iter().map(line).collect::<Vec<_>>().join("\n");
    if analysis.sites.is_empty() {
        reasons = "  the file has no Softmax and no attention operator".to_owned();
    }
    if more > 0 {
        reasons += &format!("\n  and {more} more (inspect shows all)");
    }
    Err(ConvertError::Fewer {
        model: name.to_owned(),
        converted,
        expected,
        reasons,
        report: Box::new(ModelReport::new(
            name,
            analysis,
            actions,
            WindowSpec::default(),
            0,
        )),
    })
}

fn open_checkpoint(
    request: &Request,
    name: &str,
    analysis: &Analysis<'_>,
) -> Result<Option<Checkpoint>, ConvertError> {
    let architecture = analysis.recognised.as_ref().map(|r| r.architecture);
    match &request.weights {
        WeightsFrom::Untrained => Ok(None),
        WeightsFrom::Path(path) => Ok(Some(Checkpoint::open(path)?)),
        WeightsFrom::Search => {
            let found = discover(
                &request.model,
                architecture,
                &SearchPlaces::from_environment(),
            );
            let list = |paths: &[PathBuf]| {
                paths
                    .iter()
                    .map(|p| p.display().to_string())
                    .collect::<Vec<_>>()
                    .join(", ")
            };
            match &found.found[..] {
                [one] => Ok(Some(Checkpoint::open(one)?)),
                [] => Err(ConvertError::NoWeights {
                    model: name.to_owned(),
                    architecture: analysis.architecture().to_owned(),
                    searched: list(&found.searched),
                    download: architecture.and_then(download_command).map_or_else(
                        || "no checkpoint is published for this architecture".to_owned(),
                        |command| format!("{command}, in the folder of the model, then again"),
                    ),
                }),
                many => Err(ConvertError::ManyWeights {
                    model: name.to_owned(),
                    found: list(many),
                }),
            }
        }
    }
}

/// The checkpoint's module of each site, by site index.
fn modules<'c>(
    analysis: &Analysis<'_>,
    checkpoint: Option<&'c Checkpoint>,
) -> Result<Vec<Option<&'c CheckpointModule>>, ConvertError> {
    let mut modules = vec![None; analysis.sites.len()];
    if let Some(checkpoint) = checkpoint {
        let own: Vec<_> = analysis.own_sites().collect();
        let assigned = assign(&own, checkpoint, analysis.recognised.as_ref())?;
        for (site, module) in own.iter().zip(assigned) {
            modules[site.index] = module;
        }
    }
    Ok(modules)
}

fn patches(
    request: &Request,
    analysis: &Analysis<'_>,
    actions: &mut [Action],
    checkpoint: Option<&Checkpoint>,
    modules: &[Option<&CheckpointModule>],
    warnings: &mut Vec<String>,
) -> Result<(Vec<Patch>, Vec<Converted>, Used), ConvertError> {
    let mut names = HashSet::new();
    collect_names(analysis.graph.proto, &mut names);
    let names: BTreeSet<&str> = names.into_iter().collect();
    let mut context = Context {
        names: &names,
        graph: &analysis.graph,
        shapes: &analysis.shapes,
        opset: analysis.opset,
        emit: request.emit,
    };
    // A function has one form: where text lies is told even where there is none.
    let mut sides = analysis
        .sites
        .iter()
        .filter_map(|s| s.image.as_ref().ok()?.text);
    let side = sides.next().unwrap_or(TextSide::Prefix);
    let mut used = Used::default();
    let selection = &request.selection;
    let (mut patches, mut converted) = (Vec::<Patch>::new(), Vec::new());
    let out = output(request);
    let mut spill = spill(&out);
    let mut modules_taken = HashSet::new();
    for (site, action) in analysis.sites.iter().zip(actions.iter_mut()) {
        let Some(method) = action.method() else {
            continue;
        };
        let (method, window, weights) = match (checkpoint, modules[site.index]) {
            (None, _) => (method, selection.window, Weights::Graph),
            (Some(checkpoint), Some(module)) => {
                let (learned, window) = of_module(module, selection.window);
                if selection.rule(site).is_some() && learned != method {
                    return Err(ConvertError::OtherAttention {
                        module: module.module_name.clone(),
                        learned,
                        asked: method,
                    });
                }
                (learned, window, Weights::Module { checkpoint, module })
            }
            // Window attention alone does with the graph's own weights.
            (Some(_), None) if method == Method::Window => {
                (method, selection.window, Weights::Graph)
            }
            (Some(_), None) => {
                *action =
                    Action::Cannot("the checkpoint has no weights for this module".to_owned());
                continue;
            }
        };
        let module = match &weights {
            Weights::Module { module, .. } => module.module_name.clone(),
            Weights::Graph => site
                .module
                .clone()
                .unwrap_or_else(|| format!("attention_{}", site.index)),
        };
        let module = if modules_taken.insert(module.clone()) {
            module
        } else {
            format!("{module}_{}", site.index)
        };
        context.emit = request.emit;
        let made = match (method, &site.plain) {
            (Method::Linear, Ok(plain)) => patch(&context, plain, &site.anchor, &module, &weights),
            (Method::Linear, Err(reason)) => Err(SiteError::Graph {
                anchor: site.anchor.clone(),
                reason: reason.clone(),
            }),
            _ => {
                let window = window.unwrap_or_default();
                let text = site.image.as_ref().ok().and_then(|i| i.text);
                let variant = WindowVariant {
                    shape: window.window.into(),
                    border: window.border,
                    text: text.unwrap_or(side),
                };
                if used.window.is_some_and(|first| first != variant) {
                    context.emit = match request.emit {
                        Emit::Function => Emit::Standard,
                        emit => emit,
                    };
                }
                window::patch(&context, site, method, window, side, &module, &weights)
            }
        };
        match made {
            Ok(mut p) => {
                *action = Action::Convert(method);
                used.linear |= p.linear.is_some();
                if let Some(part) = &p.window {
                    used.window.get_or_insert(WindowVariant::of(&part.attrs));
                }
                if context.emit != request.emit {
                    warnings.push(format!(
                        "{module}: its window has another form than the first site's; one function has one form, so this site is written in standard operators and our library does not speed it up"
                    ));
                }
                for (tensor, n) in &p.overflows {
                    warnings.push(format!("{module}: {n} values of '{tensor}' are infinite in the graph's element type"));
                }
                if let Some(spill) = &mut spill {
                    spill.take(patches.len(), &mut p.initializers, &out)?;
                }
                converted.push(Converted {
                    module,
                    method,
                    inputs: cut_inputs(&analysis.shapes, site, &p),
                    linear: p.linear.clone(),
                    window: p.window.clone(),
                    target: p.target.clone(),
                    element: element_of(site),
                });
                patches.push(p);
            }
            Err(SiteError::Graph { reason, .. }) => *action = Action::Cannot(reason),
            Err(SiteError::Body(source)) => {
                let model = request.model.display().to_string();
                return Err(ConvertError::Opset {
                    model,
                    opset: analysis.opset,
                    source,
                });
            }
            Err(e) => return Err(e.into()),
        }
    }
    if let Some(spill) = spill {
        spill.give_back(&mut patches, &out)?;
    }
    Ok((patches, converted, used))
}

/// The form of attention that a module's weights were learned for, and its window.
fn of_module(
    module: &CheckpointModule,
    stated: Option<WindowSpec>,
) -> (Method, Option<WindowSpec>) {
    match module.attention {
        SiteAttention::Linear => (Method::Linear, None),
        SiteAttention::Hybrid(learned) => (Method::Hybrid, stated.or(learned)),
        SiteAttention::Window(learned) => (Method::Window, stated.or(learned)),
    }
}

/// Where verification cuts a site out of the written model.
fn cut_inputs(shapes: &Shapes, site: &Site<'_>, patch: &Patch) -> Vec<CutInput> {
    let mut names: Vec<&str> = Vec::new();
    let stream = site
        .image
        .as_ref()
        .ok()
        .and_then(|i| i.stream.as_ref().ok());
    match (&patch.window, &site.plain) {
        (None, Ok(plain)) => names.push(plain.x),
        _ => {
            let readings = site.exact.as_ref().ok().and_then(|e| e.qkv.as_ref());
            names.extend(readings.into_iter().flatten().map(|r| r.value));
            names.extend(
                stream
                    .filter(|_| readings.is_none() || patch.linear.is_some())
                    .map(|s| s.x),
            );
        }
    }
    let grid = patch.window.as_ref().map(|w| CutInput {
        name: w.grid.clone(),
        feed: Feed::Grid(w.size),
    });
    let mut seen = HashSet::new();
    let noise = |name: &&str| {
        let fact = shapes.fact(name);
        Some(CutInput {
            name: (*name).to_owned(),
            feed: Feed::Noise {
                shape: fact.shape.clone()?,
                element: ElementType::from_onnx(fact.element?)?,
            },
        })
    };
    names.retain(|n| seen.insert(*n));
    names.iter().filter_map(noise).chain(grid).collect()
}

fn element_of(site: &Site<'_>) -> ElementType {
    let plain = site.plain.as_ref().map(|p| p.element);
    let code = plain.or_else(|_| site.exact.as_ref().map(|e| e.element));
    code.ok()
        .and_then(ElementType::from_onnx)
        .unwrap_or(ElementType::F32)
}

fn output(request: &Request) -> PathBuf {
    let named = request.out.clone();
    named.unwrap_or_else(|| default_output(&request.model))
}

/// New weights on their way to the output, out of memory.
struct Spilled {
    file: Spill,
    /// Patch and initializer of each tensor.
    tensors: Vec<(usize, usize)>,
}

/// `None` where the output's folder takes no file: tensors stay in memory then,
/// and writing the output will say what is wrong.
fn spill(out: &Path) -> Option<Spilled> {
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty());
    let file = Spill::new(folder.unwrap_or(Path::new("."))).ok()?;
    Some(Spilled {
        file,
        tensors: Vec::new(),
    })
}

impl Spilled {
    /// Tensors of fewer bytes stay in memory.
    const SMALL: usize = 1 << 16;

    fn take(
        &mut self,
        patch: usize,
        tensors: &mut [TensorProto],
        out: &Path,
    ) -> Result<(), ConvertError> {
        for (i, tensor) in tensors.iter_mut().enumerate() {
            if let Some(bytes) = tensor.raw_data.take_if(|b| b.len() >= Self::SMALL) {
                self.file.push(&bytes).map_err(|e| spill_error(out, e))?;
                self.tensors.push((patch, i));
            }
        }
        Ok(())
    }

    fn give_back(self, patches: &mut [Patch], out: &Path) -> Result<(), ConvertError> {
        let bytes = self.file.into_bytes().map_err(|e| spill_error(out, e))?;
        for ((patch, i), bytes) in self.tensors.into_iter().zip(bytes) {
            let tensor = patches
                .get_mut(patch)
                .and_then(|p| p.initializers.get_mut(i));
            if let Some(tensor) = tensor {
                tensor.raw_data = Some(bytes);
            }
        }
        Ok(())
    }
}

fn spill_error(out: &Path, source: std::io::Error) -> ConvertError {
    ConvertError::Spill {
        out: out.display().to_string(),
        source,
    }
}

fn mlp_width(checkpoint: &Checkpoint) -> u64 {
    let width = checkpoint.modules.first().map_or(0, |m| match m.mid {
        MlpWidth::Identity => 0,
        MlpWidth::Width(w) => w,
    });
    width as u64
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
    Ok(ModelReport::new(
        &model.display().to_string(),
        &analysis,
        &actions,
        selection.window.unwrap_or_default(),
        0,
    ))
}
