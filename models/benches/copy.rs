//! Copying a model with one small change, next to the machine's own `cp` and to
//! Python's `onnx.load` + `onnx.save`, in one run: wall time and peak anonymous
//! memory.
//!
//! `cargo bench -p linfusion-models --bench copy`. Needs 20 GB of disk in the
//! temporary folder (TMPDIR). Set LINFUSION_PYTHON to an interpreter with onnx to
//! have its rows too. LINFUSION_BENCH_SCALE divides the sizes, to try it out.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use buffa::Message;
use linfusion_models::onnx::proto::{GraphProto, ModelProto};
use linfusion_models::onnx::write::{Overwrite, WriteOptions, stage};
use linfusion_models::onnx::{ElementType, OnnxFile, make};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// How often each command runs; the median counts.
const RUNS: usize = 3;
/// The environment variable that makes this program the measured one.
const CHILD: &str = "LINFUSION_BENCH_CHILD";

fn main() -> ExitCode {
    let outcome = match std::env::var_os(CHILD) {
        Some(_) => convert(),
        // `cargo test --benches` runs this as well, without `--bench`.
        None if !std::env::args().any(|a| a == "--bench") => Ok(()),
        None => compare(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// What is measured: open, change one small tensor, write.
fn convert() -> Result<()> {
    let mut paths = std::env::args().skip(1);
    let (Some(input), Some(output)) = (paths.next(), paths.next()) else {
        return Err("needs an input and an output".into());
    };
    let source = OnnxFile::open(input)?;
    let mut model = source.model.clone();
    let graph = model.graph.get_or_insert_default();
    let small = graph.initializer.last_mut().ok_or("no initializer")?;
    *small = make::tensor_f32("small", &[3], &[4.0, 5.0, 6.0]);
    let options = WriteOptions {
        overwrite: Overwrite::Force,
        ..WriteOptions::default()
    };
    let start = Instant::now();
    let staged = stage(&model, Some(&source), output.as_ref(), &options)?;
    let copied = start.elapsed();
    staged.publish()?;
    let synced = start.elapsed() - copied;
    let (copied, synced) = (copied.as_secs_f64(), synced.as_secs_f64());
    println!("    {copied:.2} s copying, {synced:.2} s waiting for the disk");
    Ok(())
}

fn compare() -> Result<()> {
    let scale: u64 = match std::env::var("LINFUSION_BENCH_SCALE") {
        Ok(scale) => scale.parse()?,
        Err(_) => 1,
    };
    let dir = tempfile::tempdir()?;
    let inline = dir.path().join("inline.onnx");
    let external = dir.path().join("external.onnx");
    let data = dir.path().join("external.onnx_data");
    generate(&inline, None, 1_700_000_000 / scale)?;
    generate(&external, Some(&data), 5_000_000_000 / scale)?;
    // What was just written must not compete with what is measured.
    Command::new("sync").status()?;

    println!("median of {RUNS} runs; memory is the peak of RssAnon");
    let mut out = Outputs {
        dir: dir.path().to_owned(),
    };
    let title = format!("{} inline", gigabytes(&[&inline])?);
    let cp = out.measure(&title, "cp", || cp_command(&[&inline], dir.path()))?;
    out.measure_against(&title, "cp, then sync", &cp, || {
        cp_sync(&inline, dir.path())
    })?;
    let ours = out.measure_against(&title, "linfusion", &cp, || {
        ours_command(&inline, dir.path())
    })?;
    verdict(ours.seconds() <= 1.3 * cp.seconds(), "at most 1.3 × cp");
    verdict(ours.peak <= 150 << 20, "at most 150 MiB");
    if let Some(command) = python(&inline, dir.path()) {
        out.measure_against(&title, "onnx.load + save", &cp, command)?;
    }

    let title = format!("{} external", gigabytes(&[&external, &data])?);
    let cp = out.measure(&title, "cp", || cp_command(&[&external, &data], dir.path()))?;
    let ours = out.measure_against(&title, "linfusion, data reused", &cp, || {
        ours_command(&external, dir.path())
    })?;
    verdict(ours.seconds() <= 1.0, "at most 1 s");
    verdict(ours.peak <= 300 << 20, "at most 300 MiB");
    if let Some(command) = python(&external, dir.path()) {
        out.measure_against(&title, "onnx.load + save", &cp, command)?;
    }
    Ok(())
}

fn verdict(is_met: bool, goal: &str) {
    println!("    {} {goal}", if is_met { "met:   " } else { "MISSED:" });
}

fn ours_command(input: &Path, dir: &Path) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.env(CHILD, "1").arg(input).arg(dir.join("out.onnx"));
    Ok(command)
}

fn cp_command(inputs: &[&Path], dir: &Path) -> Result<Command> {
    let mut command = Command::new("cp");
    let folder = dir.join("out");
    std::fs::create_dir_all(&folder)?;
    command.args(inputs).arg(folder);
    Ok(command)
}

/// `cp` does not wait for the disk; a durable write has to.
fn cp_sync(input: &Path, dir: &Path) -> Result<Command> {
    let mut command = Command::new("sh");
    let out = dir.join("out.onnx");
    command
        .args(["-c", r#"cp "$0" "$1" && sync "$1""#])
        .arg(input)
        .arg(out);
    Ok(command)
}

const PYTHON: &str = "
import sys, onnx
model = onnx.load(sys.argv[1])
model.graph.initializer[-1].raw_data = bytes(12)
onnx.save(model, sys.argv[2], save_as_external_data=sys.argv[3] == '1', location='out.onnx_data')
";

fn python(input: &Path, dir: &Path) -> Option<impl Fn() -> Result<Command>> {
    let interpreter = std::env::var_os("LINFUSION_PYTHON")?;
    let is_external = input.with_extension("onnx_data").exists();
    let (input, out) = (input.to_owned(), dir.join("out.onnx"));
    Some(move || {
        let mut command = Command::new(&interpreter);
        command.args(["-c", PYTHON]).arg(&input).arg(&out);
        command.arg(if is_external { "1" } else { "0" });
        Ok(command)
    })
}

struct Outputs {
    dir: PathBuf,
}

struct Measured {
    times: Vec<Duration>,
    peak: u64,
}

impl Measured {
    fn seconds(&self) -> f64 {
        self.times
            .get(self.times.len() / 2)
            .map_or(f64::NAN, Duration::as_secs_f64)
    }
}

impl Outputs {
    fn measure(
        &mut self,
        model: &str,
        what: &str,
        command: impl Fn() -> Result<Command>,
    ) -> Result<Measured> {
        let mut times = Vec::new();
        let mut peak = 0;
        for _ in 0..RUNS {
            self.clear()?;
            let mut command = command()?;
            let start = Instant::now();
            let mut child = command.spawn()?;
            peak = peak.max(watch(&mut child)?);
            times.push(start.elapsed());
            if !child.wait()?.success() {
                return Err(format!("{what} failed").into());
            }
        }
        self.clear()?;
        times.sort();
        let measured = Measured { times, peak };
        let (seconds, mib) = (measured.seconds(), measured.peak as f64 / 1048576.0);
        println!("{model:18} {what:24} {seconds:7.2} s {mib:8.1} MiB");
        Ok(measured)
    }

    fn measure_against(
        &mut self,
        model: &str,
        what: &str,
        cp: &Measured,
        command: impl Fn() -> Result<Command>,
    ) -> Result<Measured> {
        let measured = self.measure(model, what, command)?;
        println!("    {:.2} × cp", measured.seconds() / cp.seconds());
        Ok(measured)
    }

    /// Removes the last run's output and waits for the disk, so that every run
    /// starts from the same state.
    fn clear(&self) -> Result<()> {
        for name in ["out.onnx", "out.onnx_data"] {
            let _ = std::fs::remove_file(self.dir.join(name));
        }
        let _ = std::fs::remove_dir_all(self.dir.join("out"));
        Command::new("sync").status()?;
        Ok(())
    }
}

/// Waits for the child; its peak anonymous memory in bytes, sampled.
fn watch(child: &mut Child) -> Result<u64> {
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait()?.is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or_default() << 10);
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(peak)
}

/// Writes a model of about `size` bytes in tensors of 10 MB (the size of a large
/// projection of a UNet), with small ones between, as exporters leave them.
fn generate(path: &Path, data: Option<&Path>, size: u64) -> Result<()> {
    const TENSOR: u64 = 2560 * 1024;
    let count = (size / (4 * TENSOR)).max(1);
    let mut graph = GraphProto {
        name: Some("bench".into()),
        ..GraphProto::default()
    };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut data_file = data.map(File::create).transpose()?.map(BufWriter::new);
    let mut block = vec![0_u8; 4 * TENSOR as usize];
    random.fill(&mut block);
    for index in 0..count {
        // Different blocks, so that nothing can be shared.
        random.fill(&mut block[..4096]);
        let name = format!("block.{index}.weight");
        let mut tensor = make::tensor(&name, ElementType::F32, &[2560, 1024], Vec::new());
        match &mut data_file {
            None => tensor.raw_data = Some(block.clone().into()),
            Some(file) => {
                file.write_all(&block)?;
                tensor.raw_data = None;
                tensor.data_location = Some(1);
                let location = data.and_then(Path::file_name).and_then(|n| n.to_str());
                tensor.external_data = vec![
                    make::metadata("location", location.ok_or("no data file")?),
                    make::metadata("offset", &(index * 4 * TENSOR).to_string()),
                    make::metadata("length", &(4 * TENSOR).to_string()),
                ];
            }
        }
        graph.initializer.push(tensor);
        let bias = format!("block.{index}.bias");
        graph
            .initializer
            .push(make::tensor_f32(&bias, &[64], &[0.5; 64]));
        for op in 0..20 {
            let name = format!("/block.{index}/op.{op}/Add");
            let output = format!("{name}_output_0");
            let inputs = [bias.as_str(), bias.as_str()];
            graph
                .node
                .push(make::node("Add", &name, &inputs, &[&output], vec![]));
        }
    }
    if let Some(file) = data_file {
        file.into_inner()?;
    }
    graph
        .initializer
        .push(make::tensor_f32("small", &[3], &[1.0, 2.0, 3.0]));
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![make::opset("", 17)],
        graph: buffa::MessageField::some(graph),
        ..ModelProto::default()
    };
    std::fs::write(path, model.try_encode_to_vec()?)?;
    Ok(())
}

/// Xorshift: the data only has to be incompressible.
struct Random(u64);

impl Random {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

fn gigabytes(paths: &[&Path]) -> Result<String> {
    let mut total = 0;
    for path in paths {
        total += path.metadata()?.len();
    }
    Ok(format!("{:.2} GB", total as f64 / 1e9))
}
