//! A model, looked at: its sites at the probe and at its native size, and the
//! architecture that they make.

use linfusion_models::catalogue::{Evidence, Recognition, SiteEvidence, recognise};
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{GraphProto, NodeProto, TensorProto};
use linfusion_ops::schema::{DOMAIN, LINFUSION_ATTENTION, WINDOW_ATTENTION};

use crate::attention::kind::Kind;
use crate::attention::site::{Site, find};
use crate::attention::stream::TextSide;
use crate::graph::default_opset;
use crate::graph::{Graph, domain, op};
use crate::grid::{GridSize, Grids};
use crate::shapes::{Dim, Probe, Shapes, tensor_type};

/// Everything the later steps want to know of a model.
pub struct Analysis<'m> {
    /// The index of its graph.
    pub graph: Graph<'m>,
    /// Shapes at the probe that layouts are traced at.
    pub shapes: Shapes,
    /// Shapes at a second probe: values of equal shape under both have equal shape.
    pub again: Shapes,
    /// Shapes at the native size.
    pub native: Shapes,
    /// The sites.
    pub sites: Vec<Site<'m>>,
    /// Tokens of each site at the native size.
    pub tokens: Vec<Option<i64>>,
    /// The architecture, if it is in the catalogue.
    pub recognised: Option<Recognition>,
    /// Opset of the default domain; 0 if the model imports none.
    pub opset: i64,
    /// What limits the model whatever its attention is.
    pub notes: Vec<String>,
    /// Whether the model is a transformer over patches, not a UNet.
    pub transformer: bool,
    /// Why no attention of this model is to be converted, if it is no denoiser.
    pub not_a_denoiser: Option<String>,
}

/// Metadata key under which a converted file says what was done.
pub const METADATA_KEY: &str = "linfusion";

impl<'m> Analysis<'m> {
    /// Looks at `file`.
    #[must_use]
    pub fn of(file: &'m OnnxFile) -> Self {
        Self::with_grid(file, None)
    }

    /// Looks at `file`, whose image has `stated` rows and columns of tokens where the
    /// graph itself does not tell.
    #[must_use]
    pub fn with_grid(file: &'m OnnxFile, stated: Option<GridSize>) -> Self {
        let model = &file.model;
        let read = |t: &TensorProto| file.tensor_bytes(t).ok();
        let graph = Graph::new(&model.graph);
        let look = |here: &Probe, there: &Probe| {
            let mut shapes = Shapes::propagate(model, &read, here);
            let again = Shapes::propagate(model, &read, there);
            shapes.forget_what_varies(&graph, &again);
            let grids = Grids::new(&graph, &shapes, &again, stated);
            let sites = find(model, &graph, &shapes, &grids);
            (shapes, again, sites)
        };
        let unread = |sites: &[Site<'_>]| {
            sites
                .iter()
                .filter(|s| s.unread && s.node.is_some())
                .count()
        };
        let (mut shapes, mut again, mut sites) = look(&Probe::TRACE, &Probe::AGAIN);
        let mut notes = Vec::new();
        if unread(&sites) > 0 {
            // Sizes of the trace may be all that the graph can run at.
            for probe in Probe::baked(&graph) {
                let other = look(&probe, &probe);
                if unread(&other.2) < unread(&sites) {
                    (shapes, again, sites) = other;
                    notes.push(format!(
                        "constants of the export fix the model to batch {} and {} tokens, whatever its declared sizes say",
                        probe.batch,
                        probe.tokens()
                    ));
                }
            }
        }
        let transformer = is_transformer(&graph, &shapes, &sites);
        let recognised = recognise(&evidence(&sites, transformer));
        let side = recognised
            .as_ref()
            .map_or(64, |r| r.structure.native_latent as i64);
        let native = Shapes::propagate(model, &read, &Probe::square(side));
        let tokens = sites.iter().map(|s| s.tokens_at(&native)).collect();
        let not_a_denoiser = not_a_denoiser(graph.proto, &sites);
        if let Some(reason) = &not_a_denoiser {
            for site in sites.iter_mut().filter(|s| s.plain.is_ok()) {
                site.plain = Err(reason.clone());
            }
        }
        name_by_order(&mut sites, recognised.as_ref());
        notes.extend(baked_positions(&graph, &shapes, &again));
        notes.extend(converted_before(&graph));
        Analysis {
            transformer,
            notes,
            graph,
            shapes,
            again,
            native,
            sites,
            tokens,
            recognised,
            opset: default_opset(model).unwrap_or(0),
            not_a_denoiser,
        }
    }

    /// The self-attentions, in execution order.
    pub fn self_sites(&self) -> impl Iterator<Item = &Site<'m>> {
        self.sites.iter().filter(|s| s.kind == Kind::SelfAttention)
    }

    /// The attentions that may be converted, in execution order.
    pub fn own_sites(&self) -> impl Iterator<Item = &Site<'m>> {
        self.sites
            .iter()
            .filter(|s| matches!(s.kind, Kind::SelfAttention | Kind::Joint))
    }

    /// The architecture's name; `unknown` if it is not in the catalogue.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        self.recognised
            .as_ref()
            .map_or("unknown", |r| r.architecture.name())
    }
}

/// Operators of ours that the graph has already.
fn converted_before(graph: &Graph<'_>) -> Option<String> {
    let count = |name: &str| {
        let ours = |n: &NodeProto| domain(n) == DOMAIN && op(n) == name;
        graph.nodes().filter(|(_, n)| ours(n)).count()
    };
    let (linear, window) = (count(LINFUSION_ATTENTION), count(WINDOW_ATTENTION));
    (linear + window > 0).then(|| {
        format!(
            "converted before: {linear} {LINFUSION_ATTENTION} and {window} {WINDOW_ATTENTION} nodes stand where attention was"
        )
    })
}

