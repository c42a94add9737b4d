//! The tiny UNet, with students in the place of its attentions.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::random::SplitMix64;
use linfusion_models::shapes::Shapes;
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Engine, SessionOptions};
use linfusion_runtime::npz;
use rstest::rstest;
use tempfile::TempDir;

use super::*;
use crate::analysis::Analysis;
use crate::convert::WeightsFrom;
use crate::distill::learn::modules;
use crate::distill::probe::layers;
use crate::distill::report::SiteReport;
use crate::distill::state::Done;
use crate::distill::student::Beginning;
use crate::distill::{measure, output};
use crate::plan::Method;
use crate::verify::engine;

struct Lesson {
    whole: Whole,
    students: Vec<Option<Student>>,
    /// The same students as what a checkpoint is written of.
    learned: Vec<Learned>,
    samples: Vec<Sample>,
    selection: Selection,
    folder: TempDir,
}

impl Lesson {
    /// Learning from two samples, as a run of a request of this name; gives the error before and after.
    fn learn(&self, request: &str, progress: &(dyn Fn(Progress) + Sync)) -> [f64; 2] {
        let (learned, held_out) = self.samples.split_at(2);
        let course = Course {
            learned,
            held_out,
            state: &State::of(&self.folder.path().join("weights"), request),
            progress,
        };
        self.whole.learn(&self.students, &course).unwrap()
    }

    /// On the samples held out.
    fn error(&self) -> f64 {
        let held_out = &self.samples[2..];
        let expected = held_out
            .iter()
            .map(|s| self.whole.graph.original(s).unwrap());
        let expected: Vec<_> = expected.collect();
        self.whole
            .error(&self.students, held_out, &expected)
            .unwrap()
    }

    fn weights(&self) -> Vec<Weights> {
        now(&self.students).unwrap()
    }
}

const ONLY_LINEAR: &[Method] = &[Method::Linear];
const OF_EACH_KIND: &[Method] = &[Method::Linear, Method::Hybrid, Method::Window];

/// The tiny UNet's inputs, with other noise in each sample, and students as learning begins, of `methods` in turn.
fn lesson(together: Together, methods: &[Method]) -> Lesson {
    let lesson = lesson_of("sd15-tiny/unet.onnx", together, methods, 16);
    assert_eq!(lesson.students.len(), 16);
    lesson
}

