//! What is done with each site: converted, or kept and why.

use std::collections::HashSet;

use globset::{Glob, GlobSet, GlobSetBuilder};

use crate::analysis::Analysis;
use crate::attention::kind::Kind;
use crate::attention::site::Site;

/// A pattern of `--keep` or `--only` that no site matches.
#[derive(Debug, thiserror::Error)]
#[error("pattern {} of {option} matches no attention of the model (hint: `inspect` lists the module paths)", .index + 1)]
pub struct UnmatchedPattern {
    /// The option.
    pub option: &'static str,
    /// Position among its patterns.
    pub index: usize,
}

impl Selection {
    /// Whether every pattern matches something.
    ///
    /// # Errors
    /// [`UnmatchedPattern`]: a mistyped `--keep` would convert what it names.
    pub fn check(&self, sites: &[Site<'_>]) -> Result<(), UnmatchedPattern> {
        let sets = [("--keep", Some(&self.keep)), ("--only", self.only.as_ref())];
        for (option, set) in sets.into_iter().filter_map(|(o, s)| Some((o, s?))) {
            let names = |s: &Site<'_>| [s.module.clone().unwrap_or_default(), s.anchor.clone()];
            let matched: HashSet<usize> = sites
                .iter()
                .flat_map(names)
                .flat_map(|name| set.matches(name))
                .collect();
            if let Some(index) = (0..set.len()).find(|i| !matched.contains(i)) {
                return Err(UnmatchedPattern { option, index });
            }
        }
        Ok(())
    }
}

/// Which sites the user wants converted.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Sites to keep, by module path or anchor name.
    pub keep: GlobSet,
    /// If given, the only sites to convert.
    pub only: Option<GlobSet>,
    /// Keep the last of every so many self-attentions.
    pub keep_every: Option<usize>,
    /// Keep sites with fewer tokens than this at the native size.
    pub min_tokens: i64,
}

/// A pattern that is no glob.
#[derive(Debug, thiserror::Error)]
#[error("'{pattern}' is not a pattern: {source}; use * and ?, e.g. 'down_blocks.0.*'")]
pub struct BadPattern {
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    #[source]
    pub source: globset::Error,
}

/// Compiles patterns over module paths.
///
/// # Errors
/// [`BadPattern`] names the first that does not parse.
pub fn globs(patterns: &[String]) -> Result<GlobSet, BadPattern> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let bad = |source| BadPattern {
            pattern: pattern.clone(),
            source,
        };
        set.add(Glob::new(pattern).map_err(bad)?);
    }
    set.build().map_err(|source| BadPattern {
        pattern: patterns.join(" "),
        source,
    })
}

/// What is done with a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Converted to linear attention.
    Convert,
    /// Left as it is: it is no self-attention, or the user chose so.
    Keep(String),
    /// Left as it is because it cannot be converted, or not be read: a shortfall.
    Cannot(String),
}

impl Action {
    /// Why the site is left as it is.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Action::Convert => None,
            Action::Keep(reason) | Action::Cannot(reason) => Some(reason),
        }
    }
}

/// Decides for every site.
#[must_use]
pub fn plan(analysis: &Analysis<'_>, selection: &Selection) -> Vec<Action> {
    let mut ordinal = 0;
    // A catalogued architecture has nothing but self- and cross-attention.
    let strange = analysis.recognised.is_some();
    analysis
        .sites
        .iter()
        .zip(&analysis.tokens)
        .map(|(site, tokens)| {
            let obstacle = site.plain.as_ref().err();
            let reason = || obstacle.map_or_else(|| site.kind.to_string(), Clone::clone);
            match site.kind {
                Kind::SelfAttention => {}
                Kind::Other if strange || site.unread || site.attends => {
                    return Action::Cannot(reason());
                }
                _ => return Action::Keep(reason()),
            }
            ordinal += 1;
            match (refusal(site, *tokens, selection, ordinal), obstacle) {
                (Some(chosen), _) => Action::Keep(chosen),
                (None, Some(obstacle)) => Action::Cannot(obstacle.clone()),
                (None, None) => Action::Convert,
            }
        })
        .collect()
}

fn refusal(
    site: &Site<'_>,
    tokens: Option<i64>,
    selection: &Selection,
    ordinal: usize,
) -> Option<String> {
    let matches = |set: &GlobSet| {
        site.module.as_deref().is_some_and(|m| set.is_match(m)) || set.is_match(&site.anchor)
    };
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
