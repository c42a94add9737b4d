//! Rewrites the self-attention of diffusion models in ONNX to LinFusion's
//! generalized linear attention.
//!
//! The way through the crate: bytes → model (`linfusion_models::onnx`) →
//! [`graph`] and [`shapes`] → [`attention`] sites → plan → rewritten model →
//! bytes. No stage reaches back.

pub mod analysis;
pub mod attention;
pub mod convert;
pub mod cost;
pub mod diff;
#[cfg(feature = "distill")]
pub mod distill;
pub mod grid;
pub mod mapping;
pub mod patterns;
pub mod plan;
pub mod reference;
pub mod report;
pub mod resize;
pub mod rewrite;
pub mod verify;

pub use linfusion_models::{graph, shapes};
