//! Ctrl-C: what it leaves, what it says, and how the program ends.

mod support;

use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use linfusion_models::fixtures;
use linfusion_models::fixtures::signals::{
    end_of, handles_hangups, handles_interrupts, hangups_are_ignored, ignores_hangups, interrupt,
    library_with_destructor, wait_until,
};
use linfusion_runtime::image::read;
use support::Bench;

/// A program and what it says, line by line.
struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStderr>>,
}

impl Running {
    fn new(command: &mut Command) -> Self {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, lines }
    }

    /// Reads up to a line that begins so.
    fn until(&mut self, begin: &str) {
        let mut lines = self.lines.by_ref().map_while(Result::ok);
        assert!(
            lines.any(|line| line.starts_with(begin)),
            "no line begins with {begin}"
        );
    }

    /// Its exit code, and the lines that are left.
    fn end(mut self) -> (Option<i32>, Vec<String>) {
        let rest = self.lines.map_while(Result::ok).collect();
        (end_of(&mut self.child).code(), rest)
    }
}

/// But for `.ses`, a file that ONNX Runtime leaves where temporary files go.
fn is_empty(folder: &Path) -> bool {
    let mut entries = folder.read_dir().unwrap().flatten();
    entries.all(|entry| entry.file_name() == ".ses")
}

/// SIGINT after the first stage leaves its image and says where, and never replaces one that was there.
#[test]
fn a_stopped_run_leaves_the_last_finished_stage() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let mine = bench.path("out-192x96.png");
    std::fs::write(&mine, "mine").unwrap();
    let arguments = ["--prompt", "x", "--size", "384x192", "--steps", "900"];
    let more = ["--scheduler", "ddim", "--upscale", "0.9", "-o", "out.png"];
    let mut running = Running::new(&mut bench.command(&[arguments, more].concat()));
    running.until("encode");
    interrupt(&running.child);
    let (code, rest) = running.end();
    assert_eq!(code, Some(130), "{rest:?}");
    let last = rest.last().unwrap();
    let kept = last.rsplit_once(" in ").unwrap().1.trim();
    assert!(
        kept.starts_with("out-") && kept.ends_with(".png"),
        "{rest:?}"
    );
    let image = read(&bench.path(kept)).unwrap();
    let bytes = std::fs::read(bench.path(kept)).unwrap();
    let size = format!("Size: {}x{}", image.width(), image.height());
    assert!(String::from_utf8_lossy(&bytes).contains(&size), "{size}");
    assert!(image.width() < 384, "{rest:?}");
    assert_eq!(std::fs::read_to_string(&mine).unwrap(), "mine");
    assert!(!bench.path("out.png").exists());
}

/// In the middle of a step, one of which takes seconds here; with what was to be compared lying in a temporary folder.
#[test]
fn a_second_interruption_runs_no_destructors_and_leaves_nothing() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let library = library_with_destructor(bench.scratch.path());
    let temporary = bench.path("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let large = ["--prompt", "x", "--size", "1024x1024", "--force"];
    let mut generate = bench.command(&large);
    generate.arg("--direct");
    let mut compare = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
    // Stages of the small size take long enough.
    compare
        .arg("compare")
        .args([&bench.pipeline, &bench.pipeline])
        .args(["--engine", "ort", "--device", "cpu", "--prompt", "x"])
        .args(["--steps", "900", "--scheduler", "ddim"])
        .current_dir(bench.scratch.path());
    for command in [&mut generate, &mut compare] {
        command
            .env("LD_PRELOAD", &library)
            .env("TMPDIR", &temporary);
        let mut running = Running::new(command);
        running.until("text");
        interrupt(&running.child);
        running.until("stopping after this step");
        interrupt(&running.child);
        let (code, rest) = running.end();
        assert_eq!(code, Some(130), "{rest:?}");
        assert!(is_empty(&temporary));
    }
}

