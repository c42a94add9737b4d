//! What samplers share: the noise that a model was trained with, and where on it the steps lie.

use super::fields::{Fields, SchedulerError};
use super::recipe::{Combination, Slot};

/// The training schedule: ᾱ of every step, in single precision as the models' makers computed it.
#[derive(Debug, Clone)]
pub(super) struct Training {
    /// Products of 1 − β.
    pub alphas: Vec<f64>,
    /// Whether β follows a squared cosine.
    pub cosine: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Betas {
    Linear,
    ScaledLinear,
    Cosine,
}

impl Training {
    /// Reads the betas; their usual ends are those of Ho et al. 2020.
    pub(super) fn read(fields: &mut Fields) -> Result<Self, SchedulerError> {
        Self::read_with(fields, [0.0001, 0.02], Betas::Linear)
    }

    /// The same with the betas of Stable Diffusion where none are given.
    pub(super) fn read_stable_diffusion(fields: &mut Fields) -> Result<Self, SchedulerError> {
        Self::read_with(fields, [0.00085, 0.012], Betas::ScaledLinear)
    }

    fn read_with(
        fields: &mut Fields,
        ends: [f64; 2],
        usual: Betas,
    ) -> Result<Self, SchedulerError> {
        let count = fields.count("num_train_timesteps", 1000)?;
        let start = fields.number("beta_start", ends[0])?;
        let end = fields.number("beta_end", ends[1])?;
        let kind = fields.choice(
            "beta_schedule",
            usual,
            &[
                ("linear", Betas::Linear),
                ("scaled_linear", Betas::ScaledLinear),
                ("squaredcos_cap_v2", Betas::Cosine),
            ],
        )?;
        let betas: Vec<f32> = match (fields.numbers("trained_betas")?, kind) {
            (Some(betas), _) => betas.into_iter().map(|b| b as f32).collect(),
            (None, Betas::Linear) => linspace_f32(start, end, count),
            (None, Betas::ScaledLinear) => linspace_f32(start.sqrt(), end.sqrt(), count)
                .into_iter()
                .map(|b| b * b)
                .collect(),
            (None, Betas::Cosine) => cosine_betas(count),
        };
        let rescale = fields.flag("rescale_betas_zero_snr", false)?;
        if betas.len() < 2 || betas.iter().any(|b| !(0.0..=1.0).contains(b)) {
            return Err(SchedulerError::Field {
                field: "beta_start, beta_end, trained_betas or num_train_timesteps".to_owned(),
                found: format!("{} betas, some beyond 0 … 1, or fewer than 2", betas.len()),
                expected: "two or more numbers between 0 and 1".to_owned(),
            });
        }
        let alphas = cumulative(&betas);
        Ok(Self {
            alphas: if rescale {
                zero_terminal_snr(&alphas)
            } else {
                alphas
            },
            cosine: kind == Betas::Cosine,
        })
    }

    /// Steps of the training schedule.
    pub(super) fn len(&self) -> usize {
        self.alphas.len()
    }

    /// The first, next to no noise.
    pub(super) fn first(&self) -> f64 {
        self.alphas.first().copied().unwrap_or(1.0)
    }

    /// ᾱ at a time step, or `before` below the first.
    pub(super) fn alpha(&self, timestep: i64, before: f64) -> f64 {
        match usize::try_from(timestep) {
            Ok(at) => self
                .alphas
                .get(at)
                .or(self.alphas.last())
                .copied()
                .unwrap_or(before),
            Err(_) => before,
        }
    }

    /// √ᾱ and √(1 − ᾱ) at a time step.
    pub(super) fn noising(&self, timestep: Option<&f64>) -> [f64; 2] {
        let alpha = self.alpha(timestep.map_or(0, |t| *t as i64), 1.0);
        [alpha.sqrt(), (1.0 - alpha).sqrt()]
    }

