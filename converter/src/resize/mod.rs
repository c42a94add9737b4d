//! One model for any image size: an export that was traced at one size holds that size in constants
//! (Reshape targets, Expand and Slice bounds, sizes of Resize). [`resize`] finds out which of them
//! are sizes of the image and computes these in the graph, or writes those of another size.
//!
//! Nothing is guessed. The graph is walked at the size of the export and, in step, at sizes whose
//! height and width are other prime multiples of it (`columns`). At each constant that takes part in
//! a size, every reading is formed that the shapes allow (`reading`): fixed, or a dimension of a
//! value that comes before. Readings under which a later node cannot run at the other sizes are out
//! (`prove`); if not exactly one is left, that is an error with all of them. What shapes do not show, a
//! number computed from the size, is refused after a sum over the image (`normaliser`), and not seen elsewhere.

mod agree;
mod columns;
mod edit;
mod error;
mod image;
mod normaliser;
mod pool;
mod proof;
mod prove;
mod reading;
mod reshape;
pub mod verify;

#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::proto::{ModelProto, TensorProto};
use serde::Serialize;

pub use self::error::ResizeError;
use self::image::{Image, Images};
use self::prove::prove;
use self::verify::{Expected, Verified, VerifyError};
use crate::verify::engine;

/// The size that a model is rewritten for, in the units of its image input: latent pixels for a
/// latent diffusion model, pixels for a model of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageSize {
    /// Any size, a multiple of [`ResizeReport::multiple_of`].
    Dynamic,
    /// This one.
    Fixed {
        /// Rows.
        height: i64,
        /// Columns.
        width: i64,
    },
}

/// Images of more than this many times the export's are not run for verification: softmax attention may not fit.
const LARGEST_RUN: i64 = 4;

/// The largest height and width that are taken: what lies above is a slip of the hand.
const LARGEST: i64 = 1 << 20;

impl FromStr for ImageSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "dynamic" {
            return Ok(Self::Dynamic);
        }
        let number = |t: &str| t.parse().ok().filter(|n| (1..=LARGEST).contains(n));
        match text.split_once('x').map(|(h, w)| (number(h), number(w))) {
            Some((Some(height), Some(width))) => Ok(Self::Fixed { height, width }),
            _ => Err(format!(
                "'{text}' is neither `dynamic` nor a size; e.g. 128x192 (height x width of the model's image input, \
                 which for a latent diffusion model is an eighth of the pixels)"
            )),
        }
    }
}

impl fmt::Display for ImageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dynamic => f.write_str("dynamic"),
            Self::Fixed { height, width } => write!(f, "{height}x{width}"),
        }
    }
}

/// What was rewritten.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct ResizeReport {
    /// The image input that the sizes are of.
    pub input: String,
    /// Height and width of the export.
    pub from: [i64; 2],
    /// "dynamic" or "HEIGHTxWIDTH".
    pub to: String,
    /// Heights and widths that the network's halvings fit are multiples of this.
    pub multiple_of: i64,
    /// Nodes whose constants were sizes of the image.
    pub nodes: Vec<ResizedNode>,
    /// What running the rewritten graph showed; null if it was not run.
    pub verified: Option<Verified>,
}

/// A node that took sizes of the image from constants.
#[derive(Clone, Debug, Serialize, PartialEq)]
pub struct ResizedNode {
    /// Its name, or that of its first output.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// What its constants were and are.
    pub change: String,
}

impl ResizeReport {
    /// Two lines for people.
    #[must_use]
    pub fn text(&self) -> String {
        let [height, width] = self.from;
        let mut text = format!(
            "resized from {height}x{width} to {}: {} nodes took sizes of the image '{}' from constants; multiples of {} fit\n",
            self.to,
            self.nodes.len(),
            self.input,
            self.multiple_of
        );
        if let Some(v) = &self.verified {
            let [rows, columns] = v.also_at;
            let compared = v.max_relative_error.map_or(
                "not compared with the original, which makes nothing finite of random inputs"
                    .to_owned(),
                |error| format!("within {error:.1e} of the original at {height}x{width}"),
            );
            text += &format!(
                "verified: on {}, {compared}; runs at {rows}x{columns}\n",
                v.engine
            );
        }
        text
    }
}

/// A rewritten model.
#[derive(Debug)]
pub struct Resized {
    /// The model; its weights are those of the file.
    pub model: ModelProto,
    /// What was done.
    pub report: ResizeReport,
    /// The model that takes any size, where `model` takes one.
    any_size: Option<ModelProto>,
    expected: Expected,
}

/// Rewrites the constants in `file`'s graph that are sizes of its image.
///
/// The image is the first input of rank 4, `[batch, channels, height, width]`; other inputs of rank 4
/// whose height and width are the same multiple or fraction of its grow with it.
///
/// # Errors
/// [`ResizeError`]: a constant may be read in several ways, a tensor belongs to one size (a learned
/// position table, say), the graph has something that is not understood, or the size asked for does
/// not fit the network's halvings.
pub fn resize(file: &OnnxFile, size: ImageSize) -> Result<Resized, ResizeError> {
    let model = &file.model;
    let read = |t: &TensorProto| file.tensor_bytes(t).ok();
    let images = Images::of(&model.graph)?;
    let proof = prove(model, &read, &images)?;
    let multiple_of = proof.multiple(model, &read, &images);
    let edit = |size| edit::rewrite(model, &read, &images, &proof, size, multiple_of);
    let rewritten = edit(size)?;
    let any_size = match size {
        ImageSize::Dynamic => None,
        ImageSize::Fixed { .. } => Some(edit(ImageSize::Dynamic)?.model),
    };
    let Image { height, width, .. } = images.image;
    let area = |height: i64, width: i64| height.saturating_mul(width);
    let other = match size {
        ImageSize::Fixed {
            height: h,
            width: w,
        } if area(h, w) <= LARGEST_RUN.saturating_mul(area(height, width)) => [h, w],
        // The smaller of the two that are at hand.
        _ if height % multiple_of.saturating_mul(2) == 0 => [height / 2, width],
        _ => [height.saturating_mul(2), width],
    };
    let expected = Expected {
        inputs: proof.inputs(&images, [height, width]).unwrap_or_default(),
        other_inputs: proof.inputs(&images, other).unwrap_or_default(),
        other_outputs: proof.outputs(model, &read, &images, other),
        size: other,
    };
    Ok(Resized {
        model: rewritten.model,
        report: ResizeReport {
            input: images.image.name.clone(),
            from: [height, width],
            to: size.to_string(),
            multiple_of,
            nodes: rewritten.nodes,
            verified: None,
        },
        any_size,
        expected,
    })
}

impl Resized {
    /// Whether [`Resized::verify`] runs the model at the one size that it was written for.
    #[must_use]
    pub fn runs_at_its_size(&self) -> bool {
        let [height, width] = self.expected.size;
        self.report.to == ImageSize::Fixed { height, width }.to_string()
    }

    /// Runs the model on random inputs: at the size of the export it must give what `file`, which it
    /// was made from, gives; at another, outputs of the shapes that were computed. Each of the two
    /// models is in memory once.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub fn verify(&self, file: &OnnxFile) -> Result<Verified, VerifyError> {
        let models = verify::Models {
            any_size: self.any_size.as_ref().unwrap_or(&self.model),
            one_size: (self.any_size.is_some() && self.runs_at_its_size()).then_some(&self.model),
        };
        verify::verify(file, models, &self.expected, engine()?)
    }
}
