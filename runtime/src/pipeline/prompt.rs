//! Prompts to what the denoising model is conditioned on.

use ndarray::{Array2, Array3, ArrayD, Axis, concatenate};
use serde::Deserialize;

use super::error::PipelineError;
use super::folder::{Family, Folder};
use super::model::{Model, Place};
use super::tokenizer::Tokenizer;
use crate::tensor::Tensor;

/// The context of CLIP's text encoder where no file says it.
const CLIP_LENGTH: usize = 77;
/// More tokens than any text encoder takes.
const MAX_LENGTH: usize = 1 << 16;

/// Encoded texts, one row each.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// [texts, tokens, width].
    pub hidden: Array3<f32>,
    /// [texts, width]: of SD-XL's second encoder.
    pub pooled: Option<Array2<f32>>,
    /// [texts, tokens]: 1 where a token is of the text, for T5.
    pub mask: Option<Array2<i64>>,
}

/// What a prompt lost because the context is too short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Tokens of the context.
    pub length: usize,
    /// The text behind it.
    pub text: String,
}

#[derive(Deserialize)]
struct EncoderConfig {
    max_position_embeddings: Option<usize>,
}

/// Both texts of a generation.
pub struct Texts<'a> {
    /// What to show.
    pub prompts: &'a [String],
    /// What not to; `None` leaves it to the pipeline.
    pub negative: Option<&'a str>,
    /// Whether the negative side is needed at all.
    pub guided: bool,
}

/// The encoded texts of a generation.
pub struct Encoded {
    /// One row a prompt.
    pub positive: Text,
    /// As many rows; `None` without guidance.
    pub negative: Option<Text>,
    /// Ends of prompts that were cut.
    pub cuts: Vec<Cut>,
}

/// Encodes prompts with the pipeline's text encoders, loading one after the other.
///
/// # Errors
/// A tokenizer or encoder is missing, damaged or fails.
pub fn encode(folder: &Folder, place: &Place, texts: &Texts<'_>) -> Result<Encoded, PipelineError> {
    let mut all: Vec<String> = texts
        .prompts
        .iter()
        .map(|p| cleaned(folder.family, p))
        .collect();
    let zeros = folder.family == Family::StableDiffusionXl
        && folder.force_zeros_for_empty_prompt
        && texts.negative.is_none();
    let encode_negative = texts.guided && !zeros;
    if encode_negative {
        all.push(cleaned(folder.family, texts.negative.unwrap_or_default()));
    }
    let mut cuts = Vec::new();
    let whole = match folder.family {
        Family::StableDiffusion => clip(folder, place, &all, &mut cuts)?,
        Family::StableDiffusionXl => clip_pair(folder, place, &all, &mut cuts)?,
        Family::PixArt => t5(folder, place, &all, &mut cuts)?,
    };
    cuts.dedup();
    let count = texts.prompts.len();
    let positive = whole.rows(0, count);
    let negative = match (texts.guided, zeros) {
        (false, _) => None,
        (true, true) => Some(Text {
            hidden: Array3::zeros(positive.hidden.raw_dim()),
            pooled: positive.pooled.as_ref().map(|p| Array2::zeros(p.raw_dim())),
            mask: None,
        }),
        (true, false) => Some(whole.rows(count, count + 1).repeated(count)),
    };
    Ok(Encoded {
        positive,
        negative,
        cuts,
    })
}

/// PixArt was trained on captions in lower case.
fn cleaned(family: Family, text: &str) -> String {
    match family {
        Family::PixArt => text.to_lowercase().trim().to_owned(),
        _ => text.to_owned(),
    }
}

impl Text {
    fn rows(&self, first: usize, end: usize) -> Self {
        let rows = ndarray::Slice::from(first..end);
        Self {
            hidden: self.hidden.slice_axis(Axis(0), rows).to_owned(),
            pooled: self
                .pooled
                .as_ref()
                .map(|p| p.slice_axis(Axis(0), rows).to_owned()),
            mask: self
                .mask
                .as_ref()
                .map(|m| m.slice_axis(Axis(0), rows).to_owned()),
        }
    }

    /// Each row so many times, copies of one beside each other.
    pub fn repeated(&self, times: usize) -> Self {
        let rows: Vec<usize> = (0..self.hidden.shape()[0])
            .flat_map(|row| std::iter::repeat_n(row, times))
            .collect();
        Self {
            hidden: self.hidden.select(Axis(0), &rows),
            pooled: self.pooled.as_ref().map(|p| p.select(Axis(0), &rows)),
            mask: self.mask.as_ref().map(|m| m.select(Axis(0), &rows)),
        }
    }

    /// The rows of both, this one's first.
    pub fn above(&self, other: &Self) -> Self {
        fn join<T: Clone, D: ndarray::RemoveAxis>(
            a: &ndarray::Array<T, D>,
            b: &ndarray::Array<T, D>,
        ) -> ndarray::Array<T, D> {
            concatenate(Axis(0), &[a.view(), b.view()]).unwrap_or_else(|_| a.clone())
        }
        Self {
            hidden: join(&self.hidden, &other.hidden),
            pooled: self
                .pooled
                .as_ref()
                .zip(other.pooled.as_ref())
                .map(|(a, b)| join(a, b)),
            mask: self
                .mask
                .as_ref()
                .zip(other.mask.as_ref())
                .map(|(a, b)| join(a, b)),
        }
    }
}

