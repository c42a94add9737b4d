//! The tensors of a sampler's run, and its steps on them.

use std::collections::BTreeMap;

use super::recipe::{Assignment, Recipe, Slot};
use crate::arithmetic::{Arithmetic, Form};
use crate::engine::{EngineError, Value};
use crate::tensor::DType;

/// The latents of a run and what its sampler keeps beside them, wherever the arithmetic has them.
pub struct State {
    sample: Value,
    others: BTreeMap<Slot, Value>,
}

impl State {
    /// A run that begins with these latents.
    pub fn new(sample: Value) -> Self {
        Self {
            sample,
            others: BTreeMap::new(),
        }
    }

    /// Goes on from other latents, with what is remembered.
    #[cfg(test)]
    pub(super) fn restart(&mut self, sample: Value) {
        self.sample = sample;
    }

    /// The latents.
    pub fn sample(&self) -> &Value {
        &self.sample
    }

    /// The clean sample that the last step predicted; `None` before the first.
    pub fn clean(&self) -> Option<&Value> {
        self.others.get(&Slot::Clean)
    }

    /// Takes a step, with the model's output and, where the recipe reads it, noise.
    ///
    /// # Errors
    /// The recipe reads what isn't there, shapes differ, or the engine fails.
    pub fn step(
        &mut self,
        recipe: &Recipe,
        output: Value,
        noise: Option<Value>,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<(), EngineError> {
        self.others.insert(Slot::Output, output);
        if let Some(noise) = noise {
            self.others.insert(Slot::Noise, noise);
        }
        for assignment in recipe.assignments() {
            let value = self.value(assignment, arithmetic)?;
            match assignment.to {
                Slot::Sample => self.sample = value,
                other => drop(self.others.insert(other, value)),
            }
        }
        self.others.remove(&Slot::Output);
        self.others.remove(&Slot::Noise);
        Ok(())
    }

    fn value(
        &self,
        assignment: &Assignment,
        arithmetic: &mut dyn Arithmetic,
    ) -> Result<Value, EngineError> {
        let mut terms = Vec::new();
        for (coefficient, slot) in assignment.value.terms() {
            // What counts nothing isn't read: 0 · ∞ would be no number.
            if *coefficient != 0.0 {
                terms.push((*coefficient, self.get(*slot)?));
            }
        }
        if terms.is_empty() {
            terms.push((0.0, &self.sample));
        }
        let form = Form {
            bound: assignment.bound,
            dtype: DType::F32,
        };
        arithmetic.sum(&terms, form)
    }

    fn get(&self, slot: Slot) -> Result<&Value, EngineError> {
        let found = match slot {
            Slot::Sample => Some(&self.sample),
            other => self.others.get(&other),
        };
        found.ok_or_else(|| EngineError::MissingInput {
            name: slot.to_string(),
            given: self.others.keys().map(Slot::to_string).collect(),
        })
    }
}
