//! Reports as text.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use comfy_table::{CellAlignment, Table};
use linfusion_runtime::bench::{BenchReport, ENOUGH, Speedup, Verdict};
use linfusion_runtime::compare::{Difference, PipelineComparison, SiteDifference};
use linfusion_runtime::doctor::Diagnosis;
use linfusion_runtime::table::table;
use miette::IntoDiagnostic;
use serde::Serialize;

/// What `compare` found.
#[derive(Serialize)]
pub struct Comparison {
    /// The model that is right.
    pub reference: PathBuf,
    /// The model that is judged.
    pub other: PathBuf,
    /// Whether each was converted without trained weights.
    pub untrained: [bool; 2],
    /// What ran them.
    pub engine: String,
    /// The limit on `max_abs`, if one was given.
    pub tolerance: Option<f64>,
    /// Whether all values are finite and within the limit.
    pub within_tolerance: bool,
    /// One entry an output.
    pub outputs: Vec<Difference>,
    /// Each replaced attention, if it was asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<SiteDifference>,
}

pub fn json(value: &impl Serialize) -> miette::Result<String> {
    let text = serde_json::to_string_pretty(value).into_diagnostic()?;
    Ok(text + "\n")
}

pub fn comparison(comparison: &Comparison) -> String {
    let mut table = table([
        "output",
        "shape",
        "max |Δ|",
        "mean |Δ|",
        "‖Δ‖/‖ref‖",
        "PSNR dB",
        "std of ref",
        "not finite",
    ]);
    for d in &comparison.outputs {
        let number = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.3e}"));
        table.add_row([
            d.output.clone(),
            format!("{:?}", d.shape),
            number(d.max_abs),
            number(d.mean_abs),
            number(d.relative),
            d.psnr_db.map_or("–".to_owned(), |v| format!("{v:.1}")),
            number(d.reference_std),
            format!("{} / {}", d.not_finite[0], d.not_finite[1]),
        ]);
    }
    align_numbers(&mut table, 2);
    let mut text = format!(
        "{} against {} on {}\n{table}\n",
        comparison.other.display(),
        comparison.reference.display(),
        comparison.engine
    );
    if let Some(limit) = comparison.tolerance {
        let verdict = if comparison.within_tolerance {
            "within"
        } else {
            "beyond"
        };
        let _ = writeln!(text, "{verdict} the tolerance of {limit:e}");
    }
    text + &sites(&comparison.sites)
}

/// What `compare` found of pipelines.
pub fn pipelines(comparison: &PipelineComparison) -> String {
    let pictures = comparison.images.iter().any(|i| i.picture.is_some());
    let mut head = vec![
        "prompt",
        "seed",
        "latents after the last step, ‖Δ‖/‖ref‖",
        "PSNR dB",
        "SSIM",
        "seconds",
    ];
    head.extend(pictures.then_some("picture"));
    let mut table = table(head);
    for image in &comparison.images {
        let last = image.steps.last().map_or(0.0, |s| s.relative);
        let [reference, other] = image.seconds;
        let mut row = vec![
            image.prompt.chars().take(40).collect(),
            image.seed.to_string(),
            format!("{last:.3e}"),
            image
                .psnr_db
                .map_or("equal".to_owned(), |v| format!("{v:.1}")),
            format!("{:.4}", image.ssim),
            format!("{reference:.1} / {other:.1}"),
        ];
        row.extend(image.picture.iter().map(|path| path.display().to_string()));
        table.add_row(row);
    }
    align_numbers(&mut table, 1);
    let mut text = format!("{table}\n");
    for image in &comparison.images {
        let steps: Vec<String> = image
            .steps
            .iter()
            .map(|s| format!("{:.1e}", s.relative))
            .collect();
        let _ = writeln!(
            text,
            "seed {}, latents step by step: {}",
            image.seed,
            steps.join(" ")
        );
    }
    text + &sites(&comparison.sites)
}

