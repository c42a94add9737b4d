//! Refinement: the sites whose errors reach the output learn on, in order, on what the converted part before them gives,
//! with the original's outputs as before. So a site can make good what the ones before it do wrong, and time goes where
//! it counts: in the models measured a handful of sites make nearly all of the error.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use linfusion_models::onnx::OnnxFile;
use linfusion_runtime::engine::{Operators, SessionOptions};
use linfusion_runtime::subgraph;
use serde::{Deserialize, Serialize};

use super::capture::{Teacher, capture, groups};
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

/// The sites are taken in at most so many parts, each on a model converted anew, of at least so many sites. Not in as many as
/// there are cores: what is learned must not depend on them.
const PARTS: usize = 2;
const OF_A_PART: usize = 2;
/// Samples, of those learned from, on which the sites' effects are measured.
const LOOKS: usize = 4;
/// Share of the whole error that the sites which learn on make up.
const SHARE: f64 = 0.99;
/// Work, in that of the first time.
const TIMES: f64 = 5.0;
/// Steps that a site gets at most, in those of the first time.
const MOST: f64 = 16.0;
/// Steps are a multiple of this, so that the last digits of a measurement do not decide, and a site that would get none stays
/// as it is.
const GRAIN: usize = 100;
/// What is left of a site's error after so many times the steps falls about as their power of -2/3 at the sites measured.
/// Then the whole is least where each gets steps as the power 1 / (1 + 2/3) of its error for the work of a step.
const POWER: f64 = 0.6;
const REFINED: &str = "refined";
const TURNS: &str = "turns";

/// What a site's error counts for.
#[derive(Clone, Copy, Debug)]
struct Worth {
    /// Its place among those learned.
    index: usize,
    /// Of the whole error.
    share: f64,
    /// Of a step.
    work: f64,
}

/// A site that learns on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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
        let became = became(before);
        // What was measured before an interruption holds on.
        let measured = self.state.with(&became);
        let turns = match measured.load_value(TURNS) {
            Some(turns) => turns,
            None => {
                let turns = self.turns(&sites)?;
                measured.save_value(TURNS, &turns)?;
                turns
            }
        };
        let state = measured.with(&format!("{turns:?}"));
        for part in turns.chunks(turns.len().div_ceil(PARTS).max(OF_A_PART)) {
            for (index, done) in self.refine_part(&sites, part, &state)? {
                if let Some(site) = sites.get_mut(index) {
                    site.done = done;
                }
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
        let first = self.request.schedule;
        let work = |site: &Learned| first.work(site.target.tokens, site.target.shape.dim);
        let worth = |(share, index): &(f64, usize)| {
            Some(Worth {
                index: *index,
                share: *share,
                work: work(sites.get(*index)?),
            })
        };
        let worths: Vec<Worth> = chosen.iter().filter_map(worth).collect();
        let learned = |site: &&Learned| site.done.report.attention != Method::Window;
        let all = sites.iter().filter(learned).map(work).sum();
        Ok(turns(&worths, all, first.steps))
    }

    /// How many of the sites, in order, the disk holds the activations of at once.
    fn fitting(&self, sites: &[Learned], part: &[Turn]) -> Result<Vec<usize>, DistillError> {
        let targets = part.iter().filter_map(|turn| sites.get(turn.index));
        let targets: Vec<Target> = targets.map(|s| s.target.clone()).collect();
        let groups = groups(&targets, self.images(), self.request.disk_budget)?;
        Ok(groups.into_iter().map(<[Target]>::len).collect())
    }

    /// What the sites of a part become: all learn in the model as it was before the part, whatever the disk holds at once, and
    /// after an interruption too.
    fn refine_part(
        &self,
        sites: &[Learned],
        part: &[Turn],
        state: &State,
    ) -> Result<Vec<(usize, Done)>, DistillError> {
        let (mut refined, mut rest) = (Vec::new(), part);
        for fitting in self.fitting(sites, part)? {
            let (group, more) = rest.split_at(fitting.min(rest.len()));
            refined.extend(self.refine_group(sites, group, state)?);
            rest = more;
        }
        Ok(refined)
    }

    fn refine_group(
        &self,
        sites: &[Learned],
        turns: &[Turn],
        state: &State,
    ) -> Result<Vec<(usize, Done)>, DistillError> {
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
        Ok(refined)
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
        let shapes = subgraph::shapes(&file, self.samples.first().map_or(&[][..], |s| &s.inputs));
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
        let method = |turn: &Turn| sites.get(turn.index).map(|s| s.done.report.attention);
        let mut near = Vec::with_capacity(open.len());
        for (turn, target) in open {
            near.push(match method(turn) {
                Some(Method::Hybrid) => Some(near::of_hybrid(&student, target)?),
                _ => None,
            });
        }
        let windows = near.iter().zip(&targets);
        let windows = windows.filter_map(|(value, target)| Some((*target, value.as_ref()?)));
        let inputs = targets.iter().map(|t| (*t, &t.x));
        let wanted: Vec<_> = inputs.chain(windows).collect();
        let mut inputs = capture(&student, &wanted, self.samples, &self.scratch, &tick)?;
        let mut windows = inputs.split_off(targets.len()).into_iter();
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
            let (Some(site), Some(output)) = (sites.get(turn.index), output) else {
                return Err(target.fault(&target.merged.name, "is not computed"));
            };
            ready.push(Ready {
                target,
                layers: site.layers.clone(),
                x,
                output,
                near,
            });
        }
        let steps: HashMap<usize, usize> = open
            .iter()
            .map(|(turn, target)| (target.site, turn.steps))
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
        // One job for each of `open`, in its order.
        let places = open.iter().map(|(turn, _)| turn.index);
        Ok(places.zip(done).collect())
    }
}

