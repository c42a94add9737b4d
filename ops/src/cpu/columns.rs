//! φ over the columns of a block of rows, one vector, half vector or part of a vector at a time.
//!
//! Rows of one column are independent, so that the long chain of operations that φ is overlaps
//! with that of the next rows.

use super::simd::{Convert, Simd, Vector};
use super::task::Rows;

/// Rows that are gone over before the next columns: rows at a distance of a power of two share few
/// places in the cache, and neighbouring columns share cache lines.
const ROWS: usize = 16;

/// How a vector's worth of columns is read.
trait Column<S: Convert<T>, T> {
    type Numbers: Vector<Number = S::Number>;
    /// Reads `left` columns or as many as the vector holds.
    unsafe fn read(from: *const T, left: usize) -> Self::Numbers;
    unsafe fn feature_map(u: Self::Numbers) -> Self::Numbers;
    /// Zeros in the lanes that a half vector lacks.
    unsafe fn extend(v: Self::Numbers) -> S::Full;
}

/// A whole vector.
struct Whole;
/// The first elements of a whole vector.
struct Part;
/// Half a vector or the first elements of it.
struct Half;

impl<S: Convert<T>, T> Column<S, T> for Whole {
    type Numbers = S::Full;
    #[inline(always)]
    unsafe fn read(from: *const T, _left: usize) -> S::Full {
        // SAFETY: as for the caller.
        unsafe { S::read(from) }
    }
    #[inline(always)]
    unsafe fn feature_map(u: S::Full) -> S::Full {
        // SAFETY: as for the caller.
        unsafe { S::feature_map(u) }
    }
    #[inline(always)]
    unsafe fn extend(v: S::Full) -> S::Full {
        v
    }
}

impl<S: Convert<T>, T> Column<S, T> for Part {
    type Numbers = S::Full;
    #[inline(always)]
    unsafe fn read(from: *const T, left: usize) -> S::Full {
        // SAFETY: as for the caller.
        unsafe { S::read_part(from, left) }
    }
    #[inline(always)]
    unsafe fn feature_map(u: S::Full) -> S::Full {
        // SAFETY: as for the caller.
        unsafe { S::feature_map(u) }
    }
    #[inline(always)]
    unsafe fn extend(v: S::Full) -> S::Full {
        v
    }
}

impl<S: Convert<T>, T> Column<S, T> for Half {
    type Numbers = S::Half;
    #[inline(always)]
    unsafe fn read(from: *const T, left: usize) -> S::Half {
        // SAFETY: as for the caller.
        unsafe { S::read_half(from, left) }
    }
    #[inline(always)]
    unsafe fn feature_map(u: S::Half) -> S::Half {
        // SAFETY: as for the caller.
        unsafe { S::feature_map_half(u) }
    }
    #[inline(always)]
    unsafe fn extend(v: S::Half) -> S::Full {
        // SAFETY: as for the caller.
        unsafe { S::extend_half(v) }
    }
}

/// Runs a block function on every vector's worth of `width` columns.
macro_rules! for_columns {
    ($S:ty, $T:ty, $width:expr, |$at:ident, $left:ident| $run:ident($($argument:expr),* $(,)?)) => {
        let mut $at = 0;
        while $at < $width {
            let $left = $width - $at;
            if $left >= <$S as Simd>::Full::LANES {
                $run::<$S, $T, Whole>($($argument),*);
            } else if <$S as Simd>::TILE.half_columns && $left <= <$S as Simd>::Half::LANES {
                $run::<$S, $T, Half>($($argument),*);
            } else {
                $run::<$S, $T, Part>($($argument),*);
            }
            $at += <$S as Simd>::Full::LANES;
        }
    };
}

/// Rows of φ in scratch memory.
#[derive(Clone, Copy)]
pub(super) struct Features<A> {
    pub(super) first: *mut A,
    /// Numbers from one row to the next.
    pub(super) stride: usize,
}

