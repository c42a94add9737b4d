//! Distillation from end to end, on models of two small attentions over an image.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use buffa::Message;
use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::distill::{
    Attention, Budget, DistillError, Progress, Refinement, Report, Request, Schedule, SiteReport,
    Source, Together, run,
};
use linfusion_convert::patterns::Patterns;
use linfusion_convert::plan::Method;
use linfusion_convert::verify::compare_weights;
use linfusion_models::checkpoint::{Checkpoint, MlpWidth, SiteAttention};
use linfusion_models::onnx::make::{
    Dim, int, ints, node, opset, tensor_f32, tensor_i64, value_info,
};
use linfusion_models::onnx::proto::{GraphProto, ModelProto, NodeProto, TensorProto};
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_models::random::SplitMix64;
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::npz;
use linfusion_runtime::tensor::Tensor;
use linfusion_tests::has_ort;
use ndarray::{ArrayD, IxDyn};
use tempfile::TempDir;

const DIM: usize = 8;
const SIDE: usize = 8;
const MODULES: [&str; 2] = ["blocks.0.attn1", "blocks.1.attn1"];

/// What the attentions of a model look at.
#[derive(Clone, Copy, PartialEq)]
enum Looks {
    /// Wherever random weights lead.
    Anywhere,
    /// At their neighbours: keys and queries are the places of tokens.
    Near,
}

struct Sketch {
    nodes: Vec<NodeProto>,
    stored: Vec<TensorProto>,
    random: SplitMix64,
}

impl Sketch {
    fn op(&mut self, op: &str, name: &str, inputs: &[&str]) -> String {
        let value = format!("{name}_out");
        self.nodes.push(node(op, name, inputs, &[&value], vec![]));
        value
    }

    fn turned(&mut self, name: &str, input: &str, perm: &[i64]) -> String {
        let value = self.op("Transpose", name, &[input]);
        self.nodes.last_mut().unwrap().attribute = vec![ints("perm", perm)];
        value
    }

    fn shaped(&mut self, name: &str, input: &str, to: &[i64]) -> String {
        let shape = format!("{name}/shape");
        self.stored.push(tensor_i64(&shape, &[to.len() as i64], to));
        self.op("Reshape", name, &[input, &shape])
    }

    fn weight(&mut self, name: &str, dims: &[i64], values: Option<Vec<f32>>) -> String {
        let count = dims.iter().product::<i64>() as usize;
        let random = &mut self.random;
        let mut draw = || 0.7 * random.symmetric() as f32;
        let values = values.unwrap_or_else(|| (0..count).map(|_| draw()).collect());
        self.stored.push(tensor_f32(name, dims, &values));
        name.to_owned()
    }

    fn linear(&mut self, name: &str, input: &str, weight: Option<Vec<f32>>) -> String {
        let dims = [DIM as i64, DIM as i64];
        let weight = self.weight(
            &format!("{}.weight", name.trim_start_matches('/')),
            &dims,
            weight,
        );
        self.op("MatMul", &format!("{name}/MatMul"), &[input, &weight])
    }

