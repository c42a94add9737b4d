//! Sizes in pixels, and what they are at a model's image input.

use std::fmt;

use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::make::{Dim, tensor_type_of};
use serde::{Deserialize, Serialize};

use crate::inputs::PIXELS_PER_LATENT;
use crate::packed::{Ids, PACKED, latents, tokens_of};

/// Height and width of an image in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Pixels {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

impl Pixels {
    /// As many rows as columns.
    #[must_use]
    pub fn square(side: usize) -> Self {
        Self {
            height: side,
            width: side,
        }
    }

    /// The side of a square of the same area: where it lies on an axis of sizes.
    #[must_use]
    pub fn side(self) -> f64 {
        (self.height as f64 * self.width as f64).sqrt()
    }
}

impl fmt::Display for Pixels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} × {}", self.height, self.width)
    }
}

/// Latents stand for whole squares of pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{side} pixels are not divisible by {scale}, as the model's latents need (hint: --pixels-per-latent 1 for a model of pixels)"
)]
pub struct NotDivisible {
    /// Pixels along an edge.
    pub side: usize,
    /// Pixels for one latent.
    pub scale: usize,
}

/// The input of a model that tells the size of its image: the image or its latents, [batch, channels, height, width], or the
/// places of the tokens that it comes packed in, [tokens, 3] or [batch, tokens, 3].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInput {
    /// Its name.
    pub name: String,
    /// Pixels along an edge that a row or column of the image or latents stands for.
    pub scale: usize,
    /// Rows and columns of the image or latents, where the graph takes no others.
    pub fixed: Option<[usize; 2]>,
    /// Whether it is of packed tokens.
    packed: bool,
    /// Other inputs of as many tokens.
    beside: Vec<String>,
}

impl ImageInput {
    /// The first input of rank 4, beside a ControlNet's hint, else the places of packed tokens. Latents of all known architectures stand for
    /// [`PIXELS_PER_LATENT`] pixels a row; an input with 1 or 3 channels is an image itself, unless `scale` says otherwise.
    #[must_use]
    pub fn of(file: &OnnxFile, scale: Option<usize>) -> Option<Self> {
        let graph = &*file.model.graph;
        let image = graph.input.iter().find_map(|value| {
            let name = value.name.as_deref().unwrap_or_default();
            let (_, dims) = tensor_type_of(value)?;
            let (channels, rows, cols) = match dims?.as_slice() {
                [_, channels, rows, cols] => (channels.clone(), rows.clone(), cols.clone()),
                _ => return None,
            };
            let is_image = matches!(channels, Dim::Fixed(1 | 3));
            if is_image && name.contains("cond") {
                return None;
            }
            Some(Self {
                name: name.to_owned(),
                scale: scale.unwrap_or(match is_image {
                    true => 1,
                    false => PIXELS_PER_LATENT,
                }),
                fixed: size_of(&rows).zip(size_of(&cols)).map(|(r, c)| [r, c]),
                packed: false,
                beside: Vec::new(),
            })
        });
        image.or_else(|| Self::of_packed(file, scale))
    }

    /// That of a model whose image comes in packed.
    fn of_packed(file: &OnnxFile, scale: Option<usize>) -> Option<Self> {
        let inputs: Vec<(&str, Vec<Option<usize>>)> = file
            .model
            .graph
            .input
            .iter()
            .filter_map(|value| {
                let (_, dims) = tensor_type_of(value)?;
                Some((value.name.as_deref()?, dims?.iter().map(size_of).collect()))
            })
            .collect();
        let ids =
            |(name, dims): &&(&str, Vec<Option<usize>>)| Ids::of(name, dims) == Some(Ids::Image);
        let (name, dims) = inputs.iter().find(ids)?;
        let tokens = match dims.as_slice() {
            [.., tokens, _] => *tokens,
            _ => return None,
        };
        let beside = inputs
            .iter()
            .filter(|(other, dims)| other != name && tokens_of(other, dims) == Some(Ids::Image));
        Some(Self {
            name: (*name).to_owned(),
            scale: scale.unwrap_or(PIXELS_PER_LATENT),
            fixed: tokens.map(latents),
            packed: true,
            beside: beside.map(|(other, _)| (*other).to_owned()).collect(),
        })
    }

