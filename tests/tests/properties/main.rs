//! Random self-attention graphs, converted: what comes out is what LinFusion's
//! formula gives, and nothing else in the file has changed.

mod bounded;
mod sketch;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use bounded::Bounded;
use buffa::Message;
use linfusion_convert::analysis::Analysis;
use linfusion_convert::attention::kind::Kind;
use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::reference::Module;
use linfusion_convert::rewrite::Emit;
use linfusion_models::checkpoint::{Checkpoint, MlpPart, MlpWidth, Part};
use linfusion_models::onnx::proto::{NodeProto, TensorProto};
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_ops::{LinFusionAttentionAttrs, reference::linfusion_attention};
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::tensor::{DType, Tensor};
use linfusion_tests::{checkpoint_for, has_ort, request, run};
use ndarray::{Array2, ArrayD, Axis, Ix1, Ix2};
use proptest::test_runner::{Config, TestCaseError, TestRunner};
use rstest::rstest;
use sketch::{Around, Bias, Case, Form, Layer, Scale, Sizes, Sketch, cases};

const CASES: u32 = 16;

#[rstest]
fn without_weights_it_is_the_formula_of_the_graphs_own_projections(
    #[values(
        Form::FourD,
        Form::HeadsInBatch,
        Form::FusedSplit,
        Form::FusedSlice,
        Form::ConvEinsum,
        Form::ImageEinsum,
        Form::LeftMatMul,
        Form::StridedHeads,
        Form::Rows
    )]
    form: Form,
) {
    for_all(form, |case| untrained(&case));
}

#[rstest]
fn with_a_checkpoint_it_is_the_formula_of_its_layers(
    #[values(
        Form::FourD,
        Form::HeadsInBatch,
        Form::FusedSplit,
        Form::FusedSlice,
        Form::ConvEinsum,
        Form::ImageEinsum,
        Form::LeftMatMul,
        Form::StridedHeads,
        Form::Rows
    )]
    form: Form,
) {
    for_all(form, |case| trained(&case.square()));
}

fn for_all(form: Form, check: impl Fn(Case) -> Result<(), String>) {
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    });
    let result = runner.run(&cases(form), |case| {
        check(case).map_err(TestCaseError::fail)
    });
    if let Err(failure) = result {
        panic!("{failure}");
    }
}

/// Small graphs for the fuzzer and `fuzz_smoke.rs` to start from.
#[test]
#[ignore = "writes fuzz/seeds/convert"]
fn seeds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/convert");
    std::fs::create_dir_all(&folder).unwrap();
    for form in Form::ALL {
        for sizes in [Sizes::Fixed, Sizes::Computed] {
            let case = Case {
                form,
                batch: 2,
                grid: [2, 3],
                heads: 2,
                head_dim: 2,
                value_dim: 2,
                width: 4,
                element: ElementType::F32,
                opset: 17,
                scale: Scale::Mul,
                around: Around::Zeros,
                sizes,
                bias: Bias::With,
                seed: 0,
            };
            let bytes = case.sketch().model.encode_to_vec();
            std::fs::write(folder.join(format!("{form:?}-{sizes:?}.onnx")), bytes).unwrap();
        }
    }
}

/// A graph on disk.
struct Bench {
    folder: tempfile::TempDir,
    model: PathBuf,
    sketch: Sketch,
}

