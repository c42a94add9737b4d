//! Prompts to tokens, as CLIP and T5 were trained on them.

use std::path::{Path, PathBuf};

use linfusion_models::sentencepiece;
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::normalizers::Precompiled;

use super::error::PipelineError;
use super::folder::{Folder, read_json, read_text};

/// The splitting rule of CLIP (Radford et al. 2021): contractions, words, single digits, runs of anything else.
const CLIP_WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
const FILES_HINT: &str =
    "a tokenizer is tokenizer.json, vocab.json with merges.txt, or spiece.model";
/// Lengths above this mean that none was set.
const NO_LENGTH: f64 = 1e6;

/// A tokenizer with the special tokens of its text encoder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    start: Option<u32>,
    end: u32,
    pad: u32,
    /// Tokens of its text encoder's context, special ones included, if its files say so.
    pub length: Option<usize>,
}

/// A text as its encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokens {
    /// As many as asked for, special and padding tokens included.
    pub ids: Vec<i64>,
    /// 1 for each token of the text, 0 for padding.
    pub mask: Vec<i64>,
    /// The end of the text that found no place.
    pub cut: Option<String>,
}

#[derive(Default, Deserialize)]
struct Config {
    tokenizer_class: Option<String>,
    bos_token: Option<Value>,
    eos_token: Option<Value>,
    unk_token: Option<Value>,
    pad_token: Option<Value>,
    model_max_length: Option<f64>,
    extra_ids: Option<usize>,
    added_tokens_decoder: Option<Value>,
}

impl Tokenizer {
    /// Reads the tokenizer of a pipeline's component.
    ///
    /// # Errors
    /// Files are missing or damaged, or lack a special token.
    pub fn load(folder: &Folder, component: &str) -> Result<Self, PipelineError> {
        let path = folder.component(component);
        let config = path.join("tokenizer_config.json");
        let mut config: Config = if config.is_file() {
            read_json(&config, FILES_HINT)?
        } else {
            Config::default()
        };
        let map = path.join("special_tokens_map.json");
        // Newer files repeat in the configuration what holds; before, the map had the last word.
        if map.is_file() && config.added_tokens_decoder.is_none() {
            let map: Config = read_json(&map, FILES_HINT)?;
            config.bos_token = map.bos_token.or(config.bos_token);
            config.eos_token = map.eos_token.or(config.eos_token);
            config.unk_token = map.unk_token.or(config.unk_token);
            config.pad_token = map.pad_token.or(config.pad_token);
        }
        let t5 = config
            .tokenizer_class
            .as_deref()
            .is_some_and(|c| c.starts_with("T5"))
            || path.join("spiece.model").is_file();
        let inner = if path.join("tokenizer.json").is_file() {
            from_json_file(&path.join("tokenizer.json"))?
        } else if t5 {
            from_sentencepiece(&path, &config)?
        } else {
            from_byte_pairs(&path, &config)?
        };
        Self::new(inner, &path, &config, t5)
    }

