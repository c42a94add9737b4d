//! Learning the weights of linear attention from the model itself: each attention is the teacher of what replaces it.
//!
//! The way of a distillation ([`run()`]): the model is looked at as for a conversion ([`crate::analysis`]) and gives its
//! `target`s; the teacher runs on [`inputs`], and what it computes at the sites is kept on disk (`capture`,
//! `store`); the graph's own layers are read off (`probe`); each site's `student` is learned alone (`train`),
//! sites beside each other on the cores; the weights are written as a checkpoint (`output`) and judged in the converted
//! model (`measure`). `docs/distill.md` says why each is done so.

mod adam;
mod capture;
mod choose;
mod device;
mod end_to_end;
mod error;
mod fused;
pub mod graph;
pub mod inputs;
mod learn;
mod measure;
mod near;
mod optimizer;
mod output;
mod pipeline;
mod plot;
mod probe;
mod refine;
mod report;
mod run;
mod state;
mod store;
mod student;
mod student_graph;
mod target;
mod train;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use linfusion_models::onnx::write::Overwrite;

pub use self::end_to_end::Together;
pub use self::error::DistillError;
pub use self::inputs::Source;
pub use self::report::{CostAt, EndToEnd, Report, SiteReport};
pub use self::run::run;
pub use self::state::unfinished;
pub use self::train::{Error, Point, Schedule};
use crate::plan::Selection;

/// What to distil, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// The model.
    pub model: PathBuf,
    /// The checkpoint's folder.
    pub out: PathBuf,
    /// What the teacher runs on.
    pub source: Source,
    /// Samples to learn from.
    pub samples: usize,
    /// Samples held out, to judge by.
    pub holdout: usize,
    /// How each site is learned.
    pub schedule: Schedule,
    /// Width of the MLPs.
    pub mid: Mid,
    /// Which sites.
    pub selection: Selection,
    /// How it is decided what each becomes.
    pub attention: Attention,
    /// Whether sites learn again on the converted model's own activations.
    pub refinement: Refinement,
    /// Whether all sites learn together in the end, on the model's output.
    pub end_to_end: Option<Together>,
    /// How much of the original's output must be left; sites keep softmax until it is.
    pub budget: Option<Budget>,
    /// An SVG of the losses.
    pub plot: Option<PathBuf>,
    /// Seed of everything random.
    pub seed: u64,
    /// Bytes of activations on disk at once.
    pub disk_budget: u64,
    /// Where they are kept; `None`: the system's folder for temporary files.
    pub scratch: Option<PathBuf>,
    /// Threads; `None`: as many as there are processors.
    pub threads: Option<NonZeroUsize>,
    /// Whether an existing output is replaced.
    pub overwrite: Overwrite,
}

/// What decides what a site becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Attention {
    /// The selection's rules, else linear in UNets and hybrid in transformers.
    #[default]
    Planned,
    /// Linear, window and hybrid attention are tried at each site; the cheapest is taken that leaves no more of the
    /// variance unexplained than this, or else the one that leaves the least.
    Auto {
        /// A share, 0 … 1.
        unexplained: f64,
    },
}

/// Whether sites learn a second time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Refinement {
    /// They do, and the result is kept if it serves the samples held out better.
    #[default]
    IfBetter,
    /// They do not.
    Never,
}

/// What the converted model must keep to on the samples held out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// At least this peak signal-to-noise ratio, in dB.
    Psnr(f64),
    /// At most this mean squared error, relative to the square of the output's range.
    Loss(f64),
}

impl Budget {
    /// The peak signal-to-noise ratio that it asks for.
    #[must_use]
    pub fn psnr(self) -> f64 {
        match self {
            Self::Psnr(db) => db,
            Self::Loss(loss) => -10.0 * loss.log10(),
        }
    }
}

/// Width of the two MLPs of each site.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mid {
    /// As wide as the site, at most 256.
    #[default]
    Auto,
    /// So many channels.
    Width(usize),
    /// No MLP: the identity.
    Identity,
}

impl Mid {
    /// The width for a site of `dim` channels; `None` for the identity.
    #[must_use]
    pub fn of(self, dim: usize) -> Option<usize> {
        const WIDEST: usize = 256;
        match self {
            Self::Auto => Some(dim.min(WIDEST)),
            Self::Width(width) => Some(width),
            Self::Identity => None,
        }
    }
}

/// What happens, for a progress bar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// A stage of so many steps begins.
    Begin {
        /// What it does.
        stage: String,
        /// Steps.
        steps: u64,
    },
    /// So many of them are done.
    Advance(u64),
    /// Something to tell.
    Note(String),
    /// Nobody else learns into the output; what is learned will be kept in this folder.
    Claimed(PathBuf),
    /// Something is in that folder that the same request goes on from.
    Kept,
    /// The output is there, and the folder goes.
    Written,
}
