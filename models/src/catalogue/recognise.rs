//! Which architecture a graph is, from the self-attentions that were found in it.

use super::{
    Architecture, CatalogueSite, Level, SiteKind, Structure, canonical_module, execution_order,
    transformer,
};

/// What was found in a graph.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The self-attentions, in the order in which the graph runs them.
    pub self_sites: Vec<SiteEvidence>,
    /// The attentions over text and image, in the same order.
    pub joint_sites: Vec<SiteEvidence>,
    /// Width of the tensor that cross-attentions take their keys from; `None` without cross-attention.
    pub context_width: Option<usize>,
    /// Whether nothing but the patch embedding is a spatial convolution.
    pub transformer: bool,
    /// Whether text tokens come before the image's, where both attend.
    pub text_first: bool,
}

/// What is known of one self-attention.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SiteEvidence {
    /// PyTorch path of the attention module, where the graph still has it.
    pub module: Option<String>,
    /// Channels.
    pub width: Option<usize>,
    /// Heads.
    pub heads: Option<usize>,
}

/// A recognised architecture, fitted to the evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recognition {
    /// Which architecture.
    pub architecture: Architecture,
    /// The published model or one with other numbers.
    pub variant: Variant,
    /// The fitted numbers. Widths and heads that the evidence lacks are the native ones; `native_latent`
    /// is always the native one.
    pub structure: Structure,
    /// Every attention that the model must have and that may be converted, in execution order.
    pub sites: Vec<CatalogueSite>,
}

/// How close a model is to the published one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Layers, widths, heads and context width are those of the published model as far as they are known.
    Exact,
    /// The same blocks with other numbers.
    Scaled,
}

impl Recognition {
    /// How many self-attentions the model must have.
    pub fn expected_self(&self) -> usize {
        self.expected(SiteKind::SelfAttention)
    }

    /// How many attentions over text and image the model must have.
    pub fn expected_joint(&self) -> usize {
        self.expected(SiteKind::Joint)
    }

    fn expected(&self, kind: SiteKind) -> usize {
        self.sites.iter().filter(|s| s.kind == kind).count()
    }
}

/// No published model has deeper transformers or more of them in a block.
const MAX_LAYERS: usize = 16;
const MAX_LAYERS_PER_BLOCK: usize = 4;

/// Recognises an architecture by its module paths if every self-attention has one, else by the sequence of
/// widths and heads in execution order. `None` for a model that is not in the catalogue, or of which only
/// a part was found.
///
/// Without names the widths must grow from level to level and there must be cross-attention: equal blocks
/// in a row are a transformer, and the same pattern without text is a pixel-space UNet.
pub fn recognise(evidence: &Evidence) -> Option<Recognition> {
    if let Some(transformer) = transformer::recognise(evidence) {
        return Some(transformer);
    }
    if evidence.self_sites.is_empty() || !evidence.joint_sites.is_empty() {
        return None;
    }
    let names: Option<Vec<&str>> = evidence
        .self_sites
        .iter()
        .map(|site| site.module.as_deref())
        .collect();
    let sites: Vec<&SiteEvidence> = match &names {
        // By name, the order in which they were found does not matter.
        Some(names) => execution_order(names)
            .into_iter()
            .filter_map(|i| evidence.self_sites.get(i))
            .collect(),
        None => evidence.self_sites.iter().collect(),
    };
    if names.is_none() && evidence.context_width.is_none() {
        return None;
    }
    let mut best: Option<(Score, Recognition)> = None;
    for architecture in Architecture::UNETS {
        for layout in layouts(architecture, sites.len()) {
            let Some(candidate) = fit(architecture, layout, &sites, evidence.context_width) else {
                continue;
            };
            let matches = match &names {
                Some(_) => same_modules(&candidate.sites, &sites),
                None => widths_grow(architecture, &candidate.structure),
            };
            if !matches {
                continue;
            }
            let score = score(&candidate);
            if best.as_ref().is_none_or(|(other, _)| score > *other) {
                best = Some((score, candidate));
            }
        }
    }
    best.map(|(_, recognition)| recognition)
}

