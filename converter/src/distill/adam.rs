//! AdamW whose moments can be kept and taken up again: candle's, which [`super::optimizer`] steps by, keeps them to itself.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;
const DECAY: f64 = 0.01;

/// Weights with what their steps depend on. Source: Loshchilov, Hutter: "Decoupled Weight Decay Regularization", 2019.
pub(super) struct AdamW {
    vars: Vec<Var>,
    /// Of each weight the means of its gradient and of its square.
    moments: Vec<[Tensor; 2]>,
    steps: usize,
}

/// What [`AdamW`]'s next steps depend on: of each weight the two moments.
pub(super) type Moments = Vec<[Vec<f32>; 2]>;

impl AdamW {
    pub fn new(vars: Vec<Var>) -> Result<Self> {
        let zeros = |var: &Var| Ok([var.zeros_like()?, var.zeros_like()?]);
        Ok(Self {
            moments: vars.iter().map(zeros).collect::<Result<_>>()?,
            vars,
            steps: 0,
        })
    }

    /// What it has after so many steps, which [`Self::moments`] gave then.
    pub fn resume(&mut self, steps: usize, moments: &Moments) -> Result<()> {
        if moments.len() != self.vars.len() {
            candle_core::bail!(
                "moments of {} weights are not those of {}",
                moments.len(),
                self.vars.len()
            );
        }
        let of = |(var, moments): (&Var, &[Vec<f32>; 2])| {
            let [mean, square] = moments
                .each_ref()
                .map(|values| Tensor::from_slice(values, var.shape(), var.device()));
            Ok([mean?, square?])
        };
        let pairs = self.vars.iter().zip(moments);
        self.moments = pairs.map(of).collect::<Result<_>>()?;
        self.steps = steps;
        Ok(())
    }

    pub fn moments(&self) -> Result<Moments> {
        let values = |moments: &[Tensor; 2]| {
            let [mean, square] = moments
                .each_ref()
                .map(|moment| moment.flatten_all()?.to_vec1::<f32>());
            Ok([mean?, square?])
        };
        self.moments.iter().map(values).collect()
    }

    /// A step down `gradients`.
    pub fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        self.steps += 1;
        let steps = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let [one, two] = BETAS.map(|beta| 1.0 / (1.0 - beta.powi(steps)));
        for (var, [mean, square]) in self.vars.iter().zip(&mut self.moments) {
            let Some(gradient) = gradients.get(var) else {
                continue;
            };
            // Detached: each would hold on to the graph that it was computed by.
            let gradient = gradient.detach();
            let mixed = |moment: &Tensor, new: Tensor, beta: f64| {
                Ok::<_, candle_core::Error>(((moment * beta)? + (new * (1.0 - beta))?)?.detach())
            };
            *mean = mixed(mean, gradient.clone(), BETAS[0])?;
            *square = mixed(square, gradient.sqr()?, BETAS[1])?;
            let step = ((&*mean * one)? / ((&*square * two)?.sqrt()? + EPSILON)?)?;
            let kept = (var.as_tensor().detach() * (1.0 - rate * DECAY))?;
            var.set(&(kept - (step * rate)?)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::{AdamW as Library, Optimizer as _, ParamsAdamW};

    use super::*;

    fn var() -> Var {
        Var::from_slice(&[3.0_f32, -2.0, 0.5, 1e-3], (2, 2), &Device::Cpu).unwrap()
    }

    /// Σ cᵢ wᵢ⁴, by hand another gradient at each step.
    fn gradients(var: &Var) -> GradStore {
        let factors = Tensor::from_slice(&[1.0_f32, 0.1, 7.0, 2.0], (2, 2), &Device::Cpu).unwrap();
        let fourth = var.as_tensor().sqr().unwrap().sqr().unwrap();
        (fourth * factors)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap()
    }

    fn values(var: &Var) -> Vec<f32> {
        var.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn steps_are_the_librarys() {
        let (own, other) = (var(), var());
        let mut adam = AdamW::new(vec![own.clone()]).unwrap();
        let mut library = Library::new(vec![other.clone()], ParamsAdamW::default()).unwrap();
        for step in 0..20 {
            let rate = 0.1 / (1.0 + step as f64);
            adam.step(&gradients(&own), rate).unwrap();
            library.set_learning_rate(rate);
            library.step(&gradients(&other)).unwrap();
            assert_eq!(values(&own), values(&other), "{step}");
        }
        assert!(values(&own)[0] < 2.9);
    }

    #[test]
    fn taken_up_again_it_goes_on_alike() {
        let (whole, parted) = (var(), var());
        let mut adam = AdamW::new(vec![whole.clone()]).unwrap();
        let mut first = AdamW::new(vec![parted.clone()]).unwrap();
        for _ in 0..5 {
            adam.step(&gradients(&whole), 0.1).unwrap();
            first.step(&gradients(&parted), 0.1).unwrap();
        }
        let mut then = AdamW::new(vec![parted.clone()]).unwrap();
        then.resume(5, &first.moments().unwrap()).unwrap();
        for _ in 0..5 {
            adam.step(&gradients(&whole), 0.1).unwrap();
            then.step(&gradients(&parted), 0.1).unwrap();
        }
        assert_eq!(values(&whole), values(&parted));
        assert!(then.resume(5, &Vec::new()).is_err());
    }
}
