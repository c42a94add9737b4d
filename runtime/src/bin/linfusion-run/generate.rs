//! `linfusion-run generate`.

use std::io::{self, IsTerminal};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use linfusion_models::terminal::say;
use linfusion_runtime::engine::{Device, memory_of};
use linfusion_runtime::image::{Rgb, check_output, read};
use linfusion_runtime::pipeline::{
    Folder, Generated, Guidance, Init, Made, Observer, PipelineError, Place, Progress, Request,
    Size, SizeHints, generate,
};
use linfusion_runtime::{memory, npz, pipeline, provenance};
use miette::{IntoDiagnostic, miette};
use ndarray::Ix4;
use serde::Serialize;

use crate::args::{Report, Where};
use crate::failure::OrReport;
use crate::images::{PromptArgs, SamplerArgs, prompt_outputs, size};
use crate::interruption::{self, STOPPED};
use crate::origin::Origin;

#[derive(Args)]
pub struct GenerateArgs {
    /// The pipeline: a folder with model_index.json, as optimum exports it
    pub pipeline: PathBuf,
    #[command(flatten)]
    pub prompts: PromptArgs,
    /// What not to show
    #[arg(long, value_name = "TEXT")]
    pub negative: Option<String>,
    /// Seed, as of PyTorch's CPU generator
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub sampler: SamplerArgs,
    /// Begin with this image
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// How much to change it: 0 to 1
    #[arg(
        long,
        default_value_t = 0.8,
        requires = "image",
        allow_negative_numbers = true
    )]
    pub strength: f64,
    /// White where --image is to be painted anew, by a model made for it
    #[arg(long, value_name = "FILE", requires = "image")]
    pub mask: Option<PathBuf>,
    /// An image for the pipeline's ControlNet
    #[arg(long, value_name = "FILE")]
    pub control_image: Option<PathBuf>,
    /// Factor on what the ControlNet adds
    #[arg(
        long,
        default_value_t = 1.0,
        requires = "control_image",
        allow_negative_numbers = true
    )]
    pub control_scale: f64,
    /// DDIM's noise: 0 for none, 1 for DDPM's
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    pub eta: f64,
    /// Images of each prompt, in one batch
    #[arg(long, default_value_t = 1, value_parser = images)]
    pub num_images: usize,
    /// Begin with these latents: standard normal, [images, channels, height/8, width/8]
    #[arg(long, value_name = "FILE.npy", conflicts_with = "image")]
    pub latents: Option<PathBuf>,
    /// Strength of each enlarging stage; the last holds for further ones
    #[arg(
        long,
        value_name = "S,…",
        value_delimiter = ',',
        default_value = "0.4,0.3,0.2,0.1",
        allow_hyphen_values = true
    )]
    pub upscale: Vec<f64>,
    /// Make a large image in one go instead of enlarging one of the model's own size
    #[arg(long)]
    pub direct: bool,
    #[command(flatten)]
    pub sizes: SizeArgs,
    /// Both sides of guidance one after the other: half the memory
    #[arg(long)]
    pub cfg_split: bool,
    /// Write the current estimate every so many steps
    #[arg(long, value_name = "STEPS")]
    pub preview: Option<NonZeroUsize>,
    /// Where the image goes: .png or .tiff
    #[arg(short, long, value_name = "OUT.png", default_value = "out.png")]
    pub output: PathBuf,
    #[command(flatten)]
    pub place: Where,
}

