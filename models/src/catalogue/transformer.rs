//! Diffusion transformers: blocks that are all alike, so that a few numbers say everything.

use super::recognise::{Evidence, Recognition, SiteEvidence, Variant};
use super::{Architecture, CatalogueSite, Level, SiteKind, Structure};

/// Latent pixels on a side of a token.
const PATCH: usize = 2;

/// The attentions of a model with this structure, in execution order.
pub(super) fn sites(architecture: Architecture, structure: &Structure) -> Vec<CatalogueSite> {
    let side = structure.native_latent / PATCH;
    let site = |level: &Level, kind: SiteKind, module: String| CatalogueSite {
        kind,
        module,
        width: level.width,
        heads: level.heads,
        head_dim: level.width.checked_div(level.heads).unwrap_or(0),
        tokens: side * side,
        level: 0,
    };
    let mut sites = Vec::new();
    let blocks = |i: usize| {
        structure
            .levels
            .get(i)
            .into_iter()
            .flat_map(|l| (0..l.layers).map(move |n| (l, n)))
    };
    match architecture {
        Architecture::Flux => {
            for (level, i) in blocks(0) {
                let module = format!("transformer_blocks.{i}.attn");
                sites.push(site(level, SiteKind::Joint, module));
            }
            for (level, i) in blocks(1) {
                let module = format!("single_transformer_blocks.{i}.attn");
                sites.push(site(level, SiteKind::Joint, module));
            }
        }
        Architecture::Sd3 | Architecture::Sd35 => {
            let dual = structure.levels.get(1).map_or(0, |l| l.layers);
            for (level, i) in blocks(0) {
                let module = format!("transformer_blocks.{i}.attn");
                sites.push(site(level, SiteKind::Joint, module));
                if i < dual {
                    let module = format!("transformer_blocks.{i}.attn2");
                    sites.push(site(level, SiteKind::SelfAttention, module));
                }
            }
        }
        _ => {
            for (level, i) in blocks(0) {
                let module = match architecture {
                    Architecture::Sit => format!("blocks.{i}.attn"),
                    _ => format!("transformer_blocks.{i}.attn1"),
                };
                sites.push(site(level, SiteKind::SelfAttention, module));
            }
        }
    }
    sites
}

/// Recognises a transformer, by names where all attentions have one. Without names equal
/// blocks are told by what attends to what; DiT and SiT then are one, and FLUX, whose
/// two kinds of block look alike, is not told.
pub(super) fn recognise(evidence: &Evidence) -> Option<Recognition> {
    if !evidence.transformer {
        return None;
    }
    let (own, joint) = (&evidence.self_sites, &evidence.joint_sites);
    let all = || own.iter().chain(joint);
    let named = all().all(|s| s.module.is_some());
    let (width, heads) = (
        common(all().map(|s| s.width))?,
        common(all().map(|s| s.heads))?,
    );
    let level = |native: Level, layers: usize| Level {
        width: width.unwrap_or(native.width),
        heads: heads.unwrap_or(native.heads),
        layers,
    };
    let single = |sites: &[SiteEvidence]| {
        let is_single = |s: &&SiteEvidence| {
            s.module
                .as_deref()
                .is_some_and(|m| m.contains("single_transformer_blocks."))
        };
        sites.iter().filter(is_single).count()
    };
    // By architecture: the number of blocks of each kind.
    let mut candidates: Vec<(Architecture, Vec<usize>)> = Vec::new();
    match (own.len(), joint.len()) {
        (0, 0) => {}
        (n, 0) if evidence.context_width.is_some() => {
            candidates.push((Architecture::PixArt, vec![n]));
        }
        (n, 0) => {
            candidates.push((Architecture::Dit, vec![n]));
            candidates.push((Architecture::Sit, vec![n]));
        }
        (0, n) => {
            let single = single(joint);
            if named && single > 0 {
                candidates.push((Architecture::Flux, vec![n - single, single]));
            } else if named || !evidence.text_first {
                candidates.push((Architecture::Sd3, vec![n]));
            }
        }
        (dual, n) => candidates.push((Architecture::Sd35, vec![n, dual])),
    }
    candidates.into_iter().find_map(|(architecture, layers)| {
        let native = architecture.native();
        let levels = native.levels.iter().zip(layers);
        let structure = Structure {
            levels: levels
                .map(|(native, layers)| level(*native, layers))
                .collect(),
            context_width: evidence.context_width.unwrap_or(native.context_width),
            ..native.clone()
        };
        let sites = sites(architecture, &structure);
        let same = |kind: SiteKind, found: &[SiteEvidence]| {
            sites
                .iter()
                .filter(|s| s.kind == kind)
                .all(|site| found.iter().any(|f| is_module(f, &site.module)))
        };
        let fits = !named || (same(SiteKind::SelfAttention, own) && same(SiteKind::Joint, joint));
        fits.then(|| Recognition {
            architecture,
            variant: if structure == native {
                Variant::Exact
            } else {
                Variant::Scaled
            },
            structure,
            sites,
        })
    })
}

