//! Images that come into a model packed, two by two latent pixels a token, with ids that say where each token lies (FLUX).

/// Latent pixels along an edge of a token.
pub const PACKED: usize = 2;
/// (_, row, column).
const ID_CHANNELS: usize = 3;

/// What ids are of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ids {
    /// The image's tokens.
    Image,
    /// The text's.
    Text,
}

impl Ids {
    /// FLUX's ids are `[tokens, 3]` or `[batch, tokens, 3]`, and exporters keep their names. `dims` has `None` for sizes that
    /// the graph leaves open.
    #[must_use]
    pub fn of(name: &str, dims: &[Option<usize>]) -> Option<Self> {
        let rows = matches!(dims, [.., Some(ID_CHANNELS)] if (2..=3).contains(&dims.len()));
        match rows {
            true if name.contains("img_ids") => Some(Self::Image),
            true if name.contains("txt_ids") => Some(Self::Text),
            _ => None,
        }
    }
}

/// Whose tokens the second last axis of an input counts, in a graph whose image comes in packed: those of ids by name, and of
/// `[batch, tokens, width]` by name as well, where the text has one of its own.
#[must_use]
pub fn tokens_of(name: &str, dims: &[Option<usize>]) -> Option<Ids> {
    let is_text = || {
        ["encoder", "txt", "text", "context"]
            .iter()
            .any(|part| name.contains(part))
    };
    match (Ids::of(name, dims), dims.len()) {
        (Some(ids), _) => Some(ids),
        (None, 3) if is_text() => Some(Ids::Text),
        (None, 3) => Some(Ids::Image),
        _ => None,
    }
}

/// The (_, row, column) of each pixel of an image, in raster order: `[rows · cols, 3]` in the order of their elements.
pub fn raster_ids(rows: usize, cols: usize) -> impl Iterator<Item = f64> + Clone {
    let pixels = (0..rows).flat_map(move |row| (0..cols).map(move |col| (row, col)));
    pixels.flat_map(|(row, col)| [0.0, row as f64, col as f64])
}

/// Tokens that a square of so many latent pixels a side is packed into.
#[must_use]
pub fn tokens(latent: usize) -> usize {
    (latent / PACKED).saturating_mul(latent / PACKED)
}

/// Rows and columns of the latents that so many tokens are packed from: those of [`squarest`].
#[must_use]
pub fn latents(tokens: usize) -> [usize; 2] {
    squarest(tokens).map(|side| side.saturating_mul(PACKED))
}

/// Rows and columns of the image nearest to a square that has so many tokens.
#[must_use]
pub fn squarest(tokens: usize) -> [usize; 2] {
    let mut rows = (1..=tokens.isqrt()).rev();
    let rows = rows.find(|rows| tokens.is_multiple_of(*rows)).unwrap_or(1);
    [rows, tokens / rows]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_known_by_name_and_shape() {
        let (open, three) = (None, Some(3));
        for (name, dims, expected) in [
            ("img_ids", &[open, three][..], Some(Ids::Image)),
            (
                "transformer.img_ids",
                &[open, open, three],
                Some(Ids::Image),
            ),
            ("txt_ids", &[Some(7), three], Some(Ids::Text)),
            ("img_ids", &[open, Some(2)], None),
            ("img_ids", &[three], None),
            ("img_ids", &[open, open, open, three], None),
            ("input_ids", &[open, three], None),
        ] {
            assert_eq!(Ids::of(name, dims), expected, "{name} {dims:?}");
        }
    }

    #[test]
    fn tokens_are_of_the_squarest_image() {
        assert_eq!(tokens(16), 64);
        assert_eq!(latents(24), [8, 12]);
        assert_eq!(latents(7), [2, 14]);
    }
}
