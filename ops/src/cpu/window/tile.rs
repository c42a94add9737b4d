//! A tile of queries: its groups, and which keys each reaches.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over lanes; iterators hide that they run together"
)]

use std::ops::Range;

use crate::schema::{GridAxis, Window, WindowAttentionAttrs, WindowDims};

/// Queries of a group: a row of scores, one number for each.
pub(super) const QUERIES: usize = 16;
/// Rows and columns of the image queries of a tile, whose groups share keys that were read once.
const TILE: usize = 16;
/// Groups of a tile.
const GROUPS: usize = 16;

/// The queries of one task, and the keys that any of them may reach.
pub(in super::super) struct Tile {
    pub(super) groups: Vec<Group>,
    /// Rows and columns of the grid, besides which there is the text; `None` for text queries,
    /// which attend to all tokens.
    pub(super) reach: Option<[Range<usize>; 2]>,
}

/// [`QUERIES`] queries close to each other; some are repeated where there are fewer.
pub(super) struct Group {
    pub(super) tokens: [usize; QUERIES],
    /// Places in the grid.
    rows: [i32; QUERIES],
    cols: [i32; QUERIES],
    /// First and last row and column of the bounding boxes of their windows.
    first_row: [i32; QUERIES],
    last_row: [i32; QUERIES],
    first_col: [i32; QUERIES],
    last_col: [i32; QUERIES],
    /// All rows of these.
    pub(super) all_rows: Range<usize>,
}

/// The keys of one row of the grid that a group reaches.
pub(super) struct RowReach {
    /// First and last column of each query; the first is beyond the last where there is none.
    pub(super) first: [i32; QUERIES],
    pub(super) last: [i32; QUERIES],
    /// Columns that any query reaches.
    pub(super) any: Range<usize>,
    /// Columns that all queries reach.
    pub(super) all: Range<usize>,
}

impl RowReach {
    /// Columns that every query of a group reaches.
    pub(super) fn whole(cols: Range<usize>) -> Self {
        Self {
            first: [0; QUERIES],
            last: [i32::MAX; QUERIES],
            any: cols.clone(),
            all: cols,
        }
    }
}

/// A row or column of queries, and the first and last of the bounding box of its windows.
#[derive(Clone, Copy)]
struct Ends {
    at: i32,
    first: i32,
    last: i32,
}

/// A call's tiles.
pub(super) struct Tiles<'a> {
    dims: &'a WindowDims,
    attrs: &'a WindowAttentionAttrs,
    /// Rows and columns of a group.
    group: [usize; 2],
    /// Rows and columns of a tile.
    tile: [usize; 2],
    /// Of a circle: how far a row reaches to each side, by its distance.
    pub(super) halves: Vec<i32>,
}

impl<'a> Tiles<'a> {
    pub(super) fn new(dims: &'a WindowDims, attrs: &'a WindowAttentionAttrs) -> Self {
        let group = group_shape(dims, attrs);
        let halves = match attrs.window {
            Window::Rect { .. } => vec![],
            // Rows beyond the image don't exist.
            Window::Circle { radius } => (0..radius.min(dims.rows))
                .map(|dy| (radius * radius - 1 - dy * dy).isqrt() as i32)
                .collect(),
        };
        let sides = [dims.rows, dims.cols];
        // Whole groups: as square as they allow.
        let rows = TILE.max(group[0]).min(sides[0].next_multiple_of(group[0]));
        let cols = (TILE * TILE / rows).max(group[1]);
        let cols = cols.min(sides[1].next_multiple_of(group[1]));
        let most = GROUPS * QUERIES / rows / group[1] * group[1];
        Self {
            dims,
            attrs,
            group,
            tile: [rows, cols.min(most.max(group[1]))],
            halves,
        }
    }

    fn across(&self) -> usize {
        self.dims.cols.div_ceil(self.tile[1])
    }

    fn of_image(&self) -> usize {
        self.dims.rows.div_ceil(self.tile[0]) * self.across()
    }

    /// Number of tiles.
    pub(super) fn count(&self) -> usize {
        self.of_image() + self.dims.text.div_ceil(GROUPS * QUERIES)
    }

    /// Groups of a tile at most.
    pub(super) fn most_groups(&self) -> usize {
        let [rows, cols] = [0, 1].map(|i| self.tile[i] / self.group[i]);
        let text = self.dims.text.div_ceil(QUERIES).min(GROUPS);
        (rows * cols).max(text)
    }

    /// A tile by its number.
    pub(super) fn tile(&self, number: usize) -> Tile {
        match number.checked_sub(self.of_image()) {
            Some(number) => self.text_tile(number),
            None => self.image_tile(number / self.across(), number % self.across()),
        }
    }

