//! What a site becomes, and which sites stay as they are.

use super::error::DistillError;
use super::inputs::Sample;
use super::learn::{Learned, Work};
use super::measure::{Judged, Outputs, distance};
use super::report::{CostAt, EndToEnd};
use super::state::Done;
use super::target::Target;
use super::{Attention, Budget};
use crate::analysis::Analysis;
use crate::cost::{Cost, Shape, linear, softmax, window};
use crate::plan::Method;
use linfusion_ops::schema::{Window, WindowSpec};

/// The cheapest of what was tried at a site that stays within the limit; else the best.
pub(super) fn cheapest(
    target: &Target,
    mut tried: Vec<Done>,
    attention: Attention,
    spec: WindowSpec,
) -> Option<Done> {
    let Attention::Auto { unexplained } = attention else {
        return tried.pop();
    };
    let cost = |done: &Done| {
        let shape = shape(target, done.report.mid, target.tokens as u64);
        cost(done.report.attention, shape, spec).flops
    };
    let errors: Vec<_> = tried
        .iter()
        .map(|d| (d.report.attention, d.report.after))
        .collect();
    let within = |d: &Done| d.report.after.unexplained <= unexplained;
    let chosen = match tried.iter().any(within) {
        true => {
            tried.retain(within);
            tried.into_iter().min_by(|a, b| cost(a).total_cmp(&cost(b)))
        }
        false => tried.into_iter().min_by(|a, b| {
            let error = |d: &Done| d.report.after.unexplained;
            error(a).total_cmp(&error(b))
        }),
    };
    chosen.map(|mut done| {
        let other = |(method, _): &(Method, _)| *method != done.report.attention;
        done.report.tried = errors.into_iter().filter(other).collect();
        done
    })
}

/// Leaves softmax where linear attention costs the output most, one site after the other, until `budget` is kept to. What
/// a site costs is measured: by the model in which it alone is converted.
///
/// # Errors
/// A model does not run.
pub(super) fn within(
    work: &Work<'_>,
    all: Judged,
    budget: Budget,
    expected: &Outputs,
    notes: &mut Vec<String>,
) -> Result<Judged, DistillError> {
    let wanted = budget.psnr();
    if all.end_to_end.pooled() >= wanted {
        return Ok(all);
    }
    let numbers = all.sites.iter().map(|s| s.target.site);
    let effects = effects(work, &all.sites, work.held_out(), expected)?;
    let effects = effects.iter().map(EndToEnd::pooled);
    let mut effects: Vec<(f64, usize)> = effects.zip(numbers).collect();
    // The most harmful first.
    effects.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best = all;
    for (_, site) in effects {
        let (gone, left): (Vec<Learned>, Vec<Learned>) = best
            .sites
            .iter()
            .cloned()
            .partition(|s| s.target.site == site);
        if left.is_empty() {
            break;
        }
        let mut kept = std::mem::take(&mut best.kept);
        kept.extend(gone.into_iter().map(|s| s.target.module));
        best = Judged {
            kept,
            ..work.judged(left, expected)?
        };
        if best.end_to_end.pooled() >= wanted {
            return Ok(best);
        }
    }
    notes.push(format!(
        "the budget of {wanted:.1} dB is not reached even with one site converted: {:.1} dB",
        best.end_to_end.pooled()
    ));
    Ok(best)
}

/// How far the model's outputs on `samples` are from the original's, `expected`, where one site alone is converted, for each
/// of `sites`.
///
/// # Errors
/// A model does not run.
pub(super) fn effects(
    work: &Work<'_>,
    sites: &[Learned],
    samples: &[Sample],
    expected: &Outputs,
) -> Result<Vec<EndToEnd>, DistillError> {
    let runs = sites.len() * samples.len();
    work.begin("measuring what each site does to the output", runs);
    let alone = |site: &Learned| {
        let converted = work.converted(std::slice::from_ref(site), samples)?;
        Ok(distance(expected, &converted))
    };
    sites.iter().map(alone).collect()
}

fn shape(target: &Target, mid: Option<usize>, tokens: u64) -> Shape {
    Shape {
        tokens,
        text: 0,
        heads: target.shape.heads as u64,
        head_dim: (target.shape.dim / target.shape.heads.max(1)) as u64,
        mid: mid.unwrap_or(0) as u64,
        element: 4,
    }
}

fn cost(method: Method, shape: Shape, spec: WindowSpec) -> Cost {
    let keys = match spec.window {
        Window::Rect { rows, cols } => rows.saturating_mul(cols) as u64,
        // Pixels of a disc.
        Window::Circle { radius } => (std::f64::consts::PI * (radius as f64).powi(2)) as u64,
    };
    match method {
        Method::Linear => linear(shape),
        Method::Window => window(shape, keys),
        Method::Hybrid => {
            let mut both = window(shape, keys);
            both += linear(shape);
            both
        }
    }
}

/// Sizes in pixels that costs are told for.
const SIZES: [u64; 5] = [1024, 2048, 4096, 8192, 16384];

/// What the attentions of the model cost at some sizes. A site's tokens grow with the image's area: from those at the
/// model's native size, or, where that is not known, at the samples' size, whose edge is `edge` pixels.
pub(super) fn costs(
    analysis: &Analysis<'_>,
    targets: &[Target],
    sites: &[Learned],
    edge: Option<u64>,
) -> Vec<CostAt> {
    let native = analysis
        .recognised
        .as_ref()
        .map(|r| r.structure.native_latent as u64 * 8);
    let Some(known) = native.or(edge).filter(|edge| *edge > 0) else {
        return Vec::new();
    };
    let tokens = |target: &Target| match native {
        None => Some(target.tokens as u64),
        Some(_) => {
            let tokens = analysis.tokens.get(target.site).copied().flatten();
            tokens.and_then(|t| u64::try_from(t).ok())
        }
    };
    let at = |pixels: u64| {
        let (mut before, mut after) = (0.0, 0.0);
        for target in targets {
            let grown = pixels as f64 / known as f64;
            let tokens = (tokens(target)? as f64 * grown * grown) as u64;
            let full = softmax(shape(target, None, tokens)).flops;
            let site = sites.iter().find(|s| s.target.site == target.site);
            before += full;
            after += site.map_or(full, |s| {
                let report = &s.done.report;
                let shape = shape(target, report.mid, tokens);
                cost(report.attention, shape, s.window).flops
            });
        }
        Some(CostAt {
            pixels,
            softmax: before,
            chosen: after,
        })
    };
    SIZES.into_iter().filter_map(at).collect()
}
