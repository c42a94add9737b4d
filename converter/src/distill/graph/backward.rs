//! The gradient of a loss through a whole program, in segments.
//!
//! The forward pass keeps the values that cross from one segment of steps to a later one; cuts are where few live. Then,
//! from the last segment to the first, the segment is computed again with those values as variables, and
//! Σ value · (gradient of the loss by it), over what the segment makes, is differentiated: that gives the gradients by
//! the weights in it and by what it was given. So memory holds the inside of one segment only, for one more forward pass
//! of time (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{Tensor, TensorId, Var};
use linfusion_runtime::tensor::Tensor as Fed;

use super::GraphError;
use super::program::{Program, Sites, Values};

/// A loss and its gradient.
pub struct Gradient {
    /// The loss.
    pub loss: f64,
    /// Its gradient by each of the weights that it depends on.
    pub by: GradStore,
}

impl Program {
    /// The gradient of `loss`, a function of the wanted values, by `weights`, which the sites' functions use.
    ///
    /// # Errors
    /// An input is missing, or an operation or its gradient fails.
    pub fn gradient(
        &self,
        inputs: &[(String, Fed)],
        sites: Sites<'_>,
        weights: &[Var],
        loss: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    ) -> Result<Gradient, GraphError> {
        let plan = Plan::of(self);
        let values = self.kept(&plan, inputs, sites)?;
        let results = self.results(&values)?;
        let (loss, mut gradients) = self.of_results(&plan, &results, loss).map_err(at_loss)?;
        let mut sums = Sums::default();
        for segment in plan.segments.iter().rev() {
            self.back(
                &plan,
                segment,
                &values,
                sites,
                &mut gradients,
                (weights, &mut sums),
            )?;
        }
        let by = sums.store(weights).map_err(at_loss)?;
        Ok(Gradient { loss, by })
    }

    /// The values that segments hand on, the wanted ones, and those that depend on no weight.
    fn kept(
        &self,
        plan: &Plan,
        inputs: &[(String, Fed)],
        sites: Sites<'_>,
    ) -> Result<Values, GraphError> {
        let mut values = self.begin(inputs)?;
        for (at, step) in self.steps.iter().enumerate() {
            self.step(step, &mut values, sites)?;
            for number in step.outputs.iter().flatten() {
                if let Some(value) = values.get_mut(number) {
                    *value = value.detach();
                }
            }
            for number in step.inputs.iter().chain(&step.outputs).flatten() {
                let last = self.values.get(*number).and_then(|v| v.last);
                if last.is_none_or(|last| last <= at) && !plan.kept.contains(number) {
                    values.remove(number);
                }
            }
        }
        Ok(values)
    }

