//! What was found and done, as data: the JSON of `--report json`, documented in
//! `docs/report.md`, and the tables of the terminal.

use std::collections::HashSet;

use linfusion_models::onnx::proto::{GraphProto, ValueInfoProto};
use linfusion_models::onnx::text::TypeText;
use linfusion_ops::schema::{Window, WindowSpec};
use linfusion_runtime::table::table;
use serde::Serialize;

use crate::analysis::Analysis;
use crate::attention::kind::Kind;
use crate::attention::stream::TextSide;
use crate::cost::{self, Cost};
use crate::plan::{Action, Method};
use crate::resize::ResizeReport;
use crate::shapes::Probe;
use crate::verify::Verified;

/// Version of the JSON's schema; it grows when a field changes its meaning.
pub const SCHEMA: u32 = 1;

/// One Softmax or attention operator.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct SiteReport {
    /// Position among all sites, in file order.
    pub index: usize,
    /// PyTorch path of the attention module; null where names are lost.
    pub module: Option<String>,
    /// What attends to what.
    pub kind: Kind,
    /// Heads; null where unknown.
    pub heads: Option<i64>,
    /// Channels a head; null where unknown.
    pub head_dim: Option<i64>,
    /// Tokens at the native size; null where unknown.
    pub tokens: Option<i64>,
    /// "convert" or "keep".
    pub action: &'static str,
    /// What the site becomes; null where it is kept.
    pub attention: Option<Method>,
    /// The window as asked for; null without.
    pub window: Option<String>,
    /// Text tokens beside the image's: "prefix" or "suffix"; null without.
    pub text: Option<&'static str>,
    /// What the rows and columns of the image's tokens are computed from; null where they
    /// are not needed or cannot be told.
    pub grid: Option<String>,
    /// Why.
    pub reason: String,
    /// Name of the Softmax or attention node.
    pub anchor: String,
}

/// One input of the graph.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct InputReport {
    /// Its name.
    pub name: String,
    /// Its type as the textual form has it, e.g. `float[batch, 4, ?, ?]`.
    pub r#type: String,
}

impl InputReport {
    /// Those of the graph that have no value stored, in order.
    fn all(graph: &GraphProto) -> Vec<Self> {
        let stored: HashSet<&str> = graph
            .initializer
            .iter()
            .filter_map(|t| t.name.as_deref())
            .collect();
        let named = |info: &ValueInfoProto| {
            let name = info.name.clone()?;
            let declared = info.r#type.as_option();
            let r#type = declared.map_or("?".to_owned(), |t| TypeText(t).to_string());
            (!stored.contains(name.as_str())).then_some(Self { name, r#type })
        };
        graph.input.iter().filter_map(named).collect()
    }
}

/// Attention cost of the whole model at one image size, batch 1.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct SizeReport {
    /// Side of the square image in pixels.
    pub pixels: u64,
    /// All self-attention as softmax.
    pub before: Cost,
    /// With the planned sites linear.
    pub after: Cost,
    /// The same, site by site.
    pub sites: Vec<SiteCost>,
}

/// Attention cost of one self-attention, batch 1.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct SiteCost {
    /// [`SiteReport::index`].
    pub index: usize,
    /// Tokens at this image size.
    pub tokens: u64,
    /// As softmax.
    pub before: Cost,
    /// As planned.
    pub after: Cost,
}

/// What `inspect` prints and `convert` carries on.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct ModelReport {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The model file.
    pub model: String,
    /// Architecture of the catalogue, or "unknown".
    pub architecture: String,
    /// Whether it is the published model or one with other numbers; null if unknown.
    pub variant: Option<String>,
    /// Self-attentions that the architecture has; null if unknown.
    pub expected_self: Option<usize>,
    /// Attentions over text and image that the architecture has; null if unknown.
    pub expected_joint: Option<usize>,
    /// Opset of the default domain.
    pub opset: i64,
    /// What the model takes.
    pub inputs: Vec<InputReport>,
    /// Every site.
    pub sites: Vec<SiteReport>,
    /// Attention cost at 512² … 16384²; empty where token counts are unknown.
    pub costs: Vec<SizeReport>,
    /// What limits the model whatever its attention is.
    pub notes: Vec<String>,
}

/// What a conversion did.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct ConvertReport {
    /// The model and its sites.
    #[serde(flatten)]
    pub model: ModelReport,
    /// What was resized; left out where nothing was to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resized: Option<ResizeReport>,
    /// The written file; null for a dry run.
    pub output: Option<String>,
    /// Other files that must be kept with it.
    pub companions: Vec<String>,
    /// "checkpoint", "none" (untrained: for measuring speed only), or "graph" (window attention
    /// alone, with the model's own weights).
    pub weights: &'static str,
    /// The checkpoint's file; null without one.
    pub checkpoint: Option<String>,
    /// SHA-256 of the checkpoint's tensors; null without one.
    pub checkpoint_sha256: Option<String>,
    /// How the operator is written.
    pub emit: crate::rewrite::Emit,
    /// Sites converted.
    pub converted: usize,
    /// Nodes removed.
    pub nodes_removed: usize,
    /// Initializers removed.
    pub initializers_removed: usize,
    /// What verification found; null if it was off.
    pub verified: Option<Verified>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