    fn attention(&mut self, module: &str, x: &str, looks: Looks) -> String {
        let at = |part: &str| format!("/{}/{part}", module.replace(".attn1", "/attn1"));
        // The first four channels are places.
        let sharp = |places: bool| {
            let entry = |i: usize| {
                let here = (i / DIM == i % DIM) && ((i / DIM < 4) == places);
                if here {
                    if places { 7.0 } else { 1.0 }
                } else {
                    0.0
                }
            };
            (looks == Looks::Near).then(|| (0..DIM * DIM).map(entry).collect::<Vec<f32>>())
        };
        let (heads, split): (i64, [i64; 4]) = match looks {
            Looks::Anywhere => (2, [0, 0, 2, 4]),
            Looks::Near => (1, [0, 0, 1, 8]),
        };
        let mut operand = |part: &str, perm: &[i64], weight| {
            let value = self.linear(&at(part), x, weight);
            let value = self.shaped(&at(&format!("{part}_split")), &value, &split);
            self.turned(&at(&format!("{part}_heads")), &value, perm)
        };
        let q = operand("to_q", &[0, 2, 1, 3], sharp(true));
        let k = operand("to_k", &[0, 2, 3, 1], sharp(true));
        let v = operand("to_v", &[0, 2, 1, 3], sharp(false));
        let scores = self.op("MatMul", &at("scores"), &[&q, &k]);
        let scale = (DIM as f32 / heads as f32).sqrt().recip();
        let scale = self.weight(&at("scale"), &[], Some(vec![scale]));
        let scaled = self.op("Mul", &at("scaled"), &[&scores, &scale]);
        let softmax = self.op("Softmax", &at("softmax"), &[&scaled]);
        self.nodes.last_mut().unwrap().attribute = vec![int("axis", -1)];
        let attended = self.op("MatMul", &at("attended"), &[&softmax, &v]);
        let merged = self.turned(&at("turned"), &attended, &[0, 2, 1, 3]);
        let merged = self.shaped(&at("merged"), &merged, &[0, 0, DIM as i64]);
        let out = self.linear(&at("to_out.0"), &merged, None);
        let bias = self.weight(&at("to_out.0/bias"), &[DIM as i64], None);
        let out = self.op("Add", &at("to_out.0/Add"), &[&out, &bias]);
        self.op("Add", &at("residual"), &[x, &out])
    }
}

/// `y` of an image `sample` `[1, 4, 8, 8]` and a number `t`, through two attentions.
fn model(folder: &Path, looks: Looks) -> PathBuf {
    let mut sketch = Sketch {
        nodes: Vec::new(),
        stored: Vec::new(),
        random: SplitMix64::new(4),
    };
    let s = &mut sketch;
    let stem = match looks {
        Looks::Anywhere => None,
        // The image goes to the last four channels.
        Looks::Near => {
            let entry = |i: usize| if i / 4 == i % 4 + 4 { 1.0 } else { 0.0 };
            Some((0..DIM * 4).map(entry).collect())
        }
    };
    let weight = s.weight("stem.weight", &[DIM as i64, 4, 1, 1], stem);
    let x = s.op("Conv", "stem", &["sample", &weight]);
    let x = s.op("Mul", "timed", &[&x, "t"]);
    let x = s.shaped("flat", &x, &[0, DIM as i64, -1]);
    let mut x = s.turned("tokens", &x, &[0, 2, 1]);
    if looks == Looks::Near {
        let angle = |i: usize| i as f32 * std::f32::consts::PI / SIDE as f32;
        let place = |token: usize| {
            let (row, column) = (angle(token / SIDE), angle(token % SIDE));
            [
                row.cos(),
                row.sin(),
                column.cos(),
                column.sin(),
                0.0,
                0.0,
                0.0,
                0.0,
            ]
        };
        let places = (0..SIDE * SIDE).flat_map(place).collect();
        let places = s.weight(
            "places",
            &[1, (SIDE * SIDE) as i64, DIM as i64],
            Some(places),
        );
        x = s.op("Add", "placed", &[&x, &places]);
    }
    for module in MODULES {
        x = s.attention(module, &x, looks);
    }
    let x = s.turned("channels", &x, &[0, 2, 1]);
    let x = s.shaped("image", &x, &[0, DIM as i64, SIDE as i64, SIDE as i64]);
    let weight = s.weight("head.weight", &[4, DIM as i64, 1, 1], None);
    s.nodes
        .push(node("Conv", "head", &[&x, &weight], &["y"], vec![]));
    let image = [1, 4, SIDE as i64, SIDE as i64].map(Dim::Fixed);
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset("", 17)],
        graph: GraphProto {
            name: Some("sketch".to_owned()),
            node: sketch.nodes,
            initializer: sketch.stored,
            input: vec![
                value_info("sample", ElementType::F32, &image),
                value_info("t", ElementType::F32, &[Dim::Fixed(1)]),
            ],
            output: vec![value_info("y", ElementType::F32, &image)],
            ..GraphProto::default()
        }
        .into(),
        ..ModelProto::default()
    };
    let path = folder.join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    path
}

