//! Latents to pixels and back, in tiles where an image is large: attention in the VAE's middle is softmax over all of its
//! pixels.

use ndarray::{Array2, Array3, Array4, ArrayView3, Axis, concatenate, s};

use super::error::PipelineError;
use super::folder::{Folder, VaeConfig};
use super::model::{Model, Place};
use crate::torch_random::TorchRandom;

/// Share of a tile that it has in common with the next.
const OVERLAP: f64 = 0.25;

/// How an image is cut: tiles of `side` a `stride` apart, blended over `extent` in the output's pixels, of which
/// `kept` of each tile are used. As diffusers' tiled VAE cuts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiling {
    side: usize,
    stride: usize,
    extent: usize,
    kept: usize,
}

impl Tiling {
    /// Tiles of `side` where an output has `up / down` pixels for one of the input.
    fn new(side: usize, up: usize, down: usize) -> Self {
        let out = side * up / down;
        let extent = (out as f64 * OVERLAP) as usize;
        Self {
            side,
            stride: ((side as f64 * (1.0 - OVERLAP)) as usize).max(1),
            extent,
            kept: (out - extent).max(1),
        }
    }
}

/// Pixels along an edge that go through the VAE when `pixels` are cut into tiles: those in two tiles count twice.
pub(super) fn covered(pixels: usize, side: usize) -> usize {
    if pixels <= side {
        return pixels;
    }
    let stride = Tiling::new(side, 1, 1).stride;
    (0..pixels)
        .step_by(stride)
        .map(|first| side.min(pixels - first))
        .sum()
}

/// What a model does to one tile, [channels, height, width] to the same.
type Run<'a> = dyn FnMut(Array3<f32>) -> Result<Array3<f32>, PipelineError> + 'a;
/// Takes rows of the output as they are finished, [channels, rows, width].
pub type Sink<'a> = dyn FnMut(ArrayView3<'_, f32>) -> Result<(), PipelineError> + 'a;

/// Runs tile after tile, a row of tiles at a time, so that two rows are all that is in memory.
fn tiled(
    input: ArrayView3<'_, f32>,
    tiling: Tiling,
    run: &mut Run<'_>,
    sink: &mut Sink<'_>,
) -> Result<(), PipelineError> {
    let (_, height, width) = input.dim();
    let mut above: Vec<Array3<f32>> = Vec::new();
    for top in (0..height).step_by(tiling.stride) {
        let mut row: Vec<Array3<f32>> = Vec::new();
        for left in (0..width).step_by(tiling.stride) {
            let bottom = (top + tiling.side).min(height);
            let right = (left + tiling.side).min(width);
            row.push(run(input
                .slice(s![.., top..bottom, left..right])
                .to_owned())?);
        }
        for column in 0..row.len() {
            let (before, rest) = row.split_at_mut(column);
            let Some(tile) = rest.first_mut() else { break };
            if let Some(upper) = above.get(column) {
                blend(upper, tile, Axis(1), tiling.extent);
            }
            if let Some(left) = before.last() {
                blend(left, tile, Axis(2), tiling.extent);
            }
        }
        let parts: Vec<_> = row
            .iter()
            .map(|tile| {
                let (_, rows, columns) = tile.dim();
                tile.slice(s![.., ..rows.min(tiling.kept), ..columns.min(tiling.kept)])
            })
            .collect();
        if let Ok(finished) = concatenate(Axis(2), &parts) {
            sink(finished.view())?;
        }
        above = row;
    }
    Ok(())
}

/// Fades from the end of `before` to the begin of `tile` along an axis.
fn blend(before: &Array3<f32>, tile: &mut Array3<f32>, axis: Axis, extent: usize) {
    let length = before.len_of(axis);
    let extent = extent.min(length).min(tile.len_of(axis));
    for i in 0..extent {
        let share = i as f32 / extent as f32;
        let old = before.index_axis(axis, length - extent + i);
        let mut new = tile.index_axis_mut(axis, i);
        new.zip_mut_with(&old, |new, old| *new = old * (1.0 - share) + *new * share);
    }
}

/// The decoder.
pub struct Decoder {
    model: Model,
    config: VaeConfig,
    tile: usize,
}

impl Decoder {
    /// Loads it; images with a side above `tile` pixels are decoded in tiles of that side.
    ///
    /// # Errors
    /// It is missing or refused.
    pub fn load(
        folder: &Folder,
        config: VaeConfig,
        place: &Place,
        tile: usize,
    ) -> Result<Self, PipelineError> {
        Ok(Self {
            model: Model::load(folder, "vae_decoder", place)?,
            config,
            tile,
        })
    }