    /// σ = √((1 − ᾱ) / ᾱ) of every training step, in single precision.
    pub(super) fn sigmas(&self) -> Vec<f64> {
        let sigma = |a: &f64| {
            let a = *a as f32;
            f64::from(((1.0 - a) / a).sqrt())
        };
        self.alphas.iter().map(sigma).collect()
    }
}

/// `count` numbers from `start` to `end` in single precision, from both ends to the middle as PyTorch computes them.
fn linspace_f32(start: f64, end: f64, count: usize) -> Vec<f32> {
    let (start, end) = (start as f32, end as f32);
    let step = (end - start) / count.saturating_sub(1).max(1) as f32;
    (0..count)
        .map(|i| {
            if i < count / 2 {
                start + step * i as f32
            } else {
                end - step * (count - 1 - i) as f32
            }
        })
        .collect()
}

/// `count` numbers from `start` to `end`.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    match count {
        0 => vec![],
        1 => vec![start],
        _ => {
            let step = (end - start) / (count - 1) as f64;
            (0..count)
                .map(|i| {
                    if i == count - 1 {
                        end
                    } else {
                        start + step * i as f64
                    }
                })
                .collect()
        }
    }
}

/// Nichol and Dhariwal 2021.
fn cosine_betas(count: usize) -> Vec<f32> {
    let bar = |t: f64| {
        ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2)
            .cos()
            .powi(2)
    };
    let n = count as f64;
    (0..count)
        .map(|i| (1.0 - bar((i + 1) as f64 / n) / bar(i as f64 / n)).min(0.999) as f32)
        .collect()
}

fn cumulative(betas: &[f32]) -> Vec<f64> {
    let mut product = 1.0_f64;
    betas
        .iter()
        .map(|beta| {
            product *= f64::from(1.0 - beta);
            f64::from(product as f32)
        })
        .collect()
}

/// Shifts √ᾱ so that the last step is noise alone (Lin et al. 2024, algorithm 1).
fn zero_terminal_snr(alphas: &[f64]) -> Vec<f64> {
    let roots: Vec<f32> = alphas.iter().map(|a| (*a as f32).sqrt()).collect();
    let (Some(first), Some(last)) = (roots.first().copied(), roots.last().copied()) else {
        return alphas.to_vec();
    };
    let scaled: Vec<f32> = roots
        .iter()
        .map(|r| (r - last) * (first / (first - last)))
        .map(|r| r * r)
        .collect();
    let mut before = 1.0_f32;
    let betas: Vec<f32> = scaled
        .iter()
        .map(|a| {
            let beta = 1.0 - a / before;
            before = *a;
            beta
        })
        .collect();
    cumulative(&betas)
}

/// What a model's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Prediction {
    Epsilon,
    Sample,
    V,
}

impl Prediction {
    pub(super) fn read(fields: &mut Fields) -> Result<Self, SchedulerError> {
        fields.choice(
            "prediction_type",
            Self::Epsilon,
            &[
                ("epsilon", Self::Epsilon),
                ("sample", Self::Sample),
                ("v_prediction", Self::V),
            ],
        )
    }

    /// The clean sample and the noise in x = √ᾱ·x₀ + √(1 − ᾱ)·ε, for a model's output at the sample x.
    pub(super) fn split(
        self,
        output: impl Into<Combination>,
        signal: f64,
        noise: f64,
    ) -> [Combination; 2] {
        let output = output.into();
        let x = Slot::Sample;
        match self {
            Self::Epsilon => [(x * 1.0 - output.clone() * noise) * (1.0 / signal), output],
            Self::Sample => [output.clone(), (x * 1.0 - output * signal) * (1.0 / noise)],
            Self::V => [
                x * signal - output.clone() * noise,
                output * signal + x * noise,
            ],
        }
    }

    /// The clean sample in x = x₀ + σ·ε.
    pub(super) fn clean(self, sigma: f64) -> Combination {
        let variance = sigma * sigma + 1.0;
        let (x, output) = (Slot::Sample, Slot::Output);
        match self {
            Self::Epsilon => x * 1.0 - output * sigma,
            Self::Sample => output.into(),
            Self::V => output * (-sigma / variance.sqrt()) + x * (1.0 / variance),
        }
    }
}

/// How steps are spread over the training schedule (Lin et al. 2024, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spacing {
    Linspace,
    Leading,
    Trailing,
}

impl Spacing {
    pub(super) fn read(fields: &mut Fields, usual: Self) -> Result<Self, SchedulerError> {
        fields.choice(
            "timestep_spacing",
            usual,
            &[
                ("linspace", Self::Linspace),
                ("leading", Self::Leading),
                ("trailing", Self::Trailing),
            ],
        )
    }

