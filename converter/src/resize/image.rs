//! The inputs that are images, and the shapes of all inputs at the sizes to look at.

use linfusion_models::onnx::make::{Dim, tensor_type_of};
use linfusion_models::onnx::proto::{GraphProto, ValueInfoProto};

use super::ResizeError;
use crate::graph::tensor_name;

/// An image input of fixed size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// Rows in the export.
    pub height: i64,
    /// Columns in the export.
    pub width: i64,
}

/// Sizes for everything that the graph leaves open, and for the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Height of the image.
    pub height: i64,
    /// Width of the image.
    pub width: i64,
    /// Every open first dimension.
    pub batch: i64,
    /// Every other open dimension.
    pub text: i64,
}

/// The inputs of a graph.
#[derive(Debug)]
pub struct Images {
    /// What the sizes are of.
    pub image: Image,
    /// The images that grow with it.
    pub others: Vec<Image>,
    inputs: Vec<(String, Vec<Dim>)>,
}

impl Images {
    /// Finds the images among `graph`'s inputs.
    pub fn of(graph: &GraphProto) -> Result<Self, ResizeError> {
        let stored = |name: &str| graph.initializer.iter().any(|t| tensor_name(t) == name);
        let inputs: Vec<(String, Vec<Dim>)> = graph
            .input
            .iter()
            .filter(|v| !stored(v.name.as_deref().unwrap_or("")))
            .filter_map(declared)
            .collect();
        let fixed = |(name, dims): &(String, Vec<Dim>)| match dims[..] {
            [_, _, Dim::Fixed(height), Dim::Fixed(width)] if height > 0 && width > 0 => {
                Some(Image {
                    name: name.clone(),
                    height,
                    width,
                })
            }
            _ => None,
        };
        let Some(first) = inputs.iter().find(|(_, dims)| dims.len() == 4) else {
            return Err(no_image(&inputs));
        };
        let Some(image) = fixed(first) else {
            if !first.1[2..].iter().any(|d| matches!(d, Dim::Fixed(_))) {
                return Err(ResizeError::AlreadyDynamic {
                    input: first.0.clone(),
                    shape: shape(&first.1),
                });
            }
            return Err(no_image(&inputs));
        };
        let others = inputs.iter().filter_map(fixed).filter(|other| {
            let grows = |a: i64, b: i64| (a % b == 0 || b % a == 0) && a > 1;
            other.name != image.name
                && grows(other.height, image.height)
                && other.height.checked_mul(image.width) == image.height.checked_mul(other.width)
        });
        Ok(Images {
            others: others.collect(),
            image,
            inputs,
        })
    }

    /// Whether `name` is an image that grows, and its size in the export.
    pub fn get(&self, name: &str) -> Option<&Image> {
        let mut all = std::iter::once(&self.image).chain(&self.others);
        all.find(|i| i.name == name)
    }

    /// The size of `other` where the image is `size`, of which its own is a multiple or a fraction.
    pub fn scaled(&self, other: &Image, height: i64, width: i64) -> Option<[i64; 2]> {
        let scale = |size: i64, mine: i64, theirs: i64| {
            let product = size.checked_mul(theirs)?;
            (product % mine == 0).then(|| product / mine)
        };
        Some([
            scale(height, self.image.height, other.height)?,
            scale(width, self.image.width, other.width)?,
        ])
    }

    /// The shape of every input at `sizes`.
    pub fn shapes(&self, sizes: &Sizes) -> Option<Vec<(String, Vec<i64>)>> {
        let shape = |(name, dims): &(String, Vec<Dim>)| {
            let mut shape: Vec<i64> = dims
                .iter()
                .enumerate()
                .map(|(axis, dim)| match (dim, axis) {
                    (Dim::Fixed(size), _) => *size,
                    (_, 0) => sizes.batch,
                    _ => sizes.text,
                })
                .collect();
            if let (Some(image), [_, _, height, width]) = (self.get(name), &mut shape[..]) {
                [*height, *width] = self.scaled(image, sizes.height, sizes.width)?;
            }
            Some((name.clone(), shape))
        };
        self.inputs.iter().map(shape).collect()
    }

    /// Whether an input has an open first dimension.
    pub fn has_open_batch(&self) -> bool {
        let open = |d: &Dim| !matches!(d, Dim::Fixed(_));
        self.inputs.iter().any(|(_, dims)| dims.iter().any(open))
    }
}

fn declared(info: &ValueInfoProto) -> Option<(String, Vec<Dim>)> {
    let (_, dims) = tensor_type_of(info)?;
    Some((info.name.clone()?, dims?))
}

fn no_image(inputs: &[(String, Vec<Dim>)]) -> ResizeError {
    let list = inputs
        .iter()
        .map(|(name, d)| format!("'{name}' {}", shape(d)));
    ResizeError::NoImage {
        inputs: list.collect::<Vec<_>>().join(", "),
    }
}

fn shape(dims: &[Dim]) -> String {
    let dims = dims.iter().map(|d| match d {
        Dim::Fixed(size) => size.to_string(),
        Dim::Named(name) => name.clone(),
        Dim::Unknown => "?".to_owned(),
    });
    format!("[{}]", dims.collect::<Vec<_>>().join(", "))
}
