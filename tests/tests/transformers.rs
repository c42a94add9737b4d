//! Diffusion transformers: what is found in them, and that window and hybrid attention
//! are put in where softmax attention was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use linfusion_convert::analysis::Analysis;
use linfusion_convert::attention::kind::Kind;
use linfusion_convert::convert::{WeightsFrom, convert, inspect};
use linfusion_convert::plan::{Method, MethodRule, Selection};
use linfusion_convert::rewrite::Emit;
use linfusion_models::checkpoint::synth::{SynthModule, SynthOptions, write_checkpoint};
use linfusion_models::checkpoint::{MlpWidth, SiteAttention};
use linfusion_models::fixtures;
use linfusion_models::onnx::OnnxFile;
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Dim, Engine, Operators, Session, SessionOptions};
use linfusion_runtime::inputs;
use linfusion_runtime::tensor::{DType, Tensor};
use linfusion_tests::{checkpoint_of, has_ort, max_difference, request};

type Outputs = Vec<(String, Tensor)>;

/// Counts of attentions by kind.
#[derive(serde::Deserialize, PartialEq, Debug)]
struct Counts {
    #[serde(rename = "self")]
    own: usize,
    cross: usize,
    joint: usize,
}

/// A graph and its counts.
struct Case {
    name: String,
    path: PathBuf,
    counts: Counts,
}

/// The committed transformers, and those of the folder that `LINFUSION_GRAPHS` names
/// that its `expected.json` lists.
fn cases(scratch: &Path) -> Vec<Case> {
    let text = fixtures::bytes("transformers/expected.json").unwrap();
    let committed: BTreeMap<String, Counts> = serde_json::from_slice(&text).unwrap();
    assert!(committed.len() >= 8, "fixtures are missing");
    let mut cases = Vec::new();
    for (name, counts) in committed {
        let path = scratch.join(name.trim_end_matches(".gz"));
        let bytes = fixtures::bytes(&format!("transformers/{name}")).unwrap();
        std::fs::write(&path, bytes).unwrap();
        cases.push(Case { name, path, counts });
    }
    if let Some(folder) = std::env::var_os("LINFUSION_GRAPHS").map(PathBuf::from) {
        let text = std::fs::read(folder.join("expected.json")).unwrap();
        let more: BTreeMap<String, Counts> = serde_json::from_slice(&text).unwrap();
        let unet = |name: &str| {
            ["sd15", "sd21", "sdxl", "controlnet"]
                .iter()
                .any(|a| name.starts_with(a))
        };
        cases.extend(
            more.into_iter()
                .filter(|(name, _)| !unet(name))
                .map(|(name, counts)| Case {
                    path: folder.join(&name),
                    name,
                    counts,
                }),
        );
    }
    cases
}

fn session(path: &Path, operators: Operators) -> Result<Session, String> {
    let options = SessionOptions {
        operators,
        ..SessionOptions::default()
    };
    Session::from_file(Engine::Ort, path, &options).map_err(|e| e.to_string())
}

/// The original's inputs and outputs; `None` where ONNX Runtime does not run it.
fn original(case: &Case) -> Option<(Outputs, Outputs)> {
    let mut session = session(&case.path, Operators::None).ok()?;
    // Exports with baked sizes run only at the one that they were traced at.
    let packed = |image: usize, text: usize| {
        let mut request = inputs::Request {
            latent: Some(16),
            sequence: text,
            ..inputs::Request::default()
        };
        request.shapes = session
            .inputs()
            .iter()
            .filter_map(|i| match i.name.as_str() {
                "img_ids" => Some((i.name.clone(), vec![image, 3])),
                "txt_ids" => Some((i.name.clone(), vec![text, 3])),
                _ => None,
            })
            .collect();
        if !request.shapes.is_empty() {
            for input in session.inputs() {
                let Some(Dim::Fixed(width)) = input.shape.as_ref().and_then(|s| s.last()) else {
                    continue;
                };
                let tokens = match input.name.as_str() {
                    "hidden_states" => image,
                    "encoder_hidden_states" => text,
                    _ => continue,
                };
                let shape = vec![2, tokens, *width];
                request.shapes.push((input.name.clone(), shape));
            }
        }
        request
    };
    for request in [packed(64, 9), packed(64, 7), inputs::Request::default()] {
        let Ok(mut feed) = inputs::make(session.inputs(), &request) else {
            continue;
        };
        for (name, tensor) in &mut feed {
            if name == "img_ids" {
                *tensor = raster_ids(tensor);
            }
        }
        if let Ok(outputs) = session.run(&feed) {
            return Some((feed, outputs));
        }
    }
    None
}

