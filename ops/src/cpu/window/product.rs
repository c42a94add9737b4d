//! The two products of a group: register tiles of keys or values times its queries in the lanes.

#![allow(
    clippy::needless_range_loop,
    reason = "constant bounds over register arrays; iterators hide the unrolling that is meant"
)]

use super::super::simd::{Accumulator, Kernel, Simd, Vector};
use super::tile::QUERIES;

/// Neighbouring keys of a block that a group reaches.
pub(super) struct Part {
    /// Place of the first in the block.
    pub(super) first: usize,
    pub(super) count: usize,
}

/// Most keys of a register tile: each has an address of its own.
const MOST_KEYS: usize = 12;
/// Widths of v are padded to a multiple of this, which every register tile's rows divide.
const STEP: usize = 4;

/// Numbers of a row of v that are read.
pub(super) fn value_width(value_dim: usize) -> usize {
    value_dim.next_multiple_of(STEP)
}

/// Accumulators of a register tile; the rest of the registers hold one row of queries and a factor.
const fn accumulators<S: Simd>() -> usize {
    if S::TILE.max_columns >= 4 { 24 } else { 12 }
}

/// R keys times C vectors of queries.
struct ScoreTile<S: Simd, const R: usize, const C: usize> {
    keys: *const S::Number,
    /// Numbers from one key to the next.
    key_step: usize,
    /// `[depth][QUERIES]`
    queries: *const S::Number,
    depth: usize,
    /// `[R][QUERIES]`
    scores: *mut S::Number,
}