/// φ of `rows` rows of k, whose sum is added to `sum`.
///
/// # Safety
/// `k` must have `rows` readable rows of `width` elements, `features` as many writable ones of
/// `width` rounded up to whole vectors, and `sum` one such row.
#[inline(always)]
pub(super) unsafe fn key_features<S, T>(
    k: Rows<*const T>,
    rows: usize,
    width: usize,
    features: Features<S::Number>,
    sum: *mut S::Number,
) where
    S: Convert<T>,
    T: Copy,
{
    // SAFETY: columns at..at + left of rows row..row + count exist.
    unsafe {
        let mut row = 0;
        while row < rows {
            let count = ROWS.min(rows - row);
            for_columns!(S, T, width, |at, left| key_column(
                k.first.add(row * k.stride + at),
                k.stride,
                count,
                left,
                features.first.add(row * features.stride + at),
                features.stride,
                sum.add(at),
            ));
            row += count;
        }
    }
}

#[inline(always)]
unsafe fn key_column<S, T, C>(
    k: *const T,
    stride: usize,
    rows: usize,
    left: usize,
    features: *mut S::Number,
    features_stride: usize,
    sum: *mut S::Number,
) where
    S: Convert<T>,
    C: Column<S, T>,
{
    // SAFETY: the caller gives `rows` rows of this column.
    unsafe {
        let mut total = C::Numbers::splat(<S::Number as super::simd::Accumulator>::ZERO);
        let mut row = 0;
        while row + 4 <= rows {
            let from = k.add(row * stride);
            let to = features.add(row * features_stride);
            let f0 = C::feature_map(C::read(from, left));
            let f1 = C::feature_map(C::read(from.add(stride), left));
            let f2 = C::feature_map(C::read(from.add(2 * stride), left));
            let f3 = C::feature_map(C::read(from.add(3 * stride), left));
            f0.store(to);
            f1.store(to.add(features_stride));
            f2.store(to.add(2 * features_stride));
            f3.store(to.add(3 * features_stride));
            total = total.add(f0.add(f1).add(f2.add(f3)));
            row += 4;
        }
        while row < rows {
            let f = C::feature_map(C::read(k.add(row * stride), left));
            f.store(features.add(row * features_stride));
            total = total.add(f);
            row += 1;
        }
        C::Numbers::load(sum).add(total).store(sum);
    }
}

/// φ of `rows` rows of q, and per row a vector whose lanes add up to φ(q)·mean φ(k).
///
/// # Safety
/// As for [`key_features`]; `mean_key` must be a readable row of whole vectors, zero beyond
/// `width`, and `overlaps` room for `rows` vectors.
#[inline(always)]
pub(super) unsafe fn query_features<S, T>(
    q: Rows<*const T>,
    rows: usize,
    width: usize,
    features: Features<S::Number>,
    mean_key: *const S::Number,
    overlaps: *mut S::Number,
) where
    S: Convert<T>,
    T: Copy,
{
    // SAFETY: columns at..at + left of rows row..row + count exist.
    unsafe {
        let mut row = 0;
        while row < rows {
            let count = ROWS.min(rows - row);
            let overlaps = overlaps.add(row * S::Full::LANES);
            for_columns!(S, T, width, |at, left| query_column(
                q.first.add(row * q.stride + at),
                q.stride,
                count,
                left,
                features.first.add(row * features.stride + at),
                features.stride,
                mean_key.add(at),
                // The first columns find nothing to add to.
                (at != 0).then_some(overlaps),
                overlaps,
            ));
            row += count;
        }
    }
}

#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "scalars that live in registers")]
unsafe fn query_column<S, T, C>(
    q: *const T,
    stride: usize,
    rows: usize,
    left: usize,
    features: *mut S::Number,
    features_stride: usize,
    mean_key: *const S::Number,
    before: Option<*mut S::Number>,
    overlaps: *mut S::Number,
) where
    S: Convert<T>,
    C: Column<S, T>,
{
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `rows` rows of this column; `mean_key` is zero in the padding, so
    // φ(0) = 1 there adds nothing.
    unsafe {
        let mean = C::Numbers::load(mean_key);
        for row in 0..rows {
            let f = C::feature_map(C::read(q.add(row * stride), left));
            f.store(features.add(row * features_stride));
            let mut overlap = C::extend(f.mul(mean));
            if let Some(before) = before {
                overlap = overlap.add(S::Full::load(before.add(row * lanes)));
            }
            overlap.store(overlaps.add(row * lanes));
        }
    }
}
