//! SentencePiece's model files (`spiece.model`), as T5's tokenizers come.

use buffa::Message;

/// The messages, generated from `proto/sentencepiece.proto`.
#[allow(missing_docs, clippy::all, clippy::undocumented_unsafe_blocks)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/sentencepiece_include.rs"));
    pub use self::sentencepiece::*;
}

/// A vocabulary with its normalization.
#[derive(Debug, Clone, PartialEq)]
pub struct SentencePiece {
    /// Pieces with the logarithms of their probabilities; a piece's place is its id.
    pub pieces: Vec<(String, f64)>,
    /// The piece that stands for what no other does.
    pub unknown: Option<usize>,
    /// The compiled table of normalizations; empty for none.
    pub charsmap: Vec<u8>,
}

/// Why a model file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SentencePieceError {
    /// The bytes are no such file.
    #[error("no SentencePiece model: {0}")]
    Damaged(String),
    /// It has no pieces.
    #[error("a SentencePiece model without pieces")]
    Empty,
}

const UNKNOWN: i32 = 2;

/// Decodes a `spiece.model`.
///
/// # Errors
/// The bytes are no SentencePiece model, or it has no pieces.
pub fn read(bytes: &[u8]) -> Result<SentencePiece, SentencePieceError> {
    let model = proto::Model::decode_from_slice(bytes)
        .map_err(|e| SentencePieceError::Damaged(e.to_string()))?;
    if model.pieces.is_empty() {
        return Err(SentencePieceError::Empty);
    }
    let unknown = model.pieces.iter().position(|p| p.r#type == Some(UNKNOWN));
    let charsmap = model
        .normalizer_spec
        .precompiled_charsmap
        .as_ref()
        .map(|map| map.to_vec())
        .unwrap_or_default();
    Ok(SentencePiece {
        pieces: model
            .pieces
            .into_iter()
            .map(|p| {
                (
                    p.piece.unwrap_or_default(),
                    f64::from(p.score.unwrap_or_default()),
                )
            })
            .collect(),
        unknown,
        charsmap,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_scores_and_the_unknown_one_are_read() {
        // Two pieces: "<unk>" of type 2, "a" with score -1.5; a table of three bytes.
        let mut bytes = vec![0x0a, 9, 0x0a, 5];
        bytes.extend(b"<unk>");
        bytes.extend([0x18, 2, 0x0a, 8, 0x0a, 1, b'a', 0x15]);
        bytes.extend((-1.5_f32).to_le_bytes());
        bytes.extend([0x1a, 5, 0x12, 3, 1, 2, 3]);
        let expected = SentencePiece {
            pieces: vec![("<unk>".to_owned(), 0.0), ("a".to_owned(), -1.5)],
            unknown: Some(0),
            charsmap: vec![1, 2, 3],
        };
        assert_eq!(read(&bytes), Ok(expected));
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(read(&[]), Err(SentencePieceError::Empty));
        let damaged = read(&[0x0a, 200, 1]);
        assert!(
            matches!(damaged, Err(SentencePieceError::Damaged(_))),
            "{damaged:?}"
        );
    }
}
