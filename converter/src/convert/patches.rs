//! From planned sites to patches, with large weights kept on disk until they are written.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use linfusion_models::checkpoint::{Checkpoint, CheckpointModule, SiteAttention};
use linfusion_models::onnx::ElementType;
use linfusion_models::onnx::proto::TensorProto;
use linfusion_models::onnx::write::Spill;
use linfusion_models::staged::parent_folder;
use linfusion_ops::body::WindowVariant;
use linfusion_ops::schema::{TextSide, WindowSpec};

use super::{ConvertError, Request, output};
use crate::analysis::Analysis;
use crate::attention::site::Site;
use crate::graph::collect_names;
use crate::plan::{Action, Method};
use crate::rewrite::site::{Context, Weights, patch};
use crate::rewrite::{Emit, Patch, SiteError, Used, window};
use crate::shapes::Shapes;
use crate::verify::{Converted, CutInput, Feed};

/// Builds the patch of every site that is to be converted; a site that turns out not to
/// be convertible changes its action.
pub(super) fn patches(
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
            Weights::Graph => site.checkpoint_name().into_owned(),
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
pub(super) fn of_module(
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

/// New weights on their way to the output, out of memory.
struct Spilled {
    file: Spill,
    /// Patch and initializer of each tensor.
    tensors: Vec<(usize, usize)>,
}

/// `None` where the output's folder takes no file: tensors stay in memory then,
/// and writing the output will say what is wrong.
fn spill(out: &Path) -> Option<Spilled> {
    let file = Spill::new(parent_folder(out)).ok()?;
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