    /// The time steps from noise to image, `count` of `total`, not rounded for `Linspace`.
    pub(super) fn timesteps(
        self,
        total: usize,
        count: usize,
        offset: usize,
    ) -> Result<Vec<f64>, SchedulerError> {
        check_steps(total, count)?;
        Ok(match self {
            Self::Linspace => {
                let mut steps = linspace(0.0, (total - 1) as f64, count);
                steps.reverse();
                steps
            }
            Self::Leading => (0..count)
                .rev()
                .map(|i| (i * (total / count) + offset) as f64)
                .collect(),
            Self::Trailing => trailing(total, count),
        })
    }
}

/// More steps than the model was trained with mean nothing.
pub(super) fn check_steps(total: usize, count: usize) -> Result<(), SchedulerError> {
    if (1..=total).contains(&count) {
        return Ok(());
    }
    Err(SchedulerError::Steps {
        found: count,
        expected: format!("1 to {total}, those of the training"),
    })
}

pub(super) fn trailing(total: usize, count: usize) -> Vec<f64> {
    let ratio = total as f64 / count as f64;
    let steps = (0..)
        .map(|i| total as f64 - ratio * f64::from(i))
        .take_while(|t| *t > 1e-9);
    steps
        .map(|t| t.round_ties_even() - 1.0)
        .take(count)
        .collect()
}

/// Linear interpolation in a table whose abscissae are its places.
pub(super) fn interpolate(table: &[f64], at: f64) -> f64 {
    let last = table.len().saturating_sub(1);
    let at = at.clamp(0.0, last as f64);
    let low = at.floor() as usize;
    let (a, b) = (table.get(low), table.get((low + 1).min(last)));
    let (a, b) = (a.copied().unwrap_or(0.0), b.copied().unwrap_or(0.0));
    a + (b - a) * (at - low as f64)
}

/// The time step of a noise level, between those of `sigmas`, which rise and are known in single precision.
pub(super) fn timestep_of(sigma: f64, sigmas: &[f64]) -> f64 {
    let log = |s: &f64| f64::from((*s as f32).ln());
    let level = sigma.max(1e-10).ln();
    let below = sigmas.iter().filter(|s| log(s) <= level).count();
    let low = below.saturating_sub(1).min(sigmas.len().saturating_sub(2));
    let (a, b) = (sigmas.get(low).map(log), sigmas.get(low + 1).map(log));
    let (Some(a), Some(b)) = (a, b) else {
        return 0.0;
    };
    let share = ((a - level) / (a - b)).clamp(0.0, 1.0);
    (1.0 - share) * low as f64 + share * (low + 1) as f64
}

/// Other ways to spread noise levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Levels {
    /// Those of the time steps.
    Plain,
    /// Karras et al. 2022, equation 5, with ρ = 7.
    Karras,
    /// Even steps of the logarithm.
    Exponential,
}

impl Levels {
    pub(super) fn read(fields: &mut Fields) -> Result<Self, SchedulerError> {
        fields.refuse_flag("use_beta_sigmas")?;
        let karras = fields.flag("use_karras_sigmas", false)?;
        let exponential = fields.flag("use_exponential_sigmas", false)?;
        match (karras, exponential) {
            (true, true) => Err(SchedulerError::Field {
                field: "use_exponential_sigmas".to_owned(),
                found: "true beside use_karras_sigmas".to_owned(),
                expected: "one of them".to_owned(),
            }),
            (true, false) => Ok(Self::Karras),
            (false, true) => Ok(Self::Exponential),
            (false, false) => Ok(Self::Plain),
        }
    }

    /// `count` levels from `highest` to `lowest`.
    pub(super) fn spread(self, highest: f64, lowest: f64, count: usize) -> Vec<f64> {
        const RHO: f64 = 7.0;
        let (a, b) = (highest.powf(1.0 / RHO), lowest.powf(1.0 / RHO));
        match self {
            Self::Karras => linspace(0.0, 1.0, count)
                .iter()
                .map(|t| (a + t * (b - a)).powf(RHO))
                .collect(),
            _ => linspace(highest.ln(), lowest.ln(), count)
                .iter()
                .map(|l| l.exp())
                .collect(),
        }
    }
}
