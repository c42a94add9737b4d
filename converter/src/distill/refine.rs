//! Refinement: the sites whose errors reach the output learn on, in order, on what the converted part before them gives,
//! with the original's outputs as before. So a site can make good what the ones before it do wrong, and time goes where
//! it counts: in the models measured a handful of sites make nearly all of the error.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use linfusion_models::onnx::OnnxFile;
use linfusion_runtime::engine::{Operators, SessionOptions};

use super::capture::{Teacher, capture, groups, shapes};
use super::choose::effects;
use super::error::DistillError;
use super::learn::{Learned, Ready, Work};
use super::near;
use super::report::mean;
use super::state::{Done, State};
use super::store::Store;
use super::target::Target;
use super::train::Schedule;
use crate::plan::Method;

/// The sites are taken in at most so many parts, each on a model converted anew, of at least so many sites. Not of as many as
/// there are cores: what is learned must not depend on them.
const PARTS: usize = 4;
const OF_A_PART: usize = 2;
/// Samples, of those learned from, on which the sites' effects are measured.
const LOOKS: usize = 4;
/// Share of the whole error that the sites which learn on make up.
const SHARE: f64 = 0.95;
/// Steps that a site gets at most, in those of the first time.
const MOST: f64 = 12.0;
/// Work, in that of the first time.
const TIMES: f64 = 2.0;
/// Of the learning rate, for weights that are nearly there.
const RATE: f64 = 0.5;
const REFINED: &str = "refined";

