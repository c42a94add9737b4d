//! Pipelines: from a folder and a prompt to an image, of any size.

mod conditions;
mod denoiser;
mod error;
mod files;
mod folder;
mod generate;
mod ladder;
mod memory;
mod model;
mod opened;
mod plan;
mod prompt;
mod request;
mod sizes;
mod start;
mod suspect;
mod tokenizer;
mod vae;

pub use conditions::Control;
pub use denoiser::Guidance;
pub use error::PipelineError;
pub use files::{outputs, preview};
pub use folder::{DenoiserConfig, Family, Folder, VaeConfig};
pub use generate::{Generated, Made, StageReport, expected, generate};
pub use ladder::Size;
pub use memory::StageMemory;
pub use model::Place;
pub use plan::MAX_IMAGES;
pub use request::{Evaluated, Init, Observer, Progress, Request};
pub use sizes::{SizeHints, Sizes};
