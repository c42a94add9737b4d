//! A model, looked at: its sites at the probe and at its native size, and the
//! architecture that they make.

use linfusion_models::catalogue::{Evidence, Recognition, SiteEvidence, recognise};
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{GraphProto, TensorProto};

use crate::attention::kind::Kind;
use crate::attention::site::{Site, find};
use crate::graph::Graph;
use crate::rewrite::default_opset;
use crate::shapes::{Dim, Probe, Shapes, tensor_type};

/// Everything the later steps want to know of a model.
pub struct Analysis<'m> {
    /// The index of its graph.
    pub graph: Graph<'m>,
    /// Shapes at the probe that layouts are traced at.
    pub shapes: Shapes,
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
    /// Why no attention of this model is to be converted, if it is no denoiser.
    pub not_a_denoiser: Option<String>,
}

/// Metadata key under which a converted file says what was done.
pub const METADATA_KEY: &str = "linfusion";

impl<'m> Analysis<'m> {
    /// Looks at `file`.
    #[must_use]
    pub fn of(file: &'m OnnxFile) -> Self {
        let model = &file.model;
        let read = |t: &TensorProto| file.tensor_bytes(t).ok();
        let shapes = Shapes::propagate(model, &read, &Probe::TRACE);
        let graph = Graph::new(&model.graph);
        let mut sites = find(model, &graph, &shapes);
        let recognised = recognise(&evidence(&sites));
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
        Analysis {
            graph,
            shapes,
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

    /// The architecture's name; `unknown` if it is not in the catalogue.
    #[must_use]
    pub fn architecture(&self) -> &'static str {
        self.recognised
            .as_ref()
            .map_or("unknown", |r| r.architecture.name())
    }
}

fn evidence(sites: &[Site<'_>]) -> Evidence {
    let size = |v: Option<i64>| v.and_then(|v| usize::try_from(v).ok());
    Evidence {
        self_sites: sites
            .iter()
            .filter(|s| s.kind == Kind::SelfAttention)
            .map(|s| SiteEvidence {
                module: s.module.clone(),
                width: size(s.width()),
                heads: size(s.heads),
            })
            .collect(),
        context_width: sites.iter().find_map(|s| size(s.context_width)),
    }
}

/// Where names are gone but the architecture is clear, the order names the sites.
fn name_by_order(sites: &mut [Site<'_>], recognised: Option<&Recognition>) {
    let Some(r) = recognised else { return };
    let mut own: Vec<&mut Site<'_>> = sites
        .iter_mut()
        .filter(|s| s.kind == Kind::SelfAttention)
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