/// Position tables that were stored for one number of tokens, where the graph's inputs
/// would allow another.
fn baked_positions(graph: &Graph<'_>, shapes: &Shapes, again: &Shapes) -> Vec<String> {
    let mut notes = Vec::new();
    for (_, node) in graph.nodes().filter(|(_, n)| op(n) == "Add") {
        let (Some(a), Some(b)) = (node.input.first(), node.input.get(1)) else {
            continue;
        };
        let (table, data) = if shapes.fact(b).constant {
            (b, a)
        } else {
            (a, b)
        };
        let rows = |s: &Shapes, v: &str| match s.shape(v) {
            Some(&[_, rows, _]) => Some(rows),
            _ => None,
        };
        let (Some(stored), Some(here), Some(there)) =
            (rows(shapes, table), rows(shapes, data), rows(again, data))
        else {
            continue;
        };
        if shapes.fact(table).constant && stored > 1 && here != there && here != stored {
            notes.push(format!(
                "the position table '{table}' was stored for {stored} tokens: the model runs at that size only, whatever its declared sizes say"
            ));
        }
    }
    notes
}

/// Whether text and image tokens attend together, or the image is cut into patches (by a
/// convolution; where patches are pixels, names tell) and no spatial convolution follows the
/// first attention.
fn is_transformer(graph: &Graph<'_>, shapes: &Shapes, sites: &[Site<'_>]) -> bool {
    if sites.iter().any(|s| s.kind == Kind::Joint) {
        return true;
    }
    let spatial = |node: &NodeProto| {
        let kernel = || {
            let shape = shapes.shape(node.input.get(1)?)?;
            shape.get(2..).map(|k| k.iter().any(|&d| d > 1))
        };
        op(node).contains("Conv") && kernel().unwrap_or(true)
    };
    let own = || sites.iter().filter(|s| s.kind == Kind::SelfAttention);
    let in_a_block = |s: &Site<'_>| {
        let module = s.module.as_deref();
        module.is_some_and(|m| m.starts_with("transformer_blocks."))
    };
    let named = own().all(in_a_block);
    own().filter_map(|s| s.node).min().is_some_and(|first| {
        let (mut before, mut after) = (false, false);
        for (id, _) in graph.nodes().filter(|(_, node)| spatial(node)) {
            *(if id < first { &mut before } else { &mut after }) = true;
        }
        (before || named) && !after
    })
}

fn evidence(sites: &[Site<'_>], transformer: bool) -> Evidence {
    let size = |v: Option<i64>| v.and_then(|v| usize::try_from(v).ok());
    let of = |kind: Kind| {
        let all = sites.iter().filter(|s| s.kind == kind);
        all.map(|s| SiteEvidence {
            module: s.module.clone(),
            width: size(s.width()),
            heads: size(s.heads),
        })
        .collect()
    };
    let mut sides = sites.iter().filter_map(|s| s.image.as_ref().ok()?.text);
    Evidence {
        self_sites: of(Kind::SelfAttention),
        joint_sites: of(Kind::Joint),
        context_width: sites.iter().find_map(|s| size(s.context_width)),
        transformer,
        text_first: sides.next() == Some(TextSide::Prefix),
    }
}

/// Where names are gone but the architecture is clear, the order names the sites.
fn name_by_order(sites: &mut [Site<'_>], recognised: Option<&Recognition>) {
    let Some(r) = recognised else { return };
    let mut own: Vec<&mut Site<'_>> = sites
        .iter_mut()
        .filter(|s| matches!(s.kind, Kind::SelfAttention | Kind::Joint))
        .collect();
    if own.len() == r.sites.len() && own.iter().any(|s| s.module.is_none()) {
        for (site, catalogued) in own.iter_mut().zip(&r.sites) {
            site.module.get_or_insert_with(|| catalogued.module.clone());
        }
    }
}

/// The VAE and the text encoders have self-attention too, which LinFusion does
/// not replace. A denoiser reads a noisy image and something else (a time step).
fn not_a_denoiser(graph: &GraphProto, sites: &[Site<'_>]) -> Option<String> {
    let stored: std::collections::HashSet<&str> = graph
        .initializer
        .iter()
        .filter_map(|t| t.name.as_deref())
        .collect();
    let inputs: Vec<(Option<i32>, Option<Vec<Dim<'_>>>)> = graph
        .input
        .iter()
        .filter(|v| !stored.contains(v.name.as_deref().unwrap_or("")))
        .filter_map(tensor_type)
        .collect();
    let is_float = |e: Option<i32>| e.is_some_and(crate::shapes::eval::element::is_float);
    if !inputs.is_empty() && inputs.iter().all(|(e, _)| !is_float(*e)) {
        return Some("the model reads only integers: a text encoder, not a denoiser".to_owned());
    }
    let images = inputs
        .iter()
        .filter(|(e, d)| is_float(*e) && d.as_ref().is_some_and(|d| d.len() == 4))
        .count();
    let own = sites
        .iter()
        .filter(|s| s.kind == Kind::SelfAttention)
        .count();
    let single_head = sites
        .iter()
        .all(|s| s.kind != Kind::SelfAttention || s.heads == Some(1));
    if inputs.len() == 1 && images == 1 && own <= 2 && single_head {
        return Some("one image in and nothing else, one head: a VAE, not a denoiser".to_owned());
    }
    None
}