impl Bench {
    fn new(case: &Case) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model.onnx");
        let sketch = case.sketch();
        std::fs::write(&model, sketch.model.encode_to_vec()).unwrap();
        Bench {
            folder,
            model,
            sketch,
        }
    }

    fn convert(&self, name: &str, weights: WeightsFrom, emit: Emit) -> Result<PathBuf, String> {
        let out = self.folder.path().join(name);
        let mut job = request(&self.model, &out, weights);
        job.emit = emit;
        let report = convert(&job, &mut |_| {}).map_err(|e| e.to_string())?;
        if report.converted != 1 {
            return Err(format!("{} sites were converted", report.converted));
        }
        Ok(out)
    }

    /// Runs `model` on every engine that has all its operators in this type.
    fn run(&self, case: &Case, model: &Path) -> Result<Vec<Vec<(String, Tensor)>>, String> {
        let dtype = DType::from_onnx(case.element.onnx()).unwrap();
        let x = to_shape(
            &self.sketch.x,
            &self.sketch.x_shape,
            case.is_channels_first(),
        );
        let t = ArrayD::zeros(ndarray::IxDyn(&[]));
        let feed = [("x", x), ("t", t)].map(|(n, a)| (n.to_owned(), Tensor::from_f64(a, dtype)));
        let mut engines = Vec::new();
        if has_ort() {
            engines.push((Engine::Ort, Operators::None));
            engines.push((Engine::Ort, Operators::InProcess));
        }
        if case.element == ElementType::F32 {
            engines.push((Engine::Tract, Operators::InProcess));
        }
        engines
            .into_iter()
            .map(|(engine, operators)| {
                run(engine, model, operators.clone(), &feed)
                    .map_err(|e| format!("{engine} {operators:?}: {e}"))
            })
            .collect()
    }
}

/// `[B·N, C]` as `[B, N, C]`, or `[B, C, …]` where channels come first.
fn to_shape(rows: &Array2<f64>, shape: &[usize], channels_first: bool) -> ArrayD<f64> {
    let columns = rows.ncols();
    let mut x = rows
        .to_shape((shape[0], rows.nrows() / shape[0], columns))
        .unwrap()
        .to_owned();
    if channels_first {
        x.swap_axes(1, 2);
    }
    let x = x.as_standard_layout().into_owned();
    x.into_shape_with_order(shape).unwrap()
}

/// The inverse of [`to_shape`].
fn to_rows(tensor: &Tensor, columns: usize, channels_first: bool) -> Array2<f64> {
    let values = tensor.to_f64();
    let batch = values.shape()[0];
    let rows = values.len() / columns;
    let tokens = rows / batch;
    if !channels_first {
        return values.into_shape_with_order((rows, columns)).unwrap();
    }
    let first = values.into_shape_with_order((batch, columns, tokens));
    let mut first = first.unwrap();
    first.swap_axes(1, 2);
    let rows = first.as_standard_layout().into_owned();
    rows.into_shape_with_order((batch * tokens, columns))
        .unwrap()
}

fn unit_roundoff(element: ElementType) -> f64 {
    match element {
        ElementType::F64 => f64::EPSILON / 2.0,
        ElementType::F16 => 2f64.powi(-11),
        _ => f64::from(f32::EPSILON) / 2.0,
    }
}

fn untrained(case: &Case) -> Result<(), String> {
    let bench = Bench::new(case);
    is_found(&bench.model, case)?;
    let u = unit_roundoff(case.element);
    let [q, k, v, out] = &bench.sketch.layers;
    let x = Bounded::exact(bench.sketch.x.clone());
    let qkv = [q, k, v].map(|l| {
        let l = head_major(l, case);
        x.linear(l.weight.view(), l.bias.as_ref(), u)
    });
    let attended = attention(qkv.each_ref(), case, u);
    let expected = attended.linear(out.weight.view(), out.bias.as_ref(), u);

    let before = bench.run(case, &bench.model)?;
    for emit in [Emit::Function, Emit::Standard] {
        let converted = bench.convert(&format!("{emit:?}.onnx"), WeightsFrom::Untrained, emit)?;
        let after = bench.run(case, &converted)?;
        is_expected(case, &expected, &before, &after).map_err(|e| format!("{emit:?}: {e}"))?;
        the_rest_is_as_it_was(&bench.model, &converted)?;
        let again = bench.convert(&format!("{emit:?}-2.onnx"), WeightsFrom::Untrained, emit)?;
        if std::fs::read(&converted).unwrap() != std::fs::read(again).unwrap() {
            return Err("converted twice, it is not the same file".to_owned());
        }
    }
    Ok(())
}

