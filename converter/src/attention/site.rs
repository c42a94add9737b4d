//! Attention sites: every anchor of a model, with its kind, its module path and
//! whether it can be rewritten.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use linfusion_models::onnx::proto::{FunctionProto, GraphProto, ModelProto};
use linfusion_ops::schema::DOMAIN;

use super::core::{Core, Role, anchors, between_products, core, is_anchor};
use super::exact::{Exact, exact};
use super::kind::{Kind, flow};
use super::names::{
    attention_module, is_layer, scope_of_metadata, scope_of_node_name, scope_of_parameter,
};
use super::plain::{Plain, plain};
use super::projection::roots;
use super::stream::{TextSide, stream};
use crate::graph::{Graph, NodeId, label, op, qualified_op, subgraphs};
use crate::grid::{Grid, Grids, NoImage};
use crate::shapes::Shapes;

/// One Softmax or attention operator of the model.
#[derive(Clone, Debug)]
pub struct Site<'m> {
    /// Position among all sites, in file order.
    pub index: usize,
    /// Name of the anchor node.
    pub anchor: String,
    /// The anchor; `None` inside a subgraph or function.
    pub node: Option<NodeId>,
    /// What attends to what.
    pub kind: Kind,
    /// PyTorch path of the attention module, where names survive.
    pub module: Option<String>,
    /// Heads, if known.
    pub heads: Option<i64>,
    /// Channels a head, if known.
    pub head_dim: Option<i64>,
    /// Queries under the probe, if known.
    pub tokens: Option<i64>,
    /// A value with the queries on one of its axes, and that axis: tells the
    /// number of tokens under another probe.
    pub queries: Option<(&'m str, usize)>,
    /// Width of the tensor that k and v are projected from, for cross-attention.
    pub context_width: Option<i64>,
    /// The strict reading, or why there is none.
    pub plain: Result<Plain<'m>, String>,
    /// q, k, v and the output as the attention has them, or why they cannot be had.
    pub exact: Result<Exact<'m>, String>,
    /// The image among the tokens, or why it cannot be told.
    pub image: Result<Image<'m>, NoImage>,
    /// Whether nothing can be said of it: shapes are unknown, or it lies in a
    /// subgraph or function.
    pub unread: bool,
    /// Whether it lies between two products, as attention does, whatever else
    /// stands in the way of reading it.
    pub attends: bool,
    /// Whether something (a mask) makes it more than plain attention.
    pub mask: Option<String>,
}

/// The image tokens of an attention.
#[derive(Clone, Debug)]
pub struct Image<'m> {
    /// Their rows and columns.
    pub grid: Grid<'m>,
    /// Where text tokens lie beside them; `None` without any.
    pub text: Option<TextSide>,
    /// The linear layers that read them, or why these cannot be read.
    pub stream: Result<Plain<'m>, String>,
    /// The linear layers that read the text, where it has its own.
    pub text_stream: Result<Plain<'m>, String>,
}

impl Site<'_> {
    /// What the site is called in a checkpoint: its module's path, else its place.
    #[must_use]
    pub fn checkpoint_name(&self) -> Cow<'_, str> {
        match &self.module {
            Some(module) => Cow::Borrowed(module),
            None => Cow::Owned(format!("attention_{}", self.index)),
        }
    }

    /// Queries under another probe of the same graph.
    #[must_use]
    pub fn tokens_at(&self, shapes: &Shapes) -> Option<i64> {
        let (value, axis) = self.queries?;
        shapes.shape(value)?.get(axis).copied()
    }

    /// Channels of the attention module's input, if known.
    #[must_use]
    pub fn width(&self) -> Option<i64> {
        self.plain
            .as_ref()
            .ok()
            .map(|p| p.width)
            .or_else(|| self.heads?.checked_mul(self.head_dim?))
    }
}

/// Finds every site of `model`: one for each Softmax and attention operator, in
/// the main graph, its subgraphs and its functions.
#[must_use]
pub fn find<'m>(
    model: &'m ModelProto,
    graph: &Graph<'m>,
    shapes: &Shapes,
    grids: &Grids<'_, 'm>,
) -> Vec<Site<'m>> {
    let mut sites: Vec<Site<'m>> = anchors(graph)
        .into_iter()
        .map(|a| read(graph, shapes, grids, a))
        .collect();
    for (_, node) in graph.nodes() {
        for sub in subgraphs(node) {
            let place = format!(
                "inside the subgraph of {} '{}'",
                qualified_op(node),
                label(node)
            );
            nested(sub, &place, &mut sites, 0);
        }
    }
    // The bodies of our own operators are known.
    let foreign = |f: &&FunctionProto| f.domain.as_deref() != Some(DOMAIN);
    for function in model.functions.iter().filter(foreign) {
        let name = function.name.as_deref().unwrap_or("");
        let place = format!(
            "inside the model-local function '{name}'; inline functions first (onnx.inliner)"
        );
        for node in function.node.iter().filter(|n| is_anchor(n)) {
            sites.push(unreachable_site(label(node), &place));
        }
    }
    join_flux_blocks(&mut sites);
    for (i, site) in sites.iter_mut().enumerate() {
        site.index = i;
    }
    drop_shared_modules(&mut sites);
    sites
}

