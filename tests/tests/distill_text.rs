//! Distillation of attentions over text and image tokens: the image's output is learned, the text's stays exact.

use std::ops::Range;
use std::path::{Path, PathBuf};

use linfusion_convert::analysis::Analysis;
use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::distill::{
    Progress, Refinement, Report, Request, Schedule, Source, Together, run,
};
use linfusion_convert::plan::{Method, Selection};
use linfusion_models::onnx::{ElementType, OnnxFile};
use linfusion_models::random::SplitMix64;
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Engine, Operators, SessionOptions};
use linfusion_runtime::inputs::raster_ids;
use linfusion_runtime::npz;
use linfusion_runtime::subgraph::{Cut, load, part};
use linfusion_runtime::tensor::Tensor;
use linfusion_tests::has_ort;
use ndarray::{ArrayD, Axis, IxDyn};
use rstest::rstest;
use tempfile::TempDir;

const LEARNED: usize = 48;
const HELD_OUT: usize = 4;
/// Of the fixtures.
const TEXT: usize = 9;

/// Rows and columns of FLUX's image where there is more text than image.
const SMALL: [usize; 2] = [2, 2];

/// Records what the model is given: the fixture's own inputs, with other numbers, and of another image where `ids` says so.
fn record(fixture: &str, ids: Option<[usize; 2]>, into: &Path) {
    let given = npz::read(&linfusion_models::fixtures::path(&format!(
        "{fixture}/inputs.npz"
    )));
    let given = given.unwrap();
    std::fs::create_dir(into).unwrap();
    let mut random = SplitMix64::new(5);
    for number in 0..LEARNED + HELD_OUT {
        let mut redrawn = |(name, tensor): &(String, Tensor)| {
            let mut shape = tensor.shape().to_vec();
            if let Some([rows, cols]) = ids {
                match name.as_str() {
                    "hidden_states" => shape[1] = rows * cols,
                    "img_ids" => {
                        let ids = raster_ids(rows, cols).map(|id| id as f32).collect();
                        let ids = ArrayD::from_shape_vec(IxDyn(&[rows * cols, 3]), ids);
                        return (name.clone(), Tensor::F32(ids.unwrap()));
                    }
                    _ => {}
                }
            }
            let drawn = match name.as_str() {
                "img_ids" | "txt_ids" | "timestep" | "guidance" => tensor.clone(),
                _ => {
                    let values =
                        ArrayD::from_shape_simple_fn(IxDyn(&shape), || random.normal() as f32);
                    Tensor::F32(values)
                }
            };
            (name.clone(), drawn)
        };
        let sample: Vec<_> = given.iter().map(&mut redrawn).collect();
        npz::write(&into.join(format!("{number:03}.npz")), &sample).unwrap();
    }
}

fn request(fixture: &str, folder: &Path) -> Request {
    of_image(fixture, None, folder)
}

fn of_image(fixture: &str, ids: Option<[usize; 2]>, folder: &Path) -> Request {
    let inputs = folder.join("inputs");
    record(fixture, ids, &inputs);
    let model = folder.join("model.onnx");
    let bytes = linfusion_models::fixtures::bytes(&format!("{fixture}/model.onnx.gz"));
    std::fs::write(&model, bytes.unwrap()).unwrap();
    Request {
        samples: LEARNED,
        holdout: HELD_OUT,
        schedule: Schedule {
            steps: 60,
            ..Schedule::default()
        },
        selection: Selection {
            window: Some(WindowSpec {
                window: Window::Rect { rows: 3, cols: 3 },
                border: Border::Clamp,
            }),
            ..Selection::default()
        },
        ..linfusion_tests::distillation(folder, model, Source::Folder(inputs))
    }
}

/// tract cannot run FLUX, whose grid is in the values of its ids.
fn runs(fixture: &str) -> bool {
    has_ort() || fixture != "hybrid-flux"
}

fn quietly(request: &Request) -> Report {
    run(request, &|_: Progress| {}).unwrap()
}

fn converted(request: &Request, folder: &Path) -> PathBuf {
    let out = folder.join("converted.onnx");
    let weights = WeightsFrom::Path(request.out.clone());
    let conversion = linfusion_tests::request(&request.model, &out, weights);
    convert(&conversion, &mut |_| {}).unwrap();
    out
}

/// Where text is joined to the image: before it in FLUX's attentions, behind it in Stable Diffusion 3's.
#[rstest]
#[case::sd3("hybrid-sd3", &[60, 60])]
#[case::sd35_has_attentions_of_the_image_alone("hybrid-sd35", &[60, 60, 60])]
#[case::flux_reads_both_with_one_layer_in_single_blocks("hybrid-flux", &[24, 24, 24, 24])]
fn hybrid_weights_are_learned_beside_text(#[case] fixture: &str, #[case] tokens: &[usize]) {
    if !runs(fixture) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let request = request(fixture, folder.path());
    let report = quietly(&request);
    let found: Vec<usize> = report.sites.iter().map(|s| s.tokens).collect();
    assert_eq!(found, tokens);
    assert!(report.skipped.is_empty(), "{:?}", report.skipped);
    for site in &report.sites {
        assert_eq!(site.attention, Method::Hybrid);
        assert!(site.after.relative < site.before.relative, "{site:?}");
    }
    assert!(report.end_to_end.mean() > report.untrained.mean());
    // Verified against the checkpoint on the way.
    converted(&request, folder.path());
}