impl ModelReport {
    /// Reports `analysis` under `actions`; `mid` is the width of the MLPs of the
    /// checkpoint at hand, 0 without one.
    #[must_use]
    pub fn new(
        model: &str,
        analysis: &Analysis<'_>,
        actions: &[Action],
        window: WindowSpec,
        mid: u64,
    ) -> Self {
        let sites = analysis
            .sites
            .iter()
            .zip(actions)
            .zip(&analysis.tokens)
            .map(|((site, action), tokens)| {
                let method = action.method();
                let (action, reason) = match (action.reason(), site.kind) {
                    (Some(reason), _) => ("keep", reason.to_owned()),
                    (None, Kind::Joint) => ("convert", "attention over text and image".to_owned()),
                    (None, _) if site.plain.is_ok() => {
                        ("convert", "self-attention, plain".to_owned())
                    }
                    (None, _) => (
                        "convert",
                        "self-attention with normed or turned q, k".to_owned(),
                    ),
                };
                let image = site.image.as_ref().ok();
                SiteReport {
                    index: site.index,
                    module: site.module.clone(),
                    kind: site.kind,
                    heads: site.heads,
                    head_dim: site.head_dim,
                    tokens: *tokens,
                    action,
                    attention: method,
                    window: method
                        .filter(|m| *m != Method::Linear)
                        .map(|_| window.to_string()),
                    text: image.and_then(|i| i.text).map(|side| match side {
                        TextSide::Prefix => "prefix",
                        TextSide::Suffix => "suffix",
                    }),
                    grid: image.map(|i| i.grid.source.to_string()),
                    reason,
                    anchor: site.anchor.clone(),
                }
            })
            .collect();
        ModelReport {
            schema: SCHEMA,
            model: model.to_owned(),
            architecture: analysis.architecture().to_owned(),
            variant: analysis
                .recognised
                .as_ref()
                .map(|r| format!("{:?}", r.variant).to_lowercase()),
            expected_self: analysis
                .recognised
                .as_ref()
                .map(linfusion_models::catalogue::Recognition::expected_self),
            expected_joint: analysis
                .recognised
                .as_ref()
                .map(linfusion_models::catalogue::Recognition::expected_joint),
            opset: analysis.opset,
            inputs: InputReport::all(analysis.graph.proto),
            sites,
            costs: costs(analysis, actions, window, mid),
            notes: analysis.notes.clone(),
        }
    }

    /// How many sites have `kind`.
    #[must_use]
    pub fn count(&self, kind: Kind) -> usize {
        self.sites.iter().filter(|s| s.kind == kind).count()
    }

    /// The costs at the size that [`SiteReport::tokens`] are given for.
    fn native_costs(&self) -> &[SiteCost] {
        let native = self.costs.iter().find(|size| {
            size.sites.iter().all(|c| {
                let tokens = self.sites.get(c.index).and_then(|s| s.tokens);
                tokens.and_then(|t| u64::try_from(t).ok()) == Some(c.tokens)
            })
        });
        native.map_or(&[], |size| &size.sites)
    }

    /// The sites and the cost as tables for a terminal.
    #[must_use]
    pub fn table(&self) -> String {
        let mut sites = table([
            "#",
            "module",
            "kind",
            "tokens",
            "heads × dim",
            "GFLOP",
            "action",
            "reason",
        ]);
        let native = self.native_costs();
        for s in &self.sites {
            let known = |v: Option<i64>| v.map_or("?".to_owned(), |v| v.to_string());
            sites.add_row([
                s.index.to_string(),
                s.module.clone().unwrap_or_else(|| s.anchor.clone()),
                s.kind.to_string(),
                known(s.tokens),
                format!("{} × {}", known(s.heads), known(s.head_dim)),
                native
                    .iter()
                    .find(|c| c.index == s.index)
                    .map_or(String::new(), |c| {
                        format!("{} → {}", giga(c.before.flops), giga(c.after.flops))
                    }),
                match (&s.attention, &s.window) {
                    (Some(method), Some(window)) => format!("{method}, window {window}"),
                    (Some(method), None) => method.to_string(),
                    _ => s.action.to_owned(),
                },
                s.reason.clone(),
            ]);
        }
        let mut text = format!(
            "{}\narchitecture {}{}, opset {}: {} self-attentions{}, {} cross, {} joint{}, {} other\n{sites}\n",
            self.model,
            self.architecture,
            self.variant
                .as_ref()
                .map_or(String::new(), |v| format!(" ({v})")),
            self.opset,
            self.count(Kind::SelfAttention),
            self.expected_self
                .map_or(String::new(), |n| format!(" of {n}")),
            self.count(Kind::Cross),
            self.count(Kind::Joint),
            self.expected_joint
                .filter(|&n| n > 0)
                .map_or(String::new(), |n| format!(" of {n}")),
            self.count(Kind::Other),
        );
        for InputReport { name, r#type } in &self.inputs {
            text += &format!("input {name}: {type}\n");
        }
        for note in &self.notes {
            text += &format!("note: {note}\n");
        }
        if !self.costs.is_empty() {
            let mut costs = table([
                "image",
                "softmax GFLOP",
                "converted GFLOP",
                "softmax GB",
                "converted GB",
                "FLOP ratio",
            ]);
            for c in &self.costs {
                costs.add_row([
                    format!("{}²", c.pixels),
                    giga(c.before.flops),
                    giga(c.after.flops),
                    giga(c.before.bytes),
                    giga(c.after.bytes),
                    format!("{:.1}×", c.before.flops / c.after.flops.max(1.0)),
                ]);
            }
            text += &format!(
                "attention, one step at batch 1, counted (not measured; the MLPs of linear attention only with a checkpoint, which tells their width):\n{costs}\n"
            );
        }
        text
    }
}