const SPEC: &str = r#"{"sample": {"normal": {}}, "t": {"uniform": {"min": 0.5, "max": 1.5}}}"#;

fn request(folder: &Path, looks: Looks) -> Request {
    let spec = folder.join("spec.json");
    std::fs::write(&spec, SPEC).unwrap();
    Request {
        // Small models learn fast, and slowly at the rate of large ones.
        schedule: Schedule {
            steps: 40,
            learning_rate: 2e-2,
            ..Schedule::default()
        },
        ..linfusion_tests::distillation(folder, model(folder, looks), Source::Random(spec))
    }
}

#[test]
fn all_sites_learn_together_end_to_end() {
    let folder = TempDir::new().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.end_to_end = Some(Together {
        steps: 16,
        learning_rate: 2e-3,
    });
    let together = quietly(&request).unwrap();
    let told = together.notes.iter().find(|n| n.starts_with("end to end:"));
    assert!(told.unwrap().ends_with("; kept"), "{:?}", together.notes);
    request.end_to_end = None;
    request.overwrite = Overwrite::Force;
    let apart = quietly(&request).unwrap();
    assert!(together.end_to_end.mean() > apart.end_to_end.mean());
}

#[test]
fn only_linear_sites_learn_together() {
    let folder = TempDir::new().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.end_to_end = Some(Together::default());
    request.attention = Attention::Auto { unexplained: 0.1 };
    let error = quietly(&request).unwrap_err().to_string();
    assert!(error.starts_with("--end-to-end is for linear"), "{error}");
}

fn quietly(request: &Request) -> Result<Report, DistillError> {
    run(request, &|_: Progress| {})
}

fn weights(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join("diffusion_pytorch_model.safetensors")).unwrap()
}

/// What is in a folder, but for the model and the description of inputs.
fn left(folder: &TempDir) -> Vec<String> {
    let entries = std::fs::read_dir(folder.path()).unwrap();
    let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names
        .filter(|n| n != "model.onnx" && n != "spec.json")
        .collect();
    names.sort();
    names
}

#[test]
fn weights_are_learned_and_the_model_converts_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.plot = Some(folder.path().join("losses.svg"));
    let report = quietly(&request).unwrap();
    let found: Vec<&str> = report.sites.iter().map(|s| s.module.as_str()).collect();
    assert_eq!(found, MODULES);
    for site in &report.sites {
        assert!(site.after.relative < 0.5 * site.before.relative, "{site:?}");
        assert_eq!((site.tokens, site.heads, site.dim), (64, 2, 8));
    }
    assert_eq!(report.end_to_end.psnr_db.len(), 4);
    let checkpoint = Checkpoint::open(&request.out).unwrap();
    assert!(checkpoint.unused_tensors().is_empty());
    for module in &checkpoint.modules {
        assert_eq!(module.attention, SiteAttention::Linear);
        assert_eq!(module.mid, MlpWidth::Width(8));
    }
    // Verified against the checkpoint on the way.
    let converted = folder.path().join("converted.onnx");
    let conversion = linfusion_tests::request(
        &request.model,
        &converted,
        WeightsFrom::Path(request.out.clone()),
    );
    let conversion = convert(&conversion, &mut |_| {}).unwrap();
    assert_eq!(conversion.converted, 2);
    // Whoever may read the one file may read the other.
    let mode = |name: &str| {
        let file = std::fs::metadata(request.out.join(name)).unwrap();
        file.permissions().mode()
    };
    assert_eq!(
        mode("diffusion_pytorch_model.safetensors"),
        mode("config.json")
    );
    let plot = std::fs::read_to_string(folder.path().join("losses.svg")).unwrap();
    assert!(plot.contains("<svg") && plot.contains("polyline"));
    assert_eq!(
        left(&folder),
        ["converted.onnx", "linfusion", "losses.svg"],
        "nothing else is left"
    );
}