fn trained(case: &Case) -> Result<(), String> {
    let bench = Bench::new(case);
    let mid = match case.seed % 4 {
        0 => MlpWidth::Identity,
        n => MlpWidth::Width(4 * n as usize),
    };
    let folder = checkpoint_for(&bench.model, bench.folder.path(), mid)?;
    let checkpoint = Checkpoint::open(&folder).map_err(|e| e.to_string())?;
    let expected = of_checkpoint(&checkpoint, &bench.sketch.x, case);

    let before = bench.run(case, &bench.model)?;
    let weights = WeightsFrom::Path(folder);
    let converted = bench.convert("out.onnx", weights, Emit::Function)?;
    let after = bench.run(case, &converted)?;
    is_expected(case, &expected, &before, &after)?;
    the_rest_is_as_it_was(&bench.model, &converted)
}

/// What the checkpoint's only module computes, once by the converter's reference and
/// once with bounds.
fn of_checkpoint(checkpoint: &Checkpoint, x: &Array2<f64>, case: &Case) -> Bounded {
    let module = &checkpoint.modules[0];
    let u = unit_roundoff(case.element);
    let exact = Bounded::exact(x.clone());
    let tensor = |part| {
        let tensor = checkpoint.tensor(module, part).unwrap();
        let shape = tensor.shape.clone();
        ArrayD::from_shape_vec(shape, tensor.to_f64()).unwrap()
    };
    let matrix = |part| {
        let m = tensor(part).into_dimensionality::<Ix2>().unwrap();
        // Rounded to the graph's type when it is converted.
        let error = m.t().mapv(|w| u * w.abs());
        Bounded::with_error(m.t().to_owned(), error)
    };
    let vector = |part| {
        let v = tensor(part).into_dimensionality::<Ix1>().unwrap();
        Bounded::with_error(
            v.clone().insert_axis(Axis(0)),
            v.mapv(|b| u * b.abs()).insert_axis(Axis(0)),
        )
    };
    let shifted = |mlp: fn(MlpPart) -> Part| match module.mid {
        MlpWidth::Identity => exact.plus(&exact, u),
        MlpWidth::Width(_) => exact
            .times(&matrix(mlp(MlpPart::InWeight)), u)
            .plus(&vector(mlp(MlpPart::InBias)), u)
            .normalised(u)
            .scaled(&vector(mlp(MlpPart::NormWeight)), u)
            .plus(&vector(mlp(MlpPart::NormBias)), u)
            .leaky(u)
            .times(&matrix(mlp(MlpPart::OutWeight)), u)
            .plus(&vector(mlp(MlpPart::OutBias)), u)
            .plus(&exact, u),
    };
    let q = shifted(Part::QMlp).times(&matrix(Part::QWeight), u);
    let k = shifted(Part::KMlp).times(&matrix(Part::KWeight), u);
    let v = exact.times(&matrix(Part::VWeight), u);
    let attended = attention([&q, &k, &v], case, u);
    let out = attended
        .times(&matrix(Part::OutWeight), u)
        .plus(&vector(Part::OutBias), u);

    let reference = Module::new(checkpoint, module).unwrap();
    let projected = reference.project(x.view());
    let same = |a: &Array2<f64>, b: &Bounded| {
        for (a, b) in a.iter().zip(&b.value) {
            assert!((a - b).abs() <= 1e-9 * (1.0 + a.abs()), "{a} {b}");
        }
    };
    same(projected.q.as_ref().unwrap(), &q);
    same(projected.k.as_ref().unwrap(), &k);
    same(projected.v.as_ref().unwrap(), &v);
    same(&reference.out(attended.value.view(), true).unwrap(), &out);
    out
}

/// The layer with its columns in the order of the operator: `head·D + channel`.
fn head_major(layer: &Layer, case: &Case) -> Layer {
    let columns = layer.weight.ncols();
    let order: Vec<usize> = match case.form {
        Form::StridedHeads => (0..case.heads)
            .flat_map(|h| (h..columns).step_by(case.heads))
            .collect(),
        _ => (0..columns).collect(),
    };
    Layer {
        weight: layer.weight.select(Axis(1), &order),
        bias: layer.bias.as_ref().map(|b| b.select(Axis(0), &order)),
    }
}

