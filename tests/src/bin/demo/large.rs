//! A terrain larger than the model was made for, in one pass.

use std::error::Error;
use std::path::{Path, PathBuf};

use linfusion_convert::convert::{WeightsFrom, convert};
use linfusion_convert::plan::MethodRule;
use linfusion_convert::resize::ImageSize;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::onnx::write::Overwrite;
use linfusion_models::shapes::{Footprint, Runner, operations};
use linfusion_runtime::bench::{
    self, EngineName, Job, Measurement, Plan, Sizes, WorkerCommand, plot,
};
use linfusion_runtime::engine::{Device, Engine, Operators, halves};
use linfusion_runtime::memory::shown;
use linfusion_runtime::subgraph::shapes;
use linfusion_runtime::table::table;
use linfusion_tests::{request, run};

use crate::{Demo, pictures};

/// Rows and columns that both run at.
const BOTH: [usize; 2] = [128, 256];
/// Rows and columns of the large one.
const SIDE: usize = 1024;

impl Demo {
    /// Both models at any size; then a terrain of [`SIDE`] rows and columns by the converted one.
    pub fn enlarge(&self, weights: &Path) -> Result<(), Box<dyn Error>> {
        println!(
            "4. let the model take any size, and make a terrain of {SIDE} × {SIDE} in one pass"
        );
        let softmax = self.resized("terrain.any-size.onnx", None)?;
        let linear = self.resized("terrain.any-size.linfusion.onnx", Some(weights))?;
        let report = bench::run(&self.plan(&[&softmax, &linear], &BOTH)?, &|_: &str| {})?;
        let mut table = table([
            "terrain",
            "softmax s",
            "linear s",
            "speed-up",
            "softmax peak",
            "linear peak",
        ]);
        let seconds = |m: &Measurement| {
            m.median_ms
                .map_or("did not fit".to_owned(), |ms| format!("{:.2}", ms / 1e3))
        };
        let peak = |m: &Measurement| m.peak_rss_bytes.map_or("?".to_owned(), shown);
        for size in &report.sizes {
            let [a, b] = &size.results[..] else {
                continue;
            };
            table.add_row([
                size.pixels.map_or("?".to_owned(), |p| p.to_string()),
                seconds(a),
                seconds(b),
                b.speedup
                    .map_or("–".to_owned(), |s| format!("{:.1} ×", s.ratio)),
                peak(a),
                peak(b),
            ]);
        }
        let large = bench::run(&self.plan(&[&linear], &[SIDE])?, &|_: &str| {})?;
        let measured = large.sizes.first().and_then(|s| s.results.first());
        let counted = counted(&softmax)?;
        // At the rate of the largest size that softmax ran at.
        let rate = report.sizes.last().and_then(|s| {
            let softmax = s.results.first()?;
            Some(softmax.expected?.operations / softmax.median_ms?)
        });
        table.add_row([
            format!("{SIDE} × {SIDE}"),
            rate.map_or("?".to_owned(), |r| {
                format!("{:.0} by arithmetic", counted.operations / r / 1e3)
            }),
            measured.map_or("?".to_owned(), seconds),
            "–".to_owned(),
            format!("{} counted", shown(counted.bytes)),
            measured.map_or("?".to_owned(), peak),
        ]);
        println!("{table}");
        let drawing = self.folder.join("time-and-memory.svg");
        plot::write(&report, &drawing)?;
        let outputs = run(
            self.engine,
            &linear,
            Operators::InProcess,
            &pictures::noise(7, SIDE),
        )?;
        let path = self.folder.join("large.png");
        pictures::write(&pictures::heights(&outputs)?, &path)?;
        println!(
            "   the terrain: {}; the measurements: {}",
            path.display(),
            drawing.display()
        );
        Ok(())
    }

    /// The model for any size, with its own attention or with the weights.
    fn resized(&self, name: &str, weights: Option<&Path>) -> Result<PathBuf, Box<dyn Error>> {
        let out = self.folder.join(name);
        let from = match weights {
            Some(weights) => WeightsFrom::Path(weights.to_owned()),
            None => WeightsFrom::Untrained,
        };
        let mut job = request(&self.teacher, &out, from);
        job.resize = Some(ImageSize::Dynamic);
        job.overwrite = Overwrite::Force;
        if weights.is_none() {
            job.selection.attention = vec![MethodRule {
                sites: None,
                method: None,
            }];
        }
        convert(&job, &mut |_| {})?;
        Ok(out)
    }

    fn plan(&self, models: &[&Path], sides: &[usize]) -> Result<Plan, Box<dyn Error>> {
        Ok(Plan {
            worker: WorkerCommand {
                program: std::env::current_exe()?,
                arguments: vec!["worker".to_owned()],
            },
            models: models.iter().map(|m| m.to_path_buf()).collect(),
            sizes: Sizes::Sides(sides.to_vec()),
            repeats: 1,
            template: Job {
                sequence: 1,
                ..Job::on(match self.engine {
                    Engine::Ort => EngineName::Ort,
                    Engine::Tract => EngineName::Tract,
                })
            },
        })
    }
}

/// What the model takes at [`SIDE`], by counting.
fn counted(model: &Path) -> Result<bench::Expected, Box<dyn Error>> {
    let file = OnnxFile::open(model)?;
    let shapes = shapes(&file, &pictures::noise(0, SIDE));
    let runner = Runner {
        kernels: true,
        halves: halves(Engine::Ort, Device::Cpu),
    };
    Ok(bench::Expected {
        operations: operations(&file.model, &shapes),
        bytes: Footprint::of(&file.model, &shapes, runner).total(),
    })
}
