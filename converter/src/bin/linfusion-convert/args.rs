//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use linfusion_convert::convert::WeightsFrom;
use linfusion_convert::plan::Method;
use linfusion_convert::resize::ImageSize;
use linfusion_convert::rewrite::Emit;
use linfusion_convert::verify::Verify;
use linfusion_models::onnx::write::ExternalData;
use linfusion_ops::schema::{Border, MAX_WINDOW, Window, WindowSpec};

/// Rewrites the self-attention of a diffusion model in ONNX to LinFusion linear
/// attention. `linfusion-convert unet.onnx` writes `unet.linfusion.onnx`.
#[derive(Parser, Debug)]
#[command(name = "linfusion-convert", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, arg_required_else_help = true, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do, if not to convert.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Converting.
    #[command(flatten)]
    pub convert: ConvertArgs,
}

const EXIT_CODES: &str = "Exit codes:\n  \
    0  done\n  \
    1  an input cannot be read or the output cannot be written\n  \
    2  wrong usage\n  \
    3  no LinFusion weights were found (nothing is written)\n  \
    4  fewer sites can be converted than the model has (nothing is written; --allow-partial)\n  \
    5  the model was converted already\n  \
    6  verification failed (nothing is written), or `diff` found differences outside converted sites\n  \
    130  interrupted (SIGINT, SIGTERM or SIGHUP; nothing is written)";

/// The other commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Show every attention site, what would be done with it, and what attention costs (without a checkpoint's MLPs).
    Inspect(InspectArgs),
    /// Learn the weights of linear attention from the model itself.
    #[cfg(feature = "distill")]
    Distill(Box<crate::distill::DistillArgs>),
    /// Check a converted file: structure, and every converted site against the reference.
    Verify(VerifyArgs),
    /// Print a model in the ONNX textual form.
    Print(PrintArgs),
    /// Show what a rewrite changed, site by site.
    Diff(DiffArgs),
    /// Write a shell completion script to stdout.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write the man page to stdout.
    Man,
}

/// How to report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ReportAs {
    /// Tables for people.
    #[default]
    Table,
    /// JSON, as documented in docs/report.md.
    Json,
}

/// Which sites.
#[derive(Args, Clone, Debug, Default)]
pub struct SelectionArgs {
    /// Keep softmax at sites whose module path (or anchor name) matches; may be repeated.
    #[arg(long, value_name = "GLOB")]
    pub keep: Vec<String>,
    /// Convert only sites that match; may be repeated.
    #[arg(long, value_name = "GLOB")]
    pub only: Vec<String>,
    /// What softmax attention becomes: linear, hybrid (window and linear), window or keep;
    /// GLOB=METHOD for the sites that match. May be repeated, the last that matches counts. With distillation also auto,
    /// which tries them all [default: what the checkpoint says, else linear in UNets and hybrid in transformers].
    #[arg(long, value_name = "[GLOB=]METHOD", value_parser = attention)]
    pub attention: Vec<AttentionArg>,
    /// Rows and columns of the window in tokens, N or ROWSxCOLS [default: the checkpoint's,
    /// else 16x16].
    #[arg(long, value_name = "ROWSxCOLS", value_parser = pair, conflicts_with = "window_radius")]
    pub window: Option<[u32; 2]>,
    /// A circular window instead: keys at a distance below N tokens.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(LARGEST)))]
    pub window_radius: Option<u32>,
    /// Windows at the image's border: shifted inside (clamp, as NATTEN has it) or cut off
    /// (truncate) [default: clamp; circular windows are always cut off].
    #[arg(long, value_enum)]
    pub border: Option<BorderArg>,
    /// Rows and columns of the image in tokens, where the graph does not tell.
    #[arg(long, value_name = "ROWSxCOLS", value_parser = pair)]
    pub grid: Option<[u32; 2]>,
    /// Keep softmax at the last of every N attentions, in execution order.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_every: Option<u32>,
    /// Keep softmax at sites with fewer tokens at the native size.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: u32,
}

