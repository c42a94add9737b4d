//! Learning one site: descent on the squared error of the attention's output, over batches of stored activations.

use candle_core::{Device, Tensor};
use linfusion_models::random::SplitMix64;
use serde::{Deserialize, Serialize};

use super::error::{DistillError, learning};
use super::optimizer::Optimizer;
use super::store::Store;
use super::student::{Shape, Student, Weights};

/// How a site is learned.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Steps.
    pub steps: usize,
    /// AdamW's learning rate at the first of 300 steps, or fewer; it falls to zero as a cosine. See [`Self::rate`].
    pub learning_rate: f64,
    /// Images of a batch; `None`: as many as have 256 tokens.
    pub batch: Option<usize>,
}

/// Tokens that a batch has unless it is told otherwise. More would make a step dearer, and what is learned depends on
/// the number of steps more than on their size.
const TOKENS: usize = 256;

impl Default for Schedule {
    fn default() -> Self {
        Self {
            steps: 300,
            learning_rate: 5e-3,
            batch: None,
        }
    }
}

/// Steps up to which the learning rate is what it is said to be.
const SHORT: usize = 300;

impl Schedule {
    /// The learning rate at the first step: lower as the root of the steps, so that more of them come to rest in finer detail.
    /// (At the sites measured 5e-3 serves 300 steps best, and 1.2e-3 to 2.5e-3 2,000.)
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.learning_rate * (SHORT as f64 / self.steps.max(SHORT) as f64).sqrt()
    }

    /// About what a step at a site takes: its layers' products.
    pub(super) fn work(&self, tokens: usize, dim: usize) -> f64 {
        (self.images(tokens) * tokens) as f64 * (dim * dim) as f64
    }

    /// Images of a batch at a site of so many tokens.
    pub(super) fn images(&self, tokens: usize) -> usize {
        self.batch.unwrap_or_else(|| TOKENS.div_ceil(tokens.max(1)))
    }
}

/// The activations of a site.
pub struct Activations<'a> {
    /// The site's name, for errors.
    pub module: &'a str,
    /// Its sizes.
    pub shape: Shape,
    /// Tokens of an image.
    pub tokens: usize,
    /// Its input.
    pub x: &'a Store,
    /// The attention's output.
    pub target: &'a Store,
    /// What window attention made of the same tokens, for hybrid sites.
    pub near: Option<&'a Store>,
    /// Images that are learned from; the ones after them are held out.
    pub learned: usize,
    /// The folder of the stores, for errors.
    pub folder: &'a std::path::Path,
}

/// How far outputs are from the teacher's, over images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Error {
    /// ‖out − teacher‖² / ‖teacher‖².
    pub relative: f64,
    /// ‖out − teacher‖² / ‖teacher − mean‖², the mean of each channel over all tokens: the share of the variance that is
    /// not explained.
    pub unexplained: f64,
}

/// A point of a curve of losses.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// After so many steps.
    pub step: usize,
    /// Relative error on the images learned from, mean since the last point.
    pub learned: f64,
    /// Relative error on the images held out.
    pub held_out: f64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Fitted {
    /// The weights that served the images held out best.
    pub weights: Weights,
    /// Before the first step.
    pub before: Error,
    /// With these weights.
    pub after: Error,
    /// The way there.
    pub curve: Vec<Point>,
}

/// Looks at the images held out so often on the way.
const LOOKS: usize = 10;
/// Ends in the second half when so many looks in a row saw no improvement; in the first the rate is high.
const PATIENCE: usize = 3;

/// Learns `student`; `tick` hears of each step.
///
/// # Errors
/// Activations cannot be read, or the library that differentiates fails.
pub fn fit(
    student: &Student,
    activations: &Activations<'_>,
    schedule: &Schedule,
    seed: u64,
    device: &Device,
    tick: &dyn Fn(usize),
) -> Result<Fitted, DistillError> {
    let failed = learning(activations.module);
    let mut best = student.weights().map_err(&failed)?;
    let before = error(student, activations, device)?;
    let (mut after, mut curve) = (before, Vec::new());
    let energy = activations.energy()?;
    let batch = schedule.images(activations.tokens).min(activations.learned);
    let mut optimizer =
        Optimizer::new(student.vars(), batch * activations.tokens).map_err(&failed)?;
    let mut order = Order::new(activations.learned, seed);
    let every = schedule.steps.div_ceil(LOOKS).max(1);
    let (mut sum, mut since, mut idle) = (
        Tensor::zeros((), candle_core::DType::F32, device).map_err(&failed)?,
        0,
        0,
    );
    for step in 0..schedule.steps {
        let done = step as f64 / schedule.steps as f64;
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
        let images = order.next(batch);
        let [x, target, near] = activations.batch(&images, device)?;
        let (Some(x), Some(target)) = (x, target) else {
            break;
        };
        let scale = 1.0 / (energy * images.len() as f64).max(f64::MIN_POSITIVE);
        let loss = student
            .squared_error(&x, near.as_ref(), &target)
            .and_then(|loss| loss * scale)
            .map_err(&failed)?;
        optimizer
            .step(&loss, schedule.rate() * cosine)
            .map_err(&failed)?;
        sum = (sum + loss.detach()).map_err(&failed)?;
        since += 1;
        tick(1);
        if (step + 1) % every != 0 && step + 1 != schedule.steps {
            continue;
        }
        let now = error(student, activations, device)?;
        let learned = f64::from(sum.to_scalar::<f32>().map_err(&failed)?) / f64::from(since);
        curve.push(Point {
            step: step + 1,
            learned,
            held_out: now.relative,
        });
        sum = sum.zeros_like().map_err(&failed)?;
        since = 0;
        idle += 1;
        // NaN is no improvement.
        if now.relative < after.relative {
            (after, idle) = (now, 0);
            best = student.weights().map_err(&failed)?;
        }
        if idle >= PATIENCE && 2 * (step + 1) > schedule.steps {
            tick(schedule.steps - step - 1);
            break;
        }
    }
    student.set(&best).map_err(&failed)?;
    Ok(Fitted {
        weights: best,
        before,
        after,
        curve,
    })
}

