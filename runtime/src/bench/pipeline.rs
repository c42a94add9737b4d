//! Measuring a pipeline from prompt to image.

use std::time::Instant;

use linfusion_models::leftovers::TemporaryFolder;
use linfusion_models::onnx::write::Overwrite;
use serde::{Deserialize, Serialize};

use super::job::{Expected, Job, RunTime, StageTime};
use super::median;
use super::size::Pixels;
use super::worker::WorkerError;
use crate::image::Metadata;
use crate::pipeline::{Folder, Observer, Place, Progress, Request, Size, expected, generate};

/// The images that a pipeline is measured by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Images {
    /// What to show.
    pub prompt: String,
    /// Steps of the sampler.
    pub steps: usize,
    /// Guidance; 1 and less is none.
    pub guidance: f64,
    /// Side of the VAE's tiles in pixels.
    pub vae_tile: usize,
}

impl Default for Images {
    fn default() -> Self {
        Self {
            prompt: "a photograph".to_owned(),
            steps: 4,
            guidance: 7.5,
            vae_tile: 1024,
        }
    }
}

/// An opened pipeline and what it is asked for.
pub(super) struct Pipeline {
    folder: Folder,
    place: Place,
    request: Request,
    pub expected: Expected,
    /// Height and width of the image, if they were asked for.
    pub pixels: Option<Pixels>,
    /// The most that any stage had in memory, in bytes.
    pub peak: Option<u64>,
    /// Holds the image, and goes with it.
    _scratch: TemporaryFolder,
}

impl Pipeline {
    pub fn open(job: &Job) -> Result<Self, WorkerError> {
        let scratch = TemporaryFolder::new().map_err(WorkerError::Scratch)?;
        let request = Request {
            seed: job.seed,
            steps: job.images.steps,
            guidance: job.images.guidance,
            size: job.side.map(|side| Size {
                width: side,
                height: side,
            }),
            direct: true,
            vae_tile: job.images.vae_tile,
            // Every run makes it anew.
            overwrite: Overwrite::Force,
            ..Request::new(job.images.prompt.clone(), scratch.path().join("image.png"))
        };
        let folder = Folder::open(&job.model)?;
        let place = Place {
            engine: job.engine.into(),
            options: job.options(),
        };
        let stages = expected(&folder, &place, &request)?;
        Ok(Self {
            expected: Expected {
                operations: stages.iter().map(|s| s.operations).sum(),
                bytes: stages.iter().map(|s| s.total()).max().unwrap_or(0),
            },
            folder,
            place,
            request,
            pixels: job.side.map(Pixels::square),
            peak: None,
            _scratch: scratch,
        })
    }

    pub fn run(&mut self) -> Result<RunTime, WorkerError> {
        let started = Instant::now();
        let generated = generate(
            &self.folder,
            &self.place,
            &self.request,
            &|_| Metadata::default(),
            &mut Quiet,
        )?;
        let ms = started.elapsed().as_secs_f64() * 1e3;
        let stages = &generated.stages;
        self.peak = stages
            .iter()
            .filter_map(|s| s.peak_bytes)
            .max()
            .max(self.peak);
        let steps: Vec<f64> = stages
            .iter()
            .flat_map(|s| &s.step_seconds)
            .copied()
            .collect();
        Ok(RunTime {
            ms,
            step_ms: median(&steps).map(|seconds| seconds * 1e3),
            stages: stages
                .iter()
                .map(|s| StageTime {
                    stage: s.stage.clone(),
                    ms: s.seconds * 1e3,
                })
                .collect(),
        })
    }
}

struct Quiet;

impl Observer for Quiet {
    fn progress(&mut self, _: Progress) {}
}