    fn of_results(
        &self,
        plan: &Plan,
        results: &[Tensor],
        loss: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<(f64, HashMap<usize, Tensor>)> {
        let vars = results.iter().map(Var::from_tensor);
        let vars = vars.collect::<candle_core::Result<Vec<Var>>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let loss = loss(&tensors)?;
        let store = loss.backward()?;
        let mut gradients = HashMap::new();
        for (number, var) in self.wanted.iter().zip(&vars) {
            if let Some(gradient) = store.get(var)
                && plan.active.contains(number)
            {
                add(&mut gradients, *number, gradient)?;
            }
        }
        Ok((f64::from(loss.to_scalar::<f32>()?), gradients))
    }

    fn back(
        &self,
        plan: &Plan,
        segment: &Range<usize>,
        kept: &Values,
        sites: Sites<'_>,
        gradients: &mut HashMap<usize, Tensor>,
        (weights, sums): (&[Var], &mut Sums),
    ) -> Result<(), GraphError> {
        let steps = self.steps.get(segment.clone()).unwrap_or_default();
        let is_active = |n: &usize| plan.active.contains(n);
        let active: Vec<_> = steps
            .iter()
            .filter(|s| s.outputs.iter().flatten().any(is_active))
            .collect();
        // In order: gradients are added up in the order of these.
        let made: BTreeSet<usize> = active
            .iter()
            .flat_map(|s| s.outputs.iter().flatten().copied())
            .collect();
        let mut given: HashMap<usize, Var> = HashMap::new();
        let mut values = Values::new();
        for number in active.iter().flat_map(|s| s.inputs.iter().flatten()) {
            let Some(value) = kept.get(number).filter(|_| !made.contains(number)) else {
                continue;
            };
            if !plan.active.contains(number) {
                values.insert(*number, value.clone());
            } else if !given.contains_key(number) {
                let var = Var::from_tensor(value).map_err(at_loss)?;
                values.insert(*number, var.as_tensor().clone());
                given.insert(*number, var);
            }
        }
        for step in active {
            self.step(step, &mut values, sites)?;
        }
        let mut outcome: Option<Tensor> = None;
        for number in &made {
            let (Some(gradient), Some(value)) = (gradients.remove(number), values.get(number))
            else {
                continue;
            };
            let part = (value * gradient)
                .and_then(|p| p.sum_all())
                .map_err(at_loss)?;
            outcome = Some(match outcome {
                None => part,
                Some(sum) => (sum + part).map_err(at_loss)?,
            });
        }
        let Some(outcome) = outcome else {
            return Ok(());
        };
        drop(values);
        let store = outcome.backward().map_err(at_loss)?;
        for (number, var) in &given {
            if let Some(gradient) = store.get(var) {
                add(gradients, *number, gradient).map_err(at_loss)?;
            }
        }
        for weight in weights {
            if let Some(gradient) = store.get(weight) {
                add(&mut sums.0, weight.id(), gradient).map_err(at_loss)?;
            }
        }
        Ok(())
    }
}

fn at_loss(source: candle_core::Error) -> GraphError {
    GraphError::at("the gradient")(source)
}

fn add<K: std::hash::Hash + Eq>(
    sums: &mut HashMap<K, Tensor>,
    key: K,
    gradient: &Tensor,
) -> candle_core::Result<()> {
    let sum = match sums.get(&key) {
        None => gradient.detach(),
        Some(sum) => (sum + gradient)?.detach(),
    };
    sums.insert(key, sum);
    Ok(())
}

/// Gradients by the weights.
#[derive(Default)]
struct Sums(HashMap<TensorId, Tensor>);

impl Sums {
    /// The gradient of Σ weight · sum is the sum: candle makes stores in no other way.
    fn store(&self, weights: &[Var]) -> candle_core::Result<GradStore> {
        let mut outcome: Option<Tensor> = None;
        for weight in weights {
            let Some(sum) = self.0.get(&weight.id()) else {
                continue;
            };
            let part = (weight.as_tensor() * sum)?.sum_all()?;
            outcome = Some(match outcome {
                None => part,
                Some(sum) => (sum + part)?,
            });
        }
        match outcome {
            Some(outcome) => outcome.backward(),
            None => candle_core::bail!("the loss depends on no weight"),
        }
    }
}

/// What a backward pass knows beforehand.
struct Plan {
    /// Values that depend on a site.
    active: HashSet<usize>,
    /// Values to keep from the forward pass.
    kept: HashSet<usize>,
    segments: Vec<Range<usize>>,
}

impl Plan {
    fn of(program: &Program) -> Self {
        let steps = &program.steps;
        let mut active: HashSet<usize> = HashSet::new();
        for step in steps {
            let reads = step.inputs.iter().flatten().any(|n| active.contains(n));
            if reads || Program::is_site(step) {
                active.extend(step.outputs.iter().flatten());
            }
        }
        let segments = segments(program, &active);
        let mut kept: HashSet<usize> = program.wanted.iter().copied().collect();
        for segment in &segments {
            let inside = steps.get(segment.clone()).unwrap_or_default();
            let mut made: HashSet<usize> = HashSet::new();
            for step in inside {
                if !step.outputs.iter().flatten().any(|n| active.contains(n)) {
                    continue;
                }
                let reads = step.inputs.iter().flatten();
                kept.extend(reads.filter(|n| !made.contains(n)));
                made.extend(step.outputs.iter().flatten());
            }
        }
        Self {
            active,
            kept,
            segments,
        }
    }
}

/// About √steps segments, cut where the fewest elements that need a gradient live.
fn segments(program: &Program, active: &HashSet<usize>) -> Vec<Range<usize>> {
    let steps = program.steps.len();
    let mut made_at: HashMap<usize, usize> = HashMap::new();
    for (at, step) in program.steps.iter().enumerate() {
        made_at.extend(step.outputs.iter().flatten().map(|n| (*n, at)));
    }
    // live[p]: elements that steps before p make and steps from p on read.
    let mut change = vec![0_i64; steps + 2];
    for number in active {
        let (Some(made), Some(value)) = (made_at.get(number), program.values.get(*number)) else {
            continue;
        };
        let elements = i64::try_from(value.elements).unwrap_or(i64::MAX / 2);
        if let Some(last) = value.last {
            for (at, by) in [(made + 1, elements), (last + 1, -elements)] {
                if let Some(change) = change.get_mut(at) {
                    *change = change.saturating_add(by);
                }
            }
        }
    }
    let live: Vec<i64> = change
        .iter()
        .scan(0_i64, |sum, by| {
            *sum = sum.saturating_add(*by);
            Some(*sum)
        })
        .collect();
    let usual = steps.isqrt().max(1);
    let mut cuts = Vec::new();
    let mut start = 0;
    while start < steps {
        let (least, most) = (start + usual / 2 + 1, start + 2 * usual);
        let end = match most >= steps {
            true => steps,
            false => (least..=most)
                .min_by_key(|p| live.get(*p).copied().unwrap_or(i64::MAX))
                .unwrap_or(most),
        };
        cuts.push(start..end);
        start = end;
    }
    cuts
}