/// The student's error on the images held out.
///
/// # Errors
/// As [`fit`].
pub fn error(
    student: &Student,
    activations: &Activations<'_>,
    device: &Device,
) -> Result<Error, DistillError> {
    let failed = learning(activations.module);
    let mut sums = Sums::new(activations.shape.dim);
    for image in activations.held_out() {
        let [x, target, near] = activations.batch(&[image], device)?;
        let (Some(x), Some(target)) = (x, target) else {
            continue;
        };
        let values = |t: Tensor| t.flatten_all()?.to_vec1::<f32>();
        let out = student
            .forward(&x, near.as_ref())
            .and_then(values)
            .map_err(&failed)?;
        sums.add(&out, &values(target).map_err(&failed)?);
    }
    Ok(sums.error())
}

/// The error of `out`, which stands for the attention's output itself, on the images held out.
///
/// # Errors
/// Activations cannot be read.
pub fn error_of(out: &Store, activations: &Activations<'_>) -> Result<Error, DistillError> {
    let mut sums = Sums::new(activations.shape.dim);
    for image in activations.held_out() {
        let (mut found, mut target) = (Vec::new(), Vec::new());
        activations.read(out, image, &mut found)?;
        activations.read(activations.target, image, &mut target)?;
        sums.add(&found, &target);
    }
    Ok(sums.error())
}

struct Sums {
    error: f64,
    squares: f64,
    rows: f64,
    channels: Vec<f64>,
}

impl Sums {
    fn new(dim: usize) -> Self {
        Self {
            error: 0.0,
            squares: 0.0,
            rows: 0.0,
            channels: vec![0.0; dim],
        }
    }

    fn add(&mut self, out: &[f32], target: &[f32]) {
        for (out, target) in out
            .chunks(self.channels.len().max(1))
            .zip(target.chunks(self.channels.len().max(1)))
        {
            self.rows += 1.0;
            for ((o, t), mean) in out.iter().zip(target).zip(&mut self.channels) {
                let (o, t) = (f64::from(*o), f64::from(*t));
                self.error += (o - t) * (o - t);
                self.squares += t * t;
                *mean += t;
            }
        }
    }

    fn error(&self) -> Error {
        let means: f64 = self.channels.iter().map(|s| s * s).sum::<f64>() / self.rows.max(1.0);
        let share = |of: f64| match self.error {
            0.0 => 0.0,
            error => error / of.max(f64::MIN_POSITIVE),
        };
        Error {
            relative: share(self.squares),
            unexplained: share(self.squares - means),
        }
    }
}

impl Activations<'_> {
    fn held_out(&self) -> std::ops::Range<usize> {
        self.learned..self.target.count()
    }

    fn read(&self, store: &Store, image: usize, into: &mut Vec<f32>) -> Result<(), DistillError> {
        store
            .read(image, into)
            .map_err(|source| DistillError::Scratch {
                folder: self.folder.to_owned(),
                source,
            })
    }

    /// Input, output and window's output of these images, `[B, N, C]`.
    fn batch(
        &self,
        images: &[usize],
        device: &Device,
    ) -> Result<[Option<Tensor>; 3], DistillError> {
        let tensor = |store: &Store| {
            let mut values = Vec::with_capacity(images.len() * self.tokens * self.shape.dim);
            for image in images {
                self.read(store, *image, &mut values)?;
            }
            let dims = (images.len(), self.tokens, self.shape.dim);
            Tensor::from_vec(values, dims, device).map_err(learning(self.module))
        };
        Ok([
            Some(tensor(self.x)?),
            Some(tensor(self.target)?),
            self.near.map(tensor).transpose()?,
        ])
    }

    /// Mean of ‖target‖² of an image, over those learned from.
    fn energy(&self) -> Result<f64, DistillError> {
        let mut sum = 0.0;
        for image in 0..self.learned {
            let mut values = Vec::new();
            self.read(self.target, image, &mut values)?;
            sum += values
                .iter()
                .map(|v| f64::from(*v) * f64::from(*v))
                .sum::<f64>();
        }
        Ok(sum / self.learned.max(1) as f64)
    }
}

