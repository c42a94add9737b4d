//! How much memory the stages of a generation will take, counted from the models' graphs before any is loaded.

use std::path::Path;

use linfusion_models::onnx::{ElementType, OnnxFile, make};
use linfusion_models::shapes::{Footprint, Probe, Runner, Shapes, operations};
use serde::Serialize;

use super::conditions::is_residual;
use super::denoiser::Guidance;
use super::error::PipelineError;
use super::folder::{Family, Folder};
use super::ladder::Size;
use super::opened::{Opened, scheduler};
use super::request::Init;
use super::vae;
use crate::engine::{Device, Operators, halves, memory_of};
use crate::memory::{resident, shown};
use crate::scheduler::kept;

/// What a stage will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageMemory {
    /// Its name, as in the report.
    pub stage: String,
    /// Bytes of its models' weights.
    pub weights: u64,
    /// Bytes of values, where they are most.
    pub values: u64,
    /// The node during which they are.
    pub node: String,
    /// Floating-point operations of its models, counted; a multiply-add is two.
    pub operations: f64,
    /// Values of the graphs whose size is not known, and which count nothing.
    pub unknown: usize,
}

impl StageMemory {
    /// All bytes.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.values)
    }
}

/// Text tokens that are counted with, where the graph leaves them open: T5's of PixArt, CLIP's otherwise.
fn text_tokens(folder: &Folder) -> i64 {
    match folder.family {
        Family::PixArt => signed(folder.t5_tokens),
        _ => 77,
    }
}