impl<S: Simd, const R: usize, const C: usize> Kernel for ScoreTile<S, R, C> {
    #[inline(always)]
    unsafe fn run(self) {
        let lanes = S::Full::LANES;
        // SAFETY: `score_rows` gives R keys and rows of scores, and `depth` rows of queries.
        unsafe {
            let mut sums = [[S::Full::splat(S::Number::ZERO); C]; R];
            for d in 0..self.depth {
                let mut terms = [S::Full::splat(S::Number::ZERO); C];
                for c in 0..C {
                    terms[c] = S::Full::load(self.queries.add(d * QUERIES + c * lanes));
                }
                for r in 0..R {
                    let factor = S::Full::splat(*self.keys.add(r * self.key_step + d));
                    for c in 0..C {
                        sums[r][c] = factor.mul_add(terms[c], sums[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    sums[r][c].store(self.scores.add(r * QUERIES + c * lanes));
                }
            }
        }
    }
}

/// q·k of `count` keys, given with the numbers from one to the next, and all queries, given with
/// the terms of each sum.
///
/// # Safety
/// Keys, `[depth][QUERIES]` queries and `[count][QUERIES]` scores must exist.
#[inline(always)]
pub(super) unsafe fn score_rows<S: Simd>(
    count: usize,
    keys: (*const S::Number, usize),
    queries: (*const S::Number, usize),
    scores: *mut S::Number,
) {
    // SAFETY: by the contract above.
    unsafe {
        if S::Full::LANES >= QUERIES {
            score_tiles::<S, 1>(count, keys, queries, scores);
        } else {
            score_tiles::<S, 2>(count, keys, queries, scores);
        }
    }
}

#[inline(always)]
unsafe fn score_tiles<S: Simd, const C: usize>(
    count: usize,
    (keys, key_step): (*const S::Number, usize),
    (queries, depth): (*const S::Number, usize),
    scores: *mut S::Number,
) {
    let tiles = count.div_ceil(const { most_keys::<S, C>() });
    let mut first = 0;
    for tile in 0..tiles {
        // Of about one size.
        let rows = (count - first).div_ceil(tiles - tile);
        let mut column = 0;
        while column < QUERIES {
            macro_rules! call {
                ($($r:literal)*) => {
                    match rows {
                        $($r => if const { $r <= most_keys::<S, C>() } {
                            // SAFETY: `rows` keys are left, and the columns exist.
                            unsafe {
                                S::vectorize(ScoreTile::<S, $r, C> {
                                    keys: keys.add(first * key_step),
                                    key_step,
                                    queries: queries.add(column),
                                    depth,
                                    scores: scores.add(first * QUERIES + column),
                                });
                            }
                        },)*
                        _ => unreachable!("tiles have 1 to 12 rows"),
                    }
                };
            }
            call!(1 2 3 4 5 6 7 8 9 10 11 12);
            column += C * S::Full::LANES;
        }
        first += rows;
    }
}

const fn most_keys<S: Simd, const C: usize>() -> usize {
    let most = accumulators::<S>() / C;
    if most < MOST_KEYS { most } else { MOST_KEYS }
}

/// R columns of v times C vectors of weights.
struct ValueTile<'a, S: Simd, const R: usize, const C: usize> {
    parts: &'a [Part],
    /// The first column of the block's values.
    values: *const S::Number,
    /// Numbers from one key's value to the next.
    value_step: usize,
    /// By key of the parts, `[QUERIES]`.
    weights: *const S::Number,
    /// `[QUERIES]`
    keep: *const S::Number,
    /// `[R][QUERIES]`
    outputs: *mut S::Number,
}

impl<S: Simd, const R: usize, const C: usize> Kernel for ValueTile<'_, S, R, C> {
    #[inline(always)]
    unsafe fn run(self) {
        let lanes = S::Full::LANES;
        // SAFETY: `value_columns` gives parts of the block, R columns, and weights for all keys.
        unsafe {
            let mut sums = [[S::Full::splat(S::Number::ZERO); C]; R];
            let mut weights = self.weights;
            for part in self.parts {
                let mut value = self.values.add(part.first * self.value_step);
                for _ in 0..part.count {
                    let mut terms = [S::Full::splat(S::Number::ZERO); C];
                    for c in 0..C {
                        terms[c] = S::Full::load(weights.add(c * lanes));
                    }
                    for r in 0..R {
                        let factor = S::Full::splat(*value.add(r));
                        for c in 0..C {
                            sums[r][c] = factor.mul_add(terms[c], sums[r][c]);
                        }
                    }
                    value = value.add(self.value_step);
                    weights = weights.add(QUERIES);
                }
            }
            for c in 0..C {
                let keep = S::Full::load(self.keep.add(c * lanes));
                for r in 0..R {
                    let at = self.outputs.add(r * QUERIES + c * lanes);
                    S::Full::load(at).mul_add(keep, sums[r][c]).store(at);
                }
            }
        }
    }
}

/// outputs = outputs · keep + weights · values.
///
/// # Safety
/// Parts must lie in the block of values, given with the numbers from one to the next, which are
/// at least [`value_width`]; there must be weights for all their keys, and as many rows of outputs
/// as numbers of a padded value.
#[inline(always)]
pub(super) unsafe fn value_columns<S: Simd>(
    parts: &[Part],
    values: (*const S::Number, usize),
    weights: *const S::Number,
    keep: *const S::Number,
    outputs: *mut S::Number,
    value_dim: usize,
) {
    // SAFETY: by the contract above.
    unsafe {
        if S::Full::LANES >= QUERIES {
            value_tiles::<S, 1, 4>(parts, values, weights, keep, outputs, value_dim);
        } else {
            value_tiles::<S, 2, 2>(parts, values, weights, keep, outputs, value_dim);
        }
    }
}

/// In register tiles of a multiple of U rows.
#[inline(always)]
unsafe fn value_tiles<S: Simd, const C: usize, const U: usize>(
    parts: &[Part],
    (values, value_step): (*const S::Number, usize),
    weights: *const S::Number,
    keep: *const S::Number,
    outputs: *mut S::Number,
    value_dim: usize,
) {
    let units = value_dim.div_ceil(U);
    let tiles = units.div_ceil(const { accumulators::<S>() / C / U });
    let mut first = 0;
    for tile in 0..tiles {
        let count = (units - first).div_ceil(tiles - tile);
        let mut column = 0;
        while column < QUERIES {
            macro_rules! call {
                ($($r:literal)*) => {
                    match count * U {
                        $($r => if const { $r <= accumulators::<S>() / C && $r % U == 0 } {
                            // SAFETY: `count` units of columns are left.
                            unsafe {
                                S::vectorize(ValueTile::<S, $r, C> {
                                    parts,
                                    values: values.add(first * U),
                                    value_step,
                                    weights: weights.add(column),
                                    keep: keep.add(column),
                                    outputs: outputs.add(first * U * QUERIES + column),
                                });
                            }
                        },)*
                        _ => unreachable!("tiles have 2 to 24 rows"),
                    }
                };
            }
            call!(2 4 6 8 10 12 16 20 24);
            column += C * S::Full::LANES;
        }
        first += count;
    }
}
