//! The model as a function that can be differentiated: as it is, and with students in the place of its attentions.
//!
//! At sites that may become window or hybrid attention, the graph with students is that of the model converted to hybrid
//! attention there: a student then reads its site's input and what the window beside it made, of q, k and v that the graph
//! makes, so gradients go through norms, rotary embeddings and windows as well.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor, Var};
use linfusion_models::onnx::OnnxFile;
use linfusion_ops::schema::TextSide;
use linfusion_runtime::engine::{Operators, Session, SessionOptions};
use linfusion_runtime::subgraph::{self, Cut};
use linfusion_runtime::tensor::Tensor as Fed;

use super::capture::{Teacher, Whether, given};
use super::error::DistillError;
use super::graph::{Gradient, NO_SITES, Program, Replaced};
use super::inputs::Sample;
use super::learn::Learned;
use super::near::{self, Near};
use super::student::{Beginning, Student};
use super::target::{Target, Value};
use crate::attention::plain::Layout;
use crate::plan::{Method, Selection};

/// Both programs.
pub(super) struct StudentGraph {
    original: Program,
    student: Program,
    /// Computes the grids that do not follow from sizes.
    grids: Option<Mutex<Session>>,
    /// Of the wanted values those that are the model's outputs; the others are the attentions'.
    pub outputs: usize,
    /// Where the students stand.
    places: Vec<Place>,
}

/// Where a student stands.
struct Place {
    target: Target,
    /// What the window beside it made; `None` where there can be neither window nor text.
    near: Option<Value>,
    /// The shape of the attention's output.
    shape: Vec<usize>,
}

/// The students of all sites; `None` where a site is window attention, which learns nothing.
pub(super) type Students = [Option<Student>];

impl StudentGraph {
    /// Reads the graph at the size of `inputs`; a converted copy is made in `scratch` where it is needed.
    ///
    /// # Errors
    /// An operator cannot be differentiated.
    pub fn new(
        teacher: &Teacher<'_>,
        targets: &[Target],
        selection: &Selection,
        scratch: &Path,
        inputs: &[(String, Fed)],
        device: &Device,
    ) -> Result<Self, DistillError> {
        let outputs = outputs(teacher);
        let attentions = targets.iter().map(|t| t.merged.name.as_str());
        let wanted: Vec<&str> = outputs.iter().copied().chain(attentions).collect();
        let original = Program::new(teacher.file, teacher.shapes, &[], &[], &wanted, device)?;
        let (student, near, grids) = match targets.iter().any(Target::has_window) {
            false => {
                let near: Vec<Option<Near>> = targets.iter().map(|_| None).collect();
                let student = Replacing::new(targets, &near, Vec::new());
                (student.program(teacher, &wanted, device)?, near, None)
            }
            true => {
                let path = teacher.file.path();
                let copy = near::converted(path, targets, selection, Method::Hybrid, scratch)?;
                let file = OnnxFile::open(copy.path())?;
                let mut shapes = subgraph::shapes(&file, inputs);
                // Behind an image of so many pixels as an input's values say, sizes would be unknown.
                shapes.learn_from(teacher.shapes);
                let options = SessionOptions {
                    operators: Operators::InProcess,
                    ..teacher.options.clone()
                };
                let hybrid = Teacher {
                    file: &file,
                    shapes: &shapes,
                    options: &options,
                    ..teacher.clone()
                };
                let window = |target: &Target| match target.has_window() {
                    true => {
                        let near = near::window(&hybrid, target)?;
                        // Learned alone, too, it would stay linear.
                        match near.is_some() || target.methods.contains(&Method::Linear) {
                            true => Ok(near),
                            false => Err(target.fault(
                                &target.merged.name,
                                "has no window: the rows and columns of its tokens cannot be told (hint: --grid)",
                            )),
                        }
                    }
                    false => Ok(None),
                };
                let near = targets.iter().map(window).collect::<Result<Vec<_>, _>>()?;
                let grids = unknown_grids(&hybrid, targets, &near)?;
                let names = grids.iter().map(|grid| grid.name.as_str()).collect();
                let student = Replacing::new(targets, &near, names);
                let student = student.program(&hybrid, &wanted, device)?;
                let grids = match grids.is_empty() {
                    true => None,
                    false => Some(Mutex::new(hybrid.part(&[], &grids)?)),
                };
                (student, near, grids)
            }
        };
        let places = targets.iter().zip(near);
        let places =
            places.map(|(target, near)| Place::new(teacher, target, near.map(|near| near.made)));
        Ok(Self {
            original,
            student,
            grids,
            outputs: outputs.len(),
            places: places.collect::<Result<_, DistillError>>()?,
        })
    }