    fn new(
        inner: tokenizers::Tokenizer,
        path: &Path,
        config: &Config,
        t5: bool,
    ) -> Result<Self, PipelineError> {
        let id = |field: &'static str, token: &Option<Value>, usual: &str| {
            let token = content(token).unwrap_or(usual);
            inner
                .token_to_id(token)
                .ok_or_else(|| PipelineError::Tokenizer {
                    path: path.to_owned(),
                    problem: format!("its {field} `{token}` is not in the vocabulary"),
                })
        };
        let (start, end, pad) = if t5 {
            let end = id("eos_token", &config.eos_token, "</s>")?;
            (None, end, id("pad_token", &config.pad_token, "<pad>")?)
        } else {
            let start = id("bos_token", &config.bos_token, "<|startoftext|>")?;
            let end = id("eos_token", &config.eos_token, "<|endoftext|>")?;
            (
                Some(start),
                end,
                id("pad_token", &config.pad_token, "<|endoftext|>")?,
            )
        };
        let length = config
            .model_max_length
            .filter(|length| (2.0..NO_LENGTH).contains(length))
            .map(|length| length as usize);
        Ok(Self {
            inner,
            start,
            end,
            pad,
            length,
        })
    }

    /// The tokens of a text, cut or padded to `length`.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn encode(&self, text: &str, length: usize) -> Result<Tokens, PipelineError> {
        let encoding = self
            .inner
            .encode(text, false)
            .map_err(|e| PipelineError::Tokenizer {
                path: PathBuf::from("prompt"),
                problem: e.to_string(),
            })?;
        let room = length.saturating_sub(1 + usize::from(self.start.is_some()));
        let words = encoding.get_ids();
        let cut = encoding
            .get_offsets()
            .get(room)
            .and_then(|(start, _)| text.get(*start..))
            .map(|rest| rest.trim().to_owned());
        let mut ids: Vec<i64> = self.start.map(i64::from).into_iter().collect();
        ids.extend(words.iter().take(room).map(|id| i64::from(*id)));
        ids.push(i64::from(self.end));
        let mut mask = vec![1; ids.len()];
        ids.resize(length, i64::from(self.pad));
        mask.resize(length, 0);
        Ok(Tokens { ids, mask, cut })
    }
}

/// A token is written as its text, or as an object with its text in `content`.
fn content(token: &Option<Value>) -> Option<&str> {
    let token = token.as_ref()?;
    token.as_str().or_else(|| token.get("content")?.as_str())
}

fn broken(path: &Path) -> impl Fn(tokenizers::Error) -> PipelineError + '_ {
    |e| PipelineError::Tokenizer {
        path: path.to_owned(),
        problem: e.to_string(),
    }
}

fn from_json_file(path: &Path) -> Result<tokenizers::Tokenizer, PipelineError> {
    let mut tokenizer = tokenizers::Tokenizer::from_file(path).map_err(broken(path))?;
    // Length and special tokens are added here, the same way for every file.
    tokenizer.with_truncation(None).map_err(broken(path))?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// A tokenizer from the parts that `tokenizer.json` would have.
fn from_parts(path: &Path, parts: &Value) -> Result<tokenizers::Tokenizer, PipelineError> {
    tokenizers::Tokenizer::from_bytes(parts.to_string()).map_err(broken(path))
}

/// The entry of a special token, which is found before anything is normalized.
fn special(id: usize, token: &str) -> Value {
    json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    })
}

fn from_byte_pairs(folder: &Path, config: &Config) -> Result<tokenizers::Tokenizer, PipelineError> {
    let vocab: serde_json::Map<String, Value> = read_json(&folder.join("vocab.json"), FILES_HINT)?;
    let merges = read_text(&folder.join("merges.txt"), FILES_HINT)?;
    let merges: Vec<&str> = merges
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
        .collect();
    let tokens = [
        &config.bos_token,
        &config.eos_token,
        &config.unk_token,
        &config.pad_token,
    ];
    let mut added: Vec<Value> = Vec::new();
    let usual = ["<|startoftext|>", "<|endoftext|>"];
    let mut names: Vec<&str> = usual
        .into_iter()
        .chain(tokens.into_iter().filter_map(content))
        .collect();
    names.sort_unstable();
    names.dedup();
    for token in names {
        if let Some(id) = vocab.get(token).and_then(Value::as_u64) {
            added.push(special(usize::try_from(id).unwrap_or(usize::MAX), token));
        }
    }
    let unknown = content(&config.unk_token)
        .unwrap_or("<|endoftext|>")
        .to_owned();
    let parts = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": CLIP_WORDS}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    });
    from_parts(folder, &parts)
}