/// What the student computes while it learns is what the converted graph computes: the first site's error, as reported and
/// as measured on the graphs, where image and text are told apart by hand.
#[rstest]
#[case::text_behind("hybrid-sd3", 0..60)]
#[case::text_before("hybrid-flux", TEXT..TEXT + 24)]
fn the_reported_error_is_the_graphs(#[case] fixture: &str, #[case] image: Range<usize>) {
    if !runs(fixture) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let request = request(fixture, folder.path());
    let report = quietly(&request);
    agree(measured(&request, folder.path(), 0, image), &report, 0);
}

/// Layers that read both are read off as well where text outnumbers the image.
#[test]
fn more_text_than_image_is_learned() {
    if !has_ort() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let request = of_image("hybrid-flux", Some(SMALL), folder.path());
    let report = quietly(&request);
    let found: Vec<usize> = report.sites.iter().map(|s| s.tokens).collect();
    assert_eq!(found, [4; 4]);
    // The window has the whole image: half of it is right before anything is learned, and nearly all after.
    for site in &report.sites {
        assert!(site.after.relative < 0.5 * site.before.relative, "{site:?}");
    }
}

/// Text beside the image, its norms and rotary embeddings are in the graph that is differentiated; FLUX's grid is among its
/// inputs' values.
#[rstest]
#[case("hybrid-sd3")]
#[case("hybrid-sd35")]
#[case("hybrid-flux")]
fn sites_beside_text_learn_together(#[case] fixture: &str) {
    if !runs(fixture) {
        return;
    }
    let folder = TempDir::new().unwrap();
    let mut request = request(fixture, folder.path());
    request.end_to_end = Some(Together {
        steps: 96,
        learning_rate: 5e-4,
    });
    let report = quietly(&request);
    let told = report.notes.iter().find(|n| n.starts_with("end to end:"));
    assert!(told.unwrap().ends_with("; kept"), "{:?}", report.notes);
}

/// Hybrid sites learn on in the converted model, with the windows of its own activations: the last site's error is that of
/// its output in the whole converted model.
#[test]
fn hybrid_sites_are_refined() {
    let folder = TempDir::new().unwrap();
    let mut request = request("hybrid-sd35", folder.path());
    request.refinement = Refinement::IfBetter;
    let report = quietly(&request);
    let told = report.notes.iter().find(|n| n.starts_with("refinement"));
    let told = told.unwrap();
    assert!(
        told.contains("(3 of 3") && told.ends_with("; kept"),
        "{told}"
    );
    agree(measured(&request, folder.path(), 2, 0..60), &report, 2);
}

fn agree(measured: f64, report: &Report, site: usize) {
    let told = report.sites[site].after.relative;
    // Activations are kept as f16, 2^-11 of each value; both errors are far above its square.
    assert!((measured / told - 1.0).abs() < 1e-2, "{measured} {told}");
}

/// Energy of the error of a site's image tokens in the converted model, relative to the original's, on the samples held out.
/// Text tokens of the first site are exact.
fn measured(request: &Request, folder: &Path, site: usize, image: Range<usize>) -> f64 {
    let original = OnnxFile::open(&request.model).unwrap();
    let analysis = Analysis::of(&original);
    let merged = analysis.sites[site].exact.as_ref().unwrap().merged;
    let expected = outputs(&request.model, merged, folder);
    let found = outputs(&converted(request, folder), merged, folder);
    let (mut error, mut energy) = (0.0, 0.0);
    for (expected, found) in expected.iter().zip(&found) {
        let rows = expected.axis_iter(Axis(1)).zip(found.axis_iter(Axis(1)));
        for (row, (a, b)) in rows.enumerate() {
            let wrong: f64 = a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum();
            if image.contains(&row) {
                error += wrong;
                energy += a.iter().map(|v| v * v).sum::<f64>();
            } else if site == 0 {
                // The window's kernel against softmax's, both in f32: a weight exp(s - max) is off by half an epsilon of its
                // exponent, below 16, and of each of the root of its score's 16 products, in either.
                let largest = a.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
                let bound = f64::from(f32::EPSILON) * (8.0 + 2.0) * (a.len() as f64).sqrt();
                assert!(wrong.sqrt() <= bound * largest, "text token {row}");
            }
        }
    }
    error / energy
}

/// A value of a model on the samples held out.
fn outputs(model: &Path, value: &str, folder: &Path) -> Vec<ArrayD<f64>> {
    let file = OnnxFile::open(model).unwrap();
    let wanted = Cut {
        name: value.to_owned(),
        element: ElementType::F32,
        shape: None,
    };
    let options = SessionOptions {
        operators: Operators::InProcess,
        ..SessionOptions::default()
    };
    let engine = if has_ort() {
        Engine::Ort
    } else {
        Engine::Tract
    };
    let mut session = load(&file, part(&file, &[], &[wanted]), engine, &options).unwrap();
    let mut of = |number: usize| {
        let sample = npz::read(&folder.join(format!("inputs/{number:03}.npz"))).unwrap();
        let takes = |name: &str| session.inputs().iter().any(|p| p.name == name);
        let given: Vec<_> = sample.into_iter().filter(|(n, _)| takes(n)).collect();
        session.run(&given).unwrap().remove(0).1.to_f64()
    };
    (LEARNED..LEARNED + HELD_OUT).map(&mut of).collect()
}
