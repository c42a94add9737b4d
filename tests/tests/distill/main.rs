//! Distillation from end to end, on models of two small attentions over an image.

mod refused;
mod sketch;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::distill::{
    Attention, Budget, DistillError, Progress, Refinement, Request, SiteReport, Source, Together,
    run,
};
use linfusion_convert::patterns::Patterns;
use linfusion_convert::plan::{Method, MethodRule};
use linfusion_convert::verify::compare_weights;
use linfusion_models::checkpoint::{Checkpoint, MlpWidth, SiteAttention};
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::random::SplitMix64;
use linfusion_ops::schema::{Border, Window, WindowSpec};
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::tensor::Tensor;
use linfusion_tests::has_ort;
use ndarray::{ArrayD, IxDyn};
use tempfile::TempDir;

use sketch::{Looks, MODULES, SIDE, left, quietly, request, weights};

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

/// What is learned through windows is what the converted graph computes: the engine's output is nearer than before.
#[test]
fn sites_of_any_kind_learn_together() {
    for method in [Method::Hybrid, Method::Window] {
        let folder = TempDir::new().unwrap();
        let mut request = request(folder.path(), Looks::Anywhere);
        request.selection.attention = vec![
            MethodRule {
                sites: None,
                method: Some(Method::Linear),
            },
            MethodRule {
                sites: Some(Patterns::new("--attention", &[MODULES[0].to_owned()]).unwrap()),
                method: Some(method),
            },
        ];
        request.end_to_end = Some(Together {
            steps: 16,
            learning_rate: 2e-3,
        });
        let together = quietly(&request).unwrap();
        let found: Vec<Method> = together.sites.iter().map(|s| s.attention).collect();
        assert_eq!(found, [method, Method::Linear]);
        let told = together.notes.iter().find(|n| n.starts_with("end to end:"));
        assert!(told.unwrap().ends_with("; kept"), "{:?}", together.notes);
    }
}

#[test]
fn windows_alone_have_nothing_to_learn_together() {
    let folder = TempDir::new().unwrap();
    let mut request = request(folder.path(), Looks::Near);
    request.end_to_end = Some(Together::default());
    request.selection.attention = vec![MethodRule {
        sites: None,
        method: Some(Method::Window),
    }];
    let report = quietly(&request).unwrap();
    let told = |n: &String| n.starts_with("end to end: every site is window attention");
    assert!(report.notes.iter().any(told), "{:?}", report.notes);
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
        // Two blocks, in float32: projections of 8 terms, an attention over 64 tokens and a layer of 8, so 24 sums whose
        // roundings add up to their number at most, on either side, and a weight is read as a difference from the bias.
        assert!(
            (a - b).abs() < 64.0 * f64::from(f32::EPSILON) * largest,
            "{a} {b}"
        );
    }
}

/// Runs `request`, of two groups, the second of which finds no scratch folder any more.
fn stopped_in_the_second_group(request: &Request, folder: &Path) {
    let scratch = folder.join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let request = Request {
        scratch: Some(scratch.clone()),
        ..request.clone()
    };
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

    stopped_in_the_second_group(&request, folder.path());
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

/// A request whose refinement is worth keeping.
fn refining(folder: &Path) -> Request {
    let mut request = request(folder, Looks::Anywhere);
    request.refinement = Refinement::IfBetter;
    request.samples = 32;
    request.schedule.steps = 100;
    request
}

#[test]
fn refined_sites_are_not_refined_again_after_an_interruption() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = refining(folder.path());
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

    // A disk that holds one site's activations at once.
    request.disk_budget = 3 * 36 * 64 * 8 * 2;
    quietly(&request).unwrap();
    assert_eq!(weights(&request.out), expected);
}

#[test]
fn what_was_learned_for_another_attention_does_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.schedule.steps = 5;
    request.disk_budget = 3 * 12 * 64 * 8 * 2;
    stopped_in_the_second_group(&request, folder.path());
    request.selection.attention = vec![MethodRule {
        sites: None,
        method: Some(Method::Hybrid),
    }];
    let report = quietly(&request).unwrap();
    assert_eq!(report.resumed, 0);
    let hybrid = |site: &SiteReport| site.attention == Method::Hybrid;
    assert!(report.sites.iter().all(hybrid), "{:?}", report.sites);
}

/// What was refined beside other sites than now does not count.
#[test]
fn refined_sites_of_another_selection_are_learned_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = refining(folder.path());
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

/// Rows and columns of a UNet's sites are computed from what earlier ones make: their windows are in each other's way.
#[test]
fn hybrid_sites_of_a_unet_are_refined() {
    let folder = tempfile::tempdir().unwrap();
    let mut request = request(folder.path(), Looks::Anywhere);
    request.model = linfusion_models::fixtures::path("sd15-tiny/unet.onnx");
    let spec = r#"{"sample": {"normal": {}, "shape": [1, 4, 16, 16]},
        "timestep": {"integers": {"min": 0, "max": 999}},
        "encoder_hidden_states": {"normal": {}, "shape": [1, 7, 12]}}"#;
    std::fs::write(folder.path().join("spec.json"), spec).unwrap();
    request.selection.window = Some(WindowSpec {
        window: Window::Rect { rows: 3, cols: 3 },
        border: Border::Clamp,
    });
    request.selection.attention = vec![MethodRule {
        sites: None,
        method: Some(Method::Hybrid),
    }];
    request.selection.only =
        Some(Patterns::new("--only", &["down_blocks.[01]*".to_owned()]).unwrap());
    (request.samples, request.holdout, request.schedule.steps) = (2, 1, 20);
    request.refinement = Refinement::IfBetter;
    let report = quietly(&request).unwrap();
    let hybrid = |site: &SiteReport| site.attention == Method::Hybrid;
    assert!(report.sites.len() == 4 && report.sites.iter().all(hybrid));
    assert!(report.notes.iter().any(|n| n.starts_with("refinement")));
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