/// (0, row, column) of a square image's tokens.
fn raster_ids(like: &Tensor) -> Tensor {
    let tokens = like.shape()[0];
    let side = tokens.isqrt();
    let ids = ndarray::Array2::from_shape_fn((tokens, 3), |(i, axis)| match axis {
        1 => (i / side) as f64,
        2 => (i % side) as f64,
        _ => 0.0,
    });
    Tensor::from_f64(ids.into_dyn(), like.dtype())
}

fn selection(method: Method, window: WindowSpec) -> Selection {
    Selection {
        attention: vec![MethodRule {
            sites: None,
            method: Some(method),
        }],
        window: Some(window),
        ..Selection::default()
    }
}

fn rect(rows: usize, cols: usize) -> WindowSpec {
    WindowSpec {
        window: Window::Rect { rows, cols },
        border: Border::Clamp,
    }
}

/// Relative to the largest value of `b`.
fn apart(a: &Outputs, b: &Outputs) -> f64 {
    let values = b.iter().flat_map(|(_, t)| t.to_f64());
    let largest = values.fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
    max_difference(a, b) / largest
}

/// What rounding explains between two ways of computing a model.
fn tolerance(case: &Case, outputs: &Outputs) -> f64 {
    match () {
        // A last bit can tip a value over to the next of 256 quantization steps.
        () if case.name.contains("int8") => 5e-2,
        () if outputs.iter().any(|(_, t)| t.dtype() == DType::F16) => 2e-2,
        () => 2e-5,
    }
}

/// How a converted model differs from what the original made, with and without the
/// operators: a line each.
fn differences(case: &Case, converted: &Path, feed: &Outputs, before: &Outputs) -> Vec<String> {
    let mut found = Vec::new();
    for operators in [Operators::None, Operators::InProcess] {
        let label = format!("{operators:?}");
        let run = session(converted, operators);
        match run.and_then(|mut s| s.run(feed).map_err(|e| e.to_string())) {
            Err(e) => found.push(format!("{} {label}: {e}", case.name)),
            Ok(after) => {
                let error = apart(&after, before);
                if error > tolerance(case, before) {
                    found.push(format!("{} {label}: {error:.1e} apart", case.name));
                }
            }
        }
    }
    found
}