#[test]
fn bench_ends_its_workers_and_leaves_nothing() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let temporary = bench.path("temporary");
    std::fs::create_dir(&temporary).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
    command
        .args([
            "bench",
            "--engine",
            "ort",
            "--sizes",
            "128",
            "--repeats",
            "100000",
        ])
        .arg(&bench.pipeline)
        .env("TMPDIR", &temporary);
    let running = Running::new(&mut command);
    // Where the worker's images go.
    wait_until("a worker's folder", || !is_empty(&temporary));
    interrupt(&running.child);
    let (code, rest) = running.end();
    let [stopping, nothing] = rest.as_slice() else {
        panic!("{rest:?}");
    };
    assert_eq!(code, Some(130));
    assert!(stopping.starts_with("stopping;"), "{rest:?}");
    assert_eq!(nothing, "stopped at 128 × 128; nothing is measured");
    assert!(is_empty(&temporary));
}

/// What was measured before is reported and written.
#[test]
fn an_interrupted_bench_reports_the_sizes_it_finished() {
    let Some(bench) = Bench::new("sd15") else {
        return;
    };
    let (report, plot) = (bench.path("bench.json"), bench.path("bench.svg"));
    let model = fixtures::path("sd15-tiny/unet.onnx");
    let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
    command
        .args(["bench", "--engine", "ort", "--batch", "1", "--threads", "1"])
        // So many runs of the second size take minutes.
        .args(["--sizes", "64,512", "--repeats", "1000"])
        .arg("--json")
        .arg(&report)
        .arg("--plot")
        .arg(&plot)
        .arg(&model)
        .stdout(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let worker = |side: &str| {
        let workers = children_of(&child);
        workers
            .iter()
            .any(|job| job.contains(&format!("\"side\":{side},")))
    };
    wait_until("the second size", || worker("512"));
    interrupt(&child);
    assert_eq!(end_of(&mut child).code(), Some(130));
    let output = child.wait_with_output().unwrap();
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("64 × 64") && !table.contains("512"),
        "{table}"
    );
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        said.contains("stopped at 512 × 512, which is not"),
        "{said}"
    );
    let written: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(&report).unwrap()).unwrap();
    assert_eq!(written["sizes"].as_array().unwrap().len(), 1);
    assert_eq!(written["stopped_at"], "512 × 512");
    assert!(plot.exists());
}

/// The command lines of a process's children.
fn children_of(child: &Child) -> Vec<String> {
    let tasks = format!("/proc/{0}/task/{0}/children", child.id());
    let pids = std::fs::read_to_string(tasks).unwrap_or_default();
    let lines = pids.split_whitespace().map(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).into_owned()
    });
    lines.collect()
}

#[test]
fn nohup_is_respected() {
    let Some(_) = Bench::new("sd15") else {
        return;
    };
    let model = fixtures::path("sd15-tiny/unet.onnx");
    let run = "exec \"$0\" compare --engine ort --latent 192 \"$1\" \"$1\"";
    // A shell cannot take back what was ignored when it began.
    for (before, ignored) in [("", hangups_are_ignored()), ("trap '' HUP; ", true)] {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{before}{run}")])
            .arg(env!("CARGO_BIN_EXE_linfusion-run"))
            .arg(&model);
        let running = Running::new(&mut command);
        // The shell that it was a moment ago has handlers of its own.
        let program = std::fs::canonicalize(env!("CARGO_BIN_EXE_linfusion-run")).unwrap();
        let runs = format!("/proc/{}/exe", running.child.id());
        wait_until("the program", || {
            std::fs::read_link(&runs).is_ok_and(|exe| exe == program)
        });
        wait_until("a handler", || handles_interrupts(&running.child));
        assert_eq!(handles_hangups(&running.child), !ignored, "{before}");
        assert_eq!(ignores_hangups(&running.child), ignored, "{before}");
        interrupt(&running.child);
        assert_eq!(running.end().0, Some(130));
    }
}

#[test]
fn a_comparison_of_models_ends_at_once() {
    let Some(_) = Bench::new("sd15") else {
        return;
    };
    let model = fixtures::path("sd15-tiny/unet.onnx");
    let mut command = Command::new(env!("CARGO_BIN_EXE_linfusion-run"));
    command
        .args(["compare", "--engine", "ort", "--latent", "192"])
        .args([&model, &model]);
    let running = Running::new(&mut command);
    wait_until("a handler", || handles_interrupts(&running.child));
    interrupt(&running.child);
    let (code, rest) = running.end();
    assert_eq!((code, rest.as_slice()), (Some(130), &[][..]));
}