/// The same of the first `sites` of a model.
fn lesson_of(model: &str, together: Together, methods: &[Method], sites: usize) -> Lesson {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, fixtures::bytes(model).unwrap()).unwrap();
    let file = OnnxFile::open(&path).unwrap();
    let beside = fixtures::path(model);
    let given = npz::read(&beside.with_file_name("inputs.npz")).unwrap();
    let mut random = SplitMix64::new(21);
    let mut noisy = || -> Sample {
        let draw = |(name, tensor): &(String, Fed)| {
            // FLUX's ids are places.
            let values = match tensor.dtype().is_float() && !name.ends_with("_ids") {
                true => tensor.to_f64().mapv(|_| random.normal()),
                false => tensor.to_f64(),
            };
            (name.clone(), Fed::from_f64(values, tensor.dtype()))
        };
        Sample {
            origin: String::new(),
            truth: None,
            inputs: given.iter().map(draw).collect(),
        }
    };
    let samples: Vec<Sample> = (0..3).map(|_| noisy()).collect();
    let sizes: Vec<(&str, Vec<i64>)> = given
        .iter()
        .map(|(n, t)| (n.as_str(), t.shape().iter().map(|d| *d as i64).collect()))
        .collect();
    let sizes: Vec<(&str, &[i64])> = sizes.iter().map(|(n, s)| (*n, s.as_slice())).collect();
    let shapes = Shapes::at(&file.model, &|t| file.tensor_bytes(t).ok(), &sizes);
    let analysis = Analysis::of(&file);
    let targets: Vec<Target> = analysis
        .sites
        .iter()
        .filter_map(|site| Target::new(&analysis, site, &shapes, methods).ok())
        .take(sites)
        .collect();
    let options = SessionOptions::default();
    let teacher = Teacher {
        file: &file,
        shapes: &shapes,
        engine: engine().unwrap(),
        options: &options,
    };
    let mut random = SplitMix64::new(22);
    let mut student = |(target, method): (&Target, &Method)| {
        if *method == Method::Window {
            return None;
        }
        let layers = layers(&teacher, target, &samples[0].inputs).unwrap();
        let beginning = Beginning {
            projections: &layers.projections,
            mid: Some(8),
            mixed: *method == Method::Hybrid,
            seed: target.site as u64,
        };
        let student = Student::new(target.shape, &beginning, &Device::Cpu).unwrap();
        // With last layers that are zero the first ones had no gradient.
        for weight in student.vars() {
            let noise = (0..weight.elem_count()).map(|_| 0.05 * random.symmetric() as f32);
            let noise = Tensor::from_iter(noise, &Device::Cpu).unwrap();
            let noise = noise.reshape(weight.shape()).unwrap();
            weight.set(&(weight.as_tensor() + noise).unwrap()).unwrap();
        }
        Some(student)
    };
    let selection = Selection {
        window: Some(WindowSpec {
            window: Window::Rect { rows: 3, cols: 5 },
            border: Border::Clamp,
        }),
        ..Selection::default()
    };
    let whole = Whole::new(
        &teacher,
        &targets,
        &samples,
        &selection,
        folder.path(),
        &Device::Cpu,
        together,
    );
    let kinds = targets.iter().zip(methods.iter().cycle());
    let students: Vec<Option<Student>> = kinds.clone().map(&mut student).collect();
    let learned = kinds.zip(&students).map(|((target, method), student)| {
        let weights = student.as_ref().map(|s| s.weights().unwrap());
        Learned {
            target: target.clone(),
            layers: layers(&teacher, target, &samples[0].inputs).unwrap(),
            done: Done {
                weights: weights.unwrap_or(Weights(Vec::new())),
                report: SiteReport {
                    module: target.module.clone(),
                    tokens: target.tokens,
                    heads: target.shape.heads,
                    dim: target.shape.dim,
                    attention: *method,
                    mid: student.as_ref().map(|_| 8),
                    before: Default::default(),
                    after: Default::default(),
                    curve: Vec::new(),
                    seconds: 0.0,
                    tried: Vec::new(),
                },
            },
            window: selection.window.unwrap(),
        }
    });
    Lesson {
        learned: learned.collect(),
        whole: whole.unwrap(),
        students,
        samples,
        selection,
        folder,
    }
}

/// What the students learn in is the model that is written: attentions that are no students' keep softmax, text stays where it
/// is, and each kind of site computes what its converted form does.
#[rstest]
#[case("sd15-tiny/unet.onnx", OF_EACH_KIND, 13)]
#[case::text_behind("hybrid-sd3/model.onnx.gz", &[Method::Hybrid], 1)]
#[case::of_the_image_alone("hybrid-sd35/model.onnx.gz", &[Method::Hybrid, Method::Window], 3)]
#[case::text_before("hybrid-flux/model.onnx.gz", &[Method::Hybrid, Method::Window], 3)]
fn the_students_graph_is_the_model_that_is_written(
    #[case] model: &str,
    #[case] methods: &[Method],
    #[case] sites: usize,
) {
    let engine = engine().unwrap();
    // tract cannot run FLUX, whose grid is in the values of its ids.
    if engine == Engine::Tract && model.contains("flux") {
        return;
    }
    let lesson = lesson_of(model, QUICK, methods, sites);
    assert_eq!(lesson.students.len(), sites);
    let checkpoint = lesson.folder.path().join("weights");
    let staged = output::stage(&checkpoint, &modules(&lesson.learned)).unwrap();
    let selection = Selection {
        attention: Vec::new(),
        ..lesson.selection.clone()
    };
    let written = measure::converted(
        &lesson.folder.path().join("model.onnx"),
        WeightsFrom::Path(staged.path().to_owned()),
        &selection,
        lesson.folder.path(),
    )
    .unwrap();
    let samples = &lesson.samples[..1];
    let expected = measure::outputs(&written.path(), samples, engine, &|| {}).unwrap();
    let found = lesson.whole.graph.run(&lesson.students, &samples[0]);
    for ((_, expected), found) in expected[0].iter().zip(&found.unwrap()) {
        let expected: Vec<f64> = expected.to_f64().into_iter().collect();
        let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(found.len(), expected.len());
        let peak = expected.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        for (e, f) in expected.iter().zip(&found) {
            // As a program and the engine may differ, see the tests of graphs.
            let error = (e - f64::from(*f)).abs();
            assert!(error < peak * 2.0_f64.powi(-14), "{error} of {peak}");
        }
    }
}

