//! Which module of a checkpoint belongs to which site.

use std::collections::HashMap;

use linfusion_models::catalogue::{Recognition, canonical_module};
use linfusion_models::checkpoint::{Checkpoint, CheckpointModule};

use crate::attention::site::Site;

/// Site and checkpoint cannot be brought together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "the checkpoint's modules cannot be told apart for this graph: names are lost and order, width and heads do not agree\n\
     self-attention sites without a module, in execution order:\n{sites}\n\
     modules of the checkpoint that no site names, in execution order:\n{modules}"
)]
pub struct Ambiguous {
    /// The sites, a line each.
    pub sites: String,
    /// The modules, a line each.
    pub modules: String,
}

/// The checkpoint's module for each of `sites` (self-attentions in execution
/// order), by position; a site that the checkpoint does not cover has none.
///
/// # Errors
/// [`Ambiguous`] if names are gone and the order does not decide.
pub fn assign<'c>(
    sites: &[&Site<'_>],
    checkpoint: &'c Checkpoint,
    recognised: Option<&Recognition>,
) -> Result<Vec<Option<&'c CheckpointModule>>, Ambiguous> {
    let by_name: HashMap<String, &CheckpointModule> = checkpoint
        .modules
        .iter()
        .map(|m| (canonical_module(&m.module_name).into_owned(), m))
        .collect();
    let find = |module: &str| by_name.get(canonical_module(module).as_ref()).copied();
    let mut assigned: Vec<Option<&CheckpointModule>> =
        sites.iter().map(|s| find(&s.checkpoint_name())).collect();
    let open: Vec<usize> = (0..sites.len())
        .filter(|&i| assigned[i].is_none() && !named_elsewhere(sites[i]))
        .collect();
    if open.is_empty() {
        return Ok(assigned);
    }
    // Where a whole architecture is recognised, the order of its sites names them.
    if let Some(r) = recognised.filter(|r| r.sites.len() == sites.len()) {
        let modules: Vec<_> = open.iter().map(|&i| find(&r.sites[i].module)).collect();
        if open
            .iter()
            .zip(&modules)
            .all(|(&i, m)| m.is_some_and(|m| fits(sites[i], m)))
        {
            for (&i, m) in open.iter().zip(modules) {
                assigned[i] = m;
            }
            return Ok(assigned);
        }
    }
    let rest: Vec<&CheckpointModule> = checkpoint
        .modules_in_execution_order()
        .into_iter()
        .filter(|m| !assigned.iter().flatten().any(|a| a.index == m.index))
        .collect();
    // Every module has its site: the other sites have none.
    if rest.is_empty() {
        return Ok(assigned);
    }
    if rest.len() == open.len() && open.iter().zip(&rest).all(|(&i, m)| fits(sites[i], m)) {
        for (i, m) in open.into_iter().zip(rest) {
            assigned[i] = Some(m);
        }
        return Ok(assigned);
    }
    let line = |what: String, width: String, heads: String| {
        format!("  {what} (width {width}, {heads} heads)")
    };
    let known = |v: Option<i64>| v.map_or("unknown".to_owned(), |v| v.to_string());
    Err(Ambiguous {
        sites: open
            .iter()
            .map(|&i| {
                line(
                    sites[i].anchor.clone(),
                    known(sites[i].width()),
                    known(sites[i].heads),
                )
            })
            .collect::<Vec<_>>()
            .join("\n"),
        modules: rest
            .iter()
            .map(|m| {
                line(
                    m.module_name.clone(),
                    m.dim.to_string(),
                    m.heads.to_string(),
                )
            })
            .collect::<Vec<_>>()
            .join("\n"),
    })
}

/// A site whose path is known and which the checkpoint does not have.
fn named_elsewhere(site: &Site<'_>) -> bool {
    site.module.as_deref().is_some_and(|m| m.contains("blocks"))
}

fn fits(site: &Site<'_>, module: &CheckpointModule) -> bool {
    let same = |a: Option<i64>, b: usize| a.is_none_or(|a| i64::try_from(b).is_ok_and(|b| a == b));
    same(site.width(), module.dim) && same(site.heads, module.heads)
}