fn sites(sites: &[SiteDifference]) -> String {
    if sites.is_empty() {
        return String::new();
    }
    let mut table = table(["attention", "now", "shape", "cosine", "‖Δ‖/‖ref‖"]);
    for site in sites {
        let number = |value: Option<f64>| value.map_or("–".to_owned(), |v| format!("{v:.4}"));
        table.add_row([
            site.site.clone(),
            site.operators.join(", "),
            format!("{:?}", site.shape),
            number(site.cosine),
            number(site.relative),
        ]);
    }
    align_numbers(&mut table, 2);
    format!("each attention alone, on the reference's activations\n{table}\n")
}

pub fn bench(report: &BenchReport) -> String {
    let results = || report.sizes.iter().flat_map(|size| &size.results);
    let pipelines = results().any(|r| r.step_ms.is_some());
    let gpu = results().any(|r| r.device_bytes.is_some());
    let mut head = vec!["pixels", "model", "median ms", "speed-up"];
    head.push(if pipelines { "step ms" } else { "attention" });
    head.extend(["peak MiB", "counted MiB"]);
    head.extend(gpu.then_some("GPU MiB"));
    let mut table = table(head);
    let mib = |bytes: Option<u64>| {
        bytes.map_or("–".to_owned(), |b| {
            format!("{:.0}", b as f64 / f64::from(1 << 20))
        })
    };
    for size in &report.sizes {
        for (model, result) in report.models.iter().zip(&size.results) {
            let mut row = vec![
                size.pixels.map_or("–".to_owned(), |p| p.to_string()),
                title(&model.path),
                result
                    .median_ms
                    .map_or("failed".to_owned(), |ms| format!("{ms:.1}")),
                result.speedup.map_or("–".to_owned(), speedup),
                match (result.step_ms, &result.profile) {
                    (Some(ms), _) => format!("{ms:.1}"),
                    (None, Some(profile)) => format!("{:.0} %", 100.0 * profile.attention_share),
                    (None, None) => "–".to_owned(),
                },
                mib(result.peak_rss_bytes),
                mib(result.expected.map(|e| e.bytes)),
            ];
            row.extend(gpu.then(|| mib(result.device_bytes)));
            table.add_row(row);
        }
    }
    align_numbers(&mut table, 2);
    let threads = report
        .threads
        .map_or("its own number of".to_owned(), |t| t.to_string());
    let what = if pipelines {
        "whole images"
    } else {
        "one step; attention: its share of it"
    };
    let mut text = format!(
        "{what}; {} with {threads} threads on {} processors; median of {} runs, models taking turns\n{table}\n",
        report.engine, report.processors, report.repeats
    );
    for failure in report
        .sizes
        .iter()
        .flat_map(|size| &size.results)
        .filter_map(|r| r.failure.as_ref())
    {
        let _ = writeln!(text, "failed: {failure}");
    }
    for note in results().filter_map(|r| r.unprofiled.as_ref()) {
        let _ = writeln!(text, "no profile: {note}");
    }
    for crossover in &report.crossovers {
        let Some(model) = report.models.get(crossover.model) else {
            continue;
        };
        let name = model.path.display();
        let _ = match (crossover.pixels, crossover.at_largest) {
            (Some(pixels), _) => writeln!(
                text,
                "{name} is faster than the first model from {pixels} on"
            ),
            (None, Some(Verdict::Unclear)) => writeln!(
                text,
                "which of {name} and the first model is faster at the largest size is within the spread of the runs; more --repeats may tell"
            ),
            (None, Some(_)) => writeln!(
                text,
                "{name} is slower than the first model at the largest size"
            ),
            (None, None) if report.repeats < ENOUGH => writeln!(
                text,
                "{name} and the first model: {} runs each are too few to tell which is faster; --repeats {ENOUGH} may do",
                report.repeats
            ),
            (None, None) => writeln!(
                text,
                "{name} cannot be compared with the first model at the largest size"
            ),
        };
    }
    for model in report.models.iter().filter(|m| m.untrained) {
        let _ = writeln!(
            text,
            "{} was converted without trained weights: only its speed means something",
            model.path.display()
        );
    }
    text
}

