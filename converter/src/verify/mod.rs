//! Verification of what was written: the structure by our own checker, and every
//! converted site by running it, cut out of the written model, on random input
//! against the reference in f64.

use std::collections::HashSet;

use buffa::Message;
use linfusion_models::checkpoint::Checkpoint;
use linfusion_models::onnx::{ElementType, OnnxFile, check_model};
use linfusion_ops::schema::DOMAIN;
use linfusion_runtime::engine::library::LibraryError;
use linfusion_runtime::engine::{
    Engine, EngineError, Operators, Session, SessionOptions, load_library,
};
use serde::Serialize;

use self::cut::cut;
pub use self::cut::{CutInput, Feed};
use self::judge::SiteRun;
pub use self::readback::{Unread, converted_sites};
pub use self::stored::{Difference, StoredWeights, compare_weights};
use crate::plan::Method;
use crate::rewrite::site::LinearPart;
use crate::rewrite::window::WindowPart;

mod cut;
mod judge;
mod readback;
mod stored;

/// How much to verify.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Verify {
    /// The structure, and every site's numbers if an engine is there and the
    /// site's input has at most 8 Mi elements.
    #[default]
    Auto,
    /// Nothing.
    Off,
    /// The structure and every site's numbers; an error where they cannot be had.
    Full,
}

/// Sites whose input has more elements are run only under [`Verify::Full`].
pub const MAX_ELEMENTS: usize = 1 << 23;

/// A converted site, as the rewrite recorded it.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// Module path.
    pub module: String,
    /// What it became.
    pub method: Method,
    /// Where it is cut out of the model.
    pub inputs: Vec<CutInput>,
    /// Its LinFusion attention.
    pub linear: Option<LinearPart>,
    /// Its window attention.
    pub window: Option<WindowPart>,
    /// The value that the site makes.
    pub target: String,
    /// Element type.
    pub element: ElementType,
}

/// What verification found.
#[derive(Clone, Debug, Default, Serialize, PartialEq)]
pub struct Verified {
    /// What ran the sites; none: only the structure was checked.
    pub engine: Option<String>,
    /// Sites that were run.
    pub sites: usize,
    /// Sites that were not, and why.
    pub skipped: Vec<String>,
    /// Those among them that the engine could not run.
    #[serde(skip)]
    pub not_run: Vec<String>,
    /// The largest error of an attention output, relative to the largest
    /// magnitude in it.
    pub max_relative_error: f64,
}

impl Verified {
    /// What to tell of sites whose numbers nobody looked at because no engine ran them; `None` where there are none.
    #[must_use]
    pub fn unchecked(&self) -> Option<String> {
        let hint = match self.engine.as_deref() {
            Some("tract") => {
                " (hint: an ONNX Runtime library runs more than tract; ORT_DYLIB_PATH names one)"
            }
            _ => "",
        };
        (!self.not_run.is_empty()).then(|| {
            format!(
                "{} of {} sites were not run: only their structure is checked{hint}",
                self.not_run.len(),
                self.sites + self.skipped.len(),
            )
        })
    }
}

/// Why a written model must not be published.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The ONNX Runtime library that was named does not load.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The structure is broken.
    #[error("the written model is not valid (a bug in the rewrite, please report it):\n  {}", .0.join("\n  "))]
    Structure(Vec<String>),
    /// A site computes something else.
    #[error(
        "{module}: {what} of the written site is off by {error:.2e} of its largest value, more than {bound:.2e} for {element} (run on {engine})"
    )]
    Numbers {
        /// The site.
        module: String,
        /// Which of its values.
        what: &'static str,
        /// Relative error found.
        error: f64,
        /// What rounding explains.
        bound: f64,
        /// Element type.
        element: String,
        /// Engine.
        engine: Engine,
    },
    /// A site makes infinities or NaN of finite input.
    #[error(
        "{module}: the written site makes infinite or NaN values of finite input (run on {engine})"
    )]
    NotFinite {
        /// The site.
        module: String,
        /// Engine.
        engine: Engine,
    },
    /// `--verify full` and no way to run a site.
    #[error("{module}: cannot be run: {reason}")]
    CannotRun {
        /// The site.
        module: String,
        /// Why.
        reason: String,
    },
}