/// The one value that all have who have any; `None` on a contradiction.
fn common(values: impl Iterator<Item = Option<usize>>) -> Option<Option<usize>> {
    let mut known = None;
    for value in values.flatten() {
        if *known.get_or_insert(value) != value {
            return None;
        }
    }
    Some(known)
}

/// Whether the site is this module, in a wrapper or not.
fn is_module(found: &SiteEvidence, module: &str) -> bool {
    let path = found.module.as_deref().unwrap_or("");
    path.strip_suffix(module)
        .is_some_and(|wrapper| wrapper.is_empty() || wrapper.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::recognise as catalogue_recognise;

    fn evidence(architecture: Architecture, levels: &[usize]) -> Evidence {
        let native = architecture.native();
        let levels = native.levels.iter().zip(levels);
        let structure = Structure {
            levels: levels.map(|(l, &layers)| Level { layers, ..*l }).collect(),
            ..native.clone()
        };
        let sites = sites(architecture, &structure);
        let of = |kind: SiteKind| {
            let all = sites.iter().filter(|s| s.kind == kind);
            all.map(|s| SiteEvidence {
                module: Some(s.module.clone()),
                width: Some(s.width),
                heads: Some(s.heads),
            })
            .collect()
        };
        Evidence {
            self_sites: of(SiteKind::SelfAttention),
            joint_sites: of(SiteKind::Joint),
            context_width: (native.context_width > 0).then_some(native.context_width),
            transformer: true,
            text_first: architecture == Architecture::Flux,
        }
    }

    fn native_layers(architecture: Architecture) -> Vec<usize> {
        architecture
            .native()
            .levels
            .iter()
            .map(|l| l.layers)
            .collect()
    }

    #[test]
    fn recognises_every_transformer_by_name() {
        for architecture in Architecture::ALL.into_iter().filter(|a| a.is_transformer()) {
            let native = native_layers(architecture);
            let found = catalogue_recognise(&evidence(architecture, &native)).unwrap();
            assert_eq!(found.architecture, architecture);
            assert_eq!(found.variant, Variant::Exact, "{architecture}");
            let few: Vec<usize> = native.iter().map(|_| 2).collect();
            let found = catalogue_recognise(&evidence(architecture, &few)).unwrap();
            assert_eq!(
                (found.architecture, found.variant),
                (architecture, Variant::Scaled)
            );
        }
    }

    #[test]
    fn counts_by_kind() {
        let native = native_layers(Architecture::Sd35);
        let found = catalogue_recognise(&evidence(Architecture::Sd35, &native)).unwrap();
        assert_eq!((found.expected_self(), found.expected_joint()), (13, 24));
    }

    #[test]
    fn without_names_by_what_attends_to_what() {
        for (architecture, found) in [
            (Architecture::PixArt, Some(Architecture::PixArt)),
            (Architecture::Dit, Some(Architecture::Dit)),
            (Architecture::Sit, Some(Architecture::Dit)),
            (Architecture::Sd3, Some(Architecture::Sd3)),
            (Architecture::Sd35, Some(Architecture::Sd35)),
            (Architecture::Flux, None),
        ] {
            let mut evidence = evidence(architecture, &native_layers(architecture));
            for site in evidence
                .self_sites
                .iter_mut()
                .chain(&mut evidence.joint_sites)
            {
                site.module = None;
            }
            let recognised = catalogue_recognise(&evidence).map(|r| r.architecture);
            assert_eq!(recognised, found, "{architecture}");
        }
    }

    #[test]
    fn what_does_not_fit_is_none() {
        let whole = || evidence(Architecture::PixArt, &[4]);
        let mut gap = whole();
        gap.self_sites.remove(1);
        assert_eq!(catalogue_recognise(&gap), None, "a block is missing");
        let mut wide = whole();
        wide.self_sites[2].width = Some(7);
        assert_eq!(catalogue_recognise(&wide), None, "a block of another width");
        let unet = Evidence {
            transformer: false,
            ..whole()
        };
        assert_eq!(
            catalogue_recognise(&unet),
            None,
            "convolutions between the blocks"
        );
        let mut wrapped = whole();
        for site in &mut wrapped.self_sites {
            site.module = site.module.as_ref().map(|m| format!("model.{m}"));
        }
        assert!(catalogue_recognise(&wrapped).is_some());
    }
}