#[test]
fn every_site_is_found_and_counted() {
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for case in cases(folder.path()) {
        let report = inspect(&case.path, &Selection::default()).unwrap();
        let found = Counts {
            own: report.count(Kind::SelfAttention),
            cross: report.count(Kind::Cross),
            joint: report.count(Kind::Joint),
        };
        let other = report.count(Kind::Other);
        let converts = report
            .sites
            .iter()
            .filter(|s| s.attention == Some(Method::Hybrid))
            .count();
        if found != case.counts || other > 0 || converts != found.own + found.joint {
            failures.push(format!(
                "{}: {found:?}, {other} other, {converts} hybrid; expected {:?}",
                case.name, case.counts
            ));
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// A window that covers the image is full attention: the model computes what it did.
#[test]
fn a_window_over_the_whole_image_changes_nothing() {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let mut ran = 0;
    for case in cases(folder.path()) {
        let Some((feed, before)) = original(&case) else {
            continue;
        };
        ran += 1;
        let out = folder.path().join("full.onnx");
        let mut job = request(&case.path, &out, WeightsFrom::Untrained);
        job.selection = selection(Method::Window, rect(4096, 4096));
        job.overwrite = linfusion_models::onnx::write::Overwrite::Force;
        if let Err(e) = convert(&job, &mut |_| {}) {
            failures.push(format!("{}: {e}", case.name));
            continue;
        }
        failures.extend(differences(&case, &out, &feed, &before));
    }
    assert!(ran >= 8, "only {ran} of the graphs run");
    assert!(failures.is_empty(), "{failures:#?}");
}

/// A hybrid over the whole image whose linear branch counts for nothing computes what the
/// original does: everything around the two branches is wired right.
#[test]
fn a_hybrid_of_the_whole_image_alone_changes_nothing() {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    let mut ran = 0;
    for case in cases(folder.path()) {
        let Some((feed, before)) = original(&case) else {
            continue;
        };
        let options = SynthOptions {
            scales: Some([1.0, 0.0]),
            ..SynthOptions::default()
        };
        let hybrid = SiteAttention::Hybrid(Some(rect(4096, 4096)));
        let mid = MlpWidth::Width(16);
        let weights = checkpoint_of(&case.path, folder.path(), mid, hybrid, options).unwrap();
        let out = folder.path().join("hybrid.onnx");
        let mut job = request(&case.path, &out, WeightsFrom::Path(weights));
        job.overwrite = linfusion_models::onnx::write::Overwrite::Force;
        match convert(&job, &mut |_| {}) {
            Err(e) => {
                failures.push(format!("{}: {e}", case.name));
                continue;
            }
            Ok(report) if report.converted != case.counts.own + case.counts.joint => {
                let reasons: Vec<_> = report
                    .model
                    .sites
                    .iter()
                    .map(|s| s.reason.clone())
                    .collect();
                failures.push(format!(
                    "{}: {} converted, {reasons:?}",
                    case.name, report.converted
                ));
                continue;
            }
            Ok(_) => ran += 1,
        }
        failures.extend(differences(&case, &out, &feed, &before));
    }
    assert!(ran >= 8, "only {ran} of the graphs run");
    assert!(failures.is_empty(), "{failures:#?}");
}

/// A file has one function for window attention: a second form of window is written in
/// standard operators, and said.
#[test]
fn two_forms_of_window_in_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.onnx");
    let packed = fixtures::bytes("transformers/pixart-ts17-dyn-sdpa.onnx.gz").unwrap();
    std::fs::write(&model, packed).unwrap();
    let file = OnnxFile::open(&model).unwrap();
    let analysis = Analysis::of(&file);
    let circle = WindowSpec {
        window: Window::Circle { radius: 3 },
        border: Border::Truncate,
    };
    let forms = [rect(4, 3), circle];
    let modules: Vec<SynthModule> = analysis
        .own_sites()
        .zip(forms)
        .map(|(site, form)| SynthModule {
            module_name: site.module.clone().unwrap(),
            dim: usize::try_from(site.width().unwrap()).unwrap(),
            heads: usize::try_from(site.heads.unwrap()).unwrap(),
            mid: MlpWidth::Width(8),
            attention: SiteAttention::Hybrid(Some(form)),
        })
        .collect();
    assert_eq!(modules.len(), forms.len());
    let weights = folder.path().join("linfusion");
    write_checkpoint(&weights, &modules, SynthOptions::default()).unwrap();
    let convert_as = |name: &str, emit: Emit| {
        let out = folder.path().join(name);
        let mut job = request(&model, &out, WeightsFrom::Path(weights.clone()));
        job.emit = emit;
        (out, convert(&job, &mut |_| {}).unwrap())
    };
    let (function, report) = convert_as("function.onnx", Emit::Function);
    assert!(
        report.warnings.iter().any(|w| w.contains("another form")),
        "{:?}",
        report.warnings
    );
    let (standard, report) = convert_as("standard.onnx", Emit::Standard);
    assert!(
        !report.warnings.iter().any(|w| w.contains("another form")),
        "{:?}",
        report.warnings
    );
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let run = |path: &Path, operators: Operators| {
        let mut session = session(path, operators).unwrap();
        let request = inputs::Request {
            latent: Some(16),
            sequence: 9,
            ..inputs::Request::default()
        };
        let feed = inputs::make(session.inputs(), &request).unwrap();
        session.run(&feed).unwrap()
    };
    let expected = run(&standard, Operators::None);
    for operators in [Operators::None, Operators::InProcess] {
        let error = apart(&run(&function, operators.clone()), &expected);
        assert!(error < 2e-5, "{operators:?}: {error:e}");
    }
}

#[test]
fn hybrids_run_alike_with_and_without_the_operators() {
    if !has_ort() {
        eprintln!("skipped: no libonnxruntime (make test fetches one)");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut failures = Vec::new();
    for case in cases(folder.path()) {
        let Some((feed, before)) = original(&case) else {
            continue;
        };
        let circle = WindowSpec {
            window: Window::Circle { radius: 3 },
            border: Border::Truncate,
        };
        for window in [rect(4, 3), circle] {
            let out = folder.path().join("hybrid.onnx");
            let mut job = request(&case.path, &out, WeightsFrom::Untrained);
            job.selection = selection(Method::Hybrid, window);
            job.overwrite = linfusion_models::onnx::write::Overwrite::Force;
            if let Err(e) = convert(&job, &mut |_| {}) {
                failures.push(format!("{}: {e}", case.name));
                continue;
            }
            let results: Result<Vec<Outputs>, String> = [Operators::None, Operators::InProcess]
                .into_iter()
                .map(|o| session(&out, o).and_then(|mut s| s.run(&feed).map_err(|e| e.to_string())))
                .collect();
            match results {
                Err(e) => failures.push(format!("{} {window}: {e}", case.name)),
                Ok(r) => {
                    let error = apart(&r[0], &r[1]);
                    if error > tolerance(&case, &before) {
                        failures.push(format!("{} {window}: {error:.1e} apart", case.name));
                    }
                    if max_difference(&r[0], &before) < 1e-6 {
                        failures.push(format!("{} {window}: as before conversion", case.name));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