fn nested(graph: &GraphProto, place: &str, sites: &mut Vec<Site<'_>>, depth: usize) {
    for node in &graph.node {
        if is_anchor(node) {
            sites.push(unreachable_site(label(node), place));
        }
        if depth < 16 {
            for sub in subgraphs(node) {
                nested(sub, place, sites, depth + 1);
            }
        }
    }
}

fn unreachable_site<'m>(anchor: &str, place: &str) -> Site<'m> {
    Site {
        index: 0,
        anchor: anchor.to_owned(),
        node: None,
        kind: Kind::Other,
        module: None,
        heads: None,
        head_dim: None,
        tokens: None,
        queries: None,
        context_width: None,
        plain: Err(format!("it lies {place}")),
        exact: Err(format!("it lies {place}")),
        image: Err(format!("it lies {place}").into()),
        unread: true,
        attends: true,
        mask: None,
    }
}

fn read<'m>(graph: &Graph<'m>, shapes: &Shapes, grids: &Grids<'_, 'm>, anchor: NodeId) -> Site<'m> {
    let name = label(graph.node(anchor)).to_owned();
    let core = match core(graph, shapes, anchor) {
        Ok(core) => core,
        Err(reason) => {
            return Site {
                node: Some(anchor),
                module: module_of_node(graph, anchor),
                plain: Err(reason.0.clone()),
                exact: Err(reason.0.clone()),
                image: Err(reason.0.into()),
                unread: graph
                    .input(anchor, 0)
                    .is_none_or(|scores| shapes.shape(scores).is_none()),
                attends: !op(graph.node(anchor)).ends_with("Softmax")
                    || between_products(graph, anchor),
                ..unreachable_site(&name, "")
            };
        }
    };
    let flow = flow(graph, shapes, &core);
    let strict = match (flow.kind, flow.source) {
        (Kind::SelfAttention, Some(source)) => match &core.mask {
            Some(mask) => Err(mask.clone()),
            None => plain(graph, shapes, &core, source),
        },
        (Kind::Cross, _) => {
            Err("cross-attention: k and v come from another tensor than q".to_owned())
        }
        (Kind::Joint, _) => Err("joint attention over several token streams".to_owned()),
        _ => Err("q, k and v are not all projected from known tensors".to_owned()),
    };
    let exact = match &strict {
        Ok(p) => Ok(Exact::of_plain(p)),
        _ if flow.kind == Kind::Cross => {
            Err("cross-attention: k and v come from another tensor than q".to_owned())
        }
        _ => exact(graph, shapes, &core),
    };
    let image = match &exact {
        Ok(exact) => image(graph, shapes, grids, &core, exact, strict.as_ref().ok()),
        Err(reason) => Err(reason.clone().into()),
    };
    // FLUX's single blocks project the joined tokens with one layer: self-attention by
    // data flow, joint by meaning.
    let joined = image.as_ref().is_ok_and(|i| i.text.is_some());
    let (kind, strict) = if joined && flow.kind == Kind::SelfAttention {
        (
            Kind::Joint,
            Err("joint attention: the tokens are text and image".to_owned()),
        )
    } else {
        (flow.kind, strict)
    };
    let out_node = strict
        .as_ref()
        .ok()
        .and_then(|p| p.out.as_ref())
        .map(|o| o.node);
    let context_width = (kind == Kind::Cross)
        .then(|| {
            let linear = *roots(graph, shapes, core.k.value).linears.first()?;
            shapes.shape(linear.source)?.last().copied()
        })
        .flatten();
    let (heads, head_dim) = match &strict {
        Ok(p) => (Some(p.heads), Some(p.head_dim)),
        Err(_) => loose_heads(graph, shapes, &core),
    };
    Site {
        index: 0,
        anchor: name,
        node: Some(anchor),
        kind,
        module: module(graph, shapes, &core, out_node),
        heads,
        head_dim,
        tokens: core.q.size(Role::Token),
        queries: core
            .q
            .roles
            .iter()
            .position(|r| *r == Role::Token)
            .map(|axis| (core.q.value, axis)),
        context_width,
        plain: strict,
        exact,
        image,
        unread: false,
        attends: true,
        mask: core.mask.clone(),
    }
}