/// Without a step the student has the graph's own layers, read off what they do, and MLPs that give zero: as with
/// `--weights none`, which takes them from the graph itself.
#[test]
fn layers_are_read_off_exactly() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.schedule.steps = 0;
    quietly(&request).unwrap();
    let mut random = SplitMix64::new(8);
    let image =
        ArrayD::from_shape_simple_fn(IxDyn(&[1, 4, SIDE, SIDE]), || random.symmetric() as f32);
    let inputs = [
        ("sample".to_owned(), Tensor::F32(image)),
        ("t".to_owned(), Tensor::from(ndarray::arr1(&[1.0_f32]))),
    ];
    let outputs = [
        WeightsFrom::Path(request.out.clone()),
        WeightsFrom::Untrained,
    ]
    .map(|weights| {
        let out = folder.path().join("converted.onnx");
        let mut conversion = linfusion_tests::request(&request.model, &out, weights);
        conversion.overwrite = Overwrite::Force;
        convert(&conversion, &mut |_| {}).unwrap();
        let engine = if has_ort() {
            Engine::Ort
        } else {
            Engine::Tract
        };
        let mut made = linfusion_tests::run(engine, &out, Operators::InProcess, &inputs).unwrap();
        made.pop().unwrap().1.to_f64()
    });
    let largest = outputs[0].iter().fold(0.0_f64, |m, v| m.max(v.abs()));
    for (a, b) in outputs[0].iter().zip(&outputs[1]) {
        // Two blocks of sums of 8 terms and of 64, in float32; a weight is read as a difference from the bias.
        assert!(
            (a - b).abs() < 64.0 * f64::from(f32::EPSILON) * largest,
            "{a} {b}"
        );
    }
}

#[test]
fn an_interrupted_run_goes_on_to_the_same_weights() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    quietly(&request).unwrap();
    let whole = weights(&request.out);

    // The same on one thread, and the activations in two groups.
    request.overwrite = Overwrite::Force;
    request.threads = Some(1.try_into().unwrap());
    request.disk_budget = 3 * 12 * 64 * 8 * 2;
    quietly(&request).unwrap();
    assert_eq!(weights(&request.out), whole);

    // Stopped in the middle: the second group finds no scratch folder any more.
    request.scratch = Some(folder.path().join("scratch"));
    let scratch = folder.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let begins = AtomicUsize::new(0);
    let stopped = run(&request, &|progress| {
        if let Progress::Begin { stage, .. } = progress
            && stage == "running the original"
            && begins.fetch_add(1, Ordering::Relaxed) == 1
        {
            std::fs::remove_dir_all(&scratch).unwrap();
        }
    });
    assert!(
        matches!(stopped, Err(DistillError::Scratch { .. })),
        "{stopped:?}"
    );
    assert_eq!(weights(&request.out), whole, "the earlier result is kept");
    assert!(left(&folder).contains(&"linfusion.unfinished".to_owned()));

    request.scratch = Some(folder.path().to_owned());
    let report = quietly(&request).unwrap();
    assert_eq!(report.resumed, 1);
    assert_eq!(weights(&request.out), whole);
    assert_eq!(left(&folder), ["linfusion"]);

    // What was done for another seed does not count.
    request.seed = 1;
    let report = quietly(&request).unwrap();
    assert_eq!(report.resumed, 0);
    assert_ne!(weights(&request.out), whole);
}