/// At most [`TIMES`] as much work for these sites as `steps` times `all`, the work of a step of each site learned: what a site
/// beyond [`MOST`] would get is saved.
fn turns(worths: &[Worth], all: f64, steps: usize) -> Vec<Turn> {
    let weight = |site: &Worth| (site.share / site.work.max(1.0)).powf(POWER);
    let weighed: f64 = worths.iter().map(|site| weight(site) * site.work).sum();
    let turn = |site: &Worth| {
        let times = TIMES * all * weight(site) / weighed.max(f64::MIN_POSITIVE);
        let grains = steps as f64 * times.min(MOST) / GRAIN as f64;
        Turn {
            index: site.index,
            steps: GRAIN * grains.round() as usize,
        }
    };
    worths.iter().map(turn).filter(|t| t.steps > 0).collect()
}

/// The share of each site's effect in the sum of all, mean over the samples: so that no sample counts more than others because
/// small differences show there.
fn shares(effects: &[EndToEnd]) -> Vec<f64> {
    let noise = |effect: &EndToEnd| -> Vec<f64> {
        let noise = |db: &Option<f64>| db.map_or(0.0, |db| 10.0_f64.powf(-db / 10.0));
        effect.psnr_db.iter().map(noise).collect()
    };
    let mut noise: Vec<Vec<f64>> = effects.iter().map(noise).collect();
    let samples = noise.first().map_or(0, Vec::len);
    for sample in 0..samples {
        let of_sample = |noise: &[Vec<f64>]| -> Vec<f64> {
            noise
                .iter()
                .filter_map(|n| n.get(sample))
                .copied()
                .collect()
        };
        // Beside an output that is not finite no other error counts.
        if of_sample(&noise).contains(&f64::INFINITY) {
            for value in noise.iter_mut().filter_map(|n| n.get_mut(sample)) {
                *value = f64::from(u8::from(value.is_infinite()));
            }
        }
        let sum: f64 = of_sample(&noise).iter().sum();
        for value in noise.iter_mut().filter_map(|n| n.get_mut(sample)) {
            *value = if sum > 0.0 { *value / sum } else { 0.0 };
        }
    }
    let share = |noise: &Vec<f64>| noise.iter().sum::<f64>() / samples.max(1) as f64;
    noise.iter().map(share).collect()
}

/// What every site became.
fn became(sites: &[Learned]) -> String {
    let became: Vec<(&str, Method)> = sites
        .iter()
        .map(|s| (s.target.module.as_str(), s.done.report.attention))
        .collect();
    format!("{became:?}")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sample_counts_alike() {
        let effect = |psnr_db: [Option<f64>; 3]| EndToEnd {
            psnr_db: psnr_db.into(),
            mean_psnr_db: None,
            pooled_psnr_db: None,
        };
        // Three to one in the first sample, one to three in the second, which is a thousand times worse; equal outputs in
        // the third say nothing.
        let three = 10.0 * 3.0_f64.log10();
        let found = shares(&[
            effect([Some(60.0 - three), Some(30.0), None]),
            effect([Some(60.0), Some(30.0 - three), None]),
        ]);
        assert_eq!(found.len(), 2);
        for share in found {
            assert!((share - 1.0 / 3.0).abs() < 1e-12, "{share}");
        }
        let broken = shares(&[
            effect([Some(f64::NEG_INFINITY), Some(30.0), None]),
            effect([Some(60.0), Some(30.0), None]),
        ]);
        // Of three samples the first is all the broken site's, and the second half.
        assert!((broken[0] - 0.5).abs() < 1e-12, "{broken:?}");
        assert!((broken[1] - 1.0 / 6.0).abs() < 1e-12, "{broken:?}");
    }

    #[test]
    fn steps_go_where_they_count_and_the_work_is_kept_to() {
        let site = |index, share, work| Worth { index, share, work };
        let sites = [site(0, 0.5, 1e5), site(2, 0.1, 1e5), site(3, 0.1, 4e5)];
        let all = 6e5;
        let found = turns(&sites, all, 300);
        let places: Vec<usize> = found.iter().map(|t| t.index).collect();
        assert_eq!(places, [0, 2, 3]);
        let [a, b, c] = [found[0].steps, found[1].steps, found[2].steps];
        assert!(a > b && b > c, "{found:?}");
        let work: f64 = found
            .iter()
            .zip(&sites)
            .map(|(t, s)| t.steps as f64 * s.work)
            .sum();
        // Half a grain for each.
        let rounded: f64 = sites.iter().map(|s| 0.5 * GRAIN as f64 * s.work).sum();
        assert!((work - TIMES * all * 300.0).abs() <= rounded, "{work}");
        // One site alone is not drilled for ever, and one that hardly counts not at all.
        let alone = turns(&sites[..1], 1e7, 300);
        assert_eq!(alone[0].steps, (300.0 * MOST) as usize);
        let hardly = [site(0, 1.0, 1e5), site(1, 1e-6, 1e5)];
        assert_eq!(turns(&hardly, 1e5, 300).len(), 1);
        assert!(turns(&[], all, 300).is_empty());
    }
}
