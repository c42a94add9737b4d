//! What an image tells of where it comes from.

use std::io;
use std::path::{Path, PathBuf};

use linfusion_runtime::image::{Metadata, Parameters};
use linfusion_runtime::pipeline::{Folder, Init, Made, Request};
use linfusion_runtime::scheduler;
use miette::{Context, IntoDiagnostic};
use sha2::{Digest, Sha256};

use crate::failure::OrReport;

/// The pipeline that makes the images.
pub struct Origin {
    name: Option<String>,
    sampler: String,
    /// The hash of each component, under the name that it has in `Hashes`.
    hashes: Vec<(String, String)>,
}

/// The names that other tools give these; text encoders, for which they have none, keep their folders'.
const MODEL: &str = "model";
const VAE: &str = "vae";

impl Origin {
    /// Reads all models of the pipeline for their hashes.
    pub fn of(folder: &Folder, scheduler: Option<&str>) -> miette::Result<Self> {
        let mut hashes = vec![
            (MODEL.to_owned(), hash(folder, folder.denoiser())?),
            (VAE.to_owned(), hash(folder, "vae_decoder")?),
        ];
        for component in ["text_encoder", "text_encoder_2", "text_encoder_3"] {
            if folder.has(component) {
                hashes.push((component.to_owned(), hash(folder, component)?));
            }
        }
        let root = folder.root();
        let real = root.canonicalize();
        let name = real.as_deref().unwrap_or(root).file_name();
        Ok(Self {
            name: name.map(|n| n.to_string_lossy().into_owned()),
            sampler: sampler(folder, scheduler)?,
            hashes,
        })
    }

    /// What an image says.
    pub fn metadata(&self, request: &Request, made: &Made) -> Metadata {
        let hash = |of: &str| {
            let found = self.hashes.iter().find(|(name, _)| name == of);
            found.map(|(_, hash)| hash.clone())
        };
        let vae = hash(VAE).map(|hash| ("VAE hash".to_owned(), hash));
        let parameters = Parameters {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative.clone().unwrap_or_default(),
            steps: request.steps,
            sampler: self.sampler.clone(),
            cfg_scale: request.guidance,
            seed: request.seed,
            width: made.size.width as u32,
            height: made.size.height as u32,
            model_hash: hash(MODEL),
            model: self.name.clone(),
            others: vae.into_iter().chain(strengths(request, made)).collect(),
            version: format!("linfusion-run {}", env!("CARGO_PKG_VERSION")),
            hashes: self.hashes.clone(),
        };
        let mut metadata = Metadata::default();
        // The key is a valid one.
        let _ = metadata.push("parameters", parameters.to_string());
        metadata
    }
}

/// First digits of the SHA-256 of a component's files, one after the other in the order of their names, but for the
/// configuration.
fn hash(folder: &Folder, component: &str) -> miette::Result<String> {
    let model = folder.model(component).or_report()?;
    let mut hasher = Sha256::new();
    let parent = model.parent().unwrap_or(Path::new("."));
    let unread = |path: &Path| format!("{} cannot be read", path.display());
    let mut files: Vec<PathBuf> = std::fs::read_dir(parent)
        .and_then(|entries| entries.map(|e| Ok(e?.path())).collect())
        .into_diagnostic()
        .wrap_err_with(|| unread(parent))?;
    files.retain(|p| p.is_file() && p.extension().is_none_or(|e| e != "json"));
    files.sort();
    for path in files {
        std::fs::File::open(&path)
            .and_then(|mut file| io::copy(&mut file, &mut Hashing(&mut hasher)))
            .into_diagnostic()
            .wrap_err_with(|| unread(&path))?;
    }
    let digest = hasher.finalize();
    Ok(digest.iter().take(5).map(|b| format!("{b:02x}")).collect())
}

struct Hashing<'a>(&'a mut Sha256);

impl io::Write for Hashing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How much an image to begin with, and enlarged ones, were changed.
fn strengths(request: &Request, made: &Made) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    if let Init::Image { strength, .. } | Init::Inpaint { strength, .. } = request.init {
        fields.push(("Denoising strength".to_owned(), strength.to_string()));
    }
    if !made.upscaled.is_empty() {
        let list: Vec<String> = made.upscaled.iter().map(f64::to_string).collect();
        fields.push(("Upscale strengths".to_owned(), list.join(" ")));
    }
    fields
}

/// The class of the sampler, or the name that was asked for.
fn sampler(folder: &Folder, asked: Option<&str>) -> miette::Result<String> {
    if let Some(asked) = asked {
        return Ok(asked.to_owned());
    }
    let fields = folder.scheduler(scheduler::config).or_report()?;
    let class = fields.get("_class_name").and_then(|name| name.as_str());
    Ok(class.unwrap_or_default().to_owned())
}