/// One `--attention`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionArg {
    /// The sites; all without.
    pub glob: Option<String>,
    /// What they become.
    pub method: MethodArg,
}

/// What sites become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodArg {
    /// Softmax stays.
    Keep,
    /// This.
    Fixed(Method),
    /// Whatever distillation finds cheapest among those that are good enough.
    Auto,
}

fn attention(text: &str) -> Result<AttentionArg, String> {
    let (glob, method) = match text.rsplit_once('=') {
        Some((glob, method)) => (Some(glob.to_owned()), method),
        None => (None, text),
    };
    let method = match method {
        "linear" => MethodArg::Fixed(Method::Linear),
        "hybrid" => MethodArg::Fixed(Method::Hybrid),
        "window" => MethodArg::Fixed(Method::Window),
        "keep" => MethodArg::Keep,
        "auto" if glob.is_none() => MethodArg::Auto,
        other => {
            return Err(format!(
                "'{other}' is none of linear, hybrid, window, keep; e.g. --attention hybrid or --attention 'transformer_blocks.0.*=keep'"
            ));
        }
    };
    Ok(AttentionArg { glob, method })
}

/// The largest window that the operator takes.
const LARGEST: u32 = MAX_WINDOW as u32;

/// N or ROWSxCOLS.
fn pair(text: &str) -> Result<[u32; 2], String> {
    let number = |t: &str| t.parse::<u32>().ok().filter(|n| (1..=LARGEST).contains(n));
    let (rows, cols) = text.split_once('x').unwrap_or((text, text));
    match (number(rows), number(cols)) {
        (Some(rows), Some(cols)) => Ok([rows, cols]),
        _ => Err(format!(
            "'{text}' is no size of 1 to {LARGEST}; e.g. 16 or 16x24 (rows x columns)"
        )),
    }
}

fn size(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// `--border`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BorderArg {
    /// Every window keeps its full size.
    Clamp,
    /// Keys outside the image do not exist.
    Truncate,
}

impl SelectionArgs {
    /// The window asked for, if one was.
    ///
    /// # Errors
    /// What is asked for contradicts itself.
    pub fn window_spec(&self) -> Result<Option<WindowSpec>, String> {
        let border = self.border.map(|b| match b {
            BorderArg::Clamp => Border::Clamp,
            BorderArg::Truncate => Border::Truncate,
        });
        match (self.window, self.window_radius, border) {
            (None, None, None) => Ok(None),
            (_, Some(_), Some(Border::Clamp)) => Err(
                "--border clamp: a circular window is always cut off at the border; leave it out or use --window".to_owned(),
            ),
            (_, Some(radius), _) => Ok(Some(WindowSpec {
                window: Window::Circle { radius: size(radius) },
                border: Border::Truncate,
            })),
            (window, None, border) => {
                let default = WindowSpec::default();
                Ok(Some(WindowSpec {
                    window: window.map_or(default.window, |[rows, cols]| Window::Rect {
                        rows: size(rows),
                        cols: size(cols),
                    }),
                    border: border.unwrap_or(default.border),
                }))
            }
        }
    }
}