    /// Decodes latents [channels, height, width] as the sampler leaves them, into rows of [3, rows, width] in −1 … 1.
    ///
    /// # Errors
    /// The model fails, or what `sink` says.
    pub fn decode(
        &mut self,
        latents: ArrayView3<'_, f32>,
        sink: &mut Sink<'_>,
    ) -> Result<(), PipelineError> {
        let unscaled = unscaled(latents, &self.config);
        let factor = self.config.factor();
        let side = self.tile / factor;
        let (_, height, width) = unscaled.dim();
        let model = &mut self.model;
        let mut run = |tile: Array3<f32>| {
            let (rows, columns) = (tile.dim().1, tile.dim().2);
            let image = only(model, "latent_sample", tile)?;
            match image.dim() {
                (3, h, w) if (h, w) == (rows * factor, columns * factor) => Ok(image),
                found => Err(model.ports(format!(
                    "its output is {found:?} for latents of {rows} × {columns}, expected (3, {}, {})",
                    rows * factor,
                    columns * factor
                ))),
            }
        };
        if height <= side && width <= side {
            return sink(run(unscaled)?.view());
        }
        tiled(
            unscaled.view(),
            Tiling::new(side, factor, 1),
            &mut run,
            sink,
        )
    }
}

/// The encoder.
pub struct Encoder {
    model: Model,
    config: VaeConfig,
    tile: usize,
}

impl Encoder {
    /// Loads it; images with a side above `tile` pixels are encoded in tiles of that side.
    ///
    /// # Errors
    /// It is missing or refused.
    pub fn load(
        folder: &Folder,
        config: VaeConfig,
        place: &Place,
        tile: usize,
    ) -> Result<Self, PipelineError> {
        Ok(Self {
            model: Model::load(folder, "vae_encoder", place)?,
            config,
            tile,
        })
    }

    /// Encodes an image [3, height, width] in −1 … 1 to latents for the sampler, drawing from the encoder's
    /// distribution.
    ///
    /// # Errors
    /// The model fails.
    pub fn encode(
        &mut self,
        image: ArrayView3<'_, f32>,
        random: &mut TorchRandom,
    ) -> Result<Array3<f32>, PipelineError> {
        let (_, height, width) = image.dim();
        let factor = self.config.factor();
        let model = &mut self.model;
        let mut run = |tile: Array3<f32>| {
            let (rows, columns) = (tile.dim().1, tile.dim().2);
            let latents = only(model, "sample", tile)?;
            match latents.dim() {
                (_, h, w) if (h, w) == (rows / factor, columns / factor) => Ok(latents),
                found => Err(model.ports(format!(
                    "its output is {found:?} for an image of {rows} × {columns}, expected a row of latents for {factor} of \
                     its rows"
                ))),
            }
        };
        let parameters = if height <= self.tile && width <= self.tile {
            run(image.to_owned())?
        } else {
            let mut bands: Vec<Array3<f32>> = Vec::new();
            let tiling = Tiling::new(self.tile, 1, factor);
            tiled(image, tiling, &mut run, &mut |band| {
                bands.push(band.to_owned());
                Ok(())
            })?;
            let views: Vec<_> = bands.iter().map(|b| b.view()).collect();
            concatenate(Axis(1), &views).map_err(|e| self.model.ports(e.to_string()))?
        };
        let channels = self.config.latent_channels;
        let latents = match parameters.dim().0 {
            // Older exports draw inside the graph, or give the mean.
            count if count == channels => parameters,
            count if count == 2 * channels => {
                let mean = parameters.slice(s![..channels, .., ..]);
                let log_variance = parameters.slice(s![channels.., .., ..]);
                let noise = random.normal(mean.len());
                let mut drawn = mean.to_owned();
                for ((value, log_variance), noise) in drawn.iter_mut().zip(&log_variance).zip(noise)
                {
                    *value += (0.5 * log_variance.clamp(-30.0, 20.0)).exp() * noise;
                }
                drawn
            }
            count => {
                return Err(self.model.ports(format!(
                    "its output has {count} channels, expected {channels}, or {} for mean and variance",
                    2 * channels
                )));
            }
        };
        Ok(scaled(latents, &self.config))
    }
}