/// The image among the tokens that attend to each other.
fn image<'m>(
    graph: &Graph<'m>,
    shapes: &Shapes,
    grids: &Grids<'_, 'm>,
    core: &Core<'m>,
    exact: &Exact<'m>,
    plain: Option<&Plain<'m>>,
) -> Result<Image<'m>, NoImage> {
    let total = exact.tokens;
    let axis = core.k.roles.iter().position(|r| *r == Role::Token);
    let axis = axis.ok_or("the keys have no axis of tokens")?;
    let layout = grids.of(core.k.value, axis)?;
    let tokens = layout.grid.size.tokens();
    let of_image = |x: &'m str| grids.is_image(x, tokens);
    let text_stream = match layout.text {
        None if tokens == total => Err("there is no text among the tokens".to_owned()),
        Some(_) if tokens < total => {
            stream(graph, shapes, core, exact, total - tokens, |x| !of_image(x))
        }
        _ => {
            return Err(format!("the image has {tokens} tokens, the attention {total}").into());
        }
    };
    let own = match plain {
        Some(plain) => Ok(plain.clone()),
        None => stream(graph, shapes, core, exact, tokens, of_image),
    };
    // A layer over all tokens reads the image's as well.
    let own =
        own.or_else(|own| stream(graph, shapes, core, exact, total, |_| true).map_err(|_| own));
    Ok(Image {
        grid: layout.grid,
        text: layout.text,
        stream: own,
        text_stream,
    })
}

/// Heads and channels a head where no strict reading gives them: from the
/// width of q's linear layer.
fn loose_heads(graph: &Graph<'_>, shapes: &Shapes, core: &Core<'_>) -> (Option<i64>, Option<i64>) {
    let head_dim = core.q.size(Role::Channel);
    let heads = core.heads.or_else(|| {
        let linear = *roots(graph, shapes, core.q.value).linears.first()?;
        let batch = *shapes.shape(linear.source)?.first()?;
        let all: i64 = core.q.batch.iter().product();
        (batch > 0 && all % batch == 0 && shapes.shape(linear.source)?.len() > 2)
            .then(|| all / batch)
    });
    let head_dim = head_dim.or_else(|| core.q.size(Role::HeadChannel)?.checked_div(heads?));
    (heads, head_dim)
}

fn module_of_node(graph: &Graph<'_>, node: NodeId) -> Option<String> {
    let proto = graph.node(node);
    let scope = scope_of_metadata(proto).or_else(|| scope_of_node_name(proto.name.as_deref()?))?;
    (!scope.is_empty()).then(|| attention_module(&scope))
}

/// The module path that the site's nodes and parameters agree on. Node names
/// and metadata first; parameter names only where they are silent, because
/// exporters share equal parameters between modules.
fn module(
    graph: &Graph<'_>,
    shapes: &Shapes,
    core: &Core<'_>,
    out: Option<NodeId>,
) -> Option<String> {
    let mut linears: Vec<NodeId> = [&core.q, &core.k, &core.v]
        .iter()
        .flat_map(|o| roots(graph, shapes, o.value).linears)
        .map(|l| l.node)
        .collect();
    linears.extend(out);
    let scope = |node: NodeId| {
        let proto = graph.node(node);
        scope_of_metadata(proto).or_else(|| scope_of_node_name(proto.name.as_deref()?))
    };
    let mut votes: HashMap<String, usize> = HashMap::new();
    for node in &linears {
        if let Some(s) = scope(*node).filter(|s| is_layer(s)) {
            *votes.entry(attention_module(&s)).or_default() += 2;
        }
    }
    if let Some(s) = scope(core.anchor).filter(|s| !s.is_empty()) {
        *votes.entry(attention_module(&s)).or_default() += 1;
    }
    if votes.is_empty() {
        for node in linears {
            let below = graph
                .node(node)
                .output
                .first()
                .map(|o| graph.readers(o))
                .unwrap_or_default();
            let neighbours = std::iter::once(node).chain(below.iter().map(|p| p.node));
            for name in neighbours.flat_map(|n| &graph.node(n).input) {
                if let Some(s) = scope_of_parameter(name).filter(|s| is_layer(s)) {
                    *votes.entry(attention_module(&s)).or_default() += 1;
                }
            }
        }
    }
    votes
        .into_iter()
        .max_by(|a, b| a.1.cmp(&b.1).then_with(|| b.0.cmp(&a.0)))
        .map(|(m, _)| m)
}

/// Two sites cannot be one module: a path that several claim is worth nothing.
fn drop_shared_modules(sites: &mut [Site<'_>]) {
    let mut seen = HashSet::new();
    let mut twice = HashSet::new();
    for module in sites.iter().filter_map(|s| s.module.clone()) {
        if !seen.insert(module.clone()) {
            twice.insert(module);
        }
    }
    for site in sites {
        if site.module.as_ref().is_some_and(|m| twice.contains(m)) {
            site.module = None;
        }
    }
}

/// FLUX's single blocks project the joined text and image tokens with one layer:
/// self-attention by data flow, joint by meaning. They have as many tokens as
/// the model's joint sites.
fn join_flux_blocks(sites: &mut [Site<'_>]) {
    let joint: HashSet<i64> = sites
        .iter()
        .filter(|s| s.kind == Kind::Joint)
        .filter_map(|s| s.tokens)
        .collect();
    for site in sites.iter_mut().filter(|s| s.kind == Kind::SelfAttention) {
        if site.tokens.is_some_and(|n| joint.contains(&n)) {
            site.kind = Kind::Joint;
            site.plain = Err("joint attention: the tokens are text and image".to_owned());
        }
    }
}