/// Token tables of all texts, [texts, length] each.
struct Tables {
    ids: Array2<i64>,
    mask: Array2<i64>,
}

fn tables(
    folder: &Folder,
    component: &str,
    texts: &[String],
    length: Option<usize>,
    cuts: &mut Vec<Cut>,
) -> Result<Tables, PipelineError> {
    let tokenizer = Tokenizer::load(folder, component)?;
    let length = length.or(tokenizer.length).unwrap_or(CLIP_LENGTH);
    let mut ids = Array2::zeros((texts.len(), length));
    let mut mask = Array2::zeros((texts.len(), length));
    for (row, text) in texts.iter().enumerate() {
        let tokens = tokenizer.encode(text, length)?;
        for (column, (id, set)) in tokens.ids.iter().zip(&tokens.mask).enumerate() {
            ids[[row, column]] = *id;
            mask[[row, column]] = *set;
        }
        cuts.extend(tokens.cut.map(|text| Cut { length, text }));
    }
    Ok(Tables { ids, mask })
}

/// The context of a CLIP encoder: its own word before the tokenizer's.
fn context(folder: &Folder, encoder: &str) -> Result<Option<usize>, PipelineError> {
    let path = folder.component(encoder).join("config.json");
    if !path.exists() {
        return Ok(None);
    }
    let config: EncoderConfig = folder.json(encoder, "config.json")?;
    match config.max_position_embeddings {
        Some(found) if found == 0 || found > MAX_LENGTH => Err(PipelineError::Field {
            path,
            field: "max_position_embeddings",
            found: found.to_string(),
            expected: format!("1 to {MAX_LENGTH}"),
        }),
        length => Ok(length),
    }
}

fn run(
    folder: &Folder,
    place: &Place,
    encoder: &str,
    tables: &Tables,
) -> Result<super::model::Outputs, PipelineError> {
    let mut model = Model::load(folder, encoder, place)?;
    let mut inputs = Vec::new();
    for port in model.inputs() {
        let table: &Array2<i64> = match port.name.as_str() {
            "input_ids" => &tables.ids,
            "attention_mask" => &tables.mask,
            other => {
                return Err(model.ports(format!(
                    "it takes `{other}`, expected `input_ids` and `attention_mask` only"
                )));
            }
        };
        let table: ArrayD<i64> = table.clone().into_dyn();
        inputs.push((port.name.clone(), Tensor::I64(table)));
    }
    model.run(inputs)
}

fn clip(
    folder: &Folder,
    place: &Place,
    texts: &[String],
    cuts: &mut Vec<Cut>,
) -> Result<Text, PipelineError> {
    let length = context(folder, "text_encoder")?;
    let tables = tables(folder, "tokenizer", texts, length, cuts)?;
    Ok(Text {
        hidden: run(folder, place, "text_encoder", &tables)?.sequence()?,
        pooled: None,
        mask: None,
    })
}

fn clip_pair(
    folder: &Folder,
    place: &Place,
    texts: &[String],
    cuts: &mut Vec<Cut>,
) -> Result<Text, PipelineError> {
    let mut parts = Vec::new();
    let mut pooled = None;
    for (encoder, tokenizer) in [
        ("text_encoder", "tokenizer"),
        ("text_encoder_2", "tokenizer_2"),
    ] {
        let length = context(folder, encoder)?;
        let tables = tables(folder, tokenizer, texts, length, cuts)?;
        let mut outputs = run(folder, place, encoder, &tables)?;
        parts.push(outputs.penultimate_hidden_state()?);
        if encoder == "text_encoder_2" {
            pooled = Some(outputs.named("text_embeds").and_then(|table| {
                table
                    .into_dimensionality()
                    .map_err(|e| PipelineError::Ports {
                        path: folder.component(encoder),
                        problem: format!("output `text_embeds`: {e}"),
                    })
            })?);
        }
    }
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    let hidden = concatenate(Axis(2), &views).map_err(|e| PipelineError::Ports {
        path: folder.component("text_encoder_2"),
        problem: format!("its tokens don't fit those of text_encoder: {e}"),
    })?;
    Ok(Text {
        hidden,
        pooled,
        mask: None,
    })
}

fn t5(
    folder: &Folder,
    place: &Place,
    texts: &[String],
    cuts: &mut Vec<Cut>,
) -> Result<Text, PipelineError> {
    let length = folder.t5_tokens;
    let tables = tables(folder, "tokenizer", texts, Some(length), cuts)?;
    Ok(Text {
        hidden: run(folder, place, "text_encoder", &tables)?.sequence()?,
        pooled: None,
        mask: Some(tables.mask),
    })
}