#[test]
fn refined_sites_are_not_refined_again_after_an_interruption() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.refinement = Refinement::IfBetter;
    request.samples = 32;
    request.schedule.steps = 100;
    let scratch = folder.path().join("scratch");
    request.scratch = Some(scratch.clone());
    std::fs::create_dir(&scratch).unwrap();
    let whole = quietly(&request).unwrap();
    let expected = weights(&request.out);
    assert!(
        whole.notes.iter().any(|n| n.contains("; kept")),
        "{:?}",
        whole.notes
    );

    // Stopped when all that is left is to judge, twice; then one of the sites is lost, and learns as it did beside the other.
    request.overwrite = Overwrite::Force;
    request.threads = Some(1.try_into().unwrap());
    let stopped = |begins: usize| {
        let refining = AtomicUsize::new(0);
        let began = AtomicUsize::new(0);
        let result = run(&request, &|progress| {
            let Progress::Begin { stage, .. } = progress else {
                return;
            };
            match stage.as_str() {
                "refining" => drop(refining.fetch_add(1, Ordering::Relaxed)),
                // The first is what was untrained, the second what was learned; what is measured is not measured again.
                "running the converted model"
                    if began.fetch_add(1, Ordering::Relaxed) >= 2
                        && refining.load(Ordering::Relaxed) == begins =>
                {
                    let _ = std::fs::remove_dir_all(&scratch);
                }
                "measuring what each site does to the output" => {
                    assert_ne!(begins, 0, "what was measured is kept");
                }
                _ => {}
            }
        });
        assert!(result.is_err(), "{result:?}");
        std::fs::create_dir(&scratch).unwrap();
        refining.load(Ordering::Relaxed)
    };
    assert_eq!(stopped(1), 1);
    assert_eq!(stopped(0), 0);
    let unfinished = folder.path().join("linfusion.unfinished");
    let mut refined: Vec<_> = std::fs::read_dir(&unfinished)
        .unwrap()
        .map(|f| f.unwrap().path())
        .filter(|f| {
            f.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("refined")
        })
        .collect();
    refined.sort();
    assert_eq!(refined.len(), 2);
    std::fs::remove_file(&refined[1]).unwrap();
    quietly(&request).unwrap();
    assert_eq!(weights(&request.out), expected);
}

/// What was refined beside other sites than now does not count.
#[test]
fn refined_sites_of_another_selection_are_learned_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.refinement = Refinement::IfBetter;
    request.samples = 32;
    request.schedule.steps = 100;
    request.selection.only = Some(Patterns::new("--only", &["blocks.1.*".to_owned()]).unwrap());
    quietly(&request).unwrap();
    let expected = weights(&request.out);

    // All sites are refined, and then the run ends for want of a place.
    let mut all = request.clone();
    all.selection.only = None;
    all.overwrite = Overwrite::Force;
    let scratch = folder.path().join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    all.scratch = Some(scratch.clone());
    let refining = AtomicUsize::new(0);
    let result = run(&all, &|progress| {
        if let Progress::Begin { stage, .. } = progress {
            if stage == "refining" {
                refining.fetch_add(1, Ordering::Relaxed);
            } else if refining.load(Ordering::Relaxed) > 0 {
                let _ = std::fs::remove_dir_all(&scratch);
            }
        }
    });
    assert!(result.is_err(), "{result:?}");
    request.overwrite = Overwrite::Force;
    quietly(&request).unwrap();
    assert_eq!(weights(&request.out), expected);
}

#[test]
fn local_attention_gets_a_window_and_other_attention_does_not() {
    for (looks, expected) in [(Looks::Near, true), (Looks::Anywhere, false)] {
        let folder = tempfile::tempdir().unwrap();
        let mut request = request(folder.path(), looks);
        request.attention = Attention::Auto { unexplained: 0.2 };
        request.samples = 32;
        request.schedule.steps = 150;
        request.selection.window = Some(WindowSpec {
            window: Window::Rect { rows: 5, cols: 5 },
            border: Border::Clamp,
        });
        let report = quietly(&request).unwrap();
        for site in &report.sites {
            assert_eq!(site.attention != Method::Linear, expected, "{site:?}");
            assert_eq!(site.tried.len(), 2, "{site:?}");
        }
        let converted = folder.path().join("converted.onnx");
        let conversion = linfusion_tests::request(
            &request.model,
            &converted,
            WeightsFrom::Path(request.out.clone()),
        );
        assert_eq!(convert(&conversion, &mut |_| {}).unwrap().converted, 2);
        // Windows alone have no weights, and nothing of them is compared.
        let file = OnnxFile::open(&converted).unwrap();
        let checkpoint = Checkpoint::open(&request.out).unwrap();
        let stored = compare_weights(&file, &checkpoint).unwrap();
        let is_window = |site: &&SiteReport| site.attention == Method::Window;
        let windows = report.sites.iter().filter(is_window).count();
        assert_eq!(stored.without.len(), windows, "{stored:?}");
        assert_eq!(stored.equal.len(), 2 - windows, "{stored:?}");
    }
}

