//! What is done with each site: converted, or kept and why.

use linfusion_ops::schema::WindowSpec;
use serde::{Deserialize, Serialize};

use crate::analysis::Analysis;
use crate::attention::kind::Kind;
use crate::attention::site::Site;
use crate::grid::GridSize;
use crate::grid::NoImage;
use crate::patterns::{Patterns, UnmatchedPattern};

impl Selection {
    /// The rule that decides what `site` becomes, if the user gave one.
    #[must_use]
    pub fn rule(&self, site: &Site<'_>) -> Option<&MethodRule> {
        let mut last_first = self.attention.iter().rev();
        last_first.find(|rule| rule.sites.as_ref().is_none_or(|set| named(site, set)))
    }

    /// Whether every pattern matches something.
    ///
    /// # Errors
    /// [`UnmatchedPattern`]: a mistyped `--keep` would convert what it names.
    pub fn check(&self, sites: &[Site<'_>]) -> Result<(), UnmatchedPattern> {
        let names: Vec<Vec<&str>> = sites
            .iter()
            .map(|s| {
                s.module
                    .as_deref()
                    .into_iter()
                    .chain([s.anchor.as_str()])
                    .collect()
            })
            .collect();
        let by_rule = self.attention.iter().map(|r| r.sites.as_ref());
        let mut sets = by_rule
            .chain([Some(&self.keep), self.only.as_ref()])
            .flatten();
        sets.try_for_each(|set: &Patterns| set.check(&names))
    }

    /// What to tell of a window that no site gets; `None` where one does, or none was asked for.
    #[must_use]
    pub fn unused_window(&self, actions: &[Action]) -> Option<String> {
        let has_window = |a: &Action| matches!(a.method(), Some(Method::Hybrid | Method::Window));
        (self.window.is_some() && !actions.iter().any(has_window)).then(|| {
            "the window that was asked for is not used: no attention becomes hybrid or window (--attention says what it becomes)".to_owned()
        })
    }
}

/// What a site's softmax attention becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// LinFusion attention.
    Linear,
    /// Window attention and LinFusion attention, weighted by head.
    Hybrid,
    /// Window attention.
    Window,
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Method::Linear => "linear",
            Method::Hybrid => "hybrid",
            Method::Window => "window",
        })
    }
}

/// One `--attention` option: a method for the sites that match.
#[derive(Clone, Debug)]
pub struct MethodRule {
    /// Module paths or anchor names; all, where there is none.
    pub sites: Option<Patterns>,
    /// `None` keeps softmax.
    pub method: Option<Method>,
}

/// Which sites the user wants converted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// What sites become; the last that matches counts. Without any, UNets become
    /// linear and transformers hybrid.
    pub attention: Vec<MethodRule>,
    /// Shape of the windows; `None`: the checkpoint's, else 16 × 16.
    pub window: Option<WindowSpec>,
    /// Rows and columns of the image's tokens, where the graph does not tell.
    pub grid: Option<GridSize>,
    /// Sites to keep, by module path or anchor name.
    pub keep: Patterns,
    /// If given, the only sites to convert.
    pub only: Option<Patterns>,
    /// Keep the last of every so many self-attentions.
    pub keep_every: Option<usize>,
    /// Keep sites with fewer tokens than this at the native size.
    pub min_tokens: i64,
}

impl Selection {
    /// Whether the user keeps every attention: `--attention keep` and no other method.
    #[must_use]
    pub fn keeps_all(&self) -> bool {
        let keeps = self.attention.iter().all(|rule| rule.method.is_none());
        keeps && self.attention.iter().any(|rule| rule.sites.is_none())
    }
}

/// What is done with a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Converted.
    Convert(Method),
    /// Left as it is: it is no self-attention, or the user chose so.
    Keep(String),
    /// Left as it is because it cannot be converted, or not be read: a shortfall.
    Cannot(String),
}

impl Action {
    /// What the site becomes, if it is converted.
    #[must_use]
    pub fn method(&self) -> Option<Method> {
        match self {
            Action::Convert(method) => Some(*method),
            _ => None,
        }
    }

