//! The tiny UNet, with students in the place of its attentions.

use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::random::SplitMix64;
use linfusion_models::shapes::Shapes;
use linfusion_runtime::engine::SessionOptions;
use linfusion_runtime::npz;

use super::*;
use crate::analysis::Analysis;
use crate::distill::probe::layers;
use crate::verify::engine;

struct Lesson {
    whole: Whole,
    students: Vec<Student>,
    samples: Vec<Sample>,
}

/// The fixture's inputs, with other noise in each sample, and students as learning begins.
fn lesson(together: Together) -> Lesson {
    let file = OnnxFile::open(fixtures::path("sd15-tiny/unet.onnx")).unwrap();
    let given = npz::read(&fixtures::path("sd15-tiny/inputs.npz")).unwrap();
    let mut random = SplitMix64::new(21);
    let mut noisy = || -> Sample {
        let draw = |(name, tensor): &(String, Fed)| {
            let values = match tensor.dtype().is_float() {
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
        .filter_map(|site| Target::new(&analysis, site, &shapes, &[Method::Linear]).ok())
        .collect();
    assert_eq!(targets.len(), 16);
    let options = SessionOptions::default();
    let teacher = Teacher {
        file: &file,
        shapes: &shapes,
        engine: engine().unwrap(),
        options: &options,
    };
    let mut random = SplitMix64::new(22);
    let mut student = |target: &Target| {
        let layers = layers(&teacher, target, &samples[0].inputs).unwrap();
        let beginning = Beginning {
            projections: &layers.projections,
            mid: Some(8),
            mixed: false,
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
        student
    };
    Lesson {
        whole: Whole::of(&teacher, &targets, together).unwrap(),
        students: targets.iter().map(&mut student).collect(),
        samples,
    }
}

#[test]
fn the_gradient_by_segments_is_that_of_the_whole_graph() {
    let Lesson {
        whole,
        students,
        samples,
    } = lesson(Together::default());
    let sample = &samples[0];
    let weights: Vec<Var> = students.iter().flat_map(Student::vars).collect();
    let original = whole
        .original
        .run(&sample.inputs, &|_, x| Ok(x.clone()))
        .unwrap();
    let sites = |i: usize, x: &Tensor| whole.site(&students, i, x);
    let loss = |results: &[Tensor]| whole.loss(results, &original, None);
    let parts = whole
        .student
        .gradient(&sample.inputs, &sites, &weights, &loss)
        .unwrap();
    let results = whole.student.run(&sample.inputs, &sites).unwrap();
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

#[test]
fn the_error_on_samples_held_out_falls() {
    let Lesson {
        whole,
        students,
        samples,
    } = lesson(Together {
        steps: 10,
        learning_rate: 3e-3,
    });
    let [before, after] = whole
        .learn(&students, &samples[..2], &samples[2..], &|_| {})
        .unwrap();
    assert!(after < 0.97 * before, "{before} {after}");
}
