//! Names of files, and images between bytes and planes.

use std::path::{Path, PathBuf};

use ndarray::{Array3, Array4, ArrayView3, Axis, concatenate};

use super::error::PipelineError;
use crate::image::{Rgb, to_byte};

/// `name.png` for one image, `name-1.png` and so on for several.
pub(super) fn numbered(path: &Path, number: usize, count: usize) -> PathBuf {
    if count == 1 {
        return path.to_owned();
    }
    beside(path, &(number + 1).to_string())
}

/// Where so many images of one prompt go.
pub fn outputs(path: &Path, count: usize) -> impl Iterator<Item = PathBuf> {
    (0..count).map(move |number| numbered(path, number, count))
}

/// Where previews of one prompt go, the later over the earlier.
pub fn preview(path: &Path) -> PathBuf {
    beside(path, "preview")
}

/// `name-word.png` for `name.png`.
pub(super) fn beside(path: &Path, word: &str) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path
        .extension()
        .map(|e| format!(".{}", e.to_string_lossy()))
        .unwrap_or_default();
    path.with_file_name(format!("{stem}-{word}{extension}"))
}

/// `name-word.png`, or `name-word-2.png` and so on where there is one already.
pub(super) fn unused(path: &Path, word: &str) -> PathBuf {
    let first = beside(path, word);
    let others = (2..).map(|n: u32| beside(path, &format!("{word}-{n}")));
    std::iter::once(first.clone())
        .chain(others)
        .find(|p| !p.exists())
        .unwrap_or(first)
}

pub(super) fn planes(image: &Rgb) -> Result<Array3<f32>, PipelineError> {
    let shape = (3, image.height() as usize, image.width() as usize);
    Array3::from_shape_vec(shape, image.to_planes()).map_err(|e| PipelineError::Request {
        option: "--image",
        problem: e.to_string(),
    })
}

/// Rows [3, rows, width] in −1 … 1 as bytes, pixel by pixel.
pub(super) fn bytes(band: ArrayView3<'_, f32>) -> Vec<u8> {
    let pixels = band.permuted_axes([1, 2, 0]);
    pixels.iter().map(|v| to_byte(*v)).collect()
}

pub(super) fn repeat(latents: &Array3<f32>, count: usize) -> Array4<f32> {
    let views = vec![latents.view().insert_axis(Axis(0)); count];
    concatenate(Axis(0), &views).unwrap_or_else(|_| latents.clone().insert_axis(Axis(0)))
}

pub(super) fn finite<'v>(
    values: impl ExactSizeIterator<Item = &'v f32> + Clone,
    stage: impl FnOnce() -> String,
) -> Result<(), PipelineError> {
    let count = values.clone().filter(|v| !v.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    Err(PipelineError::NotFinite {
        stage: stage(),
        count,
        total: values.len(),
        place: String::new(),
    })
}
