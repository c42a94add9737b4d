//! `linfusion-run export-triton`.

use std::num::NonZeroU32;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use linfusion_models::terminal::say;
use linfusion_runtime::triton::{
    Existing, Exported, InstanceKind, Note, Placing, Request, TritonError, export,
};

use crate::args::{Report, byte_count};
use crate::failure::OrReport;
use crate::interruption::{self, STOPPED};

#[derive(Args)]
pub struct ExportTritonArgs {
    /// The pipeline: a folder with model_index.json, as optimum exports it
    pub pipeline: PathBuf,
    /// The model repository to write
    #[arg(short, long, value_name = "REPOSITORY")]
    pub output: PathBuf,
    /// Copy this library of operators into the repository [default: the definitions in the model run]
    #[arg(long, value_name = "FILE")]
    pub op_library: Option<PathBuf>,
    /// Where the server sees the repository, e.g. /mnt/models in KServe
    #[arg(long, value_name = "PATH", default_value = "/models", value_parser = absolute)]
    pub served_at: String,
    /// Largest batch of models whose batch is open
    #[arg(long, value_name = "N", default_value = "4", value_parser = count)]
    pub max_batch: NonZeroU32,
    /// Copies of each model that run at once
    #[arg(long, value_name = "N", default_value = "1", value_parser = count)]
    pub instances: NonZeroU32,
    /// What the server runs models on
    #[arg(long, value_enum, default_value_t = On::Auto)]
    pub device: On,
    /// Bytes of a GPU's memory for each copy of a model, e.g. 20GB [default: all]
    #[arg(long, value_name = "BYTES", value_parser = byte_count)]
    pub gpu_memory: Option<usize>,
    /// Copy the models (the default)
    #[arg(long)]
    pub copy: bool,
    /// Link to the pipeline's files by absolute path instead of copying them
    #[arg(long, conflicts_with = "copy")]
    pub link: bool,
    /// Replace a repository
    #[arg(long)]
    pub force: bool,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = Report::Table)]
    pub report: Report,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// GPUs if the server has any
    Auto,
    /// The processor
    Cpu,
    /// Every GPU of the server
    Gpu,
}

impl From<On> for InstanceKind {
    fn from(on: On) -> Self {
        match on {
            On::Auto => Self::Auto,
            On::Cpu => Self::Cpu,
            On::Gpu => Self::Gpu,
        }
    }
}

fn absolute(text: &str) -> Result<String, String> {
    match text.starts_with('/') {
        true => Ok(text.to_owned()),
        false => Err(format!("`{text}` is not absolute")),
    }
}

pub fn run(args: &ExportTritonArgs) -> miette::Result<ExitCode> {
    interruption::may_wait();
    let mut watch = |model: &str| {
        say(model);
        match interruption::is_asked_for() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    match export(&request(args), &mut watch) {
        Ok(exported) => {
            let mut notes = exported.models.iter().flat_map(|m| &m.notes);
            let copied = notes.any(|n| matches!(n, Note::Library { .. }));
            if args.op_library.is_some() && !copied {
                say(
                    "note: no model has LinFusion operators, and the library was not copied; was the pipeline converted?",
                );
            }
            crate::print_beside(
                "the repository is",
                &match args.report {
                    Report::Json => crate::output::json(&exported)?,
                    Report::Table => table(&exported),
                },
            )?;
            Ok(ExitCode::SUCCESS)
        }
        Err(stopped @ TritonError::Stopped) => {
            say(stopped);
            Ok(ExitCode::from(STOPPED))
        }
        Err(error) => Err(error).or_report(),
    }
}

/// Triton's fields are int32.
fn count(text: &str) -> Result<NonZeroU32, String> {
    let number = text.parse::<NonZeroU32>().ok();
    number
        .filter(|n| i32::try_from(n.get()).is_ok())
        .ok_or_else(|| format!("`{text}` is not 1 to {}", i32::MAX))
}

fn request(args: &ExportTritonArgs) -> Request {
    Request {
        pipeline: args.pipeline.clone(),
        repository: args.output.clone(),
        served_at: args.served_at.clone(),
        operator_library: args.op_library.clone(),
        max_batch: args.max_batch,
        instances: args.instances,
        kind: args.device.into(),
        gpu_memory: args.gpu_memory,
        placing: match args.link {
            true => Placing::Link,
            false => Placing::Copy,
        },
        existing: match args.force {
            true => Existing::Replace,
            false => Existing::Refuse,
        },
    }
}

fn table(exported: &Exported) -> String {
    let mut text = format!("wrote {}\n", exported.repository.display());
    for model in &exported.models {
        let batch = match model.max_batch_size {
            0 => String::new(),
            size => format!(", batches of up to {size}"),
        };
        text += &format!("  {}{batch}\n", model.name);
        for note in &model.notes {
            text += &format!("    {note}\n");
        }
    }
    text
}
