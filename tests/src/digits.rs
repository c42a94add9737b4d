//! Handwritten digits from a small diffusion transformer (`models/scripts/train_digits_dit.py`), how often a classifier
//! recognises them (what a converted model is worth beside its original), and the transformer's inputs on the way
//! (what such a model is distilled from).

use std::error::Error;
use std::path::Path;

use linfusion_models::random::SplitMix64;
use linfusion_runtime::engine::{Engine, Operators, Session, SessionOptions};
use linfusion_runtime::npz;
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
        let mut sampler = Sampler::load(self.engine, model, self.seed)?;
        let mut result = Recognised { right: 0, of: 0 };
        while result.of < self.samples {
            let count = BATCH.min(self.samples - result.of);
            let label = |i: usize| (result.of + i) % CLASSES;
            let labels = Array1::from_shape_fn(count, |i| label(i) as i64);
            let x = sampler.images(&labels, &mut |_| Ok(()))?;
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

/// Writes `count` inputs that the model meets while it makes images: [`OF_AN_IMAGE`] of each, at steps drawn at random, a
/// `.npz` file each, in the images' order.
///
/// # Errors
/// What the engine says; a model with other inputs or outputs; the folder cannot be written to.
pub fn record(
    engine: Engine,
    model: &Path,
    folder: &Path,
    count: usize,
    seed: u64,
) -> Result<(), Box<dyn Error>> {
    std::fs::create_dir_all(folder)?;
    // Of the noise that an experiment of the same seed begins from, nothing may be learned.
    let mut random = SplitMix64::new(seed);
    let mut sampler = Sampler::load(engine, model, random.bits())?;
    let mut written = 0;
    for image in 0.. {
        let mut steps: Vec<usize> = (0..STEPS).collect();
        for i in 0..OF_AN_IMAGE {
            steps.swap(i, i + random.below(STEPS - i));
        }
        let wanted = steps
            .get(..OF_AN_IMAGE.min(count - written))
            .unwrap_or_default();
        if wanted.is_empty() {
            break;
        }
        let mut step = 0;
        let labels = Array1::from_elem(1, (image % CLASSES) as i64);
        sampler.images(&labels, &mut |feeds| {
            if wanted.contains(&step) {
                npz::write(&folder.join(format!("{written:05}.npz")), feeds)?;
                written += 1;
            }
            step += 1;
            Ok(())
        })?;
    }
    Ok(())
}

/// Inputs that an image gives to [`record`].
pub const OF_AN_IMAGE: usize = 4;

/// A model with the noise that it begins from.
struct Sampler {
    session: Session,
    random: SplitMix64,
}

/// Sees what a model is given.
type Watch<'a> = dyn FnMut(&[(String, Tensor)]) -> Result<(), Box<dyn Error>> + 'a;

impl Sampler {
    fn load(engine: Engine, model: &Path, seed: u64) -> Result<Self, Box<dyn Error>> {
        let options = SessionOptions {
            operators: Operators::InProcess,
            ..SessionOptions::default()
        };
        Ok(Sampler {
            session: Session::from_file(engine, model, &options)?,
            random: SplitMix64::new(seed),
        })
    }

    /// An image for each label, by Euler's method; `watch` sees what the model is given at each step.
    fn images(
        &mut self,
        labels: &Array1<i64>,
        watch: &mut Watch<'_>,
    ) -> Result<Array4<f32>, Box<dyn Error>> {
        let count = labels.len();
        let random = &mut self.random;
        let mut x = Array4::from_shape_simple_fn((count, 1, SIDE, SIDE), || random.normal() as f32);
        for step in 0..STEPS {
            let t = Array1::from_elem(count, 1.0 - step as f32 / STEPS as f32);
            let feeds = [
                ("x".to_owned(), Tensor::from(x.clone())),
                ("t".to_owned(), Tensor::from(t)),
                ("label".to_owned(), Tensor::from(labels.clone())),
            ];
            watch(&feeds)?;
            let outputs = self.session.run(&feeds)?;
            let velocity = outputs.first().and_then(|(_, v)| v.as_f32());
            let velocity = velocity
                .filter(|v| v.shape() == x.shape())
                .ok_or("the model's output is no float32 image")?;
            x.zip_mut_with(&velocity.into_dimensionality::<Ix4>()?, |x, v| {
                *x -= v / STEPS as f32
            });
        }
        Ok(x)
    }
}

#[cfg(test)]
mod tests {
    use linfusion_models::fixtures;

    use super::*;

    #[test]
    fn inputs_on_the_way_are_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let model = fixtures::path("digits").join("digits-dit.onnx");
        record(Engine::Tract, &model, folder.path(), 6, 3).unwrap();
        let mut files: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|f| f.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(files.len(), 6);
        let read = |path: &std::path::PathBuf| npz::read(path).unwrap();
        let times: Vec<f64> = files
            .iter()
            .map(|f| {
                let feeds = read(f);
                let names: Vec<&str> = feeds.iter().map(|(name, _)| name.as_str()).collect();
                assert_eq!(names, ["x", "t", "label"]);
                *feeds[1].1.to_f64().first().unwrap()
            })
            .collect();
        let mut judged = SplitMix64::new(3);
        let judged: Vec<f32> = (0..4).map(|_| judged.normal() as f32).collect();
        let first = read(&files[0])[0].1.to_f64();
        assert!(
            judged
                .iter()
                .all(|v| !first.iter().any(|w| *w == f64::from(*v)))
        );
        // Down the steps of an image, four of each.
        assert!(times[..4].is_sorted_by(|a, b| a > b), "{times:?}");
        let labels = [0, 4].map(|i| read(&files[i])[2].1.to_f64().sum());
        assert_eq!(labels, [0.0, 1.0]);
    }
}