fn speedup(speedup: Speedup) -> String {
    let equal = match speedup.verdict {
        Some(Verdict::Unclear) => " (unclear)",
        _ => "",
    };
    format!("{:.2} ×{equal}", speedup.ratio)
}

fn title(model: &Path) -> String {
    let name = model.file_name().unwrap_or(model.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Where each model's time goes at the largest size that it got through: operators, or a pipeline's stages.
pub fn profiles(report: &BenchReport) -> String {
    let mut text = String::new();
    for (index, model) in report.models.iter().enumerate() {
        let largest = report.sizes.iter().rev().find_map(|size| {
            let result = size.results.get(index)?;
            result.median_ms.is_some().then_some((size.pixels, result))
        });
        let Some((pixels, result)) = largest else {
            continue;
        };
        let mut table = table(["", "calls", "ms", "share", "attention"]);
        let share = |ms: f64, all: f64| format!("{:.1} %", 100.0 * ms / all);
        if let Some(profile) = &result.profile {
            for row in &profile.operators {
                table.add_row([
                    format!("{} ({})", row.operator, row.provider),
                    row.calls.to_string(),
                    format!("{:.2}", row.ms),
                    share(row.ms, profile.total_ms),
                    share(row.attention_ms, profile.total_ms),
                ]);
            }
        } else if let (Some(all), false) = (result.median_ms, result.stages.is_empty()) {
            for row in &result.stages {
                table.add_row([
                    row.stage.clone(),
                    "1".to_owned(),
                    format!("{:.2}", row.ms),
                    share(row.ms, all),
                    "–".to_owned(),
                ]);
            }
        } else {
            continue;
        }
        align_numbers(&mut table, 1);
        let _ = writeln!(
            text,
            "{}{}, by time\n{table}",
            title(&model.path),
            pixels.map_or(String::new(), |p| format!(" at {p}"))
        );
    }
    text
}

pub fn diagnosis(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    let _ = match (&diagnosis.onnx_runtime, &diagnosis.onnx_runtime_problem) {
        (Some(found), _) => writeln!(
            text,
            "ONNX Runtime {} ({}): {}\n  providers: {}",
            found.version,
            found.origin,
            found.path.display(),
            found.providers.join(", ")
        ),
        (None, problem) => writeln!(
            text,
            "ONNX Runtime: none\n  {}",
            problem.as_deref().unwrap_or("no reason known")
        ),
    };
    // Where none loads, the reason names them all.
    let loaded = diagnosis.onnx_runtime.iter();
    let others = loaded.flat_map(|found| {
        let candidates = diagnosis.candidates.iter();
        candidates.filter(|candidate| candidate.path != found.path)
    });
    for candidate in others {
        let _ = writeln!(
            text,
            "  also looked for: {} ({})",
            candidate.path.display(),
            candidate.origin
        );
    }
    let _ = writeln!(
        text,
        "operators in this program: {}",
        diagnosis.operators_in_process
    );
    if let Some(library) = &diagnosis.operator_library {
        let state = match (&library.status, &library.problem) {
            (Some(status), _) => status.clone(),
            (None, problem) => format!("unusable: {}", problem.as_deref().unwrap_or_default()),
        };
        let _ = writeln!(text, "operator library {}: {state}", library.path.display());
    }
    let mut table = table(["a LinFusionAttention node on", "with operators", "without"]);
    for placement in &diagnosis.placements {
        table.add_row([
            &placement.place,
            &placement.with_operators,
            &placement.without_operators,
        ]);
    }
    let _ = writeln!(text, "{table}");
    text
}

fn align_numbers(table: &mut Table, from: usize) {
    for column in table.column_iter_mut().skip(from) {
        column.set_cell_alignment(CellAlignment::Right);
    }
}
