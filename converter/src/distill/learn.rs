//! Learning the sites, each from the original's own activations.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use candle_core::Device;
use linfusion_models::checkpoint::write::NewModule;
use linfusion_models::checkpoint::{CheckpointModule, MlpWidth, Part, SiteAttention};
use linfusion_models::random::SplitMix64;
use linfusion_ops::schema::WindowSpec;
use rayon::prelude::*;

use super::capture::{Teacher, capture, groups};
use super::choose::cheapest;
use super::error::{DistillError, learning};
use super::inputs::Sample;
use super::measure::{self, Judged, Outputs};
use super::near;
use super::output;
use super::probe::{Layers, layers};
use super::report::SiteReport;
use super::state::{Done, State};
use super::store::Store;
use super::student::{Beginning, Student, Weights};
use super::target::Target;
use super::train::{Activations, Schedule, error_of, fit};
use super::{Progress, Request};
use crate::convert::WeightsFrom;
use crate::plan::{Method, Selection};

/// What every step of a distillation needs.
pub(super) struct Work<'a> {
    pub request: &'a Request,
    pub teacher: Teacher<'a>,
    pub samples: &'a [Sample],
    /// Where weights are learned.
    pub device: Device,
    pub scratch: PathBuf,
    pub state: State,
    pub progress: &'a (dyn Fn(Progress) + Sync),
    /// The original's outputs by site, where those of all sites fit on the disk.
    pub outputs: Mutex<HashMap<usize, Arc<Store>>>,
}

/// A site and what was learned for it.
#[derive(Clone, Debug)]
pub(super) struct Learned {
    pub target: Target,
    pub layers: Layers,
    pub done: Done,
    pub window: WindowSpec,
}

impl Learned {
    /// Its student as learning begins; a window has none.
    pub fn beginning(&self, seed: u64, device: &Device) -> candle_core::Result<Option<Student>> {
        let report = &self.done.report;
        if report.attention == Method::Window {
            return Ok(None);
        }
        let beginning = Beginning {
            projections: &self.layers.projections,
            mid: report.mid,
            mixed: report.attention == Method::Hybrid,
            seed,
        };
        Student::new(self.target.shape, &beginning, device).map(Some)
    }
}

/// The modules of a checkpoint.
pub(super) fn modules(sites: &[Learned]) -> Vec<NewModule> {
    sites.iter().enumerate().map(module).collect()
}

fn module((index, site): (usize, &Learned)) -> NewModule {
    let Learned {
        target,
        layers,
        done,
        window,
    } = site;
    let attention = match done.report.attention {
        Method::Linear => SiteAttention::Linear,
        Method::Hybrid => SiteAttention::Hybrid(Some(*window)),
        Method::Window => SiteAttention::Window(Some(*window)),
    };
    let mut parts = done.weights.0.clone();
    // A hybrid's out projection stays the graph's without being told.
    if let (SiteAttention::Linear, Some(out)) = (attention, &layers.out) {
        parts.push((Part::OutWeight, out.weight.clone()));
        let zeros = || vec![0.0; target.shape.dim];
        parts.push((Part::OutBias, out.bias.clone().unwrap_or_else(zeros)));
    }
    NewModule {
        form: CheckpointModule {
            index,
            module_name: target.module.clone(),
            dim: target.shape.dim,
            heads: target.shape.heads,
            mid: done.report.mid.map_or(MlpWidth::Identity, MlpWidth::Width),
            attention,
        },
        parts,
    }
}

/// A site with its activations.
pub(super) struct Ready<'t> {
    pub target: &'t Target,
    pub layers: Layers,
    pub x: Store,
    pub output: Arc<Store>,
    pub near: Option<Store>,
}