/// Every structure of the architecture that has this many self-attentions; widths and heads are native.
fn layouts(architecture: Architecture, count: usize) -> Vec<Structure> {
    let native = architecture.native();
    // Only SDXL's levels differ in depth.
    let depths: Vec<Vec<usize>> = match architecture {
        Architecture::Sdxl => (1..=MAX_LAYERS)
            .flat_map(|outer| (1..=MAX_LAYERS).map(move |inner| vec![outer, inner]))
            .collect(),
        _ => (1..=MAX_LAYERS)
            .map(|depth| vec![depth; native.levels.len()])
            .collect(),
    };
    let mut found = Vec::new();
    for layers_per_block in 1..=MAX_LAYERS_PER_BLOCK {
        for depth in &depths {
            let mut structure = native.clone();
            structure.layers_per_block = layers_per_block;
            for (level, layers) in structure.levels.iter_mut().zip(depth) {
                level.layers = *layers;
            }
            if architecture.level_indices(&structure).len() == count {
                found.push(structure);
            }
        }
    }
    found
}

/// Gives each level the width and heads that its sites have; `None` if sites of a level differ.
fn fit(
    architecture: Architecture,
    mut structure: Structure,
    sites: &[&SiteEvidence],
    context_width: Option<usize>,
) -> Option<Recognition> {
    let native = architecture.native();
    let mut known: Vec<SiteEvidence> = vec![SiteEvidence::default(); structure.levels.len()];
    for (level, site) in architecture.level_indices(&structure).iter().zip(sites) {
        let known = known.get_mut(*level)?;
        merge(&mut known.width, site.width)?;
        merge(&mut known.heads, site.heads)?;
    }
    for (level, known) in structure.levels.iter_mut().zip(&known) {
        *level = Level {
            width: known.width.unwrap_or(level.width),
            heads: known.heads.unwrap_or(level.heads),
            layers: level.layers,
        };
    }
    structure.context_width = context_width.unwrap_or(native.context_width);
    let variant = if structure == native {
        Variant::Exact
    } else {
        Variant::Scaled
    };
    let sites = architecture.sites(&structure);
    Some(Recognition {
        architecture,
        variant,
        structure,
        sites,
    })
}

/// `None` on a contradiction.
fn merge(known: &mut Option<usize>, found: Option<usize>) -> Option<()> {
    match (*known, found) {
        (Some(a), Some(b)) if a != b => None,
        _ => {
            *known = known.or(found);
            Some(())
        }
    }
}

fn same_modules(expected: &[CatalogueSite], found: &[&SiteEvidence]) -> bool {
    expected.len() == found.len()
        && expected.iter().zip(found).all(|(expected, found)| {
            found
                .module
                .as_deref()
                .is_some_and(|module| canonical_module(module) == expected.module)
        })
}

/// The middle block may have the width of the last down block.
fn widths_grow(architecture: Architecture, structure: &Structure) -> bool {
    let down_levels = match architecture {
        Architecture::Sdxl => structure.levels.as_slice(),
        _ => structure.levels.split_last().map_or(&[][..], |(_, l)| l),
    };
    down_levels.is_sorted_by(|a, b| a.width < b.width)
}

/// Better candidates compare greater: the published model, then the same division of heads, then the
/// fewest differences in depth.
type Score = (bool, usize, std::cmp::Reverse<usize>);

fn score(candidate: &Recognition) -> Score {
    let native = candidate.architecture.native();
    let levels = &candidate.structure.levels;
    let distance = levels
        .iter()
        .zip(&native.levels)
        .map(|(a, b)| a.layers.abs_diff(b.layers))
        .sum::<usize>()
        + candidate
            .structure
            .layers_per_block
            .abs_diff(native.layers_per_block);
    (
        candidate.variant == Variant::Exact,
        heads_fit(candidate),
        std::cmp::Reverse(distance),
    )
}

