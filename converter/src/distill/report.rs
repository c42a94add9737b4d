//! What was learned, for people and for programs.

use std::collections::BTreeMap;

use linfusion_runtime::memory::shown;
use linfusion_runtime::table::table;
use serde::{Deserialize, Serialize};

use super::train::{Error, Point};
use crate::plan::Method;

/// One site.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// Its module's path.
    pub module: String,
    /// Tokens at the samples' size.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Channels.
    pub dim: usize,
    /// What it became.
    pub attention: Method,
    /// Width of its MLPs; `None`: the identity.
    pub mid: Option<usize>,
    /// Error on the images held out before anything was learned, with MLPs that give zero.
    pub before: Error,
    /// Error on them with the weights written.
    pub after: Error,
    /// The way there.
    pub curve: Vec<Point>,
    /// Seconds of learning.
    pub seconds: f64,
    /// What was tried in place of it, with the error.
    pub tried: Vec<(Method, Error)>,
}

/// What equal outputs count as in a mean: errors of the last of float32's 24 bits.
pub const EXACT_DB: f64 = 144.5;

/// The whole model on samples held out.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct EndToEnd {
    /// Peak signal-to-noise ratio of each sample's outputs in dB, with the original output's range as peak; `None` where
    /// both are equal.
    pub psnr_db: Vec<Option<f64>>,
    /// Their mean, equal outputs as 144.5 dB; `None` without samples.
    pub mean_psnr_db: Option<f64>,
    /// That of the mean of the samples' squared errors, each relative to its peak's square, which the worst of them
    /// decides; `None` where all are equal.
    pub pooled_psnr_db: Option<f64>,
}

impl EndToEnd {
    /// The mean of the ratios.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean_psnr_db.unwrap_or(EXACT_DB)
    }

    /// The ratio of all samples together; infinite where nothing differs.
    #[must_use]
    pub fn pooled(&self) -> f64 {
        self.pooled_psnr_db.unwrap_or(f64::INFINITY)
    }
}

/// What all attentions of the model cost at one size, in floating-point operations of one image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CostAt {
    /// Pixels along an edge; 8 to a latent pixel of the architectures that are known.
    pub pixels: u64,
    /// With softmax everywhere.
    pub softmax: f64,
    /// With what was chosen.
    pub chosen: f64,
}

/// All that a distillation has to tell.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The checkpoint.
    pub output: String,
    /// What ran the teacher.
    pub engine: String,
    /// Samples learned from.
    pub samples: usize,
    /// Samples held out.
    pub holdout: usize,
    /// The sites, in execution order.
    pub sites: Vec<SiteReport>,
    /// Attentions that were left, and why.
    pub skipped: Vec<String>,
    /// The converted model with these weights.
    pub end_to_end: EndToEnd,
    /// The same before anything was learned, with MLPs that give zero at all sites.
    pub untrained: EndToEnd,
    /// The same if no site had been left to stay within a budget.
    pub all_sites: EndToEnd,
    /// Sites that keep softmax to stay within a budget.
    pub kept: Vec<String>,
    /// What attention costs.
    pub costs: Vec<CostAt>,
    /// Mean of the sites' errors.
    pub mean: Error,
    /// Seconds from begin to end.
    pub seconds: f64,
    /// Bytes that the process had at most, where the system tells.
    pub peak_bytes: Option<u64>,
    /// Sites that an earlier, interrupted run had learned.
    pub resumed: usize,
    /// What is to be known.
    pub notes: Vec<String>,
    /// What makes the weights doubtful, and what to do about it.
    pub warnings: Vec<String>,
}

