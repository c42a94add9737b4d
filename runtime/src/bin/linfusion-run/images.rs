//! What images are asked for: the arguments that `generate` and `compare` share.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use linfusion_models::onnx::write::Overwrite;
use linfusion_runtime::pipeline::Size;
use linfusion_runtime::scheduler::{self, SchedulerError};
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::failure::{usage, usage_with};

/// What to show.
#[derive(Args)]
pub struct PromptArgs {
    /// What to show
    #[arg(long)]
    prompt: Option<String>,
    /// A file with a prompt a line; the second takes the next seed, and so on
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompts: Option<PathBuf>,
}

/// How images are made.
#[derive(Args)]
pub struct SamplerArgs {
    /// Steps of the sampler
    #[arg(long, default_value_t = 30)]
    pub steps: usize,
    /// Guidance; 1 is none
    #[arg(long, default_value_t = 7.5, allow_negative_numbers = true)]
    pub guidance: f64,
    /// Size in pixels [default: that of an image to begin with, else the model's own]
    #[arg(long, value_name = "WxH", value_parser = size)]
    pub size: Option<Size>,
    /// The sampler [default: the pipeline's]
    #[arg(long, value_name = "NAME", value_parser = sampler, help = format!("The sampler: {} [default: the pipeline's]", scheduler::NAMES.join(", ")))]
    pub scheduler: Option<String>,
    /// Side of the tiles in which larger images go through the VAE, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 1024)]
    pub vae_tile: usize,
    /// Begin even if less memory is free than the estimate says
    #[arg(long)]
    pub force: bool,
    /// Replace images that are there
    #[arg(long)]
    overwrite: bool,
}

impl SamplerArgs {
    pub fn overwrite(&self) -> Overwrite {
        match self.overwrite {
            true => Overwrite::Force,
            false => Overwrite::Refuse,
        }
    }
}

pub fn size(text: &str) -> Result<Size, String> {
    let sides = text
        .split_once(['x', 'X', '×'])
        .map(|(w, h)| (w.parse(), h.parse()));
    match sides {
        Some((Ok(width), Ok(height))) => Ok(Size { width, height }),
        _ => Err(format!("`{text}` is not WIDTHxHEIGHT, such as 1024x768")),
    }
}

fn sampler(name: &str) -> Result<String, String> {
    let run = scheduler::Run {
        steps: 1,
        image_tokens: None,
        eta: 0.0,
        strength: 1.0,
    };
    match scheduler::from_config("{}", Some(name), &run) {
        Err(error @ SchedulerError::Unknown { .. }) => Err(error.to_string()),
        // What else is wrong with it is told with the pipeline's own configuration.
        _ => Ok(name.to_owned()),
    }
}

impl PromptArgs {
    pub fn are_given(&self) -> bool {
        self.prompt.is_some() || self.prompts.is_some()
    }

    /// The prompt, or those of the file, one a line.
    pub fn read(&self) -> miette::Result<Vec<String>> {
        match (&self.prompt, &self.prompts) {
            (Some(prompt), _) => match prompt.find('\0') {
                Some(at) => Err(usage(format!("--prompt: a NUL character after {at} bytes"))),
                None => Ok(vec![prompt.clone()]),
            },
            (None, Some(path)) => lines(path),
            (None, None) => Err(usage_with(
                "nothing says what the images are to show",
                "give --prompt TEXT, or --prompts FILE with a prompt a line",
            )),
        }
    }
}

fn lines(path: &Path) -> miette::Result<Vec<String>> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .into_diagnostic()
        .wrap_err_with(|| format!("reading {}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e
            .as_bytes()
            .iter()
            .take(e.utf8_error().valid_up_to())
            .filter(|b| **b == b'\n')
            .count()
            + 1;
        miette!(
            help = "save it as UTF-8",
            "{} is no UTF-8 (line {line})",
            path.display()
        )
    })?;
    // Editors of some systems begin UTF-8 with a byte order mark.
    let lines = text.trim_start_matches('\u{feff}').lines();
    let prompts: Vec<String> = lines
        .filter(|l| !l.trim().is_empty())
        .map(str::to_owned)
        .collect();
    // An image's texts end at a NUL.
    if let Some(at) = prompts.iter().find_map(|prompt| prompt.find('\0')) {
        return Err(miette!(
            "{}: a NUL character after {at} bytes of a prompt",
            path.display()
        ));
    }
    if prompts.is_empty() {
        return Err(miette!(
            "{} has no prompt: expected one a line",
            path.display()
        ));
    }
    Ok(prompts)
}

/// Where the image of each of so many prompts goes: `name-001.png` for the first of several.
pub fn prompt_outputs(path: &Path, count: usize) -> Vec<PathBuf> {
    if count == 1 {
        return vec![path.to_owned()];
    }
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let extension = path
        .extension()
        .map(|e| format!(".{}", e.to_string_lossy()))
        .unwrap_or_default();
    (1..=count)
        .map(|number| path.with_file_name(format!("{stem}-{number:03}{extension}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_width_and_height() {
        assert_eq!(
            size("1024x768"),
            Ok(Size {
                width: 1024,
                height: 768
            })
        );
        for wrong in ["1024", "x", "1024x", "ax8", "-8x8"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn samplers_are_known_by_short_names_and_classes() {
        for name in scheduler::NAMES.into_iter().chain(["DDIMScheduler"]) {
            assert_eq!(sampler(name), Ok(name.to_owned()));
        }
        for wrong in ["magic", "MagicScheduler", ""] {
            assert!(
                sampler(wrong).is_err_and(|e| e.contains("unipc")),
                "{wrong}"
            );
        }
    }
}