/// What SD-XL is told about sizes.
#[derive(Args)]
pub struct SizeArgs {
    /// SD-XL: size of the picture before it was resized [default: that of the image]
    #[arg(long, value_name = "WxH", value_parser = size)]
    original_size: Option<Size>,
    /// SD-XL: pixels cut off the top and left [default: 0,0]
    #[arg(long, value_name = "TOP,LEFT", value_parser = crop)]
    crop: Option<[usize; 2]>,
    /// SD-XL: size of the picture [default: that of the image]
    #[arg(long, value_name = "WxH", value_parser = size)]
    target_size: Option<Size>,
    /// SD-XL, on the negative side: as --original-size
    #[arg(long, value_name = "WxH", value_parser = size)]
    negative_original_size: Option<Size>,
    /// SD-XL, on the negative side: as --crop
    #[arg(long, value_name = "TOP,LEFT", value_parser = crop)]
    negative_crop: Option<[usize; 2]>,
    /// SD-XL, on the negative side: as --target-size
    #[arg(long, value_name = "WxH", value_parser = size)]
    negative_target_size: Option<Size>,
}

impl SizeArgs {
    fn hints(&self) -> SizeHints {
        let pixels = |size: Option<Size>| size.map(|s| [s.height, s.width]);
        SizeHints {
            original: pixels(self.original_size),
            crop: self.crop,
            target: pixels(self.target_size),
            negative_original: pixels(self.negative_original_size),
            negative_crop: self.negative_crop,
            negative_target: pixels(self.negative_target_size),
        }
    }
}

fn images(text: &str) -> Result<usize, String> {
    let most = pipeline::MAX_IMAGES;
    let count = text.parse().ok().filter(|n| (1..=most).contains(n));
    count.ok_or_else(|| format!("`{text}` is not 1 to {most}"))
}

fn crop(text: &str) -> Result<[usize; 2], String> {
    let sides = text.split_once(',').map(|(t, l)| (t.parse(), l.parse()));
    match sides {
        Some((Ok(top), Ok(left))) => Ok([top, left]),
        _ => Err(format!("`{text}` is not TOP,LEFT, such as 0,0")),
    }
}

/// Shows progress on the terminal, and stops after Ctrl-C.
pub struct Terminal {
    device: Device,
    bar: ProgressBar,
}

impl Terminal {
    pub fn new(device: Device) -> Self {
        interruption::may_wait();
        Self {
            device,
            bar: ProgressBar::hidden(),
        }
    }

    fn say(&self, text: &str) {
        if self.bar.is_hidden() {
            say(text);
        } else {
            self.bar.println(text);
        }
    }
}

impl Observer for Terminal {
    fn progress(&mut self, progress: Progress) {
        match progress {
            Progress::Memory(stages) => {
                let stages: Vec<String> = stages
                    .iter()
                    .map(|s| format!("{} {}", s.stage, memory::shown(s.total())))
                    .collect();
                let free = memory_of(self.device)
                    .map_or(String::new(), |free| format!("; {}", self.device.has(free)));
                say(format_args!("expected memory: {}{free}", stages.join(", ")));
            }
            Progress::Begin { stage, steps } => {
                self.bar = if io::stderr().is_terminal() {
                    ProgressBar::new(steps as u64)
                } else {
                    ProgressBar::hidden()
                };
                let style = ProgressStyle::with_template(
                    "{msg:24} {wide_bar} {pos}/{len} {elapsed} left {eta} {prefix}",
                );
                self.bar
                    .set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                self.bar.set_message(stage);
            }
            Progress::Step => {
                let taken = memory::resident().map(memory::shown);
                self.bar.set_prefix(taken.unwrap_or_default());
                self.bar.inc(1);
            }
            Progress::End { stage, seconds } => {
                self.bar.finish_and_clear();
                say(format_args!("{stage}: {seconds:.1} s"));
            }
            Progress::Note(text) => self.say(&text),
        }
    }

    fn stopped(&self) -> bool {
        interruption::is_asked_for()
    }
}

#[derive(Serialize)]
struct Summary {
    prompt: String,
    seed: u64,
    #[serde(flatten)]
    generated: Generated,
}