fn from_sentencepiece(
    folder: &Path,
    config: &Config,
) -> Result<tokenizers::Tokenizer, PipelineError> {
    let path = folder.join("spiece.model");
    let bytes = std::fs::read(&path).map_err(|source| PipelineError::Read {
        path: path.clone(),
        source,
        hint: FILES_HINT,
    })?;
    let model = sentencepiece::read(&bytes).map_err(|e| PipelineError::Tokenizer {
        path: path.clone(),
        problem: e.to_string(),
    })?;
    let mut vocab = model.pieces;
    // T5's sentinels come behind the pieces, the last first.
    let extra = config.extra_ids.unwrap_or(100);
    vocab.extend((0..extra).rev().map(|i| (format!("<extra_id_{i}>"), 0.0)));
    let unknown = model.unknown.unwrap_or(2);
    let specials: Vec<Value> = vocab
        .iter()
        .enumerate()
        .filter(|(_, (piece, _))| {
            matches!(piece.as_str(), "<pad>" | "</s>" | "<unk>") || piece.starts_with("<extra_id_")
        })
        .map(|(id, (piece, _))| special(id, piece))
        .collect();
    let parts = json!({
        "version": "1.0",
        "added_tokens": specials,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        ]},
        "model": {"type": "Unigram", "unk_id": unknown, "byte_fallback": false, "vocab": vocab},
    });
    let mut tokenizer = from_parts(&path, &parts)?;
    if !model.charsmap.is_empty() {
        let normalizer =
            Precompiled::from(&model.charsmap).map_err(|e| PipelineError::Tokenizer {
                path: path.clone(),
                problem: format!("its table of normalizations: {e}"),
            })?;
        tokenizer.with_normalizer(Some(normalizer));
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use linfusion_models::fixtures;

    use super::*;

    #[derive(Deserialize)]
    struct Row {
        text: String,
        ids: Vec<i64>,
        mask: Vec<i64>,
    }

    #[test]
    fn texts_are_cut_into_the_tokens_of_transformers() {
        let mut failures = Vec::new();
        for name in ["sd15", "sd21", "sdxl", "pixart"] {
            let root = fixtures::path(&format!("pipelines/{name}"));
            let folder = Folder::open(&root).unwrap();
            let table = std::fs::read_to_string(root.join("tokens.json")).unwrap();
            let table: BTreeMap<String, Vec<Row>> = serde_json::from_str(&table).unwrap();
            for (component, rows) in table {
                let tokenizer = Tokenizer::load(&folder, &component).unwrap();
                for row in rows {
                    let found = tokenizer.encode(&row.text, row.ids.len()).unwrap();
                    if (&found.ids, &found.mask) != (&row.ids, &row.mask) {
                        let Row { text, ids, .. } = row;
                        failures.push(format!(
                            "{name}/{component} `{text}`: {:?}, expected {ids:?}",
                            found.ids
                        ));
                    }
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn what_finds_no_place_is_quoted() {
        let folder = Folder::open(&fixtures::path("pipelines/sd15")).unwrap();
        let tokenizer = Tokenizer::load(&folder, "tokenizer").unwrap();
        assert_eq!(tokenizer.length, Some(24));
        let text = "astronaut riding a horse on mars";
        assert_eq!(tokenizer.encode(text, 24).unwrap().cut, None);
        let short = tokenizer.encode(text, 5).unwrap();
        assert_eq!(short.ids.len(), 5);
        assert_eq!(short.cut.as_deref(), Some("horse on mars"));
    }

    #[test]
    fn broken_files_are_named() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("pipeline");
        fixtures::pipeline("pixart", &path).unwrap();
        let folder = Folder::open(&path).unwrap();
        let message = || {
            Tokenizer::load(&folder, "tokenizer")
                .err()
                .unwrap()
                .to_string()
        };
        std::fs::write(path.join("tokenizer/spiece.model"), [0x0a, 200, 1]).unwrap();
        assert!(message().contains("spiece.model"), "{}", message());
        std::fs::write(path.join("tokenizer/tokenizer.json"), "{}").unwrap();
        assert!(message().contains("tokenizer.json"), "{}", message());
        std::fs::write(path.join("tokenizer/tokenizer_config.json"), "{").unwrap();
        assert!(message().contains("tokenizer_config.json"), "{}", message());
    }
}