/// Images in random order, each as often as any other.
struct Order {
    random: SplitMix64,
    count: usize,
    left: Vec<usize>,
}

impl Order {
    fn new(count: usize, seed: u64) -> Self {
        Self {
            random: SplitMix64::new(seed),
            count,
            left: Vec::new(),
        }
    }

    fn next(&mut self, batch: usize) -> Vec<usize> {
        let wanted = batch.min(self.count);
        let mut taken = Vec::with_capacity(wanted);
        while taken.len() < wanted {
            if self.left.is_empty() {
                self.left = (0..self.count).collect();
                for i in (1..self.count).rev() {
                    self.left.swap(i, self.random.below(i + 1));
                }
            }
            taken.extend(self.left.pop());
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::distill::student::{Beginning, Layer};

    const SHAPE: Shape = Shape { dim: 8, heads: 2 };
    const TOKENS: usize = 12;

    fn noise(random: &mut SplitMix64, n: usize) -> Vec<f32> {
        (0..n).map(|_| random.normal() as f32).collect()
    }

    fn layers(seed: u64) -> [Layer; 3] {
        let mut random = SplitMix64::new(seed);
        [0, 1, 2].map(|_| Layer {
            weight: noise(&mut random, 64).iter().map(|v| v * 0.4).collect(),
            bias: None,
        })
    }

    fn student(layers: &[Layer; 3]) -> Student {
        let beginning = Beginning {
            projections: layers,
            mid: Some(8),
            mixed: false,
            seed: 1,
        };
        Student::new(SHAPE, &beginning, &Device::Cpu).unwrap()
    }

    /// Random tokens, and what `teacher` makes of them.
    fn lesson(folder: &std::path::Path, teacher: &Student) -> [Store; 2] {
        let mut random = SplitMix64::new(77);
        let mut stores = [(); 2].map(|()| Store::new(folder, TOKENS * 8).unwrap());
        for _ in 0..28 {
            stores[0].push(&noise(&mut random, TOKENS * 8)).unwrap();
            let mut x = Vec::new();
            stores[0].read(stores[0].count() - 1, &mut x).unwrap();
            let x = Tensor::from_vec(x, (1, TOKENS, 8), &Device::Cpu).unwrap();
            assert_eq!(x.dtype(), DType::F32);
            let out = teacher.forward(&x, None).unwrap();
            let out: Vec<f32> = out.flatten_all().unwrap().to_vec1().unwrap();
            stores[1].push(&out).unwrap();
        }
        stores
    }

    fn activations<'a>(folder: &'a std::path::Path, stores: &'a [Store; 2]) -> Activations<'a> {
        Activations {
            module: "m",
            shape: SHAPE,
            tokens: TOKENS,
            x: &stores[0],
            target: &stores[1],
            near: None,
            learned: 20,
            folder,
        }
    }

    const QUICK: Schedule = Schedule {
        steps: 100,
        learning_rate: 5e-3,
        batch: Some(4),
    };

    #[test]
    fn a_student_that_is_the_teacher_stays_there() {
        let folder = tempfile::tempdir().unwrap();
        let layers = layers(3);
        let stores = lesson(folder.path(), &student(&layers));
        let activations = activations(folder.path(), &stores);
        let student = student(&layers);
        let fitted = fit(&student, &activations, &QUICK, 1, &Device::Cpu, &|_| {}).unwrap();
        // Outputs are kept in half precision: half of the last of 11 bits, squared.
        let rounding = 2.0_f64.powi(-24);
        assert!(fitted.before.relative < rounding, "{fitted:?}");
        assert!(
            fitted.after.relative <= fitted.before.relative,
            "{fitted:?}"
        );
    }

    #[test]
    fn another_student_learns_and_the_same_seed_learns_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let stores = lesson(folder.path(), &student(&layers(3)));
        let activations = activations(folder.path(), &stores);
        let mut begin = layers(3);
        begin[2].weight.iter_mut().for_each(|w| *w += 0.1);
        let learn = |seed| {
            let steps = std::cell::Cell::new(0);
            let student = student(&begin);
            let tick = |n| steps.set(steps.get() + n);
            let fitted = fit(&student, &activations, &QUICK, seed, &Device::Cpu, &tick).unwrap();
            assert_eq!(steps.get(), QUICK.steps);
            fitted
        };
        let first = learn(5);
        assert!(
            first.after.relative < 0.5 * first.before.relative,
            "{first:?}"
        );
        assert_eq!(first, learn(5));
        assert_ne!(first.weights, learn(6).weights);
        assert!(first.after.unexplained > first.after.relative);
    }

    #[test]
    fn many_steps_begin_at_a_lower_rate() {
        let rate = |steps| {
            let schedule = Schedule {
                steps,
                learning_rate: 0.5,
                ..QUICK
            };
            schedule.rate()
        };
        assert_eq!([0, 1, 300].map(rate), [0.5; 3]);
        assert_eq!(rate(1200), 0.25);
    }
}