#[test]
fn a_budget_keeps_softmax_where_it_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.refinement = Refinement::IfBetter;
    let all = quietly(&request).unwrap();
    assert!(all.kept.is_empty());
    assert!(
        all.notes.iter().any(|n| n.contains("refinement")),
        "{:?}",
        all.notes
    );
    request.overwrite = Overwrite::Force;
    request.budget = Some(Budget::Psnr(all.end_to_end.pooled() + 0.1));
    let report = quietly(&request).unwrap();
    assert_eq!((report.kept.len(), report.sites.len()), (1, 1));
    assert!(report.end_to_end.pooled() > all.end_to_end.pooled());
    assert_eq!(report.all_sites, all.end_to_end);
    let checkpoint = Checkpoint::open(&request.out).unwrap();
    assert_eq!(checkpoint.modules.len(), 1);
}

#[test]
fn inputs_may_be_recorded() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    let recorded = folder.path().join("inputs");
    std::fs::create_dir(&recorded).unwrap();
    let mut random = SplitMix64::new(2);
    let mut record = |number: usize, names: [&str; 2], side: usize, broken: f32| {
        let image = ArrayD::from_shape_simple_fn(IxDyn(&[1, 4, side, side]), || {
            random.symmetric() as f32 + broken
        });
        let arrays = [
            (names[0].to_owned(), Tensor::F32(image)),
            (names[1].to_owned(), Tensor::from(ndarray::arr1(&[1.0_f64]))),
        ];
        npz::write(&recorded.join(format!("{number:03}.npz")), &arrays).unwrap();
    };
    for number in 0..12 {
        record(number, ["sample", "t"], SIDE, 0.0);
    }
    request.source = Source::Folder(recorded.clone());
    request.schedule.steps = 5;
    quietly(&request).unwrap();
    let learned = weights(&request.out);
    request.overwrite = Overwrite::Force;

    let mut refused = |number, names, side, broken, expected: &[&str]| {
        record(number, names, side, broken);
        let error = quietly(&request).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(weights(&request.out), learned, "earlier weights are kept");
        record(number, ["sample", "t"], SIDE, 0.0);
    };
    refused(
        3,
        ["image", "t"],
        SIDE,
        0.0,
        &["003.npz", "'sample'", "image"],
    );
    refused(
        4,
        ["sample", "t"],
        16,
        0.0,
        &["004.npz", "[1, 4, 16, 16]", "f32[1, 4, 8, 8]"],
    );
    refused(
        11,
        ["sample", "t"],
        SIDE,
        f32::NAN,
        &["011.npz", "array 'sample'", "NaN"],
    );
    // Finite itself, and its square is not.
    refused(
        11,
        ["sample", "t"],
        SIDE,
        1e30,
        &["011.npz", "blocks.0.attn1", "NaN"],
    );
    request.samples = 9;
    let error = quietly(&request).unwrap_err().to_string();
    assert!(
        error.contains("12 .npz files") && error.contains("13"),
        "{error}"
    );
}

#[test]
fn two_do_not_learn_into_one_output() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.schedule.steps = 5;
    let kept = folder.path().join("linfusion.unfinished");
    std::fs::create_dir(&kept).unwrap();
    let other = File::open(&kept).unwrap();
    other.lock().unwrap();
    let error = quietly(&request).unwrap_err();
    assert!(matches!(error, DistillError::Busy { .. }), "{error}");
    drop(other);
    quietly(&request).unwrap();
    assert!(!kept.exists());
}