    /// The original's outputs, then its attentions'.
    pub fn original(&self, sample: &Sample) -> Result<Vec<Tensor>, DistillError> {
        Ok(self.original.run(&sample.inputs, NO_SITES)?)
    }

    /// The same with `students`.
    pub fn run(&self, students: &Students, sample: &Sample) -> Result<Vec<Tensor>, DistillError> {
        let sites = |i: usize, given: &[&Tensor]| self.site(students, i, given);
        Ok(self.student.run(&self.inputs(sample)?, &sites)?)
    }

    /// The gradient of `loss`, a function of what [`Self::run`] gives, by `weights`, which are the students'.
    pub fn gradient(
        &self,
        students: &Students,
        sample: &Sample,
        weights: &[Var],
        loss: &dyn Fn(&[Tensor]) -> candle_core::Result<Tensor>,
    ) -> Result<Gradient, DistillError> {
        let sites = |i: usize, given: &[&Tensor]| self.site(students, i, given);
        let inputs = self.inputs(sample)?;
        Ok(self.student.gradient(&inputs, &sites, weights, loss)?)
    }

    /// What the program with students takes.
    fn inputs(&self, sample: &Sample) -> Result<Vec<(String, Fed)>, DistillError> {
        let mut inputs = sample.inputs.clone();
        if let Some(grids) = &self.grids {
            let mut grids = grids.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = given(&grids, &sample.inputs);
            inputs.extend(grids.run(&taken)?);
        }
        Ok(inputs)
    }

    /// A student in the place of its attention: tensors as the graph has them.
    fn site(
        &self,
        students: &Students,
        index: usize,
        given: &[&Tensor],
    ) -> candle_core::Result<Tensor> {
        let (Some(place), Some(student)) = (self.places.get(index), students.get(index)) else {
            candle_core::bail!("there is no attention {index}");
        };
        place.attend(student.as_ref(), given)
    }
}

impl Place {
    fn new(
        teacher: &Teacher<'_>,
        target: &Target,
        near: Option<Value>,
    ) -> Result<Self, DistillError> {
        let dims = teacher.shapes.shape(&target.merged.name);
        let dims = dims.and_then(|dims| dims.iter().map(|d| usize::try_from(*d).ok()).collect());
        Ok(Self {
            target: target.clone(),
            near,
            shape: dims.ok_or_else(|| target.fault(&target.merged.name, "has no known shape"))?,
        })
    }

    /// The attention's output, of the site's input and what the window made.
    fn attend(&self, student: Option<&Student>, given: &[&Tensor]) -> candle_core::Result<Tensor> {
        let Target {
            tokens, x, merged, ..
        } = &self.target;
        let image = |all: &Tensor, value: &Value| {
            let image = value.of_image(*tokens);
            all.narrow(1, image.start, image.len())
        };
        let near = match (given.get(1), &self.near) {
            (Some(near), Some(value)) => Some((self.matrix(near, value)?, value)),
            _ => None,
        };
        let beside = near.as_ref().map(|(all, value)| image(all, value));
        let beside = beside.transpose()?;
        let out = match (student, given.first(), beside) {
            (Some(student), Some(given), beside) if beside.is_some() || !student.is_mixed() => {
                student.forward(&image(&self.matrix(given, x)?, x)?, beside.as_ref())?
            }
            (None, _, Some(beside)) => beside,
            _ => candle_core::bail!("a window is missing"),
        };
        let out = match (merged.text, near) {
            (None, _) => out,
            (Some(text), Some((all, _))) => match text.side {
                TextSide::Prefix => Tensor::cat(&[&all.narrow(1, 0, text.tokens)?, &out], 1)?,
                TextSide::Suffix => Tensor::cat(&[&out, &all.narrow(1, *tokens, text.tokens)?], 1)?,
            },
            (Some(_), None) => candle_core::bail!("what text attends to is missing"),
        };
        match merged.layout {
            Layout::ChannelsFirst => out.transpose(1, 2)?.reshape(self.shape.as_slice()),
            _ => out.reshape(self.shape.as_slice()),
        }
    }