/// SD 1.x has as many heads everywhere, the later ones as many channels a head everywhere.
fn heads_fit(candidate: &Recognition) -> usize {
    let levels = &candidate.structure.levels;
    let constant = |value: fn(&Level) -> Option<usize>| {
        levels.windows(2).all(|pair| match pair {
            [a, b] => value(a) == value(b),
            _ => true,
        })
    };
    let fits = match candidate.architecture {
        Architecture::Sd15 | Architecture::ControlNet => constant(|level| Some(level.heads)),
        Architecture::Sd21 | Architecture::Sdxl => {
            constant(|level| level.width.checked_div(level.heads))
        }
        _ => true,
    };
    usize::from(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(sites: &[CatalogueSite]) -> Evidence {
        Evidence {
            self_sites: sites
                .iter()
                .map(|s| SiteEvidence {
                    module: Some(s.module.clone()),
                    width: Some(s.width),
                    heads: Some(s.heads),
                })
                .collect(),
            context_width: Some(12),
            ..Evidence::default()
        }
    }

    fn anonymous(mut evidence: Evidence) -> Evidence {
        for site in &mut evidence.self_sites {
            site.module = None;
        }
        evidence
    }

    /// The same blocks with other numbers.
    fn scaled(architecture: Architecture, levels: &[(usize, usize, usize)]) -> Vec<CatalogueSite> {
        let mut structure = architecture.native();
        structure.levels = levels
            .iter()
            .map(|&(width, heads, layers)| Level {
                width,
                heads,
                layers,
            })
            .collect();
        architecture.sites(&structure)
    }

    #[test]
    fn recognises_every_native_model_with_and_without_names() {
        for architecture in Architecture::UNETS {
            let mut evidence = named(&architecture.native_sites());
            evidence.context_width = Some(architecture.native().context_width);
            for evidence in [evidence.clone(), anonymous(evidence)] {
                let found = recognise(&evidence).unwrap();
                assert_eq!(found.architecture, architecture);
                assert_eq!(found.variant, Variant::Exact);
                assert_eq!(found.sites, architecture.native_sites());
            }
        }
    }

    #[test]
    fn recognises_shrunken_models() {
        let cases = [
            (
                Architecture::Sd15,
                vec![(4, 2, 1), (8, 2, 1), (16, 2, 1), (16, 2, 1)],
                16,
            ),
            (
                Architecture::Sd21,
                vec![(4, 1, 1), (8, 2, 1), (16, 4, 1), (16, 4, 1)],
                16,
            ),
            (Architecture::Sdxl, vec![(8, 2, 2), (16, 4, 3)], 28),
            (
                Architecture::ControlNet,
                vec![(4, 2, 1), (8, 2, 1), (16, 2, 1), (16, 2, 1)],
                7,
            ),
        ];
        for (architecture, levels, count) in cases {
            let sites = scaled(architecture, &levels);
            let evidence = named(&sites);
            for evidence in [evidence.clone(), anonymous(evidence)] {
                let found = recognise(&evidence).unwrap();
                assert_eq!(found.architecture, architecture);
                assert_eq!(found.variant, Variant::Scaled);
                assert_eq!(found.expected_self(), count);
                assert_eq!(found.sites, sites);
            }
        }
    }

    #[test]
    fn names_alone_are_enough_in_any_order_and_spelling() {
        let mut evidence = named(&Architecture::Sd15.native_sites());
        evidence.context_width = None;
        for site in &mut evidence.self_sites {
            site.width = None;
            site.heads = None;
            site.module = site.module.as_ref().map(|m| format!("unet.{m}"));
        }
        evidence.self_sites.reverse();
        let found = recognise(&evidence).unwrap();
        assert_eq!(found.architecture, Architecture::Sd15);
    }

    #[test]
    fn what_is_not_in_the_catalogue_is_none() {
        let site = |width| SiteEvidence {
            module: None,
            width: Some(width),
            heads: Some(2),
        };
        let native = named(&Architecture::Sd15.native_sites());
        let cases = [
            ("nothing", Evidence::default()),
            (
                "a transformer of seven equal blocks",
                Evidence {
                    self_sites: vec![site(64); 7],
                    context_width: Some(768),
                    ..Evidence::default()
                },
            ),
            (
                "a pixel UNet with SD's pattern and no text",
                Evidence {
                    context_width: None,
                    ..anonymous(native.clone())
                },
            ),
            (
                "one site missing",
                Evidence {
                    self_sites: native.self_sites[1..].to_vec(),
                    ..native.clone()
                },
            ),
            ("one site of another width", {
                let mut other = anonymous(native.clone());
                other.self_sites[3].width = Some(77);
                other
            }),
            ("other module names", {
                let mut other = native.clone();
                other.self_sites[3].module = Some("blocks.3.attn".to_owned());
                other
            }),
        ];
        for (case, evidence) in cases {
            assert_eq!(recognise(&evidence), None, "{case}");
        }
    }
}