#[rstest]
fn the_gradient_by_segments_is_that_of_the_whole_graph(
    #[values(ONLY_LINEAR, OF_EACH_KIND)] methods: &[Method],
) {
    let lesson = lesson(Together::default(), methods);
    let (graph, students) = (&lesson.whole.graph, &lesson.students);
    let sample = &lesson.samples[0];
    let weights: Vec<Var> = students.iter().flatten().flat_map(Student::vars).collect();
    let original = graph.original(sample).unwrap();
    let loss = |results: &[Tensor]| lesson.whole.loss(results, &original, None);
    let parts = graph.gradient(students, sample, &weights, &loss).unwrap();
    let results = graph.run(students, sample).unwrap();
    let at_once = loss(&results).unwrap();
    let whole = at_once.backward().unwrap();
    let at_once = f64::from(at_once.to_scalar::<f32>().unwrap());
    assert!(at_once > 0.0 && (at_once - parts.loss).abs() <= at_once * 1e-6);
    let size = |t: &Tensor| -> f32 { t.sqr().unwrap().sum_all().unwrap().to_scalar().unwrap() };
    let mut moved = 0;
    for weight in &weights {
        let (part, whole) = (parts.by.get(weight).unwrap(), whole.get(weight).unwrap());
        // Sums of the same numbers in another order: some of the last bits, squared. What is nothing but rounding, as the
        // gradient by a bias that a norm takes away, has no bits to compare.
        let error = size(&(part - whole).unwrap());
        assert!(
            error <= size(whole) * 2.0_f32.powi(-28) + 1e-16,
            "{error} {}",
            size(whole)
        );
        moved += usize::from(size(whole) > 1e-12);
    }
    assert!(moved * 2 > weights.len(), "{moved} of {}", weights.len());
}

const QUICK: Together = Together {
    steps: 10,
    learning_rate: 3e-3,
};

#[rstest]
fn the_error_on_samples_held_out_falls(#[values(ONLY_LINEAR, OF_EACH_KIND)] methods: &[Method]) {
    let lesson = lesson(QUICK, methods);
    let [before, after] = lesson.learn("request", &|_| {});
    assert!(after < 0.97 * before, "{before} {after}");
}

#[test]
fn an_interrupted_run_goes_on_with_the_same_weights() {
    // Slow, so that the last look is the best.
    let slow = Together {
        learning_rate: 5e-4,
        ..QUICK
    };
    let whole = lesson(slow, OF_EACH_KIND);
    let errors = whole.learn("request", &|_| {});
    // Interrupted at the second look.
    let parted = lesson(slow, OF_EACH_KIND);
    let looks = AtomicUsize::new(0);
    let interrupt = |event: Progress| {
        if matches!(event, Progress::Kept) && looks.fetch_add(1, Ordering::Relaxed) == 1 {
            panic!("interrupted");
        }
    };
    let run = || parted.learn("request", &interrupt);
    assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    // What comes after makes the weights that are kept.
    assert!(errors[1] < parted.error());
    let again = Lesson {
        folder: parted.folder,
        ..lesson(slow, OF_EACH_KIND)
    };
    let taken = Mutex::new(Vec::new());
    let told = |event: Progress| {
        if let Progress::Note(note) = event {
            taken.lock().unwrap().push(note);
        }
    };
    let resumed = again.learn("request", &told);
    let taken = taken.into_inner().unwrap();
    assert!(
        matches!(taken.as_slice(), [note] if note.contains("4 of 10 steps are taken over")),
        "{taken:?}"
    );
    assert_eq!(resumed, errors);
    assert!(again.weights() == whole.weights());
    // What another request left is none of its own.
    let other = lesson(slow, OF_EACH_KIND);
    let other = Lesson {
        folder: again.folder,
        ..other
    };
    let begun = AtomicUsize::new(0);
    let count = |event: Progress| {
        if matches!(event, Progress::Note(_)) {
            begun.fetch_add(1, Ordering::Relaxed);
        }
    };
    other.learn("another request", &count);
    assert_eq!(begun.into_inner(), 0);
}
