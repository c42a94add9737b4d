//! The main job, shown: converts a real exported UNet with a LinFusion
//! checkpoint, checks it against the output of the official PyTorch code, and
//! times softmax against linear attention over growing resolution.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_models::fixtures;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::bench::{
    self, EngineName, Images, Job, OperatorsFrom, Plan, WorkerCommand, plot,
};
use linfusion_runtime::engine::{Device, Engine, Operators};
use linfusion_runtime::npz;
use linfusion_runtime::table::table;
use linfusion_tests::{has_ort, max_difference, request, run};

/// |error| against the official output that f32 rounding explains here: a plain
/// conversion with standard operators is 2e-6 to 7e-6 off.
const BOUND: f64 = 3e-5;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    if let (Some("worker"), Some(job)) = (arguments.next().as_deref(), arguments.next()) {
        return worker(&job);
    }
    match demo() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(6),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn worker(job: &str) -> ExitCode {
    let outcome = bench::serve(job, std::io::stdin().lock(), std::io::stdout().lock());
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn demo() -> Result<bool, Box<dyn Error>> {
    let folder = PathBuf::from("demo-out");
    std::fs::create_dir_all(&folder)?;
    let case = fixtures::path("sd15-tiny");
    let (model, out) = (case.join("unet.onnx"), folder.join("unet.linfusion.onnx"));
    println!(
        "1. convert {} with {}",
        shown(&model),
        shown(&case.join("linfusion"))
    );
    let mut job = request(&model, &out, WeightsFrom::Path(case.join("linfusion")));
    job.overwrite = Overwrite::Force;
    let report = convert(&job, &mut |_| {})?;
    println!(
        "   {}: {} self-attentions converted, {} other sites kept; wrote {}",
        report.model.architecture,
        report.converted,
        report.model.sites.len() - report.converted,
        out.display()
    );
    if let Some(v) = &report.verified {
        println!(
            "   verified before publishing: {} sites within {:.1e} of the reference",
            v.sites, v.max_relative_error
        );
    }

    println!(
        "2. compare with the output of the official PyTorch code (max |error|, bound {BOUND:.0e})"
    );
    let right = compare(&case, &model, &out)?;

    println!("3. softmax against linear attention, one UNet step at batch 2, medians");
    let engine = if has_ort() {
        Engine::Ort
    } else {
        Engine::Tract
    };
    measure(engine, &model, &out, &folder)?;
    Ok(right)
}

/// Paths in the output without this machine's folders.
fn shown(path: &Path) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let canonical = |p: &Path| p.canonicalize().unwrap_or_else(|_| p.to_owned());
    let (path, root) = (canonical(path), canonical(&root));
    path.strip_prefix(&root)
        .unwrap_or(&path)
        .display()
        .to_string()
}

fn compare(case: &Path, model: &Path, out: &Path) -> Result<bool, Box<dyn Error>> {
    let inputs = npz::read(&case.join("inputs.npz"))?;
    let expected = npz::read(&case.join("expected.npz"))?;
    let mut engines = vec![("tract, our operator", Engine::Tract, Operators::InProcess)];
    if has_ort() {
        engines.push(("ONNX Runtime, function body", Engine::Ort, Operators::None));
        engines.push((
            "ONNX Runtime, our operator",
            Engine::Ort,
            Operators::InProcess,
        ));
    } else {
        println!(
            "   (no libonnxruntime found: tract only; `make ort` fetches one, ORT_DYLIB_PATH names one)"
        );
    }
    let mut table = table([
        "engine",
        "converted vs official",
        "original vs official",
        "",
    ]);
    let mut all = true;
    for (name, engine, operators) in engines {
        let converted = max_difference(&run(engine, out, operators.clone(), &inputs)?, &expected);
        let original = max_difference(&run(engine, model, operators, &inputs)?, &expected);
        let right = converted <= BOUND;
        all &= right;
        let verdict = if right { "ok" } else { "WRONG" };
        table.add_row([
            name,
            &format!("{converted:.1e}"),
            &format!("{original:.1e} (softmax: another model)"),
            verdict,
        ]);
    }
    println!("{table}");
    Ok(all)
}

fn measure(engine: Engine, model: &Path, out: &Path, folder: &Path) -> Result<(), Box<dyn Error>> {
    let latents = match engine {
        Engine::Ort => vec![16, 32, 48, 64, 96],
        // tract is slower: the same picture at smaller sizes.
        Engine::Tract => vec![16, 32, 48, 64],
    };
    let template = Job {
        model: PathBuf::new(),
        engine: if engine == Engine::Ort {
            EngineName::Ort
        } else {
            EngineName::Tract
        },
        threads: None,
        operators: OperatorsFrom::InProcess,
        library: None,
        device: Device::Cpu,
        device_memory: None,
        latent: 0,
        batch: 2,
        sequence: 77,
        shapes: Vec::new(),
        seed: 0,
        images: Images::default(),
    };
    let worker = WorkerCommand {
        program: std::env::current_exe()?,
        arguments: vec!["worker".to_owned()],
    };
    let plan = Plan {
        worker,
        models: vec![model.to_owned(), out.to_owned()],
        latents,
        repeats: 3,
        template,
    };
    let report = bench::run(&plan, |_| {})?;
    let mut table = table([
        "image",
        "softmax ms",
        "linear ms",
        "speed-up",
        "softmax peak MB",
        "linear peak MB",
    ]);
    for size in &report.sizes {
        let [softmax, linear] = &size.results[..] else {
            continue;
        };
        let known = |v: Option<f64>, unit: &str| {
            v.map_or("did not fit".to_owned(), |v| format!("{v:.1}{unit}"))
        };
        let mega = |b: Option<u64>| b.map_or("?".to_owned(), |b| format!("{:.0}", b as f64 / 1e6));
        table.add_row([
            format!("{0} × {0}", size.pixels),
            known(softmax.median_ms, ""),
            known(linear.median_ms, ""),
            known(linear.speedup, " ×"),
            mega(softmax.peak_rss_bytes),
            mega(linear.peak_rss_bytes),
        ]);
    }
    println!("{table}");
    let picture = folder.join("step-time.svg");
    plot::write(&report, &picture)?;
    println!(
        "   measured on {engine}; widths are tiny, so small images are all overhead; plot: {}",
        picture.display()
    );
    Ok(())
}