/// Converting.
#[derive(Args, Debug)]
pub struct ConvertArgs {
    /// The model: a UNet, ControlNet or transformer in ONNX, or the folder of a pipeline with one.
    // Optional to the type, since other commands do without; clap asks for it.
    #[arg(required = true)]
    pub model: Option<PathBuf>,
    /// The file to write [default: <MODEL>.linfusion.onnx], or the folder [default: <FOLDER>.linfusion].
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// A LinFusion checkpoint (folder or .safetensors), `distill` to learn one from the model
    /// itself first, or `none` for an untrained file that only serves to measure speed
    /// [default: look beside the model and in the local Hugging Face cache].
    #[arg(long, value_name = "PATH|distill|none")]
    pub weights: Option<String>,
    /// How the operator is written.
    #[arg(long, value_enum, default_value_t)]
    pub emit: Emit,
    /// Rewrite the constants of an export that hold its image size, so that it runs at another
    /// (HEIGHTxWIDTH) or at any (dynamic). Sizes are those of the graph's image input: latent pixels,
    /// an eighth of the image's, for latent diffusion. With --attention keep nothing else is done.
    #[arg(long, value_name = "HxW|dynamic")]
    pub resize: Option<ImageSize>,
    /// Sites.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// What becomes of weights in external data files.
    #[arg(long, value_enum, default_value_t)]
    pub external_data: External,
    /// How much of the written file is verified before it gets its name.
    #[arg(long, value_enum, default_value_t)]
    pub verify: Verify,
    /// Accept that fewer sites are converted than the model has.
    #[arg(long)]
    pub allow_partial: bool,
    /// Replace an existing output.
    #[arg(long)]
    pub force: bool,
    /// Do everything but write.
    #[arg(long)]
    pub dry_run: bool,
    /// Say of every site what was found and why it is converted or kept.
    #[arg(long)]
    pub explain: bool,
    /// How to report on stdout.
    #[arg(long, value_enum, default_value_t)]
    pub report: ReportAs,
    /// Learning weights.
    // Last: the heading is that of all arguments after it.
    #[cfg(feature = "distill")]
    #[command(flatten, next_help_heading = "With --weights distill")]
    pub how: crate::distill::HowArgs,
}

/// What becomes of external data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum External {
    /// `reuse` if the output lies in the folder of the input's data file, else `copy`.
    #[default]
    Auto,
    /// Point at the input's data file; new weights go into a second one. Both are needed then.
    Reuse,
    /// Copy into one self-contained data file beside the output.
    Copy,
    /// Put all weights into the model file.
    Inline,
}

impl From<External> for ExternalData {
    fn from(e: External) -> Self {
        match e {
            External::Auto => ExternalData::Auto,
            External::Reuse => ExternalData::Reuse,
            External::Copy => ExternalData::Copy,
            External::Inline => ExternalData::Inline,
        }
    }
}

impl ConvertArgs {
    /// Where the weights come from.
    pub fn weights(&self) -> WeightsFrom {
        match self.weights.as_deref() {
            None => WeightsFrom::Search,
            Some("none") => WeightsFrom::Untrained,
            Some(path) => WeightsFrom::Path(path.into()),
        }
    }
}

/// Inspecting.
#[derive(Args, Debug)]
pub struct InspectArgs {
    /// The model.
    pub model: PathBuf,
    /// Sites.
    #[command(flatten)]
    pub selection: SelectionArgs,
    /// How to report on stdout.
    #[arg(long, value_enum, default_value_t)]
    pub report: ReportAs,
}

/// Verifying.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// A converted model.
    pub model: PathBuf,
    /// Also compare its weights, site by site, with those of this LinFusion checkpoint; others fail (exit code 6).
    #[arg(long, value_name = "PATH")]
    pub weights: Option<PathBuf>,
    /// How to report on stdout.
    #[arg(long, value_enum, default_value_t)]
    pub report: ReportAs,
}

/// Printing.
#[derive(Args, Debug)]
pub struct PrintArgs {
    /// The model.
    pub model: PathBuf,
    /// Print tensors of up to this many elements in full.
    #[arg(long, default_value_t = 8)]
    pub max_elements: usize,
    /// Print the hash of larger tensors' bytes (reads all of them).
    #[arg(long)]
    pub hash: bool,
}

/// Comparing.
#[derive(Args, Debug)]
pub struct DiffArgs {
    /// The original.
    pub before: PathBuf,
    /// The converted model.
    pub after: PathBuf,
    /// How to report on stdout.
    #[arg(long, value_enum, default_value_t)]
    pub report: ReportAs,
}