/// Verifies `file`, a model with `sites` converted.
///
/// # Errors
/// [`VerifyError`].
pub fn verify(
    file: &OnnxFile,
    before: &HashSet<String>,
    sites: &[Converted],
    checkpoint: Option<&Checkpoint>,
    how: Verify,
    progress: &mut dyn FnMut(&str),
) -> Result<Verified, VerifyError> {
    if how == Verify::Off {
        return Ok(Verified::default());
    }
    structure(file, before)?;
    let mut verified = Verified::default();
    let engine = engine()?;
    verified.engine = Some(engine.to_string());
    for site in sites {
        progress(&site.module);
        let size: i64 = site.inputs.iter().map(CutInput::elements).sum();
        if how == Verify::Auto && usize::try_from(size).map_or(true, |n| n > MAX_ELEMENTS) {
            verified.skipped.push(format!(
                "{}: an input of {size} elements (--verify full runs it)",
                site.module
            ));
            continue;
        }
        match run_site(file, site, checkpoint, engine) {
            Ok(error) => {
                verified.sites += 1;
                verified.max_relative_error = verified.max_relative_error.max(error);
            }
            Err(Failure::Wrong(e)) => return Err(*e),
            Err(Failure::CannotRun(reason)) if how == Verify::Full => {
                return Err(VerifyError::CannotRun {
                    module: site.module.clone(),
                    reason,
                });
            }
            Err(Failure::CannotRun(reason)) => {
                let line = format!("{}: {reason}", site.module);
                verified.not_run.push(line.clone());
                verified.skipped.push(line);
            }
        }
    }
    Ok(verified)
}

/// Names of what the checker had to say of the original: a flaw that was there
/// before is not the rewrite's.
#[must_use]
pub fn known_problems(file: &OnnxFile) -> HashSet<String> {
    match check_model(&file.model, Some(file)) {
        Ok(_) => HashSet::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

fn structure(file: &OnnxFile, before: &HashSet<String>) -> Result<(), VerifyError> {
    let Err(problems) = check_model(&file.model, Some(file)) else {
        return Ok(());
    };
    let new: Vec<String> = problems
        .iter()
        .map(ToString::to_string)
        .filter(|p| !before.contains(p))
        .take(8)
        .collect();
    if new.is_empty() {
        Ok(())
    } else {
        Err(VerifyError::Structure(new))
    }
}

/// ONNX Runtime if it is there, else tract.
///
/// # Errors
/// A library was named, and does not load: another engine is not what was asked for.
pub(crate) fn engine() -> Result<Engine, LibraryError> {
    match load_library(None) {
        Ok(_) => Ok(Engine::Ort),
        Err(LibraryError::NotFound { .. }) => Ok(Engine::Tract),
        Err(error) => Err(error),
    }
}

enum Failure {
    Wrong(Box<VerifyError>),
    CannotRun(String),
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        // The first line says what; the rest is an engine's stack of contexts.
        Failure::CannotRun(
            error
                .to_string()
                .lines()
                .next()
                .unwrap_or_default()
                .to_owned(),
        )
    }
}

fn run_site(
    file: &OnnxFile,
    site: &Converted,
    checkpoint: Option<&Checkpoint>,
    engine: Engine,
) -> Result<f64, Failure> {
    let model = cut(file, site).map_err(Failure::CannotRun)?;
    let bytes = model.encode_to_vec();
    // The function body, as any engine runs it; where the file has only the
    // operator, the operator.
    let has_body = (file.model.functions.iter()).any(|f| f.domain.as_deref() == Some(DOMAIN));
    let uses_operator = model
        .graph
        .node
        .iter()
        .any(|n| n.domain.as_deref() == Some(DOMAIN));
    let options = SessionOptions {
        operators: if uses_operator && !has_body {
            Operators::InProcess
        } else {
            Operators::None
        },
        ..SessionOptions::default()
    };
    let mut session = Session::from_bytes(engine, &bytes, &options)?;
    let mut feeds = Vec::new();
    for (seed, input) in site.inputs.iter().enumerate() {
        let tensor = input.tensor(seed as u64).ok_or_else(|| {
            Failure::CannotRun(format!("'{}' cannot be fed: {:?}", input.name, input.feed))
        })?;
        feeds.push((input.name.as_str(), tensor));
    }
    let outputs = session.run(&feeds)?;
    if outputs.iter().any(|(_, t)| !t.is_finite()) {
        return Err(Failure::Wrong(Box::new(VerifyError::NotFinite {
            module: site.module.clone(),
            engine,
        })));
    }
    let fed = feeds.into_iter().map(|(name, t)| (name.to_owned(), t));
    let run = SiteRun {
        site,
        engine,
        values: outputs.into_iter().chain(fed).collect(),
    };
    let mut error = 0.0f64;
    if let Some(linear) = &site.linear {
        error = error.max(run.linear(linear, checkpoint)?);
    }
    if let Some(window) = &site.window {
        error = error.max(run.window(window)?);
    }
    Ok(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_that_no_engine_ran_are_told() {
        let mut verified = Verified {
            engine: Some("ort".to_owned()),
            sites: 3,
            skipped: vec!["a: large".to_owned()],
            ..Verified::default()
        };
        assert_eq!(verified.unchecked(), None);
        verified.skipped.push("b: no kernel".to_owned());
        verified.not_run.push("b: no kernel".to_owned());
        let said = "1 of 5 sites were not run: only their structure is checked";
        assert_eq!(verified.unchecked().unwrap(), said);
        verified.engine = Some("tract".to_owned());
        let hinted = verified.unchecked().unwrap();
        assert!(hinted.contains("ORT_DYLIB_PATH"), "{hinted}");
    }
}