    /// Whether the shape of the input called `name` tells the image's size.
    #[must_use]
    pub fn is_told_by(&self, name: &str) -> bool {
        self.name == name || self.beside.iter().any(|other| other == name)
    }

    /// The image's size in pixels where the input has this shape.
    #[must_use]
    pub fn pixels_at(&self, shape: &[usize]) -> Option<Pixels> {
        match *shape {
            [.., tokens, _] if self.packed => Some(self.pixels(latents(tokens))),
            [_, _, rows, cols] => Some(self.pixels([rows, cols])),
            _ => None,
        }
    }

    /// Its rows, or columns, for an image with so many.
    ///
    /// # Errors
    /// They are no whole number.
    pub fn elements(&self, side: usize) -> Result<usize, NotDivisible> {
        let scale = match self.packed {
            true => self.scale.saturating_mul(PACKED),
            false => self.scale,
        };
        match side.is_multiple_of(scale) {
            true => Ok(side / self.scale),
            false => Err(NotDivisible { side, scale }),
        }
    }

    /// What so many rows and columns of it are in pixels.
    #[must_use]
    pub fn pixels(&self, [rows, cols]: [usize; 2]) -> Pixels {
        Pixels {
            height: rows.saturating_mul(self.scale),
            width: cols.saturating_mul(self.scale),
        }
    }
}

/// A size that the graph fixes.
fn size_of(dim: &Dim) -> Option<usize> {
    match dim {
        Dim::Fixed(size) => usize::try_from(*size).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use buffa::Message;
    use linfusion_models::fixtures;

    fn input(path: &std::path::Path) -> ImageInput {
        ImageInput::of(&OnnxFile::open(path).unwrap(), None).unwrap()
    }

    #[test]
    fn latents_are_an_eighth_and_images_are_themselves() {
        let latents = input(&fixtures::path("sd15-tiny/unet.onnx"));
        assert_eq!((latents.scale, latents.fixed), (8, None));
        assert_eq!(latents.pixels([16, 24]).to_string(), "128 × 192");
        assert_eq!(latents.elements(64), Ok(8));
        let odd = NotDivisible { side: 63, scale: 8 };
        assert_eq!(latents.elements(63), Err(odd));
        let image = input(&fixtures::path("digits/digits-dit.onnx"));
        assert_eq!((image.name.as_str(), image.scale), ("x", 1));
        assert_eq!(image.pixels([16, 16]), Pixels::square(16));
        assert_eq!(image.fixed, Some([16, 16]));
    }

    #[test]
    fn packed_latents_are_counted_by_their_ids() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flux.onnx");
        std::fs::write(&path, fixtures::bytes("hybrid-flux/model.onnx.gz").unwrap()).unwrap();
        let packed = input(&path);
        assert_eq!((packed.name.as_str(), packed.scale), ("img_ids", 8));
        let telling = [
            "img_ids",
            "hidden_states",
            "encoder_hidden_states",
            "txt_ids",
        ];
        let telling = telling.map(|name| packed.is_told_by(name));
        assert_eq!(telling, [true, true, false, false]);
        assert_eq!(packed.elements(64), Ok(8));
        let odd = NotDivisible {
            side: 40,
            scale: 16,
        };
        assert_eq!(packed.elements(40), Err(odd));
        // 4 × 6 tokens of 2 × 2 latents.
        assert_eq!(packed.pixels_at(&[24, 3]).unwrap().to_string(), "64 × 96");
    }

    #[test]
    fn who_knows_better_says_so() {
        let file = OnnxFile::open(fixtures::path("digits/digits-dit.onnx")).unwrap();
        assert_eq!(ImageInput::of(&file, Some(4)).unwrap().scale, 4);
        let mut model = file.model.clone();
        model.graph.get_or_insert_default().input.clear();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none.onnx");
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        let none = OnnxFile::open(&path).unwrap();
        assert_eq!(ImageInput::of(&none, None), None);
    }
}