impl Work<'_> {
    pub fn begin(&self, stage: &str, steps: usize) {
        (self.progress)(Progress::Begin {
            stage: stage.to_owned(),
            steps: steps as u64,
        });
    }

    pub fn advance(&self, steps: usize) {
        (self.progress)(Progress::Advance(steps as u64));
    }

    /// Samples to learn from.
    pub fn learned(&self) -> &[Sample] {
        self.samples.get(..self.request.samples).unwrap_or_default()
    }

    /// Samples to judge by.
    pub fn held_out(&self) -> &[Sample] {
        self.samples.get(self.request.samples..).unwrap_or_default()
    }

    fn window(&self) -> WindowSpec {
        self.request.selection.window.unwrap_or_default()
    }

    /// Learns all sites, as many at once as the disk holds the activations of.
    pub fn learn(&self, targets: &[Target]) -> Result<Vec<Learned>, DistillError> {
        let mut done = self.done_before(targets);
        let open: Vec<Target> = targets
            .iter()
            .filter(|t| !done.contains_key(&t.site))
            .cloned()
            .collect();
        let groups = groups(&open, self.images(), self.request.disk_budget)?;
        let keeps = groups.len() == 1;
        for group in groups {
            let ready = self.ready(group)?;
            done.extend(self.learn_group(group, &ready)?);
            if keeps {
                let outputs = ready.into_iter().map(|r| (r.target.site, r.output));
                self.outputs().extend(outputs);
            }
        }
        let mut learned = Vec::with_capacity(targets.len());
        for target in targets {
            if let Some(done) = done.remove(&target.site) {
                learned.push(Learned {
                    layers: self.layers(target)?,
                    target: target.clone(),
                    done,
                    window: self.window(),
                });
            }
        }
        Ok(learned)
    }

    /// How many sites have something of an earlier run of the request.
    pub fn taken_over(&self, targets: &[Target]) -> usize {
        let tried = |t: &&Target| {
            let mut methods = t.methods.iter();
            methods.any(|m| self.state.load(&m.to_string(), t.site).is_some())
        };
        targets.iter().filter(tried).count()
    }

    /// The sites that an earlier run of the request finished.
    fn done_before(&self, targets: &[Target]) -> HashMap<usize, Done> {
        let done = |t: &Target| {
            let done = self.state.load(CHOSEN, t.site)?;
            // The selection may have been another.
            let wanted = t.methods.contains(&done.report.attention);
            wanted.then_some((t.site, done))
        };
        targets.iter().filter_map(done).collect()
    }

    pub fn images(&self) -> usize {
        self.samples.len() * self.batch()
    }

    /// Images that a sample has.
    fn batch(&self) -> usize {
        let sizes = self.samples.first().into_iter().flat_map(|s| &s.inputs);
        let mut images = sizes.filter(|(_, t)| t.shape().len() >= 3);
        images
            .next()
            .and_then(|(_, t)| t.shape().first().copied())
            .unwrap_or(1)
    }

    fn layers(&self, target: &Target) -> Result<Layers, DistillError> {
        let first = self.samples.first().map_or(&[][..], |s| &s.inputs);
        layers(&self.teacher, target, first)
    }

    pub fn pool(&self) -> Result<rayon::ThreadPool, DistillError> {
        let mut pool = rayon::ThreadPoolBuilder::new();
        if let Some(threads) = self.request.threads {
            pool = pool.num_threads(threads.get());
        }
        pool.build()
            .map_err(|e| DistillError::Threads(e.to_string()))
    }

    /// The original's activations at some sites.
    fn ready<'t>(&self, targets: &'t [Target]) -> Result<Vec<Ready<'t>>, DistillError> {
        self.begin("running the original", self.samples.len());
        let values: Vec<_> = targets
            .iter()
            .flat_map(|t| [(t, &t.x), (t, &t.merged)])
            .collect();
        let tick = || self.advance(1);
        let stores = capture(&self.teacher, &values, self.samples, &self.scratch, &tick)?;
        let mut near = self.near(targets)?.into_iter();
        let mut stores = stores.into_iter();
        let mut ready = Vec::with_capacity(targets.len());
        for target in targets {
            let (Some(x), Some(output)) = (stores.next(), stores.next()) else {
                break;
            };
            ready.push(Ready {
                target,
                layers: self.layers(target)?,
                x,
                output: Arc::new(output),
                near: near.next().flatten(),
            });
        }
        Ok(ready)
    }

    /// What windows make of the same tokens, at the sites that may get one.
    fn near(&self, targets: &[Target]) -> Result<Vec<Option<Store>>, DistillError> {
        if !targets.iter().any(Target::has_window) {
            return Ok(Vec::new());
        }
        self.begin("running windows", self.samples.len());
        near::capture(self, targets)
    }

    pub fn outputs(&self) -> MutexGuard<'_, HashMap<usize, Arc<Store>>> {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn learn_group(
        &self,
        targets: &[Target],
        ready: &[Ready<'_>],
    ) -> Result<Vec<(usize, Done)>, DistillError> {
        let jobs: Vec<(&Ready<'_>, Method)> = ready
            .iter()
            .flat_map(|r| r.target.methods.iter().map(move |m| (r, *m)))
            .filter(|(r, m)| *m == Method::Linear || r.near.is_some())
            .collect();
        let learns = |m: &Method| *m != Method::Window;
        let count = jobs.iter().filter(|(_, m)| learns(m)).count();
        self.begin("learning", count * self.request.schedule.steps);
        let steps = |_| self.request.schedule.steps;
        let done = self.beside(&jobs, &steps, |(ready, method)| {
            let phase = method.to_string();
            if let Some(done) = self.state.load(&phase, ready.target.site) {
                self.advance(self.request.schedule.steps);
                return Ok(done);
            }
            let done = self.learn_site(ready, *method, None, &self.request.schedule)?;
            self.state.save(&phase, ready.target.site, &done)?;
            (self.progress)(Progress::Kept);
            Ok(done)
        })?;
        let mut by_site: HashMap<usize, Vec<Done>> = HashMap::new();
        for ((ready, _), done) in jobs.iter().zip(done) {
            by_site.entry(ready.target.site).or_default().push(done);
        }
        let mut chosen = Vec::with_capacity(targets.len());
        for target in targets {
            let tried = by_site.remove(&target.site).unwrap_or_default();
            let done = cheapest(target, tried, self.request.attention, self.window())
                .ok_or_else(|| target.no_window())?;
            self.state.save(CHOSEN, target.site, &done)?;
            chosen.push((target.site, done));
        }
        Ok(chosen)
    }

    /// Does `work` for all `jobs`, each on one core, the longest first by the sites' sizes and `steps`: a core that is done takes
    /// the next.
    pub fn beside<'j, 'r, 't: 'r, R: Send>(
        &self,
        jobs: &'j [(&'r Ready<'t>, Method)],
        steps: &dyn Fn(usize) -> usize,
        work: impl Fn(&'j (&'r Ready<'t>, Method)) -> Result<R, DistillError> + Sync,
    ) -> Result<Vec<R>, DistillError> {
        let mut order: Vec<(usize, &(&Ready<'_>, Method))> = jobs.iter().enumerate().collect();
        let schedule = &self.request.schedule;
        let time = |(_, (ready, _)): &(usize, &(&Ready<'_>, Method))| {
            let target = ready.target;
            schedule.work(target.tokens, target.shape.dim) * steps(target.site) as f64
        };
        order.sort_by(|a, b| time(b).total_cmp(&time(a)));
        let mut done: Vec<(usize, R)> = self.pool()?.install(|| {
            order
                .into_par_iter()
                .with_max_len(1)
                .map(|(i, job)| Ok((i, work(job)?)))
                .collect::<Result<_, DistillError>>()
        })?;
        done.sort_by_key(|(i, _)| *i);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    }

    /// Learns one site, from `weights` on where some are given.
    pub fn learn_site(
        &self,
        ready: &Ready<'_>,
        method: Method,
        weights: Option<&Weights>,
        schedule: &Schedule,
    ) -> Result<Done, DistillError> {
        let started = Instant::now();
        let target = ready.target;
        let activations = Activations {
            module: &target.module,
            shape: target.shape,
            tokens: target.tokens,
            x: &ready.x,
            target: &ready.output,
            near: ready.near.as_ref().filter(|_| method == Method::Hybrid),
            learned: self.request.samples * self.batch(),
            folder: &self.scratch,
        };
        let seed = SplitMix64::new(self.request.seed.wrapping_add(target.site as u64)).bits();
        let mid = match method {
            Method::Window => None,
            _ => self.request.mid.of(target.shape.dim),
        };
        let mut report = SiteReport {
            module: target.module.clone(),
            tokens: target.tokens,
            heads: target.shape.heads,
            dim: target.shape.dim,
            attention: method,
            mid,
            before: Default::default(),
            after: Default::default(),
            curve: Vec::new(),
            seconds: 0.0,
            tried: Vec::new(),
        };
        if let (Method::Window, Some(near)) = (method, &ready.near) {
            let error = error_of(near, &activations)?;
            (report.before, report.after) = (error, error);
            return Ok(Done {
                weights: Weights(Vec::new()),
                report,
            });
        }
        let failed = learning(&target.module);
        let beginning = Beginning {
            projections: &ready.layers.projections,
            mid,
            mixed: method == Method::Hybrid,
            seed,
        };
        let student = Student::new(target.shape, &beginning, &self.device).map_err(&failed)?;
        if let Some(weights) = weights {
            student.set(weights).map_err(&failed)?;
        }
        let tick = |steps| self.advance(steps);
        let fitted = fit(&student, &activations, schedule, seed, &self.device, &tick)?;
        report.before = fitted.before;
        report.after = fitted.after;
        report.curve = fitted.curve;
        report.seconds = started.elapsed().as_secs_f64();
        Ok(Done {
            weights: fitted.weights,
            report,
        })
    }

    /// The original's outputs for the samples held out.
    pub fn expected(&self) -> Result<Outputs, DistillError> {
        self.begin("running the original", self.held_out().len());
        self.original(self.held_out())
    }

    /// The model converted with these weights, on the samples held out.
    pub fn judged(&self, sites: Vec<Learned>, expected: &Outputs) -> Result<Judged, DistillError> {
        self.begin("running the converted model", self.held_out().len());
        let found = self.converted(&sites, self.held_out())?;
        Ok(Judged {
            sites,
            kept: Vec::new(),
            end_to_end: measure::distance(expected, &found),
        })
    }

    /// The original's outputs.
    pub fn original(&self, samples: &[Sample]) -> Result<Outputs, DistillError> {
        self.outputs_of(self.teacher.file.path(), samples)
    }

    /// Those of the model converted with these weights.
    pub fn converted(
        &self,
        sites: &[Learned],
        samples: &[Sample],
    ) -> Result<Outputs, DistillError> {
        self.outputs_of(&self.student(sites)?.path(), samples)
    }

    fn outputs_of(&self, model: &Path, samples: &[Sample]) -> Result<Outputs, DistillError> {
        measure::outputs(model, samples, self.teacher.engine, &|| self.advance(1))
    }

    /// Converts the model with these weights to a scratch file.
    pub fn student(&self, sites: &[Learned]) -> Result<measure::Scratch, DistillError> {
        let staged = output::stage(&self.scratch.join("checkpoint"), &modules(sites));
        let staged = staged.map_err(|error| match error {
            DistillError::Write { source, .. } => DistillError::Scratch {
                folder: self.scratch.clone(),
                source,
            },
            error => error,
        })?;
        measure::converted(
            self.teacher.file.path(),
            WeightsFrom::Path(staged.path().to_owned()),
            &Selection {
                // The checkpoint says what each site becomes.
                attention: Vec::new(),
                ..self.request.selection.clone()
            },
            &self.scratch,
        )
    }
}

const CHOSEN: &str = "chosen";
