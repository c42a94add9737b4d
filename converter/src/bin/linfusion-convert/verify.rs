//! `linfusion-convert verify`.

use std::path::Path;

use linfusion_convert::analysis::METADATA_KEY;
use linfusion_convert::verify::{
    StoredWeights, Unread, Verified, Verify, VerifyError, compare_weights, converted_sites, verify,
};
use linfusion_models::checkpoint::Checkpoint;
use linfusion_models::onnx::OnnxFile;
use linfusion_models::terminal::say;

use crate::args::{ReportAs, VerifyArgs};
use crate::{Failure, data_is_there, print_bytes, print_json};

pub fn run_verify(args: &VerifyArgs) -> Result<(), Failure> {
    let file = OnnxFile::open(&args.model)?;
    let (sites, unread) = converted_sites(&file);
    let total = sites.len() + unread.len();
    let converted = file
        .model
        .metadata_props
        .iter()
        .any(|p| p.key.as_deref() == Some(METADATA_KEY));
    let name = args.model.display();
    data_is_there(&file)?;
    match (total, converted, &args.weights) {
        (0, false, _) => {
            return Err(Failure::new(
                1,
                format!(
                    "'{name}' was not converted: it holds no LinFusionAttention and no WindowAttention node"
                ),
            ));
        }
        (0, true, None) => {
            return Err(Failure::new(
                1,
                format!(
                    "'{name}' was converted with --emit standard: there is no operator left in it to check (it was verified when it was converted, unless that was off)\nhint: --weights CHECKPOINT compares its weights"
                ),
            ));
        }
        _ => {}
    }
    let weights = match &args.weights {
        Some(checkpoint) => Some(same_weights(&file, checkpoint)?),
        None => None,
    };
    let mut verified = verify(
        &file,
        &Default::default(),
        &sites,
        None,
        Verify::Auto,
        &mut |_| {},
    )
    .map_err(|error| match error {
        VerifyError::Structure(problems) => Failure::new(
            6,
            format!(
                "'{name}' is not a valid model:\n  {}\nhint: if nothing has written to it since it was converted, please report it",
                problems.join("\n  ")
            ),
        ),
        error => error.into(),
    })?;
    for Unread { module, reason } in unread {
        let line = format!("{module}: {reason}");
        verified.not_run.push(line.clone());
        verified.skipped.push(line);
    }
    if let Some(warning) = verified.unchecked() {
        say(format_args!("warning: {warning}"));
    }
    let report = VerifyReport { verified, weights };
    match args.report {
        ReportAs::Json => print_json(&report),
        ReportAs::Table => print_bytes(report.text(total).as_bytes()),
    }
}

/// What `verify` found.
#[derive(serde::Serialize)]
struct VerifyReport {
    #[serde(flatten)]
    verified: Verified,
    /// The comparison that `--weights` asks for.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<SameWeights>,
}

/// Weights that were found to be a checkpoint's.
#[derive(serde::Serialize)]
struct SameWeights {
    checkpoint: String,
    #[serde(flatten)]
    stored: StoredWeights,
}

/// Compares the weights in `file` with those of the checkpoint at `path`.
fn same_weights(file: &OnnxFile, path: &Path) -> Result<SameWeights, Failure> {
    let checkpoint = Checkpoint::open(path).map_err(|e| Failure::new(1, e))?;
    let stored = compare_weights(file, &checkpoint).map_err(|e| Failure::new(1, e))?;
    let checkpoint = checkpoint.path.display().to_string();
    if !stored.different.is_empty() {
        return Err(Failure::new(
            6,
            format!("the weights in the file are not those of {checkpoint}: {stored}"),
        ));
    }
    if stored.equal.is_empty() {
        return Err(Failure::new(
            6,
            format!(
                "nothing was compared with {checkpoint}: the {} converted sites of the file are window attention, which has no weights of a checkpoint",
                stored.without.len()
            ),
        ));
    }
    Ok(SameWeights { checkpoint, stored })
}

impl VerifyReport {
    /// For people; the file has so many converted sites.
    fn text(&self, sites: usize) -> String {
        let Self { verified, weights } = self;
        let mut text = match (sites, verified.sites) {
            (0, _) => "structure ok; no operator is left to run (--emit standard)\n".to_owned(),
            (_, 0) => format!("structure ok; 0 of {sites} sites run\n"),
            (_, run) => format!(
                "structure ok; {run} of {sites} sites run on {}, within {:.1e} of the reference\n",
                verified.engine.as_deref().unwrap_or("nothing"),
                verified.max_relative_error,
            ),
        };
        for skipped in &verified.skipped {
            text += &format!("  not run: {skipped}\n");
        }
        match weights {
            None => text += "weights not compared (--weights CHECKPOINT does)\n",
            Some(SameWeights { checkpoint, stored }) => {
                text += &format!(
                    "weights of {} sites compared with {checkpoint}: equal\n",
                    stored.equal.len()
                );
                if !stored.without.is_empty() {
                    text += &format!(
                        "  {} sites of window attention have no weights of a checkpoint\n",
                        stored.without.len()
                    );
                }
            }
        }
        text
    }
}
