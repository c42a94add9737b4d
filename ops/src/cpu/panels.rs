//! How the value columns of one head are cut into register columns and panels.
//!
//! A register column is one vector, or half a vector for a short rest, so that a head width of
//! 40 costs 2.5 vectors of 16 lanes and not 3. A panel is as many register columns as one
//! register tile holds. Panels are stored one after the other, each row-major with its own width,
//! which is the order in which the micro-kernel reads them.

/// The limits that an instruction set puts on a register tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileShape {
    /// Numbers in one vector.
    pub(super) lanes: usize,
    /// Whether half vectors are worth using.
    pub(super) half_columns: bool,
    /// Most register columns of one tile.
    pub(super) max_columns: usize,
    /// Rows of a tile, by its number of register columns.
    pub(super) rows: [usize; 6],
}

impl TileShape {
    /// Whether panels of so many whole and half vectors come up.
    pub(super) const fn has_tile(&self, full: usize, half: usize) -> bool {
        full + half <= self.max_columns && (half == 0 || self.half_columns)
    }
}

/// Consecutive register columns that one register tile covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Panel {
    /// Index of the first value column.
    pub(super) first: usize,
    /// Value columns that exist; the rest of `width` is padding.
    pub(super) columns: usize,
    /// Whole vectors.
    pub(super) full: usize,
    /// Whether half a vector follows.
    pub(super) half: bool,
    /// Numbers stored per row: whole vectors, so that loads don't straddle cache lines.
    pub(super) width: usize,
    /// Sum of the widths of the panels before this one.
    pub(super) offset: usize,
}

impl Panel {
    /// Whether the value columns fill the register columns of so many lanes.
    pub(super) fn is_exact(&self, lanes: usize) -> bool {
        self.columns == self.full * lanes + if self.half { lanes / 2 } else { 0 }
    }

    /// Register columns, a half one counted as one.
    pub(super) fn register_columns(&self) -> usize {
        self.full + usize::from(self.half)
    }
}

/// The panels of `value_dim` columns and the sum of their widths.
pub(super) fn cut(value_dim: usize, shape: TileShape) -> (Vec<Panel>, usize) {
    let rest = value_dim % shape.lanes;
    let half = shape.half_columns && rest != 0 && rest <= shape.lanes / 2;
    let full = value_dim / shape.lanes + usize::from(rest != 0 && !half);
    let columns = full + usize::from(half);
    let count = columns.div_ceil(shape.max_columns);

    let mut panels = Vec::with_capacity(count);
    let (mut first, mut offset, mut left) = (0, 0, columns);
    for index in 0..count {
        let take = left.div_ceil(count - index);
        left -= take;
        let has_half = half && left == 0;
        let full = take - usize::from(has_half);
        let covered = full * shape.lanes + if has_half { shape.lanes / 2 } else { 0 };
        let width = take * shape.lanes;
        panels.push(Panel {
            first,
            columns: covered.min(value_dim - first),
            full,
            half: has_half,
            width,
            offset,
        });
        first += covered;
        offset += width;
    }
    (panels, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    const AVX512: TileShape = TileShape {
        lanes: 16,
        half_columns: true,
        max_columns: 5,
        rows: [0, 8, 8, 8, 6, 5],
    };

    #[test]
    fn diffusion_head_widths_waste_nothing() {
        for value_dim in [8, 24, 40, 64, 72, 80, 160] {
            let (panels, _) = cut(value_dim, AVX512);
            let computed = |p: &Panel| p.full * 16 + usize::from(p.half) * 8;
            let computed: usize = panels.iter().map(computed).sum();
            assert_eq!(computed, value_dim);
        }
    }

    #[test]
    fn panels_cover_every_column_once() {
        for lanes in [4, 8, 16] {
            for half_columns in [false, true] {
                for max_columns in 1..=5 {
                    let shape = TileShape {
                        lanes,
                        half_columns,
                        max_columns,
                        rows: [0, 4, 4, 4, 4, 4],
                    };
                    for value_dim in 1..=200 {
                        let (panels, total) = cut(value_dim, shape);
                        let (mut next, mut offset) = (0, 0);
                        for p in &panels {
                            assert_eq!((p.first, p.offset), (next, offset));
                            assert!(p.columns >= 1 && p.columns <= p.width);
                            assert_eq!(p.register_columns() * lanes, p.width);
                            assert!(p.register_columns() <= max_columns);
                            next += p.columns;
                            offset += p.width;
                        }
                        assert_eq!((next, offset), (value_dim, total));
                    }
                }
            }
        }
    }
}
