//! Errors that the command line is to blame for, told from all others: they have an exit code of their own.

use std::error::Error;
use std::fmt::Display;

use linfusion_runtime::bench::BenchError;
use linfusion_runtime::compare::CompareError;
use linfusion_runtime::image::ImageError;
use linfusion_runtime::inputs::InputsError;
use linfusion_runtime::pipeline::PipelineError;
use linfusion_runtime::triton::TritonError;
use miette::{Diagnostic, IntoDiagnostic, Report};

/// What was asked for cannot be, whatever the files hold.
#[derive(Debug, thiserror::Error, Diagnostic)]
#[error("{problem}")]
struct Usage {
    problem: String,
    #[help]
    hint: Option<String>,
}

/// Wrong usage.
pub fn usage(problem: impl Display) -> Report {
    Usage {
        problem: problem.to_string(),
        hint: None,
    }
    .into()
}

/// Wrong usage, with what to do instead.
pub fn usage_with(problem: impl Display, hint: impl Display) -> Report {
    Usage {
        problem: problem.to_string(),
        hint: Some(hint.to_string()),
    }
    .into()
}

/// Whether a report is of wrong usage.
pub fn is_usage(report: &Report) -> bool {
    report.downcast_ref::<Usage>().is_some()
}

/// An error that may be of wrong usage.
pub trait Blame: Error + Send + Sync + 'static {
    /// Whether it is.
    fn is_usage(&self) -> bool;
}

/// Turns the errors of the library into reports.
pub trait OrReport<T> {
    /// The value, or a report that knows whether the command line is to blame.
    fn or_report(self) -> miette::Result<T>;
}

impl<T, E: Blame> OrReport<T> for Result<T, E> {
    fn or_report(self) -> miette::Result<T> {
        match self {
            Err(error) if error.is_usage() => Err(usage(error)),
            other => other.into_diagnostic(),
        }
    }
}

impl Blame for PipelineError {
    fn is_usage(&self) -> bool {
        self.is_usage()
    }
}

impl Blame for ImageError {
    fn is_usage(&self) -> bool {
        self.is_usage()
    }
}

impl Blame for InputsError {
    /// Shapes and sizes are the command line's, or are missing in it.
    fn is_usage(&self) -> bool {
        true
    }
}

impl Blame for CompareError {
    fn is_usage(&self) -> bool {
        match self {
            Self::Pipeline { source, .. } => source.is_usage(),
            Self::Image(image) => image.is_usage(),
            Self::Samplers { .. } | Self::Sites(_) | Self::Scratch(_) => false,
        }
    }
}

impl Blame for BenchError {
    fn is_usage(&self) -> bool {
        self.is_usage()
    }
}

impl Blame for TritonError {
    fn is_usage(&self) -> bool {
        matches!(self, Self::Pipeline(error) if error.is_usage())
    }
}
