//! The keys of a tile in blocks, each of which is read once for all groups.

use std::ops::Range;

use super::tile::Tile;
use crate::schema::{TextSide, WindowDims};

/// Keys of a block at most; at least the queries of a group, as their place serves for these too.
pub(super) const KEYS: usize = 128;

/// Neighbouring keys of a block.
pub(super) struct Segment {
    /// The first one's token.
    pub(super) token: usize,
    pub(super) count: usize,
    /// Place of the first in the block.
    pub(super) first: usize,
    /// Row and first column in the grid; `None` where every query attends to them.
    pub(super) place: Option<[usize; 2]>,
}

/// The segments of a tile, block by block.
pub(super) struct Blocks {
    segments: Vec<Segment>,
    /// Where the segments of each block begin, and the end of the last.
    starts: Vec<usize>,
}

impl Blocks {
    /// All keys that any query of the tile attends to.
    pub(super) fn of(tile: &Tile, dims: &WindowDims, text: TextSide) -> Self {
        let mut blocks = Self {
            segments: Vec::new(),
            starts: vec![0],
        };
        match &tile.reach {
            None => blocks.tokens(0..dims.tokens()),
            Some([rows, cols]) => {
                let image = dims.image_start(text);
                blocks.image(rows.clone(), cols.clone(), |row, column| {
                    image + row * dims.cols + column
                });
                let first = dims.text_start(text);
                blocks.tokens(first..first + dims.text);
            }
        }
        blocks
    }

    /// Tokens that every query attends to.
    fn tokens(&mut self, tokens: Range<usize>) {
        for token in tokens.clone().step_by(KEYS) {
            self.segments.push(Segment {
                token,
                count: KEYS.min(tokens.end - token),
                first: 0,
                place: None,
            });
            self.starts.push(self.segments.len());
        }
    }

    /// Rows and columns of the grid, in blocks of about one size.
    fn image(
        &mut self,
        rows: Range<usize>,
        cols: Range<usize>,
        token: impl Fn(usize, usize) -> usize,
    ) {
        let most = (KEYS / cols.len().max(1)).clamp(1, rows.len().max(1));
        let blocks = rows.len().div_ceil(most).max(1);
        let at_once = rows.len().div_ceil(blocks).max(1);
        for first in rows.clone().step_by(at_once) {
            for column in cols.clone().step_by(KEYS) {
                let count = KEYS.min(cols.end - column);
                for (i, row) in (first..(first + at_once).min(rows.end)).enumerate() {
                    self.segments.push(Segment {
                        token: token(row, column),
                        count,
                        first: i * count,
                        place: Some([row, column]),
                    });
                }
                self.starts.push(self.segments.len());
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.starts.len() - 1
    }

    /// The segments of a block; none beyond the last.
    pub(super) fn block(&self, number: usize) -> &[Segment] {
        match (self.starts.get(number), self.starts.get(number + 1)) {
            (Some(&start), Some(&end)) => self.segments.get(start..end).unwrap_or_default(),
            _ => &[],
        }
    }
}

/// Tokens of part `part` of `parts` of a block.
pub(super) fn share(
    block: &[Segment],
    part: usize,
    parts: usize,
) -> impl Iterator<Item = Range<usize>> {
    let keys: usize = block.iter().map(|s| s.count).sum();
    let (from, to) = (keys * part / parts, keys * (part + 1) / parts);
    block.iter().map(move |s| {
        let place = |at: usize| s.token + at.clamp(s.first, s.first + s.count) - s.first;
        place(from)..place(to)
    })
}