impl Opened<'_> {
    /// All stages in order, under the names of the report.
    pub fn stages(&self) -> Result<Vec<StageMemory>, PipelineError> {
        let mut stages = vec![self.text()?];
        for (rung, size) in self.plan.sizes.iter().enumerate() {
            let from_image = matches!(self.request.init, Init::Image { .. } | Init::Inpaint { .. });
            if rung > 0 || from_image {
                stages.push(self.encode(*size)?);
            }
            stages.push(self.denoise(*size)?);
            stages.push(self.decode(*size)?);
        }
        // On the processor, what this program has already counts too.
        if self.place.options.device == Device::Cpu {
            let base = resident().unwrap_or(0);
            for stage in &mut stages {
                stage.values = stage.values.saturating_add(base);
            }
        }
        Ok(stages)
    }

    /// The largest stage must fit into what is free.
    pub fn check(&self, stages: &[StageMemory]) -> Result<(), PipelineError> {
        let options = &self.place.options;
        let limit = options
            .device_memory
            .filter(|_| options.device != Device::Cpu);
        let free = match (memory_of(options.device), limit) {
            (Some(all), Some(limit)) => Some(all.min(limit as u64)),
            (all, limit) => all.or(limit.map(|l| l as u64)),
        };
        let largest = stages.iter().max_by_key(|stage| stage.total());
        let (Some(free), Some(largest)) = (free, largest) else {
            return Ok(());
        };
        // What this program has already isn't free, and isn't needed again.
        let there = match options.device {
            Device::Cpu => resident().unwrap_or(0),
            Device::Cuda(_) => 0,
        };
        if self.request.force || largest.total().saturating_sub(there) <= free {
            return Ok(());
        }
        Err(PipelineError::Memory {
            stage: largest.stage.clone(),
            needed: shown(largest.total()),
            available: match limit {
                Some(limit) if limit as u64 == free => {
                    format!("--gpu-memory allows {}", shown(free))
                }
                _ => options.device.has(free),
            },
            hint: self.hint(largest),
        })
    }

    fn hint(&self, stage: &StageMemory) -> String {
        let place = match stage.node.as_str() {
            "" => String::new(),
            node => format!("most of it at node `{node}`; "),
        };
        let remedy = if !stage.stage.starts_with("denoise") {
            "smaller --vae-tile"
        } else if self.plan.guided && self.request.batching == Guidance::Together {
            "try --cfg-split, a smaller --size, or convert the pipeline with linfusion-convert if it isn't"
        } else {
            "try a smaller --size, or convert the pipeline with linfusion-convert if it isn't"
        };
        format!("{place}{remedy}; --force begins anyway")
    }

    fn count(&self, component: &str, probe: &Probe) -> Result<Counted, PipelineError> {
        let path = self.folder.model(component)?;
        let file = open(&path)?;
        let read = |tensor: &_| file.tensor_bytes(tensor).ok();
        let model = &mut file.model.clone();
        // Each residual has a size of its own, which the graph often leaves open; what it is added to has the same.
        for value in &mut model.graph.get_or_insert_default().input {
            let name = value.name.as_deref().unwrap_or_default();
            if let (true, Some((element, _))) = (is_residual(name), make::tensor_type_of(value)) {
                *value = make::value_info(name, element, &vec![make::Dim::Fixed(1); 4]);
            }
        }
        let shapes = Shapes::propagate(model, &read, probe);
        let options = &self.place.options;
        let runner = Runner {
            kernels: options.operators != Operators::None,
            halves: halves(self.place.engine, options.device),
        };
        let footprint = Footprint::of(model, &shapes, runner);
        let outputs = model.graph.output.iter().filter_map(|value| {
            let fact = shapes.fact(value.name.as_deref()?);
            let element = ElementType::from_onnx(fact.element?)?;
            let bytes = element.byte_len(fact.shape.as_deref()?).ok()??;
            u64::try_from(bytes).ok()
        });
        Ok(Counted {
            footprint,
            operations: operations(model, &shapes),
            outputs: outputs.collect(),
        })
    }

    fn text(&self) -> Result<StageMemory, PipelineError> {
        let mut largest = Footprint::default();
        let mut operations = 0.0;
        for component in ["text_encoder", "text_encoder_2", "text_encoder_3"] {
            if !self.folder.has(component) {
                continue;
            }
            let probe = Probe {
                batch: 2,
                latent: (1, 1),
                text: text_tokens(self.folder),
            };
            let found = self.count(component, &probe)?;
            operations += found.operations;
            if found.footprint.total() >= largest.total() {
                largest = found.footprint;
            }
        }
        let models = [Counted {
            footprint: largest,
            operations,
            outputs: Vec::new(),
        }];
        Ok(stage("text".to_owned(), &models, 0, 1.0))
    }

    fn denoise(&self, size: Size) -> Result<StageMemory, PipelineError> {
        let (images, _, height, width) = self.plan.latent_shape(size);
        let sides = match (self.plan.guided, self.request.batching) {
            (true, Guidance::Together) => 2_usize,
            _ => 1,
        };
        let probe = Probe {
            batch: signed(images * sides),
            latent: (signed(height), signed(width)),
            text: text_tokens(self.folder),
        };
        let mut models = vec![self.count(self.folder.denoiser(), &probe)?];
        let mut beside = self.between_steps(size, sides)?;
        if self.request.control.is_some() && self.folder.has("controlnet") {
            let control = self.count("controlnet", &probe)?;
            beside = beside.saturating_add(self.residuals(size, images * sides, &control.outputs));
            models.push(control);
        }
        if self.request.preview.is_some() {
            // Previews are decoded while the model stays loaded.
            models.push(self.count("vae_decoder", &self.tile_of_latents(size))?);
        }
        let evaluations = self.request.steps * if self.plan.guided { 2 / sides } else { 1 };
        Ok(stage(
            format!("denoise {size}"),
            &models,
            beside,
            evaluations as f64,
        ))
    }

    /// Latents and what is computed from them, in single precision, while the model runs or beside it.
    fn between_steps(&self, size: Size, sides: usize) -> Result<u64, PipelineError> {
        let (images, channels, height, width) = self.plan.latent_shape(size);
        let scheduler = scheduler(self.folder, self.request, &self.plan, size, 1.0)?;
        // What the sampler keeps; the prediction, noise, the sum that is being computed and the scaled latents; and of each
        // side the batch, the model's input and output, and the check of these.
        let tensors = kept(scheduler.as_ref(), 0) + 4 + 4 * sides;
        // An inpainting mask and image, alone and in each input.
        let told = match self.request.init {
            Init::Inpaint { .. } => (channels + 1) * (2 + 2 * sides),
            _ => 0,
        };
        Ok((4 * images * (tensors * channels + told) * height * width) as u64)
    }

    /// A ControlNet's hint, uploaded, as the type that it takes and in a batch of so many, and what it gives, which stays while
    /// the model runs.
    fn residuals(&self, size: Size, batch: usize, outputs: &[u64]) -> u64 {
        let hint = 3 * 4 * size.width * size.height * (batch + 3);
        let copies = match self.request.control_scale {
            1.0 => 1,
            _ => 2,
        };
        // Each is multiplied in single precision, and checked, alone.
        let largest = outputs.iter().max().copied().unwrap_or(0);
        let all = outputs.iter().sum::<u64>().saturating_mul(copies);
        all.saturating_add(largest.saturating_mul(2))
            .saturating_add(hint as u64)
    }

    fn decode(&self, size: Size) -> Result<StageMemory, PipelineError> {
        let model = self.count("vae_decoder", &self.tile_of_latents(size))?;
        let whole = format!("decode {size}");
        Ok(stage(whole, &[model], self.bands(size), self.tiles(size)))
    }

    fn tile_of_latents(&self, size: Size) -> Probe {
        let side = self.request.vae_tile;
        let factor = self.vae.factor();
        Probe {
            batch: 1,
            latent: (
                signed(size.height.min(side) / factor),
                signed(size.width.min(side) / factor),
            ),
            text: 1,
        }
    }

    fn encode(&self, size: Size) -> Result<StageMemory, PipelineError> {
        let side = self.request.vae_tile;
        let probe = Probe {
            batch: 1,
            // Its input is pixels.
            latent: (signed(size.height.min(side)), signed(size.width.min(side))),
            text: 1,
        };
        let model = self.count("vae_encoder", &probe)?;
        // The image as bytes and as planes.
        let image = (3 + 12) * size.width * size.height;
        let whole = format!("encode {size}");
        Ok(stage(whole, &[model], image as u64, self.tiles(size)))
    }

    /// How many times a whole tile's pixels go through the VAE.
    fn tiles(&self, size: Size) -> f64 {
        let side = self.request.vae_tile;
        let along = |pixels: usize| vae::covered(pixels, side) as f64 / pixels.min(side) as f64;
        along(size.width) * along(size.height)
    }

    /// Two rows of tiles, and one joined, in single precision.
    fn bands(&self, size: Size) -> u64 {
        let rows = size.height.min(self.request.vae_tile);
        (3 * 3 * 4 * rows * size.width) as u64
    }
}

fn signed(size: usize) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// A model at the sizes of a stage.
struct Counted {
    footprint: Footprint,
    operations: f64,
    /// Bytes of each output.
    outputs: Vec<u64>,
}

/// A stage that runs `models` so many times, with so many bytes beside them.
fn stage(stage: String, models: &[Counted], beside: u64, times: f64) -> StageMemory {
    let operations: f64 = models.iter().map(|m| m.operations).sum();
    let models = || models.iter().map(|m| &m.footprint);
    // One model runs at a time, but each session keeps the memory that it took.
    let most = models().max_by_key(|m| m.values);
    let values = models().map(|m| m.values).fold(0, u64::saturating_add);
    StageMemory {
        stage,
        operations: operations * times,
        weights: models().map(|m| m.weights).sum(),
        values: values.saturating_add(beside),
        node: most.map(|m| m.node.clone()).unwrap_or_default(),
        unknown: models().map(|m| m.unknown).sum(),
    }
}

fn open(path: &Path) -> Result<OnnxFile, PipelineError> {
    OnnxFile::open(path).map_err(|e| PipelineError::Ports {
        path: path.to_owned(),
        problem: e.to_string(),
    })
}