    /// Why the site is left as it is.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Action::Convert(_) => None,
            Action::Keep(reason) | Action::Cannot(reason) => Some(reason),
        }
    }
}

/// Decides for every site. `learned`: what a checkpoint's weights for the site are for,
/// by position; shorter where there is no checkpoint.
#[must_use]
pub fn plan(
    analysis: &Analysis<'_>,
    selection: &Selection,
    learned: &[Option<Method>],
) -> Vec<Action> {
    let mut ordinal = 0;
    // A catalogued architecture has nothing but attention that is understood.
    let strange = analysis.recognised.is_some();
    let default = if analysis.transformer {
        Method::Hybrid
    } else {
        Method::Linear
    };
    analysis
        .sites
        .iter()
        .zip(&analysis.tokens)
        .map(|(site, tokens)| {
            let reason = || match &site.plain {
                Err(reason) => reason.clone(),
                Ok(_) => site.kind.to_string(),
            };
            match site.kind {
                Kind::SelfAttention | Kind::Joint => {}
                Kind::Other if strange || site.unread || site.attends => {
                    return Action::Cannot(reason());
                }
                _ => return Action::Keep(reason()),
            }
            ordinal += 1;
            if let Some(chosen) = refusal(site, *tokens, selection, ordinal) {
                return Action::Keep(chosen);
            }
            let weights = learned.get(site.index).copied().flatten();
            match selection
                .rule(site)
                .map_or(Some(weights.unwrap_or(default)), |rule| rule.method)
            {
                None => Action::Keep("kept by --attention".to_owned()),
                Some(Method::Hybrid | Method::Window) if other_input(site).is_some() => {
                    Action::Keep(other_input(site).unwrap_or_default())
                }
                Some(method) => match obstacle(site, method, analysis.not_a_denoiser.as_deref()) {
                    None => Action::Convert(method),
                    Some(obstacle) => Action::Cannot(obstacle),
                },
            }
        })
        .collect()
}

/// Text that attends to itself, beside an image: nothing for windows.
fn other_input(site: &Site<'_>) -> Option<String> {
    match &site.image {
        Err(reason @ NoImage::OtherInput(_)) => Some(reason.to_string()),
        _ => None,
    }
}

/// What stands between a site and a method.
fn obstacle(site: &Site<'_>, method: Method, not_a_denoiser: Option<&str>) -> Option<String> {
    if let Some(reason) = not_a_denoiser {
        return Some(reason.to_owned());
    }
    if method == Method::Linear {
        return site.plain.as_ref().err().map(|reason| match site.kind {
            Kind::Joint => format!("{reason}; --attention hybrid or window converts it"),
            _ => reason.clone(),
        });
    }
    let image = match (&site.exact, &site.image) {
        (Err(reason), _) => return Some(reason.clone()),
        (_, Err(reason)) => return Some(reason.to_string()),
        (Ok(_), Ok(image)) => image,
    };
    match (&image.stream, method) {
        (Err(reason), Method::Hybrid) => Some(format!("{reason}; --attention window does without")),
        _ => None,
    }
}

fn named(site: &Site<'_>, set: &Patterns) -> bool {
    site.module.as_deref().is_some_and(|m| set.is_match(m)) || set.is_match(&site.anchor)
}

fn refusal(
    site: &Site<'_>,
    tokens: Option<i64>,
    selection: &Selection,
    ordinal: usize,
) -> Option<String> {
    let matches = |set: &Patterns| named(site, set);
    if matches(&selection.keep) {
        return Some("kept by --keep".to_owned());
    }
    if selection.only.as_ref().is_some_and(|set| !matches(set)) {
        return Some("not selected by --only".to_owned());
    }
    if let Some(n) = selection
        .keep_every
        .filter(|&n| n > 0 && ordinal.is_multiple_of(n))
    {
        return Some(format!("kept by --keep-every {n}"));
    }
    match tokens {
        Some(t) if t < selection.min_tokens => Some(format!(
            "{t} tokens at the native size, fewer than --min-tokens {}",
            selection.min_tokens
        )),
        _ => None,
    }
}
