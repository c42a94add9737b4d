//! A request with what its pipeline's files say: the begin of a generation, and of counting what one would take.

use super::error::PipelineError;
use super::folder::{DenoiserConfig, Folder, VaeConfig};
use super::ladder::Size;
use super::model::Place;
use super::plan::Plan;
use super::request::Request;
use crate::scheduler::{self, Run, Scheduler};

/// A request that was found possible.
pub(super) struct Opened<'a> {
    pub folder: &'a Folder,
    pub place: &'a Place,
    pub request: &'a Request,
    pub plan: Plan,
    pub vae: VaeConfig,
    pub config: DenoiserConfig,
}

impl<'a> Opened<'a> {
    /// Reads the configurations that all stages go by.
    ///
    /// # Errors
    /// One is missing or damaged, or the request is impossible with it.
    pub fn new(
        folder: &'a Folder,
        place: &'a Place,
        request: &'a Request,
    ) -> Result<Self, PipelineError> {
        let vae: VaeConfig = folder.json("vae_decoder", "config.json")?;
        let config: DenoiserConfig = folder.json(folder.denoiser(), "config.json")?;
        let plan = Plan::new(folder, request, &vae, &config)?;
        Ok(Self {
            folder,
            place,
            request,
            plan,
            vae,
            config,
        })
    }
}

/// The sampler of a stage that changes an image by so much of the steps, 1 for one from noise.
///
/// # Errors
/// The pipeline's configuration cannot be followed.
pub(super) fn scheduler(
    folder: &Folder,
    request: &Request,
    plan: &Plan,
    size: Size,
    strength: f64,
) -> Result<Box<dyn Scheduler>, PipelineError> {
    let run = Run {
        steps: request.steps,
        image_tokens: Some(size.width / plan.token * (size.height / plan.token)),
        eta: request.eta,
        // As diffusers' pipeline of latent consistency models has it; its others cut LCM's schedule as any.
        strength: if plan.distilled { strength } else { 1.0 },
    };
    folder.scheduler(|text| scheduler::from_config(text, request.scheduler.as_deref(), &run))
}