pub fn run(args: &GenerateArgs) -> miette::Result<ExitCode> {
    let prompts = args.prompts.read()?;
    let outputs = prompt_outputs(&args.output, prompts.len());
    // All of them, before the first is made.
    for path in outputs.iter().flat_map(|p| {
        let preview = args.preview.map(|_| pipeline::preview(p));
        pipeline::outputs(p, args.num_images).chain(preview)
    }) {
        check_output(&path, args.sampler.overwrite()).or_report()?;
    }
    let folder = Folder::open(&args.pipeline).or_report()?;
    let place = place(&args.place)?;
    let origin = Origin::of(&folder, args.sampler.scheduler.as_deref())?;
    if provenance::is_untrained(&args.pipeline) {
        say("note: the model was converted without trained weights: the images mean nothing");
    }
    let mut terminal = Terminal::new(place.options.device);
    let mut summaries = Vec::new();
    for (number, (prompt, output)) in prompts.iter().zip(outputs).enumerate() {
        let seed = args.seed.wrapping_add(number as u64);
        let request = request(args, prompt, seed, output)?;
        let metadata = |made: &Made| origin.metadata(&request, made);
        match generate(&folder, &place, &request, &metadata, &mut terminal) {
            Ok(generated) => summaries.push(Summary {
                prompt: prompt.clone(),
                seed,
                generated,
            }),
            Err(stopped @ PipelineError::Stopped { .. }) => {
                say(stopped);
                return Ok(ExitCode::from(STOPPED));
            }
            Err(error) => return Err(error).or_report(),
        }
    }
    crate::print_beside(
        "the images are",
        &match args.place.report {
            Report::Json => crate::output::json(&summaries)?,
            Report::Table => {
                let paths = summaries.iter().flat_map(|s| &s.generated.images);
                paths.map(|p| format!("{}\n", p.display())).collect()
            }
        },
    )?;
    Ok(ExitCode::SUCCESS)
}

pub fn place(place: &Where) -> miette::Result<Place> {
    Ok(Place {
        engine: place.engine(),
        options: crate::session_options(place)?,
    })
}

fn open(path: &Path) -> miette::Result<Rgb> {
    read(path).or_report()
}

fn request(
    args: &GenerateArgs,
    prompt: &str,
    seed: u64,
    output: PathBuf,
) -> miette::Result<Request> {
    let init = match (&args.image, &args.mask, &args.latents) {
        (Some(image), Some(mask), _) => Init::Inpaint {
            image: open(image)?,
            mask: open(mask)?,
            strength: args.strength,
        },
        (Some(image), None, _) => Init::Image {
            image: open(image)?,
            strength: args.strength,
        },
        (None, _, Some(path)) => {
            let array = npz::read_array(path).into_diagnostic()?;
            let shape = array.shape().to_vec();
            Init::Latents(array.into_dimensionality::<Ix4>().map_err(|_| {
                miette!("{} is {shape:?}, expected [images, channels, height, width] of the latent image", path.display())
            })?)
        }
        (None, _, None) => Init::Noise,
    };
    Ok(Request {
        prompt: prompt.to_owned(),
        negative: args.negative.clone(),
        images: args.num_images,
        seed,
        steps: args.sampler.steps,
        guidance: args.sampler.guidance,
        size: args.sampler.size,
        init,
        scheduler: args.sampler.scheduler.clone(),
        eta: args.eta,
        upscale: args.upscale.clone(),
        direct: args.direct,
        vae_tile: args.sampler.vae_tile,
        batching: if args.cfg_split {
            Guidance::Split
        } else {
            Guidance::Together
        },
        control: args.control_image.as_deref().map(open).transpose()?,
        control_scale: args.control_scale,
        sizes: args.sizes.hints(),
        output,
        overwrite: args.sampler.overwrite(),
        force: args.sampler.force,
        preview: args.preview.map(NonZeroUsize::get),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_are_top_and_left() {
        assert_eq!(crop("0,16"), Ok([0, 16]));
        for wrong in ["16", "0x16", "-1,0", ",", "1,2,3"] {
            assert!(crop(wrong).is_err(), "{wrong}");
        }
    }
}
