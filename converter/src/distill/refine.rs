//! Refinement: sites learn again, in order, on what the converted part before them gives, with the original's outputs as
//! before. So a site can make good what the ones before it do wrong.

use std::collections::HashMap;
use std::sync::Arc;

use linfusion_models::onnx::OnnxFile;

use super::capture::{Teacher, capture};
use super::error::DistillError;
use super::learn::{Learned, Ready, Work};
use super::store::Store;
use super::target::Target;
use super::train::Schedule;
use crate::plan::Method;

/// The sites are taken in so many parts, each on a model converted anew.
const PARTS: usize = 4;
/// Of the steps and of the learning rate, for weights that are nearly there.
const STEPS: usize = 2;
const RATE: f64 = 0.25;

impl Work<'_> {
    /// Learns the linear sites again; windows and hybrids stay as they are.
    ///
    /// # Errors
    /// As learning the first time.
    pub fn refine(&self, sites: &[Learned]) -> Result<Vec<Learned>, DistillError> {
        let mut sites = sites.to_vec();
        let schedule = Schedule {
            steps: self.request.schedule.steps / STEPS,
            learning_rate: self.request.schedule.learning_rate * RATE,
            ..self.request.schedule
        };
        let size = sites.len().div_ceil(PARTS).max(1);
        for start in (0..sites.len()).step_by(size) {
            let end = (start + size).min(sites.len());
            self.refine_part(&mut sites, start..end, &schedule)?;
        }
        Ok(sites)
    }

    fn refine_part(
        &self,
        sites: &mut [Learned],
        part: std::ops::Range<usize>,
        schedule: &Schedule,
    ) -> Result<(), DistillError> {
        let chosen: Vec<usize> = part
            .filter(|i| {
                let method = sites.get(*i).map(|s| s.done.report.attention);
                method == Some(Method::Linear)
            })
            .collect();
        let targets: Vec<Target> = chosen
            .iter()
            .filter_map(|i| Some(sites.get(*i)?.target.clone()))
            .collect();
        if targets.is_empty() {
            return Ok(());
        }
        let student = self.student(sites)?;
        let file = OnnxFile::open(student.path())?;
        let missing: Vec<&Target> = {
            let outputs = self.outputs();
            let known = |t: &&Target| !outputs.contains_key(&t.site);
            targets.iter().filter(known).collect()
        };
        let runs = if missing.is_empty() { 1 } else { 2 };
        self.begin("running the converted model", runs * self.samples.len());
        let tick = || self.advance(1);
        let student = Teacher {
            file: &file,
            ..self.teacher.clone()
        };
        let inputs: Vec<_> = targets.iter().map(|t| (t, &t.x)).collect();
        let inputs = capture(&student, &inputs, self.samples, &self.scratch, &tick)?;
        let values: Vec<_> = missing.iter().map(|t| (*t, &t.merged)).collect();
        let mut fresh: HashMap<usize, Arc<Store>> = HashMap::new();
        if !values.is_empty() {
            let stores = capture(&self.teacher, &values, self.samples, &self.scratch, &tick)?;
            let sites = missing.iter().map(|t| t.site);
            fresh.extend(sites.zip(stores.into_iter().map(Arc::new)));
        }
        let mut ready = Vec::with_capacity(targets.len());
        for ((target, x), i) in targets.iter().zip(inputs).zip(&chosen) {
            let kept = self.outputs().get(&target.site).cloned();
            let output = kept.or_else(|| fresh.remove(&target.site));
            if let (Some(site), Some(output)) = (sites.get(*i), output) {
                ready.push(Ready {
                    target,
                    layers: site.layers.clone(),
                    x,
                    output,
                    near: None,
                });
            }
        }
        self.begin("refining", ready.len() * schedule.steps);
        let jobs: Vec<(&Ready<'_>, Method)> = ready.iter().map(|r| (r, Method::Linear)).collect();
        let weights = |ready: &Ready<'_>| {
            let site = sites.iter().find(|s| s.target.site == ready.target.site);
            site.map(|s| s.done.weights.clone())
        };
        let done = self.beside(&jobs, |(ready, method)| {
            self.learn_site(ready, *method, weights(ready).as_ref(), schedule)
        })?;
        for (i, done) in chosen.into_iter().zip(done) {
            if let Some(site) = sites.get_mut(i) {
                // What the site was before anything was learned stays told.
                let before = site.done.report.before;
                let mut curve = std::mem::take(&mut site.done.report.curve);
                let last = curve.last().map_or(0, |p| p.step);
                curve.extend(done.report.curve.iter().map(|p| super::Point {
                    step: last + p.step,
                    ..*p
                }));
                let seconds = site.done.report.seconds + done.report.seconds;
                let tried = std::mem::take(&mut site.done.report.tried);
                site.done = done;
                site.done.report.before = before;
                site.done.report.curve = curve;
                site.done.report.seconds = seconds;
                site.done.report.tried = tried;
            }
        }
        Ok(())
    }
}
