//! The checkpoint: found, opened, laid beside the sites, and doubted.

use std::path::PathBuf;

use linfusion_models::catalogue::canonical_module;
use linfusion_models::checkpoint::{
    Checkpoint, CheckpointModule, MlpWidth, SearchPlaces, discover, download_command,
};

use super::patches::of_module;
use super::{ConvertError, Request, WeightsFrom};
use crate::analysis::Analysis;
use crate::mapping::assign;
use crate::plan::Selection;

/// The checkpoint that the request names, or the one that is found where it names none.
pub(super) fn open_checkpoint(
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
pub(super) fn modules<'c>(
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

/// That of the first module; 0 without MLPs.
pub(super) fn mlp_width(checkpoint: &Checkpoint) -> u64 {
    let width = checkpoint.modules.first().map_or(0, |m| match m.mid {
        MlpWidth::Identity => 0,
        MlpWidth::Width(w) => w,
    });
    width as u64
}

/// What of a checkpoint looks as if it were meant for another model.
pub(super) fn doubts(
    analysis: &Analysis<'_>,
    checkpoint: &Checkpoint,
    modules: &[Option<&CheckpointModule>],
    selection: &Selection,
) -> Vec<String> {
    const MANY: usize = 4;
    let mut doubts = Vec::new();
    let unused = checkpoint.unused_tensors();
    if let Some(first) = unused.first() {
        doubts.push(format!(
            "{} of the checkpoint's tensors are none that the format has, and are ignored: '{first}'{}",
            unused.len(),
            if unused.len() > 1 { ", …" } else { "" }
        ));
    }
    let renamed = analysis
        .sites
        .iter()
        .zip(modules)
        .filter_map(|(site, module)| {
            let (path, module) = (site.module.as_deref()?, (*module)?);
            let same = canonical_module(path) == canonical_module(&module.module_name);
            (!same).then(|| {
                format!(
                    "'{path}' gets the checkpoint's '{}', by its place in the order: names differ",
                    module.module_name
                )
            })
        });
    doubts.extend(renamed.take(MANY));
    let other = modules.iter().flatten().find_map(|module| {
        let (_, learned) = of_module(module, None);
        let (asked, learned) = (selection.window?, learned?);
        (asked != learned).then(|| {
            format!(
                "{}: the checkpoint was learned with window {learned}, the file gets {asked}",
                module.module_name
            )
        })
    });
    doubts.extend(other);
    doubts
}
