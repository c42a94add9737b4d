//! The main job, shown on a trained model that nobody has published LinFusion weights for: its weights are learned from the
//! ONNX file alone, the file is converted, both are run on the same noise, and the converted one makes a terrain 64 times
//! as large in one pass.
//!
//! The model is the terrain generator that `make terrain` fetches, named by `LINFUSION_TERRAIN`; without it, a small one of
//! the same form with random weights.

mod large;
mod pictures;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::distill::{self, Attention, Mid, Progress, Refinement, Schedule, Source};
use linfusion_convert::plan::Selection;
use linfusion_models::fixtures;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::bench::work;
use linfusion_runtime::engine::{Engine, Operators};
use linfusion_runtime::table::table;
use linfusion_tests::{has_ort, request, run};

/// How the generator's own program draws its inputs: noise of deviation 80 and a difficulty of 0 to 1.
const INPUTS: &str = r#"{"noisy": {"normal": {"std": 80}}, "sigma": {"constant": 80}, "difficulty": {"uniform": {"min": 0, "max": 1}}}"#;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((name, rest)) if name == "worker" => work(rest).map_err(Into::into),
        _ => demo(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What the steps share.
struct Demo {
    folder: PathBuf,
    teacher: PathBuf,
    engine: Engine,
}

fn demo() -> Result<(), Box<dyn Error>> {
    let folder = PathBuf::from("demo-out");
    std::fs::create_dir_all(&folder)?;
    let demo = Demo {
        teacher: teacher(&folder)?,
        engine: match has_ort() {
            true => Engine::Ort,
            false => Engine::Tract,
        },
        folder,
    };
    let weights = demo.distil()?;
    let student = demo.convert(&weights)?;
    demo.compare(&student)?;
    demo.enlarge(&weights)
}

/// The trained model where it was fetched, else the committed small one.
fn teacher(folder: &Path) -> Result<PathBuf, Box<dyn Error>> {
    if let Some(named) = std::env::var_os("LINFUSION_TERRAIN").map(PathBuf::from)
        && named.is_file()
    {
        return Ok(named);
    }
    println!(
        "   (the trained model isn't there: `make terrain` fetches it; a small one with random weights takes its place)"
    );
    let path = folder.join("small.onnx");
    std::fs::write(&path, fixtures::bytes("terrain/terrain-fixed.onnx.gz")?)?;
    Ok(path)
}

impl Demo {
    fn distil(&self) -> Result<PathBuf, Box<dyn Error>> {
        let out = self.folder.join("linfusion");
        println!(
            "1. learn the weights of linear attention from {} alone",
            name(&self.teacher)
        );
        let spec = self.folder.join("inputs.json");
        std::fs::write(&spec, INPUTS)?;
        let request = distill::Request {
            model: self.teacher.clone(),
            out: out.clone(),
            source: Source::Random(spec),
            samples: 224,
            holdout: 8,
            schedule: Schedule::default(),
            mid: Mid::Auto,
            selection: Selection::default(),
            attention: Attention::Planned,
            refinement: Refinement::IfBetter,
            end_to_end: None,
            budget: None,
            plot: Some(self.folder.join("losses.svg")),
            seed: 0,
            disk_budget: 8 << 30,
            scratch: None,
            threads: None,
            overwrite: Overwrite::Force,
        };
        let last = Mutex::new(String::new());
        let report = distill::run(&request, &|progress| {
            if let (Progress::Begin { stage, .. }, Ok(mut last)) = (progress, last.lock())
                && *last != stage
            {
                eprintln!("   {stage} …");
                *last = stage;
            }
        })?;
        let before = |f: fn(&distill::Error) -> f64| {
            let sum: f64 = report.sites.iter().map(|s| f(&s.before)).sum();
            sum / report.sites.len().max(1) as f64
        };
        let mut table = table(["on 8 samples held out", "untrained", "learned"]);
        let percent = |share: f64| format!("{:.1} %", 100.0 * share);
        table.add_row([
            "energy unexplained, mean of the sites".to_owned(),
            percent(before(|e| e.relative)),
            percent(report.mean.relative),
        ]);
        table.add_row([
            "variance unexplained, mean of the sites".to_owned(),
            percent(before(|e| e.unexplained)),
            percent(report.mean.unexplained),
        ]);
        println!("{table}");
        println!(
            "   {} of {} attentions learned in {:.0} s; all converted: {} against the original's output",
            report.sites.len(),
            report.sites.len() + report.skipped.len(),
            report.seconds,
            decibel(report.end_to_end.mean_psnr_db)
        );
        Ok(out)
    }

    fn convert(&self, weights: &Path) -> Result<PathBuf, Box<dyn Error>> {
        println!("2. convert it");
        let out = self.folder.join("terrain.linfusion.onnx");
        let mut job = request(&self.teacher, &out, WeightsFrom::Path(weights.to_owned()));
        job.overwrite = Overwrite::Force;
        let report = convert(&job, &mut |_| {})?;
        let verified = report.verified.map_or(0.0, |v| v.max_relative_error);
        println!(
            "   {} attentions converted, verified within {verified:.1e} of the reference; wrote {}",
            report.converted,
            out.display()
        );
        Ok(out)
    }

    fn compare(&self, student: &Path) -> Result<(), Box<dyn Error>> {
        println!("3. run both on noise that neither has seen");
        let side = pictures::native(&self.teacher)?;
        let mut table = table(["seed", "PSNR", "largest error / range"]);
        let mut shown = Vec::new();
        for seed in [1001, 1002, 1003] {
            let inputs = pictures::noise(seed, side);
            let [a, b] = [&self.teacher, student].map(|model| {
                run(self.engine, model, Operators::InProcess, &inputs)
                    .map_err(Box::<dyn Error>::from)
                    .and_then(|outputs| pictures::heights(&outputs))
            });
            let (a, b) = (a?, b?);
            let difference = pictures::Difference::of(&a, &b);
            table.add_row([
                seed.to_string(),
                decibel(difference.psnr_db()),
                format!("{:.2e}", difference.largest()),
            ]);
            shown.push((a, b));
        }
        println!("{table}");
        let path = self.folder.join("original-converted-difference.png");
        pictures::write_rows(&shown, &path)?;
        println!(
            "   original, converted, and their difference × {}: {}",
            pictures::GAIN,
            path.display()
        );
        Ok(())
    }
}

fn name(path: &Path) -> String {
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

fn decibel(psnr: Option<f64>) -> String {
    psnr.map_or("equal".to_owned(), |p| format!("{p:.1} dB"))
}