/// The formula with bounds, whose values must be those of the operator's reference.
fn attention(qkv: [&Bounded; 3], case: &Case, u: f64) -> Bounded {
    let bounded = Bounded::attention(qkv, case.batch, case.heads, u);
    let packed = qkv.map(|m| {
        let shape = (case.batch, case.tokens(), m.value.ncols());
        m.value.to_shape(shape).unwrap().to_owned().into_dyn()
    });
    let attrs = LinFusionAttentionAttrs::new(case.heads as i64, None).unwrap();
    let [q, k, v] = &packed;
    let reference = linfusion_attention(q.view(), k.view(), v.view(), &attrs).unwrap();
    for (a, b) in reference.iter().zip(&bounded.value) {
        assert!((a - b).abs() <= 1e-12 * (1.0 + a.abs()), "{a} {b}");
    }
    bounded
}

fn is_found(model: &Path, case: &Case) -> Result<(), String> {
    let file = OnnxFile::open(model).map_err(|e| e.to_string())?;
    let analysis = Analysis::of(&file);
    let [site] = &analysis.sites[..] else {
        return Err(format!("{} sites", analysis.sites.len()));
    };
    let plain = site.plain.as_ref()?;
    let found = (
        site.kind,
        site.module.as_deref(),
        plain.heads,
        plain.head_dim,
    );
    let (heads, head_dim) = (case.heads as i64, case.head_dim as i64);
    let expected = (Kind::SelfAttention, Some(sketch::MODULE), heads, head_dim);
    if found != expected {
        return Err(format!("{found:?}, not {expected:?}"));
    }
    Ok(())
}

/// y is `expected` on every engine, and every other output what it was on that engine.
fn is_expected(
    case: &Case,
    expected: &Bounded,
    before: &[Vec<(String, Tensor)>],
    after: &[Vec<(String, Tensor)>],
) -> Result<(), String> {
    for (engine, (before, after)) in before.iter().zip(after).enumerate() {
        if before.len() != after.len() || before.len() < 2 {
            return Err(format!("{} outputs, then {}", before.len(), after.len()));
        }
        for ((name, was), (same_name, is)) in before.iter().zip(after) {
            assert_eq!(name, same_name);
            if name == "y" {
                let found = to_rows(is, case.width, case.is_channels_first());
                let wrong = |e| format!("engine {engine}: {e}");
                expected.refuse(&found).map_err(wrong)?;
            } else if was != is {
                return Err(format!("engine {engine}: output '{name}' changed"));
            }
        }
    }
    Ok(())
}

/// Nodes and weights in both files are equal, and what is gone is the site's.
fn the_rest_is_as_it_was(before: &Path, after: &Path) -> Result<(), String> {
    let (before, after) = (OnnxFile::open(before), OnnxFile::open(after));
    let (before, after) = (before.unwrap(), after.unwrap());
    let tensors: HashMap<_, &TensorProto> = after
        .model
        .graph
        .initializer
        .iter()
        .map(|t| (t.name.as_deref(), t))
        .collect();
    for tensor in &before.model.graph.initializer {
        match tensors.get(&tensor.name.as_deref()) {
            Some(same) if *same != tensor => {
                return Err(format!("initializer {:?} changed", tensor.name));
            }
            _ => {}
        }
    }
    let nodes: HashMap<_, &NodeProto> = after
        .model
        .graph
        .node
        .iter()
        .map(|n| (n.name.as_deref(), n))
        .collect();
    for node in &before.model.graph.node {
        let name = node.name.as_deref().unwrap_or("");
        let of_site = name.contains("attn1") || name.contains("/part/");
        match nodes.get(&Some(name)) {
            None if of_site => {}
            // Nobody but the site's reshapes reads it.
            None if ["/batch", "/batch_heads", "/rows", "/columns"].contains(&name) => {}
            Some(same) if *same == node => {}
            Some(_) => return Err(format!("node '{name}' changed")),
            None => return Err(format!("node '{name}' is gone")),
        }
    }
    if before.model.graph.input != after.model.graph.input
        || before.model.graph.output != after.model.graph.output
    {
        return Err("inputs or outputs changed".to_owned());
    }
    Ok(())
}
