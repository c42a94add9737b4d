//! What a conversion can fail of.

use linfusion_models::checkpoint::CheckpointError;
use linfusion_models::onnx::ReadError;
use linfusion_models::onnx::write::WriteError;
use linfusion_ops::body::BodyError;

use crate::mapping::Ambiguous;
use crate::patterns::UnmatchedPattern;
use crate::plan::Method;
use crate::report::ModelReport;
use crate::resize::{self, ResizeError};
use crate::rewrite::SiteError;
use crate::verify::VerifyError;

/// What is wrong with a pipeline's folder.
#[derive(Debug, thiserror::Error)]
pub enum PipelineFault {
    /// It is none.
    #[error(
        "is a folder without model_index.json\nhint: name a model file, or the folder that optimum exported"
    )]
    NoIndex,
    /// There is nothing to convert.
    #[error("has neither a folder unet nor transformer")]
    NoDenoiser,
    /// There is no model, or no single one.
    #[error("has no model.onnx and no other single ONNX file")]
    NoModel,
    /// The new folder is there.
    #[error("exists already; --force replaces it, -o names another folder")]
    Exists,
    /// The output is the pipeline itself, or in it.
    #[error(
        "is the pipeline itself or in it, and the new folder links to what is there\nhint: -o names another"
    )]
    Itself,
    /// Something that is no pipeline is in its place.
    #[error("is no pipeline's folder, and is not replaced\nhint: -o names another")]
    NoPipeline,
    /// The new folder cannot be made.
    #[error("cannot be made: {0}\nhint: -o names another folder")]
    Create(std::io::Error),
    /// Something cannot be put into it.
    #[error("cannot be written: {0}")]
    Write(std::io::Error),
}

/// Why a conversion failed. Nothing was written then.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The model cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// No weights were found.
    #[error(
        "no LinFusion weights for '{model}' (architecture: {architecture})\n\
         Linear attention with the original weights alone makes garbage images: its feature maps and projections are learned.\n\
         searched: {searched}\n\
         Four ways on:\n\
         \x20 1. linfusion-convert {model} --weights FOLDER-OR-FILE    (a LinFusion checkpoint that you have)\n\
         \x20 2. {download}\n\
         \x20 3. linfusion-convert distill {model} -o linfusion ...    (learns them from the model itself)\n\
         \x20 4. linfusion-convert {model} --weights none              (untrained: for measuring speed only)\n\
         Window attention alone needs none: --attention window"
    )]
    NoWeights {
        /// The model.
        model: String,
        /// What it is.
        architecture: String,
        /// Where was looked.
        searched: String,
        /// The command that fetches the published checkpoint.
        download: String,
    },
    /// More than one checkpoint was found.
    #[error("several LinFusion checkpoints fit '{model}': {found}; choose one with --weights")]
    ManyWeights {
        /// The model.
        model: String,
        /// The checkpoints.
        found: String,
    },
    /// The model was converted before.
    #[error("'{model}' was converted already ({how}); convert the original model instead")]
    AlreadyConverted {
        /// The model.
        model: String,
        /// What its metadata says.
        how: String,
    },
    /// Nothing, or less than expected, can be converted.
    #[error(
        "{converted} of {expected} attentions of '{model}' can be converted{}\n{reasons}",
        if *converted > 0 { "; --allow-partial accepts that" } else { "" }
    )]
    Fewer {
        /// The model.
        model: String,
        /// Sites that can be converted.
        converted: usize,
        /// Sites that should be.
        expected: usize,
        /// Reasons, a line each.
        reasons: String,
        /// The report so far.
        report: Box<ModelReport>,
    },
    /// Nothing is to be done.
    #[error(
        "--attention keep leaves '{model}' as it is\n\
         hint: with --resize HxW or --resize dynamic the model is resized and nothing else; without --attention keep it is converted"
    )]
    NothingToDo {
        /// The model.
        model: String,
    },
    /// Opset or element type are outside what the operator can be written in.
    #[error(
        "'{model}' imports opset {opset}: {source}\nhint: --emit standard works from opset 11 up"
    )]
    Opset {
        /// The model.
        model: String,
        /// Its opset.
        opset: i64,
        /// Details.
        r#source: BodyError,
    },
    /// Sites and checkpoint cannot be brought together.
    #[error(transparent)]
    Ambiguous(#[from] Ambiguous),
    /// Weights are used for what they were not learned for.
    #[error(
        "{module}: the checkpoint's weights are for {learned} attention, --attention asks for {asked}\nhint: without --attention the checkpoint decides"
    )]
    OtherAttention {
        /// The module.
        module: String,
        /// What its weights are for.
        learned: Method,
        /// What was asked for.
        asked: Method,
    },
    /// A pattern matches nothing.
    #[error(transparent)]
    Pattern(#[from] UnmatchedPattern),
    /// Sites have different element types.
    #[error(
        "'{model}' has self-attention in {found}: one function in the file has one type\nhint: --emit standard, or --only for the sites of one type"
    )]
    MixedTypes {
        /// The model.
        model: String,
        /// The types.
        found: String,
    },
    /// A site cannot be rewritten.
    #[error(transparent)]
    Site(#[from] SiteError),
    /// The new weights cannot be kept beside the output.
    #[error("'{out}' cannot be written: {source}")]
    Spill {
        /// The output.
        out: String,
        /// Why: usually the disk is full.
        r#source: std::io::Error,
    },
    /// A pipeline's folder cannot be converted as a whole.
    #[error("'{path}' {fault}")]
    Pipeline {
        /// The folder.
        path: String,
        /// What is wrong with it.
        fault: PipelineFault,
    },
    /// The model cannot be resized.
    #[error("'{model}' cannot be resized: {source}")]
    Resize {
        /// The model.
        model: String,
        /// Why.
        r#source: Box<ResizeError>,
    },
    /// The resized model does something else.
    #[error("'{model}' was resized wrongly (a bug, please report it): {source}")]
    ResizedWrong {
        /// The model.
        model: String,
        /// What was found.
        r#source: Box<resize::verify::VerifyError>,
    },
    /// The output cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The written model is wrong; it was not published.
    #[error(transparent)]
    Verify(#[from] VerifyError),
}