impl Work<'_> {
    /// Lets the sites that count learn on; windows, which have no weights, and the others stay as they are. Gives what there is
    /// to tell, too.
    ///
    /// # Errors
    /// As learning the first time.
    pub fn refine(&self, before: &[Learned]) -> Result<(Vec<Learned>, String), DistillError> {
        let mut sites = before.to_vec();
        let chosen = self.counting(&sites)?;
        let schedule = self.schedule(&sites, &chosen);
        let state = self.state.with(&depends(before, &chosen));
        for part in chosen.chunks(chosen.len().div_ceil(PARTS).max(OF_A_PART)) {
            let mut part = part;
            for fitting in self.fitting(&sites, part)? {
                let (group, rest) = part.split_at(fitting.min(part.len()));
                self.refine_part(&mut sites, group, &schedule, &state)?;
                part = rest;
            }
        }
        let error = |sites: &[Learned]| {
            let errors: Vec<_> = chosen.iter().filter_map(|i| sites.get(*i)).collect();
            mean(errors.iter().map(|s| s.done.report.after)).unexplained
        };
        let told = format!(
            "{} of {} sites, {} steps each, from {:.1} % of their variance unexplained to {:.1} %",
            chosen.len(),
            sites.len(),
            schedule.steps,
            100.0 * error(before),
            100.0 * error(&sites)
        );
        Ok((sites, told))
    }

    /// The sites with weights, in order, that make up most of the error of the whole, each measured alone.
    fn counting(&self, sites: &[Learned]) -> Result<Vec<usize>, DistillError> {
        let looks: Range<usize> = 0..LOOKS.min(self.learned().len());
        let samples = self.learned().get(looks).unwrap_or_default();
        self.begin("running the original", samples.len());
        let expected = self.original(samples)?;
        let mut effects: Vec<(f64, usize)> = effects(self, sites, samples, &expected)?
            .into_iter()
            .map(|psnr| 10.0_f64.powf(-psnr / 10.0))
            .zip(0..)
            .filter(|(_, i)| {
                let method = sites.get(*i).map(|s| s.done.report.attention);
                method.is_some_and(|method| method != Method::Window)
            })
            .collect();
        effects.sort_by(|a, b| b.0.total_cmp(&a.0));
        let total: f64 = effects.iter().map(|(noise, _)| noise).sum();
        let mut reached = 0.0;
        let mut chosen: Vec<usize> = effects
            .into_iter()
            .take_while(|(noise, _)| {
                let wanted = reached < SHARE * total;
                reached += noise;
                wanted
            })
            .map(|(_, i)| i)
            .collect();
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// [`TIMES`] as much work for the chosen as the first time was for all.
    fn schedule(&self, sites: &[Learned], chosen: &[usize]) -> Schedule {
        let first = self.request.schedule;
        let work = |site: &Learned| {
            let target = &site.target;
            (first.images(target.tokens) * target.tokens * target.shape.dim) as f64
        };
        let all: f64 = sites.iter().map(work).sum();
        let these: f64 = chosen.iter().filter_map(|i| sites.get(*i)).map(work).sum();
        let times = (TIMES * all / these.max(1.0)).clamp(1.0, MOST);
        Schedule {
            steps: (first.steps as f64 * times) as usize,
            learning_rate: first.learning_rate * RATE,
            ..first
        }
    }

    /// How many of the sites, in order, the disk holds the activations of at once.
    fn fitting(&self, sites: &[Learned], part: &[usize]) -> Result<Vec<usize>, DistillError> {
        let targets = part.iter().filter_map(|i| sites.get(*i));
        let targets: Vec<Target> = targets.map(|s| s.target.clone()).collect();
        let groups = groups(&targets, self.images(), self.request.disk_budget)?;
        Ok(groups.into_iter().map(<[Target]>::len).collect())
    }

    fn refine_part(
        &self,
        sites: &mut [Learned],
        chosen: &[usize],
        schedule: &Schedule,
        state: &State,
    ) -> Result<(), DistillError> {
        let (mut refined, mut open) = (Vec::new(), Vec::new());
        for i in chosen {
            let Some(site) = sites.get(*i) else { continue };
            match state.load(REFINED, site.target.site) {
                Some(done) => refined.push((*i, done)),
                None => open.push((*i, site.target.clone())),
            }
        }
        if !open.is_empty() {
            refined.extend(self.refined(sites, &open, schedule, state)?);
        }
        // Not before: all sites of a part learn in the model as it was before the part, after an interruption too.
        for (i, done) in refined {
            if let Some(site) = sites.get_mut(i) {
                site.done = done;
            }
        }
        Ok(())
    }

    /// What sites learn in the model converted so far.
    fn refined(
        &self,
        sites: &[Learned],
        open: &[(usize, Target)],
        schedule: &Schedule,
        state: &State,
    ) -> Result<Vec<(usize, Done)>, DistillError> {
        let targets: Vec<&Target> = open.iter().map(|(_, target)| target).collect();
        let student = self.student(sites)?;
        let file = OnnxFile::open(student.path())?;
        let missing: Vec<&Target> = {
            let outputs = self.outputs();
            let unknown = |t: &&Target| !outputs.contains_key(&t.site);
            targets.iter().copied().filter(unknown).collect()
        };
        let runs = if missing.is_empty() { 1 } else { 2 };
        self.begin("running the converted model", runs * self.samples.len());
        let tick = || self.advance(1);
        let shapes = shapes(&file, self.samples);
        let options = SessionOptions {
            operators: Operators::InProcess,
            ..self.teacher.options.clone()
        };
        let student = Teacher {
            file: &file,
            shapes: &shapes,
            options: &options,
            ..self.teacher.clone()
        };
        let became = |i: &usize| sites.get(*i).map(|site| site.done.report.attention);
        let mut near = Vec::with_capacity(open.len());
        for (i, target) in open {
            near.push(match became(i) {
                Some(Method::Hybrid) => near::of_hybrid(&student, target)?,
                _ => None,
            });
        }
        let windows = near.iter().zip(&targets);
        let windows = windows.filter_map(|(value, target)| Some((*target, value.as_ref()?)));
        let inputs = targets.iter().map(|t| (*t, &t.x));
        let inputs: Vec<_> = inputs.chain(windows).collect();
        let inputs = capture(&student, &inputs, self.samples, &self.scratch, &tick)?;
        let mut windows = inputs.into_iter();
        let inputs: Vec<Store> = windows.by_ref().take(targets.len()).collect();
        let values: Vec<_> = missing.iter().map(|t| (*t, &t.merged)).collect();
        let mut fresh: HashMap<usize, Arc<Store>> = HashMap::new();
        if !values.is_empty() {
            let stores = capture(&self.teacher, &values, self.samples, &self.scratch, &tick)?;
            let sites = missing.iter().map(|t| t.site);
            fresh.extend(sites.zip(stores.into_iter().map(Arc::new)));
        }
        let mut ready = Vec::with_capacity(targets.len());
        for (((i, target), x), window) in open.iter().zip(inputs).zip(&near) {
            let near = window.as_ref().and_then(|_| windows.next());
            let kept = self.outputs().get(&target.site).cloned();
            let output = kept.or_else(|| fresh.remove(&target.site));
            if let (Some(site), Some(output)) = (sites.get(*i), output) {
                ready.push(Ready {
                    target,
                    layers: site.layers.clone(),
                    x,
                    output,
                    near,
                });
            }
        }
        self.begin("refining", ready.len() * schedule.steps);
        let method = |ready: &Ready<'_>| match ready.near {
            Some(_) => Method::Hybrid,
            None => Method::Linear,
        };
        let jobs: Vec<(&Ready<'_>, Method)> = ready.iter().map(|r| (r, method(r))).collect();
        let done = self.beside(&jobs, |(ready, method)| {
            let site = ready.target.site;
            let first = sites.iter().find(|s| s.target.site == site);
            let weights = first.map(|s| &s.done.weights);
            let mut done = self.learn_site(ready, *method, weights, schedule)?;
            if let Some(first) = first {
                done = after(&first.done, done);
            }
            state.save(REFINED, site, &done)?;
            Ok(done)
        })?;
        let places = open.iter().map(|(i, _)| *i);
        Ok(places.zip(done).collect())
    }
}

/// What refined weights depend on beside the request: what every site became, and which of them learn on together.
fn depends(sites: &[Learned], chosen: &[usize]) -> String {
    let became: Vec<(&str, Method)> = sites
        .iter()
        .map(|s| (s.target.module.as_str(), s.done.report.attention))
        .collect();
    format!("{became:?} {chosen:?}")
}

/// What is to be told of a site that learned once and then on.
fn after(first: &Done, mut then: Done) -> Done {
    let report = &first.report;
    let last = report.curve.last().map_or(0, |p| p.step);
    let later = then.report.curve.iter().map(|p| super::Point {
        step: last + p.step,
        ..*p
    });
    then.report.curve = report.curve.iter().copied().chain(later).collect();
    // What the site was before anything was learned stays told.
    then.report.before = report.before;
    then.report.seconds += report.seconds;
    then.report.tried = report.tried.clone();
    then
}