/// Runs a model on its only input, whatever its name; `usual` where it has several.
fn only(model: &mut Model, usual: &str, tile: Array3<f32>) -> Result<Array3<f32>, PipelineError> {
    let name = match model.inputs() {
        [port] => port.name.clone(),
        _ => usual.to_owned(),
    };
    let batch: Array4<f32> = tile.insert_axis(Axis(0));
    let mut outputs = model.run(vec![(name, batch.into())])?;
    Ok(outputs.image()?.index_axis_move(Axis(0), 0))
}

fn scaled(mut latents: Array3<f32>, config: &VaeConfig) -> Array3<f32> {
    if let Some((mean, std)) = config
        .latents_mean
        .as_ref()
        .zip(config.latents_std.as_ref())
    {
        for ((mut plane, mean), std) in latents.outer_iter_mut().zip(mean).zip(std) {
            plane.mapv_inplace(|v| (v - mean) * config.scaling_factor / std);
        }
        return latents;
    }
    let shift = config.shift_factor.unwrap_or(0.0);
    latents.mapv_inplace(|v| (v - shift) * config.scaling_factor);
    latents
}

fn unscaled(latents: ArrayView3<'_, f32>, config: &VaeConfig) -> Array3<f32> {
    let mut latents = latents.to_owned();
    if let Some((mean, std)) = config
        .latents_mean
        .as_ref()
        .zip(config.latents_std.as_ref())
    {
        for ((mut plane, mean), std) in latents.outer_iter_mut().zip(mean).zip(std) {
            plane.mapv_inplace(|v| v * std / config.scaling_factor + mean);
        }
        return latents;
    }
    let shift = config.shift_factor.unwrap_or(0.0);
    latents.mapv_inplace(|v| v / config.scaling_factor + shift);
    latents
}

/// Latent pixels whose pixels are to be painted anew, from an image's mask: each takes the mask's pixel at its corner, as
/// nearest-neighbour scaling does.
pub fn latent_mask(mask: &Array2<f32>, factor: usize) -> Array2<f32> {
    let (height, width) = mask.dim();
    Array2::from_shape_fn((height / factor, width / factor), |(y, x)| {
        if mask[[y * factor, x * factor]] >= 0.5 {
            1.0
        } else {
            0.0
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A model that enlarges by repetition: tiles of it must join without a trace.
    fn repeat(tile: Array3<f32>) -> Array3<f32> {
        let (c, h, w) = tile.dim();
        Array3::from_shape_fn((c, h * 8, w * 8), |(c, y, x)| tile[[c, y / 8, x / 8]])
    }

    #[test]
    fn tiles_of_a_local_model_join_exactly() {
        for (height, width) in [(8, 8), (9, 40), (41, 17), (64, 33)] {
            let input = Array3::from_shape_fn((3, height, width), |(c, y, x)| {
                (c * 7919 + y * 101 + x) as f32
            });
            let mut bands = Vec::new();
            tiled(
                input.view(),
                Tiling::new(16, 8, 1),
                &mut |t| Ok(repeat(t)),
                &mut |band| {
                    bands.push(band.to_owned());
                    Ok(())
                },
            )
            .unwrap();
            let views: Vec<_> = bands.iter().map(|b| b.view()).collect();
            let joined = concatenate(Axis(1), &views).unwrap();
            let whole = repeat(input);
            assert_eq!(joined.dim(), whole.dim());
            let worst = (&joined - &whole)
                .iter()
                .fold(0.0_f32, |m, d| m.max(d.abs()));
            // Weighted means of equal numbers, in single precision.
            assert!(
                worst <= 24000.0 * f32::EPSILON,
                "{height} × {width}: {worst}"
            );
        }
    }

    #[test]
    fn scaling_is_undone() {
        let plain = |json| serde_json::from_str::<VaeConfig>(json).unwrap();
        let latents = Array3::from_shape_fn((4, 2, 3), |(c, y, x)| (c + y * 2 + x) as f32 - 3.0);
        for json in [
            r#"{"block_out_channels": [1, 2, 3, 4]}"#,
            r#"{"block_out_channels": [1], "scaling_factor": 0.13, "shift_factor": 0.06}"#,
            r#"{"block_out_channels": [1], "latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 3, 4]}"#,
        ] {
            let config = plain(json);
            let back = unscaled(scaled(latents.clone(), &config).view(), &config);
            let worst = (&back - &latents)
                .iter()
                .fold(0.0_f32, |m, d| m.max(d.abs()));
            assert!(worst < 1e-5, "{json}: {worst}");
        }
        assert_eq!(plain(r#"{"block_out_channels": [1, 2, 3, 4]}"#).factor(), 8);
    }
}