#[test]
fn what_cannot_be_done_is_said_before_work_begins() {
    let folder = tempfile::tempdir().unwrap();
    let good = request(folder.path(), Looks::Anywhere);
    let refused = |change: &dyn Fn(&mut Request), expected: &str| {
        let mut request = good.clone();
        change(&mut request);
        let error = quietly(&request).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert!(
            left(&folder).iter().all(|n| n == "taken"),
            "{:?}",
            left(&folder)
        );
    };
    refused(&|r| r.samples = 0, "--samples");
    refused(&|r| r.holdout = 0, "--holdout");
    refused(&|r| r.schedule.batch = Some(0), "--batch");
    refused(
        &|r| r.plot = Some(PathBuf::from("nowhere/losses.svg")),
        "nowhere/losses.svg",
    );
    refused(&|r| r.schedule.learning_rate = f64::NAN, "--lr");
    refused(&|r| r.disk_budget = 1000, "--disk-budget");
    refused(&|r| r.out = folder.path().join("no/where"), "where");
    std::fs::create_dir(folder.path().join("taken")).unwrap();
    refused(&|r| r.out = folder.path().join("taken"), "--force");
    let spec = |text: &'static str| {
        move |r: &mut Request| {
            let path = r.scratch.clone().unwrap().join("spec.json");
            std::fs::write(&path, text).unwrap();
            r.source = Source::Random(path);
        }
    };
    refused(&spec(r#"{"t": {"constant": 1}}"#), "'sample'");
    refused(
        &spec(r#"{"sample": {"normal": {}}, "t": {"constant": 1}, "u": {"constant": 1}}"#),
        "'u'",
    );
    refused(
        &spec(r#"{"sample": {"wide": {}}, "t": {"constant": 1}}"#),
        "log-uniform",
    );
    refused(
        &spec(r#"{"sample": {"normal": {}}, "t": {"uniform": {"min": 2, "max": 1}}}"#),
        "impossible",
    );
    refused(
        &spec(r#"{"sample": {"normal": {}, "shape": [1, 4, 9, 9]}, "t": {"constant": 1}}"#),
        "[1, 4, 9, 9]",
    );
    std::fs::write(folder.path().join("spec.json"), SPEC).unwrap();
    let none = linfusion_convert::patterns::Patterns::new("--keep", &["*".to_owned()]).unwrap();
    refused(
        &|r| r.selection.keep = none.clone(),
        "no attention whose weights could be learned",
    );
}

/// A pipeline makes its own samples; its denoiser has cross-attention, which is left.
#[test]
fn a_pipeline_teaches_itself() {
    if !has_ort() {
        println!("skipped: no ONNX Runtime library");
        return;
    }
    for (name, method, sites) in [("sd15", Method::Linear, 16), ("pixart", Method::Hybrid, 2)] {
        let folder = tempfile::tempdir().unwrap();
        let pipeline = folder.path().join("pipeline");
        linfusion_models::fixtures::pipeline(name, &pipeline).unwrap();
        let mut request = request(folder.path(), Looks::Anywhere);
        request.model = pipeline.clone();
        request.source = Source::Pipeline {
            folder: pipeline.clone(),
            prompts: None,
            steps: 4,
        };
        (request.samples, request.holdout) = (3, 1);
        request.schedule.steps = 2;
        let report = quietly(&request).unwrap();
        assert_eq!(report.sites.len(), sites, "{name}: {:?}", report.skipped);
        assert!(report.sites.iter().all(|s| s.attention == method), "{name}");
        assert!(
            report.skipped.iter().all(|s| s.contains("cross")),
            "{:?}",
            report.skipped
        );
        let mut conversion = linfusion_tests::request(
            &pipeline,
            &folder.path().join("converted"),
            WeightsFrom::Path(request.out.clone()),
        );
        conversion.model = pipeline;
        let report =
            linfusion_convert::convert::convert_pipeline(&conversion, &mut |_| {}).unwrap();
        assert_eq!(report.converted, sites, "{name}");
    }
}
