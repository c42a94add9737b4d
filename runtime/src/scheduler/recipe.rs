//! A sampler's step as data: which tensors become which sums of which.

use std::fmt;
use std::ops::{Add, Mul, Sub};

/// A tensor of a run, all of the latents' shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// The latents.
    Sample,
    /// What the model predicted from them; there during a step.
    Output,
    /// Standard normal noise, new at each step that reads it; there during a step.
    Noise,
    /// The clean sample that the step predicts, for previews.
    Clean,
    /// What the sampler remembers of earlier steps, by a number of its own.
    Memory(usize),
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sample => f.write_str("sample"),
            Self::Output => f.write_str("output"),
            Self::Noise => f.write_str("noise"),
            Self::Clean => f.write_str("clean"),
            Self::Memory(number) => write!(f, "memory {number}"),
        }
    }
}

/// Σ coefficient · slot, each slot once.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Combination(Vec<(f64, Slot)>);

impl Combination {
    /// Coefficients, 0 among them, and what they are of.
    pub fn terms(&self) -> &[(f64, Slot)] {
        &self.0
    }

    fn plus(mut self, terms: impl IntoIterator<Item = (f64, Slot)>) -> Self {
        for (coefficient, slot) in terms {
            match self.0.iter_mut().find(|(_, known)| *known == slot) {
                Some((sum, _)) => *sum += coefficient,
                None => self.0.push((coefficient, slot)),
            }
        }
        self
    }
}

impl From<Slot> for Combination {
    fn from(slot: Slot) -> Self {
        Self(vec![(1.0, slot)])
    }
}

impl Mul<f64> for Slot {
    type Output = Combination;

    fn mul(self, factor: f64) -> Combination {
        Combination(vec![(factor, self)])
    }
}

impl Mul<f64> for Combination {
    type Output = Self;

    fn mul(mut self, factor: f64) -> Self {
        self.0.iter_mut().for_each(|(c, _)| *c *= factor);
        self
    }
}

impl Add for Combination {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        self.plus(other.0)
    }
}

impl Sub for Combination {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        self.plus(other.0.into_iter().map(|(c, slot)| (-c, slot)))
    }
}

/// A slot that becomes a sum of slots as they are before it.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// What is set.
    pub to: Slot,
    /// To what.
    pub value: Combination,
    /// The largest magnitude that an element keeps.
    pub bound: Option<f64>,
}

/// Assignments, one after the other.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recipe(Vec<Assignment>);

impl Recipe {
    /// In order.
    pub fn assignments(&self) -> &[Assignment] {
        &self.0
    }

    /// Whether a step needs what is in that slot; noise counts even with a coefficient of 0, since it is drawn for it.
    pub fn reads(&self, slot: Slot) -> bool {
        let terms = self.0.iter().flat_map(|a| a.value.terms());
        terms.into_iter().any(|(_, read)| *read == slot)
    }

    pub(super) fn set(&mut self, to: Slot, value: impl Into<Combination>) {
        self.set_within(to, value, None);
    }

    pub(super) fn set_within(
        &mut self,
        to: Slot,
        value: impl Into<Combination>,
        bound: Option<f64>,
    ) {
        self.0.push(Assignment {
            to,
            value: value.into(),
            bound,
        });
    }

    /// Makes `Memory(0)` the newest of `count` memories, as many of which as `known` are there already.
    pub(super) fn remember(&mut self, newest: Slot, known: usize, count: usize) {
        for older in (1..count.min(known + 1)).rev() {
            self.set(Slot::Memory(older), Slot::Memory(older - 1));
        }
        self.set(Slot::Memory(0), newest);
    }
}
