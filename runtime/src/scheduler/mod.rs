//! Samplers of diffusion models: from `scheduler_config.json` to the next latents.

mod ddim;
mod dpm;
mod euler;
mod fields;
mod flow;
mod lcm;
mod path;
mod pndm;
mod recipe;
mod schedule;
mod state;
#[cfg(test)]
mod tests;
mod unipc;

pub use fields::SchedulerError;
pub use recipe::{Assignment, Combination, Recipe, Slot};
pub use state::State;

use fields::Fields;

/// One sampler with its time steps chosen. It computes coefficients; [`State`] applies them, on whatever device.
pub trait Scheduler: Send {
    /// What the model is given as its `timestep`, one value per evaluation, from noise to image. Whole numbers
    /// where the sampler was trained on them.
    fn timesteps(&self) -> &[f64];

    /// Evaluations per step of the schedule; the first step to run from a noised image is a multiple of it.
    fn order(&self) -> usize {
        1
    }

    /// Standard deviation of the noise that a generation begins with.
    fn init_noise_sigma(&self) -> f64 {
        1.0
    }

    /// Whether the schedule is of a part already: a run from an image takes all of it, where those of others begin within.
    fn is_cut(&self) -> bool {
        false
    }

    /// What the sample is multiplied by to be the model's input at evaluation `index`.
    fn input_scale(&self, index: usize) -> f64 {
        let _ = index;
        1.0
    }

    /// What moves the sample on to the next evaluation.
    fn step(&self, at: Evaluation) -> Recipe;

    /// Factors of the clean sample and of noise in what is noised to the level of evaluation `index`.
    fn noising(&self, index: usize) -> [f64; 2];
}

/// An evaluation of the model within a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Evaluation {
    /// Its place in [`Scheduler::timesteps`].
    pub index: usize,
    /// That of the run's first, before which nothing is remembered.
    pub first: usize,
}

impl Evaluation {
    /// Evaluations before it in the run.
    fn done(self) -> usize {
        self.index.saturating_sub(self.first)
    }
}

/// Tensors of the latents' shape that a run keeps from step to step, the latents and the clean sample among them.
pub fn kept(scheduler: &dyn Scheduler, first: usize) -> usize {
    let steps = first..scheduler.timesteps().len();
    let assigned = steps.flat_map(|index| {
        let recipe = scheduler.step(Evaluation { index, first });
        let slots: Vec<Slot> = recipe.assignments().iter().map(|a| a.to).collect();
        slots
    });
    assigned.collect::<std::collections::BTreeSet<Slot>>().len()
}

/// What samplers have to know beside their configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Run {
    /// Steps of the schedule (`num_inference_steps`).
    pub steps: usize,
    /// Tokens of the latent image, for flow-matching models that shift their schedule by it.
    pub image_tokens: Option<usize>,
    /// DDIM's share of DDPM's noise, 0 to 1.
    pub eta: f64,
    /// Share of the distilled schedule that LCM's steps are taken from, above 0 to 1; other samplers' schedules are whole.
    pub strength: f64,
}

/// Names that [`from_config`] takes beside those of diffusers' classes.
pub const NAMES: [&str; 11] = [
    "ddim",
    "pndm",
    "euler",
    "euler-a",
    "dpm++",
    "dpm++-karras",
    "dpm++-sde",
    "dpm++-sde-karras",
    "unipc",
    "lcm",
    "flow-euler",
];

/// The fields of a `scheduler_config.json`; infinities, which Python writes as bare words, are the texts "inf" and "-inf".
///
/// # Errors
/// The text is no JSON object.
pub fn config(text: &str) -> Result<serde_json::Map<String, serde_json::Value>, SchedulerError> {
    Fields::parse(text).map(Fields::into_map)
}

/// Builds the sampler of a `scheduler_config.json`, or another one, given by a name of [`NAMES`] or of diffusers, from the
/// same configuration.
///
/// # Errors
/// The text is no JSON object, a field is unknown or asks for what isn't there, or there is no sampler of that name.
pub fn from_config(
    text: &str,
    choice: Option<&str>,
    run: &Run,
) -> Result<Box<dyn Scheduler>, SchedulerError> {
    let mut fields = Fields::parse(text)?;
    let class = match choice {
        Some(name) => {
            let class = fields.choose(name).ok_or_else(|| SchedulerError::Unknown {
                name: name.to_owned(),
            })?;
            class.to_owned()
        }
        None => fields.class()?,
    };
    if run.steps == 0 {
        return Err(SchedulerError::Steps {
            found: 0,
            expected: "at least 1".to_owned(),
        });
    }
    if run.eta != 0.0 && class != "DDIMScheduler" {
        return Err(SchedulerError::Field {
            field: "eta".to_owned(),
            found: run.eta.to_string(),
            expected: format!("0: {class} doesn't take it, DDIM does"),
        });
    }
    let scheduler: Box<dyn Scheduler> = match class.as_str() {
        "DDIMScheduler" => Box::new(ddim::Ddim::new(&mut fields, run)?),
        "PNDMScheduler" => Box::new(pndm::Pndm::new(&mut fields, run)?),
        "EulerDiscreteScheduler" => Box::new(euler::Euler::new(&mut fields, run, false)?),
        "EulerAncestralDiscreteScheduler" => Box::new(euler::Euler::new(&mut fields, run, true)?),
        "DPMSolverMultistepScheduler" => Box::new(dpm::DpmSolver::new(&mut fields, run)?),
        "UniPCMultistepScheduler" => Box::new(unipc::UniPc::new(&mut fields, run)?),
        "LCMScheduler" => Box::new(lcm::Lcm::new(&mut fields, run)?),
        "FlowMatchEulerDiscreteScheduler" => Box::new(flow::FlowEuler::new(&mut fields, run)?),
        _ => return Err(SchedulerError::Unknown { name: class }),
    };
    fields.finish(&class)?;
    Ok(scheduler)
}
