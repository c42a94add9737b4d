//! Handwritten digits from a small diffusion transformer (`models/scripts/train_digits_dit.py`), and how
//! often a classifier recognises them: what a converted model is worth beside its original.

use std::error::Error;
use std::path::Path;

use linfusion_models::random::SplitMix64;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::tensor::Tensor;
use ndarray::{Array1, Array4, Ix4};

/// Rows and columns of an image.
pub const SIDE: usize = 16;
/// Steps from noise to image, as the script's `expected.json` has them.
pub const STEPS: usize = 20;
const CLASSES: usize = 10;
const BATCH: usize = 100;

/// Samples digits with one or more models from the same noise and has them judged.
pub struct Experiment {
    engine: Engine,
    judge: Session,
    /// Images a model.
    pub samples: usize,
    /// Seed of the noise.
    pub seed: u64,
}

/// What became of a model's images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recognised {
    /// Images that the classifier takes for what they were to be.
    pub right: usize,
    /// Images.
    pub of: usize,
}

impl Recognised {
    /// The fraction.
    #[must_use]
    pub fn rate(self) -> f64 {
        self.right as f64 / self.of.max(1) as f64
    }
}

impl Experiment {
    /// Loads the classifier.
    ///
    /// # Errors
    /// What the engine says.
    pub fn new(
        engine: Engine,
        classifier: &Path,
        samples: usize,
        seed: u64,
    ) -> Result<Self, Box<dyn Error>> {
        Ok(Experiment {
            engine,
            judge: Session::from_file(engine, classifier, &SessionOptions::default())?,
            samples,
            seed,
        })
    }

    /// Labels 0 to 9 in turn, each from its noise by Euler's method: x ← x − v/steps at t = 1, 1 − 1/steps, …
    ///
    /// # Errors
    /// What the engine says; a model with other inputs or outputs.
    pub fn run(
        &mut self,
        model: &Path,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Recognised, Box<dyn Error>> {
        let options = SessionOptions {
            operators: Operators::InProcess,
            ..SessionOptions::default()
        };
        let mut session = Session::from_file(self.engine, model, &options)?;
        let mut random = SplitMix64::new(self.seed);
        let mut result = Recognised { right: 0, of: 0 };
        while result.of < self.samples {
            let count = BATCH.min(self.samples - result.of);
            let label = |i: usize| (result.of + i) % CLASSES;
            let labels = Array1::from_shape_fn(count, |i| label(i) as i64);
            let mut x =
                Array4::from_shape_simple_fn((count, 1, SIDE, SIDE), || random.normal() as f32);
            for step in 0..STEPS {
                let t = Array1::from_elem(count, 1.0 - step as f32 / STEPS as f32);
                let feeds = [
                    ("x", Tensor::from(x.clone())),
                    ("t", Tensor::from(t)),
                    ("label", Tensor::from(labels.clone())),
                ];
                let outputs = session.run(&feeds)?;
                let velocity = outputs.first().and_then(|(_, v)| v.as_f32());
                let velocity = velocity
                    .filter(|v| v.shape() == x.shape())
                    .ok_or("the model's output is no float32 image")?;
                x.zip_mut_with(&velocity.into_dimensionality::<Ix4>()?, |x, v| {
                    *x -= v / STEPS as f32
                });
            }
            let outputs = self.judge.run(&[("image", Tensor::from(x))])?;
            let logits = outputs.first().and_then(|(_, l)| l.as_f32());
            let logits = logits.ok_or("the classifier's output is not float32")?;
            for (i, row) in logits.outer_iter().enumerate() {
                let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                result.right += usize::from(best.is_some_and(|(class, _)| class == label(i)));
            }
            result.of += count;
            progress(result.of);
        }
        Ok(result)
    }
}