    fn image_tile(&self, row: usize, column: usize) -> Tile {
        let range = |axis: usize, number: usize, size: usize| {
            number * self.tile[axis]..((number + 1) * self.tile[axis]).min(size)
        };
        let rows = range(0, row, self.dims.rows);
        let cols = range(1, column, self.dims.cols);
        let ends = |axis, range: &Range<usize>, size| -> Vec<Ends> {
            let ends = |at| {
                let reach = self.attrs.key_range(axis, at, size);
                Ends {
                    at: at as i32,
                    first: reach.start as i32,
                    last: reach.end as i32 - 1,
                }
            };
            range.clone().map(ends).collect()
        };
        let row_ends = ends(GridAxis::Rows, &rows, self.dims.rows);
        let col_ends = ends(GridAxis::Cols, &cols, self.dims.cols);
        let mut groups = Vec::new();
        for row_ends in row_ends.chunks(self.group[0]) {
            for col_ends in col_ends.chunks(self.group[1]) {
                groups.push(self.group(row_ends, col_ends));
            }
        }
        let union = |axis, range: &Range<usize>, size| {
            let first = self.attrs.key_range(axis, range.start, size).start;
            first..self.attrs.key_range(axis, range.end - 1, size).end
        };
        Tile {
            groups,
            reach: Some([
                union(GridAxis::Rows, &rows, self.dims.rows),
                union(GridAxis::Cols, &cols, self.dims.cols),
            ]),
        }
    }

    fn group(&self, rows: &[Ends], cols: &[Ends]) -> Group {
        let image = self.dims.image_start(self.attrs.text);
        let row = |lane: usize| rows[(lane / self.group[1]).min(rows.len() - 1)];
        let col = |lane: usize| cols[(lane % self.group[1]).min(cols.len() - 1)];
        let token = |lane| image + row(lane).at as usize * self.dims.cols + col(lane).at as usize;
        Group {
            tokens: std::array::from_fn(token),
            rows: std::array::from_fn(|lane| row(lane).at),
            cols: std::array::from_fn(|lane| col(lane).at),
            first_row: std::array::from_fn(|lane| row(lane).first),
            last_row: std::array::from_fn(|lane| row(lane).last),
            first_col: std::array::from_fn(|lane| col(lane).first),
            last_col: std::array::from_fn(|lane| col(lane).last),
            all_rows: row(0).first as usize..row(QUERIES - 1).last as usize + 1,
        }
    }

    fn text_tile(&self, number: usize) -> Tile {
        let start = self.dims.text_start(self.attrs.text);
        let first = number * GROUPS * QUERIES;
        let end = (first + GROUPS * QUERIES).min(self.dims.text);
        let none = [0; QUERIES];
        let group = |first: usize| Group {
            tokens: std::array::from_fn(|lane| start + (first + lane).min(end - 1)),
            rows: none,
            cols: none,
            first_row: none,
            last_row: none,
            first_col: none,
            last_col: none,
            all_rows: 0..0,
        };
        Tile {
            groups: (first..end).step_by(QUERIES).map(group).collect(),
            reach: None,
        }
    }
}

/// Rows and columns of a group that meets the fewest keys, those of repeated queries counted.
fn group_shape(dims: &WindowDims, attrs: &WindowAttentionAttrs) -> [usize; 2] {
    // All windows of a rectangle are of one size but for truncated ones; those are smaller.
    let side = |axis| match (attrs.window, axis) {
        (Window::Rect { rows, .. }, GridAxis::Rows) => rows,
        (Window::Rect { cols, .. }, GridAxis::Cols) => cols,
        (Window::Circle { radius }, _) => 2 * radius - 1,
    };
    let along =
        |axis, size: usize, group: usize| size.div_ceil(group) * (side(axis) + group - 1).min(size);
    let cost = |[rows, cols]: [usize; 2]| {
        along(GridAxis::Rows, dims.rows, rows) as f64
            * along(GridAxis::Cols, dims.cols, cols) as f64
    };
    [[4, 4], [2, 8], [1, 16], [8, 2], [16, 1]]
        .into_iter()
        .min_by(|a, b| cost(*a).total_cmp(&cost(*b)))
        .unwrap_or([4, 4])
}

impl Group {
    /// Which keys of a row of the grid the queries reach.
    #[inline(always)]
    pub(super) fn reach(&self, row: usize, halves: &[i32]) -> RowReach {
        let row = row as i32;
        let mut first = self.first_col;
        let mut last = self.last_col;
        if !halves.is_empty() {
            for lane in 0..QUERIES {
                let half = halves.get(self.rows[lane].abs_diff(row) as usize);
                // A row farther away is outside of the box, too.
                let half = half.copied().unwrap_or(0);
                first[lane] = first[lane].max(self.cols[lane] - half);
                last[lane] = last[lane].min(self.cols[lane] + half);
            }
        }
        for lane in 0..QUERIES {
            let inside = row >= self.first_row[lane] && row <= self.last_row[lane];
            first[lane] = if inside { first[lane] } else { NOWHERE };
            last[lane] = if inside { last[lane] } else { -1 };
        }
        let (mut from, mut to) = (i32::MAX, -1);
        let (mut all_from, mut all_to) = (0, i32::MAX);
        for lane in 0..QUERIES {
            from = from.min(first[lane]);
            to = to.max(last[lane]);
            all_from = all_from.max(first[lane]);
            all_to = all_to.min(last[lane]);
        }
        let range = |from: i32, to: i32| from as usize..(to + 1).max(from) as usize;
        RowReach {
            first,
            last,
            any: range(from, to),
            all: range(all_from, all_to),
        }
    }
}

/// A column beyond every grid that fits in memory, and exact in single precision.
const NOWHERE: i32 = 1 << 24;
