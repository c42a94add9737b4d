//! Patterns over the names of attentions, as `--keep`, `--only` and `--attention` take them.

use globset::{Glob, GlobMatcher};

/// Patterns of one option.
#[derive(Clone, Debug, Default)]
pub struct Patterns {
    option: &'static str,
    globs: Vec<GlobMatcher>,
    names: Vec<String>,
}

/// A pattern that is no glob.
#[derive(Debug, thiserror::Error)]
#[error("{option} '{pattern}' is no pattern: {problem}; use * and ?, e.g. 'down_blocks.0.*'")]
pub struct BadPattern {
    /// The option.
    pub option: &'static str,
    /// The pattern.
    pub pattern: String,
    /// What is wrong with it.
    pub problem: String,
}

/// A pattern that no attention matches.
#[derive(Debug, thiserror::Error)]
#[error(
    "{option} '{pattern}' matches no attention of the model{near} (hint: `inspect` lists the module paths)"
)]
pub struct UnmatchedPattern {
    /// The option.
    pub option: &'static str,
    /// The pattern.
    pub pattern: String,
    /// What would match.
    pub near: Near,
}

/// What may have been meant by a pattern.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Near {
    /// The same with wildcards around it, which matches so many names.
    Wildcards(String, usize),
    /// Names that look like it, the nearest first.
    Names(Vec<String>),
}

impl std::fmt::Display for Near {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Wildcards(pattern, 1) => write!(f, "; '{pattern}' matches 1"),
            Self::Wildcards(pattern, count) => write!(f, "; '{pattern}' matches {count}"),
            Self::Names(names) if names.is_empty() => Ok(()),
            Self::Names(names) => write!(f, "; there are '{}'", names.join("', '")),
        }
    }
}

impl Patterns {
    /// Compiles the patterns of an option.
    ///
    /// # Errors
    /// [`BadPattern`] names the first that does not parse.
    pub fn new(option: &'static str, patterns: &[String]) -> Result<Self, BadPattern> {
        let compiled = patterns.iter().map(|pattern| {
            let glob = Glob::new(pattern).map_err(|e| BadPattern {
                option,
                pattern: pattern.clone(),
                problem: e.kind().to_string(),
            })?;
            Ok(glob.compile_matcher())
        });
        Ok(Self {
            option,
            globs: compiled.collect::<Result<_, _>>()?,
            names: Vec::new(),
        })
    }

    /// These names as they are.
    #[must_use]
    pub fn of_names(names: Vec<String>) -> Self {
        Self {
            names,
            ..Self::default()
        }
    }

    /// Whether any of them matches.
    #[must_use]
    pub fn is_match(&self, name: &str) -> bool {
        self.globs.iter().any(|glob| glob.is_match(name)) || self.names.iter().any(|n| n == name)
    }

    /// Whether each of them matches one of the attentions, by any of its `names`, the usual one first.
    ///
    /// # Errors
    /// [`UnmatchedPattern`]: the first that does not.
    pub fn check(&self, names: &[Vec<&str>]) -> Result<(), UnmatchedPattern> {
        let lost = |glob: &&GlobMatcher| count(glob, names) == 0;
        match self.globs.iter().find(lost) {
            None => Ok(()),
            Some(glob) => Err(UnmatchedPattern {
                option: self.option,
                pattern: glob.glob().glob().to_owned(),
                near: near(glob.glob().glob(), names),
            }),
        }
    }
}

/// Attentions that match.
fn count(glob: &GlobMatcher, names: &[Vec<&str>]) -> usize {
    let matches = |names: &&Vec<&str>| names.iter().any(|name| glob.is_match(name));
    names.iter().filter(matches).count()
}

fn near(pattern: &str, names: &[Vec<&str>]) -> Near {
    let wide = format!("*{}*", pattern.trim_matches('*'));
    let found = Glob::new(&wide).map_or(0, |glob| count(&glob.compile_matcher(), names));
    if found > 0 && wide != "**" {
        return Near::Wildcards(wide, found);
    }
    /// Below, names have little in common: 0 is nothing, 1 is equality.
    const ALIKE: f64 = 0.7;
    const MOST: usize = 3;
    let plain: String = pattern.chars().filter(|c| !"*?".contains(*c)).collect();
    let mut alike: Vec<(f64, &str)> = names
        .iter()
        .filter_map(|names| names.first())
        .map(|name| (strsim::jaro_winkler(&plain, name), *name))
        .filter(|(likeness, _)| *likeness > ALIKE)
        .collect();
    alike.sort_by(|(a, x), (b, y)| b.total_cmp(a).then(x.cmp(y)));
    alike.dedup();
    let names = alike.into_iter().take(MOST);
    Near::Names(names.map(|(_, name)| name.to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 3] = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
    ];

    fn told(pattern: &str) -> String {
        let patterns = Patterns::new("--keep", &[pattern.to_owned()]);
        let names = NAMES.map(|name| vec![name, "Softmax_1"]);
        match patterns.map(|p| p.check(&names)) {
            Ok(Ok(())) => String::new(),
            Ok(Err(unmatched)) => unmatched.to_string(),
            Err(bad) => bad.to_string(),
        }
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_shown_with_what_would() {
        assert_eq!(told("mid_block.*"), "");
        let part = told("down_blocks.0");
        assert!(
            part.contains("--keep 'down_blocks.0'") && part.contains("'*down_blocks.0*' matches 1"),
            "{part}"
        );
        let shared = told("Softmax");
        assert!(shared.contains("'*Softmax*' matches 3"), "{shared}");
        let mistyped = told("mid_blok.*");
        assert!(
            mistyped.contains("there are 'mid_block.attentions.0"),
            "{mistyped}"
        );
        let strange = told("xyz");
        assert!(
            strange.contains("'xyz' matches no attention of the model (hint"),
            "{strange}"
        );
    }

    #[test]
    fn a_pattern_that_is_none_is_told_once() {
        let bad = told("[");
        assert!(
            bad.starts_with("--keep '[' is no pattern: unclosed character class"),
            "{bad}"
        );
        assert_eq!(bad.matches('[').count(), 1, "{bad}");
    }
}