    /// `[B, tokens, C]` of one of the site's values, text included.
    fn matrix(&self, x: &Tensor, value: &Value) -> candle_core::Result<Tensor> {
        let (all, dim) = (value.all(self.target.tokens), self.target.shape.dim);
        let images = x.elem_count() / (all * dim).max(1);
        match value.layout {
            Layout::ChannelsFirst => x.reshape((images, dim, all))?.transpose(1, 2)?.contiguous(),
            _ => x.reshape((images, all, dim)),
        }
    }
}

/// The student of a site that has learned alone.
pub(super) fn student(site: &Learned, device: &Device) -> candle_core::Result<Option<Student>> {
    let method = site.done.report.attention;
    if method == Method::Window {
        return Ok(None);
    }
    let beginning = Beginning {
        projections: &site.layers.projections,
        mid: site.done.report.mid,
        mixed: method == Method::Hybrid,
        seed: 0,
    };
    let student = Student::new(site.target.shape, &beginning, device)?;
    student.set(&site.done.weights)?;
    Ok(Some(student))
}

/// What stands in for parts of a graph.
struct Replacing<'a> {
    attentions: Vec<Replaced<'a>>,
    fed: Vec<&'a str>,
}

impl<'a> Replacing<'a> {
    fn new(targets: &'a [Target], near: &'a [Option<Near>], fed: Vec<&'a str>) -> Self {
        let attention = |(target, near): (&'a Target, &'a Option<Near>)| {
            let near = near.as_ref().map(|near| near.made.name.as_str());
            Replaced {
                inputs: std::iter::once(target.x.name.as_str())
                    .chain(near)
                    .collect(),
                output: &target.merged.name,
            }
        };
        Self {
            attentions: targets.iter().zip(near).map(attention).collect(),
            fed,
        }
    }

    fn program(
        &self,
        teacher: &Teacher<'_>,
        wanted: &[&str],
        device: &Device,
    ) -> Result<Program, DistillError> {
        let (file, shapes) = (teacher.file, teacher.shapes);
        let program = Program::new(file, shapes, &self.attentions, &self.fed, wanted, device);
        Ok(program?)
    }
}

/// The grids of windows that do not follow from sizes: FLUX's are in the values of its ids, so the engine computes them.
fn unknown_grids(
    hybrid: &Teacher<'_>,
    targets: &[Target],
    near: &[Option<Near>],
) -> Result<Vec<Cut>, DistillError> {
    let mut grids: Vec<Cut> = Vec::new();
    for (target, near) in targets.iter().zip(near) {
        let Some(Near { grid, .. }) = near else {
            continue;
        };
        let told = hybrid.shapes.fact(grid).ints().is_some();
        if !told && !grids.iter().any(|cut| cut.name == *grid) {
            grids.push(hybrid.cut(target, grid, Whether::Open)?);
        }
    }
    Ok(grids)
}

/// The names of the model's outputs.
pub(super) fn outputs<'t>(teacher: &'t Teacher<'_>) -> Vec<&'t str> {
    let outputs = teacher.file.model.graph.output.iter();
    outputs.filter_map(|o| o.name.as_deref()).collect()
}