/// Billions, three digits.
fn giga(value: f64) -> String {
    let giga = value / 1e9;
    let decimals = (2.0 - giga.max(1e-9).log10().floor()).clamp(0.0, 5.0);
    format!("{giga:.*}", decimals as usize)
}

/// A latent pixel is 8 image pixels in every catalogued architecture.
const LATENT: u64 = 8;

fn costs(
    analysis: &Analysis<'_>,
    actions: &[Action],
    window: WindowSpec,
    mid: u64,
) -> Vec<SizeReport> {
    let Some(native) = analysis
        .recognised
        .as_ref()
        .map(|r| r.structure.native_latent as u64 * LATENT)
    else {
        return Vec::new();
    };
    let known: Option<Vec<(usize, cost::Shape, Option<Method>)>> = analysis
        .sites
        .iter()
        .zip(actions)
        .zip(&analysis.tokens)
        .filter(|((s, _), _)| matches!(s.kind, Kind::SelfAttention | Kind::Joint))
        .map(|((site, action), tokens)| {
            let size = |v: i64| u64::try_from(v).ok();
            let element = site.plain.as_ref().map(|p| p.element);
            let element = element.or_else(|_| site.exact.as_ref().map(|e| e.element));
            let text = match (&site.exact, &site.image) {
                (Ok(exact), Ok(image)) => exact.tokens - image.grid.size.tokens(),
                _ => 0,
            };
            // The probes have texts of different lengths: at the native size it is this.
            let text = if text > 0 { Probe::square(0).text } else { 0 };
            let shape = cost::Shape {
                tokens: size((*tokens)?.checked_sub(text)?)?,
                text: size(text)?,
                heads: size(site.heads?)?,
                head_dim: size(site.head_dim?)?,
                mid,
                element: element.map_or(4, element_bytes),
            };
            Some((site.index, shape, action.method()))
        })
        .collect();
    let Some(known) = known else {
        return Vec::new();
    };
    let keys = window_keys(window);
    [512u64, 1024, 2048, 4096, 8192, 16384]
        .into_iter()
        .map(|pixels| {
            let scale = (pixels as f64 / native as f64).powi(2);
            let sites: Vec<SiteCost> = known
                .iter()
                .map(|(index, shape, method)| {
                    let shape = cost::Shape {
                        tokens: (shape.tokens as f64 * scale).round() as u64,
                        ..*shape
                    };
                    let before = cost::softmax(shape);
                    SiteCost {
                        index: *index,
                        tokens: shape.tokens + shape.text,
                        before,
                        after: match method {
                            None => before,
                            Some(Method::Linear) => cost::linear(shape),
                            Some(Method::Window) => cost::window(shape, keys),
                            Some(Method::Hybrid) => {
                                [cost::linear(shape), cost::window(shape, keys)]
                                    .into_iter()
                                    .sum()
                            }
                        },
                    }
                })
                .collect();
            SizeReport {
                pixels,
                before: sites.iter().map(|s| s.before).sum(),
                after: sites.iter().map(|s| s.after).sum(),
                sites,
            }
        })
        .collect()
}

/// Keys in a whole window.
fn window_keys(window: WindowSpec) -> u64 {
    let keys = match window.window {
        Window::Rect { rows, cols } => rows.saturating_mul(cols),
        Window::Circle { radius } => {
            // Whole numbers x with x² < r² − y², for every y.
            let r = radius.min(1 << 12);
            let half = |y: usize| (0..r).take_while(|x| x * x + y * y < r * r).count();
            let row = |y: usize| (2 * half(y)).saturating_sub(1);
            row(0) + 2 * (1..r).map(row).sum::<usize>()
        }
    };
    keys as u64
}

fn element_bytes(element: i32) -> u64 {
    match element {
        10 | 16 => 2,
        11 => 8,
        _ => 4,
    }
}
