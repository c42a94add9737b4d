//! The model as a function that can be differentiated: as it is, and with students in the place of its attentions.
//!
//! At sites that may become window or hybrid attention, the graph with students is that of the model converted to hybrid
//! attention there: a student then reads its site's input and what the window beside it made, of q, k and v that the graph
//! makes, so gradients go through norms, rotary embeddings and windows as well.

use std::borrow::Cow;
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
use super::graph::{Gradient, NO_SITES, Program, Replaced, shape};
use super::inputs::Sample;
use super::learn::Learned;
use super::near::{self, Near};
use super::student::Student;
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
                let student = with_students(teacher, targets, &near, &[], &wanted, device)?;
                (student, near, None)
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
                    false => Ok(None),
                    true => match near::window(&hybrid, target)? {
                        // Learned alone, too, it would stay linear.
                        None if !target.methods.contains(&Method::Linear) => {
                            Err(target.no_window())
                        }
                        near => Ok(near),
                    },
                };
                let near = targets.iter().map(window).collect::<Result<Vec<_>, _>>()?;
                let grids = unknown_grids(&hybrid, targets, &near)?;
                let student = with_students(&hybrid, targets, &near, &grids, &wanted, device)?;
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
    fn inputs<'s>(&self, sample: &'s Sample) -> Result<Cow<'s, [(String, Fed)]>, DistillError> {
        let mut inputs = Cow::Borrowed(sample.inputs.as_slice());
        if let Some(grids) = &self.grids {
            let mut grids = grids.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = given(&grids, &sample.inputs);
            inputs.to_mut().extend(grids.run(&taken)?);
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
        let name = &target.merged.name;
        Ok(Self {
            target: target.clone(),
            near,
            shape: shape(teacher.shapes, name)
                .map_err(|_| target.fault(name, "has no known shape"))?,
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
    let student = site.beginning(0, device)?;
    if let Some(student) = &student {
        student.set(&site.done.weights)?;
    }
    Ok(student)
}

/// The teacher's graph with students in the place of its attentions; `grids` are given to it.
fn with_students(
    teacher: &Teacher<'_>,
    targets: &[Target],
    near: &[Option<Near>],
    grids: &[Cut],
    wanted: &[&str],
    device: &Device,
) -> Result<Program, DistillError> {
    let attentions = targets.iter().zip(near).map(|(target, near)| {
        let near = near.as_ref().map(|near| near.made.name.as_str());
        Replaced {
            inputs: [target.x.name.as_str()].into_iter().chain(near).collect(),
            output: &target.merged.name,
        }
    });
    let attentions: Vec<Replaced<'_>> = attentions.collect();
    let fed: Vec<&str> = grids.iter().map(|grid| grid.name.as_str()).collect();
    let (file, shapes) = (teacher.file, teacher.shapes);
    Ok(Program::new(
        file,
        shapes,
        &attentions,
        &fed,
        wanted,
        device,
    )?)
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
