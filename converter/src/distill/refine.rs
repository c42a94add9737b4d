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
use super::report::{EndToEnd, mean};
use super::state::{Done, State};
use super::store::Store;
use super::target::Target;
use super::train::Schedule;
use crate::plan::Method;

/// The sites are taken in so many parts, each on a model converted anew. Not in as many as there are cores: what is learned
/// must not depend on them.
const PARTS: usize = 2;
/// Samples, of those learned from, on which the sites' effects are measured.
const LOOKS: usize = 4;
/// Share of the whole error that the sites which learn on make up.
const SHARE: f64 = 0.98;
/// Work, in that of the first time.
const TIMES: f64 = 4.0;
/// Steps that a site gets at most, in those of the first time.
const MOST: f64 = 16.0;
/// What is left of a site's error after so many times the steps falls about as their power of -2/3 at the sites measured.
/// Then the whole is least where each gets steps as the power 1 / (1 + 2/3) of its error for the work of a step.
const POWER: f64 = 0.6;
const REFINED: &str = "refined";

/// A site that learns on.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Turn {
    /// Its place among those learned.
    index: usize,
    /// For so many steps.
    steps: usize,
}

impl Work<'_> {
    /// Lets the sites that count learn on; windows, which have no weights, and the others stay as they are. Gives what there is
    /// to tell, too.
    ///
    /// # Errors
    /// As learning the first time.
    pub fn refine(&self, before: &[Learned]) -> Result<(Vec<Learned>, String), DistillError> {
        let mut sites = before.to_vec();
        let turns = self.turns(&sites)?;
        let state = self.state.with(&depends(before, &turns));
        for part in turns.chunks(turns.len().div_ceil(PARTS).max(1)) {
            let mut part = part;
            for fitting in self.fitting(&sites, part)? {
                let (group, rest) = part.split_at(fitting.min(part.len()));
                self.refine_part(&mut sites, group, &state)?;
                part = rest;
            }
        }
        let error = |sites: &[Learned]| {
            let errors: Vec<_> = turns.iter().filter_map(|t| sites.get(t.index)).collect();
            mean(errors.iter().map(|s| s.done.report.after)).unexplained
        };
        let steps = turns.iter().map(|turn| turn.steps);
        let told = format!(
            "{} of {} sites, {} to {} steps, from {:.1} % of their variance unexplained to {:.1} %",
            turns.len(),
            sites.len(),
            steps.clone().min().unwrap_or_default(),
            steps.max().unwrap_or_default(),
            100.0 * error(before),
            100.0 * error(&sites)
        );
        Ok((sites, told))
    }

    /// The sites with weights, in order, that make up most of the error of the whole, each measured alone, and for how long
    /// they learn on.
    fn turns(&self, sites: &[Learned]) -> Result<Vec<Turn>, DistillError> {
        let looks: Range<usize> = 0..LOOKS.min(self.learned().len());
        let samples = self.learned().get(looks).unwrap_or_default();
        self.begin("running the original", samples.len());
        let expected = self.original(samples)?;
        let effects = effects(self, sites, samples, &expected)?;
        let mut shares: Vec<(f64, usize)> = shares(&effects)
            .into_iter()
            .zip(0..)
            .filter(|(_, i)| {
                let method = sites.get(*i).map(|s| s.done.report.attention);
                method.is_some_and(|method| method != Method::Window)
            })
            .collect();
        shares.sort_by(|a, b| b.0.total_cmp(&a.0));
        let total: f64 = shares.iter().map(|(share, _)| share).sum();
        let mut reached = 0.0;
        let mut chosen: Vec<(f64, usize)> = shares
            .into_iter()
            .take_while(|(share, _)| {
                let wanted = reached < SHARE * total;
                reached += share;
                wanted
            })
            .collect();
        chosen.sort_by_key(|(_, index)| *index);
        Ok(self.steps(sites, &chosen))
    }

    /// [`TIMES`] as much work for the chosen as the first time was for all, by what each one's error is worth.
    fn steps(&self, sites: &[Learned], chosen: &[(f64, usize)]) -> Vec<Turn> {
        let first = self.request.schedule;
        let work = |site: &Learned| {
            let target = &site.target;
            (first.images(target.tokens) * target.tokens * target.shape.dim) as f64
        };
        let all: f64 = sites.iter().map(work).sum();
        let chosen = chosen.iter().filter_map(|(share, index)| {
            let work = work(sites.get(*index)?);
            Some((*index, (share / work).powf(POWER), work))
        });
        let weighed: f64 = chosen.clone().map(|(_, weight, work)| weight * work).sum();
        let turn = |(index, weight, _): (usize, f64, f64)| {
            let times = TIMES * all * weight / weighed.max(f64::MIN_POSITIVE);
            Turn {
                index,
                steps: (first.steps as f64 * times.min(MOST)) as usize,
            }
        };
        chosen.map(turn).collect()
    }

    /// How many of the sites, in order, the disk holds the activations of at once.
    fn fitting(&self, sites: &[Learned], part: &[Turn]) -> Result<Vec<usize>, DistillError> {
        let targets = part.iter().filter_map(|turn| sites.get(turn.index));
        let targets: Vec<Target> = targets.map(|s| s.target.clone()).collect();
        let groups = groups(&targets, self.images(), self.request.disk_budget)?;
        Ok(groups.into_iter().map(<[Target]>::len).collect())
    }

    fn refine_part(
        &self,
        sites: &mut [Learned],
        turns: &[Turn],
        state: &State,
    ) -> Result<(), DistillError> {
        let (mut refined, mut open) = (Vec::new(), Vec::new());
        for turn in turns {
            let Some(site) = sites.get(turn.index) else {
                continue;
            };
            match state.load(REFINED, site.target.site) {
                Some(done) => refined.push((turn.index, done)),
                None => open.push((*turn, site.target.clone())),
            }
        }
        if !open.is_empty() {
            refined.extend(self.refined(sites, &open, state)?);
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
        open: &[(Turn, Target)],
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
        let became = |turn: &Turn| sites.get(turn.index).map(|s| s.done.report.attention);
        let mut near = Vec::with_capacity(open.len());
        for (turn, target) in open {
            near.push(match became(turn) {
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
        for (((turn, target), x), window) in open.iter().zip(inputs).zip(&near) {
            let near = window.as_ref().and_then(|_| windows.next());
            let kept = self.outputs().get(&target.site).cloned();
            let output = kept.or_else(|| fresh.remove(&target.site));
            if let (Some(site), Some(output)) = (sites.get(turn.index), output) {
                ready.push(Ready {
                    target,
                    layers: site.layers.clone(),
                    x,
                    output,
                    near,
                });
            }
        }
        let steps: HashMap<usize, usize> = open
            .iter()
            .map(|(t, target)| (target.site, t.steps))
            .collect();
        self.begin("refining", steps.values().sum());
        let method = |ready: &Ready<'_>| match ready.near {
            Some(_) => Method::Hybrid,
            None => Method::Linear,
        };
        let jobs: Vec<(&Ready<'_>, Method)> = ready.iter().map(|r| (r, method(r))).collect();
        let of = |site: usize| steps.get(&site).copied().unwrap_or_default();
        let done = self.beside(&jobs, &of, |(ready, method)| {
            let site = ready.target.site;
            let first = sites.iter().find(|s| s.target.site == site);
            let weights = first.map(|s| &s.done.weights);
            let schedule = Schedule {
                steps: of(site),
                ..self.request.schedule
            };
            let mut done = self.learn_site(ready, *method, weights, &schedule)?;
            if let Some(first) = first {
                done = after(&first.done, done);
            }
            state.save(REFINED, site, &done)?;
            Ok(done)
        })?;
        let places = open.iter().map(|(turn, _)| turn.index);
        Ok(places.zip(done).collect())
    }
}

/// The share of each site's effect in the sum of all, mean over the samples: so that no sample counts more than others because
/// small differences show there.
fn shares(effects: &[EndToEnd]) -> Vec<f64> {
    let noise = |effect: &EndToEnd| -> Vec<f64> {
        let noise = |db: &Option<f64>| db.map_or(0.0, |db| 10.0_f64.powf(-db / 10.0));
        effect.psnr_db.iter().map(noise).collect()
    };
    let noise: Vec<Vec<f64>> = effects.iter().map(noise).collect();
    let samples = noise.first().map_or(0, Vec::len);
    let of_sample = |sample: usize| noise.iter().filter_map(move |n| n.get(sample));
    let sums: Vec<f64> = (0..samples).map(|s| of_sample(s).sum()).collect();
    let share = |noise: &Vec<f64>| {
        let shares = noise.iter().zip(&sums).filter(|(_, sum)| sum.is_normal());
        shares.map(|(n, sum)| n / sum).sum::<f64>() / samples.max(1) as f64
    };
    noise.iter().map(share).collect()
}

/// What refined weights depend on beside the request: what every site became, and which of them learn on together.
fn depends(sites: &[Learned], turns: &[Turn]) -> String {
    let became: Vec<(&str, Method)> = sites
        .iter()
        .map(|s| (s.target.module.as_str(), s.done.report.attention))
        .collect();
    format!("{became:?} {turns:?}")
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