impl Report {
    /// A table and some lines.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = table([
            "module",
            "tokens",
            "heads × dim",
            "attention",
            "mid",
            "energy before",
            "after",
            "variance before",
            "after",
        ]);
        for site in &self.sites {
            table.add_row([
                site.module.clone(),
                site.tokens.to_string(),
                format!("{} × {}", site.heads, site.dim / site.heads.max(1)),
                site.attention.to_string(),
                site.mid.map_or("–".to_owned(), |m| m.to_string()),
                percent(site.before.relative),
                percent(site.after.relative),
                percent(site.before.unexplained),
                percent(site.after.unexplained),
            ]);
        }
        let mut text = format!("{table}\n");
        text += &format!(
            "unexplained on {} samples held out, mean of {} sites: {} of the energy, {} of the variance\n",
            self.holdout,
            self.sites.len(),
            percent(self.mean.relative),
            percent(self.mean.unexplained),
        );
        let psnr: Vec<String> = self
            .end_to_end
            .psnr_db
            .iter()
            .map(|p| p.map_or("equal".to_owned(), |p| format!("{p:.1}")))
            .collect();
        text += &format!(
            "the converted model against the original: PSNR {:.1} dB, mean of {}; all together {}; {:.1} dB untrained\n",
            self.end_to_end.mean(),
            psnr.join(", "),
            self.end_to_end
                .pooled_psnr_db
                .map_or("equal".to_owned(), |p| format!("{p:.1} dB")),
            self.untrained.mean(),
        );
        let reason = |line: &String| {
            line.split_once("]: ")
                .map_or(line.clone(), |(_, r)| r.to_owned())
        };
        let mut reasons: BTreeMap<String, usize> = BTreeMap::new();
        for line in &self.skipped {
            *reasons.entry(reason(line)).or_default() += 1;
        }
        for (reason, count) in reasons {
            text += &format!("left as they are: {count} ({reason})\n");
        }
        if !self.kept.is_empty() {
            text += &format!(
                "softmax stays at {} to keep to the budget; without, PSNR would be {:.1} dB. Convert with --allow-partial\n",
                self.kept.join(", "),
                self.all_sites.pooled()
            );
        }
        for cost in &self.costs {
            text += &format!(
                "attention at {0} × {0}: {1:.3e} floating-point operations, {2:.3e} with softmax\n",
                cost.pixels, cost.chosen, cost.softmax
            );
        }
        for note in &self.notes {
            text += &format!("{note}\n");
        }
        text += &format!("wrote {} in {:.0} s", self.output, self.seconds);
        text += &self.peak_bytes.map_or(String::new(), |b| {
            format!(", at most {} of memory", shown(b))
        });
        text += "\n";
        text
    }
}

/// Below, outputs are off by more than a tenth of their range.
const LOW_PSNR_DB: f64 = 20.0;
/// As much of a site's variance as `--attention auto` leaves unexplained without being told.
const MUCH_UNEXPLAINED: f64 = 0.15;

/// What makes the weights doubtful, and what to do about it.
pub(super) fn doubts(sites: &[SiteReport], whole: &EndToEnd) -> Vec<String> {
    const SHOWN: usize = 3;
    let mut doubts = Vec::new();
    let psnr = whole.mean();
    if psnr < LOW_PSNR_DB {
        doubts.push(format!(
            "the converted model is off by more than a tenth of the output's range (PSNR {psnr:.1} dB, less than {LOW_PSNR_DB} dB): \
             learn from more --samples or for more --steps, try --attention auto, or leave softmax where it is needed with \
             --budget-db or --keep"
        ));
    }
    let mut poor: Vec<&SiteReport> = sites
        .iter()
        .filter(|s| s.after.unexplained > MUCH_UNEXPLAINED)
        .collect();
    poor.sort_by(|a, b| b.after.unexplained.total_cmp(&a.after.unexplained));
    if !poor.is_empty() {
        let worst: Vec<String> = poor
            .iter()
            .take(SHOWN)
            .map(|s| format!("{} ({})", s.module, percent(s.after.unexplained)))
            .collect();
        let more = if poor.len() > SHOWN { ", …" } else { "" };
        doubts.push(format!(
            "{} of {} sites leave more than {} of their output's variance unexplained: {}{more}; more --samples or --steps, \
             --attention auto, or --keep for them",
            poor.len(),
            sites.len(),
            percent(MUCH_UNEXPLAINED),
            worst.join(", "),
        ));
    }
    doubts
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// The mean of errors.
pub(super) fn mean(errors: impl ExactSizeIterator<Item = Error>) -> Error {
    let n = errors.len().max(1) as f64;
    errors.fold(Error::default(), |mean, e| Error {
        relative: mean.relative + e.relative / n,
        unexplained: mean.unexplained + e.unexplained / n,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_far_from_the_original_is_warned_of() {
        let told = |psnr: Option<f64>| {
            let whole = EndToEnd {
                psnr_db: vec![psnr],
                mean_psnr_db: psnr,
                pooled_psnr_db: psnr,
            };
            doubts(&[], &whole)
        };
        assert!(told(None).is_empty() && told(Some(20.0)).is_empty());
        let [low] = &told(Some(19.9))[..] else {
            panic!("one warning");
        };
        for what in ["19.9 dB", "--samples", "--attention auto", "--keep"] {
            assert!(low.contains(what), "{low}");
        }
    }
}
