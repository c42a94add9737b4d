//! The command line.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use linfusion_runtime::bench::{EngineName, OperatorsFrom};
use linfusion_runtime::engine::{DeviceChoice, Engine, library, load_library};

use crate::bench::BenchArgs;
use crate::compare::CompareArgs;
use crate::export_triton::ExportTritonArgs;
use crate::generate::GenerateArgs;

/// Runs, compares and measures diffusion graphs, original and converted.
#[derive(Parser)]
#[command(
    name = "linfusion-run",
    version,
    after_help = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 compare: outputs are beyond --tolerance; \
                  4 doctor: no ONNX Runtime, or a broken operator library; 5 compare: models' outputs are infinite or NaN; \
                  130 interrupted, also by SIGTERM and SIGHUP.\n\
                  LINFUSION_LOG sets what is logged, e.g. `debug`."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// What is installed, and what would run where
    Doctor(DoctorArgs),
    /// Run two models, or two pipelines, on the same inputs and report how far they are apart
    Compare(Box<CompareArgs>),
    /// Time a step of several models, or an image of several pipelines, at growing resolution, with peak memory
    Bench(Box<BenchArgs>),
    /// Make images with a pipeline's folder
    Generate(Box<GenerateArgs>),
    /// Write a model repository for Triton Inference Server from a pipeline's folder
    ExportTriton(ExportTritonArgs),
    /// Write completions for a shell to standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man page to standard output
    Man,
    /// One measuring process of `bench`
    #[command(hide = true)]
    MeasureWorker {
        /// What the library that started it says
        #[arg(allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

#[derive(Args)]
pub struct DoctorArgs {
    /// Also look at this operator library
    #[arg(
        long,
        alias = "operators",
        value_name = "FILE",
        env = "LINFUSION_OPS_LIBRARY"
    )]
    pub operator_library: Option<PathBuf>,
    /// ONNX Runtime's library [default: ORT_DYLIB_PATH, else searched for]
    #[arg(long, value_name = "FILE")]
    pub ort_library: Option<PathBuf>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = Report::Table)]
    pub report: Report,
}

/// What random inputs look like.
#[derive(Args)]
pub struct Shape {
    /// Images at once, where the model leaves it open
    #[arg(long, default_value_t = 2)]
    pub batch: usize,
    /// Text tokens, where the model leaves it open
    #[arg(long, default_value_t = 77)]
    pub sequence: usize,
    /// The whole shape of an input
    #[arg(long, value_name = "INPUT=4,64,64", value_parser = named_shape)]
    pub set: Vec<(String, Vec<usize>)>,
    /// Seed of random inputs
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// What runs, and how it is reported.
#[derive(Args)]
pub struct Where {
    /// What runs the models [default: ort if a library is found, else tract]
    #[arg(long, value_enum)]
    engine: Option<EngineArg>,
    /// ONNX Runtime's library [default: ORT_DYLIB_PATH, else searched for]
    #[arg(long, value_name = "FILE")]
    pub ort_library: Option<PathBuf>,
    /// Where models run: auto, cpu, cuda or cuda:N; only auto may take another
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Bytes of the GPU's memory that ONNX Runtime may take for a model, e.g. 20GB [default: all]
    #[arg(long, value_name = "BYTES", value_parser = byte_count)]
    pub gpu_memory: Option<usize>,
    /// Where ONNX Runtime takes the LinFusion operators from: none, in-process, or a library file
    #[arg(long, alias = "op-library", value_name = "WHICH", default_value = "in-process", value_parser = operators)]
    pub operators: OperatorsFrom,
    /// Threads within an operator [default: the engine's]
    #[arg(long)]
    pub threads: Option<NonZeroUsize>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = Report::Table)]
    pub report: Report,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineArg {
    Ort,
    Tract,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Report {
    Table,
    Json,
}

impl Where {
    pub fn engine(&self) -> Engine {
        self.engine_name().into()
    }

    pub fn engine_name(&self) -> EngineName {
        match self.engine {
            Some(EngineArg::Ort) => EngineName::Ort,
            Some(EngineArg::Tract) => EngineName::Tract,
            // Who names a library wants to hear that it does not load.
            None if self.ort_library.is_some() || library::is_named() => EngineName::Ort,
            None if load_library(None).is_ok() => EngineName::Ort,
            None => EngineName::Tract,
        }
    }
}

/// `20GB`, `512MiB`, or a number of bytes.
pub fn byte_count(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "B" => 1.0,
        "MB" => 1e6,
        "GB" => 1e9,
        "MiB" => f64::from(1 << 20),
        "GiB" => f64::from(1 << 30),
        other => {
            return Err(format!(
                "`{other}` is no unit; expected B, MB, GB, MiB or GiB"
            ));
        }
    };
    match digits.parse::<f64>() {
        Ok(number) if number > 0.0 && number * unit < 1e18 => Ok((number * unit) as usize),
        _ => Err(format!("`{text}` is no number of bytes, such as 20GB")),
    }
}

fn named_shape(text: &str) -> Result<(String, Vec<usize>), String> {
    let (name, dims) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| format!("`{text}` is not INPUT=DIM,DIM,…"))?;
    let dims = dims
        .split(',')
        .filter(|dim| !dim.is_empty())
        .map(|dim| dim.parse().map_err(|_| format!("`{dim}` is no dimension")))
        .collect::<Result<_, _>>()?;
    Ok((name.to_owned(), dims))
}

fn operators(text: &str) -> Result<OperatorsFrom, String> {
    match text {
        "none" => Ok(OperatorsFrom::None),
        "in-process" => Ok(OperatorsFrom::InProcess),
        "" => Err("give none, in-process, or a library file".to_owned()),
        path => Ok(OperatorsFrom::Library(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn bytes_have_units() {
        assert_eq!(byte_count("1024"), Ok(1024));
        assert_eq!(byte_count("1.5GB"), Ok(1_500_000_000));
        assert_eq!(byte_count("2GiB"), Ok(2 << 30));
        for wrong in ["", "GB", "-1GB", "0", "3 GB", "3TB", "nanGB"] {
            assert!(byte_count(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn shapes_are_named_lists() {
        let shape = ("sample".to_owned(), vec![2, 4, 64, 64]);
        assert_eq!(named_shape("sample=2,4,64,64"), Ok(shape));
        assert_eq!(named_shape("t="), Ok(("t".to_owned(), vec![])));
        for wrong in ["sample", "=2", "x=2,y"] {
            assert!(named_shape(wrong).is_err(), "{wrong}");
        }
    }
}
