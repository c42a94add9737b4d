//! Samplers of diffusion models: from `scheduler_config.json` to the next latents.

/// One sampler with its time steps chosen. Tensors are flat: every rule here is element by element.
pub trait Scheduler: Send {
    /// What the model is given as its `timestep`, one value per evaluation, from noise to image. Whole numbers
    /// where the sampler was trained on them.
    fn timesteps(&self) -> &[f64];

    /// Evaluations per step of the schedule; the first step to run from a noised image is a multiple of it.
    fn order(&self) -> usize {
        1
    }

    /// Standard deviation of the noise that a generation begins with.
    fn init_noise_sigma(&self) -> f64;

    /// Prepares `sample` as the model's input at evaluation `index`.
    fn scale_model_input(&self, sample: &mut [f32], index: usize);

    /// Begins a run at evaluation `index`, forgetting earlier model outputs.
    fn begin(&mut self, index: usize);

    /// Takes the model's output at evaluation `index` and moves `sample` on to the next; `noise` gives standard normal
    /// values, as many as asked for, and is called only by samplers that need them.
    fn step(
        &mut self,
        model_output: &[f32],
        index: usize,
        sample: &mut [f32],
        noise: &mut dyn FnMut(usize) -> Vec<f32>,
    );

    /// Noises the clean `original` in place to the level of evaluation `index`.
    fn add_noise(&self, original: &mut [f32], noise: &[f32], index: usize);

    /// The clean sample that the last step predicted, for previews; `None` before the first.
    fn predicted_original(&self) -> Option<&[f32]>;
}
