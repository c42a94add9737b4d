//! The two phases' tasks: which rows of which heads, where the sums stand, and how much scratch
//! memory they need.
//!
//! Phase 1 ([`Accumulate`]) takes some rows of k and v and adds up φ(k)ᵀv and φ(k) per head.
//! Phase 2 ([`Apply`]) takes some rows of q and multiplies φ(q) with the finished sums.
//!
//! In the packed layout the heads lie side by side in each row, so a task takes the same rows of
//! several heads in turn: read head by head, every page would be walked once per head, and
//! address translation would cost more than the arithmetic.

use std::marker::PhantomData;

use super::panels::Panel;

/// Rows of k and v that are transformed before they are multiplied. Also the length of the inner
/// sums: partial results of this many rows are added up, which keeps the rounding error of the
/// whole sum near that of a pairwise one.
pub(super) const KEY_BLOCK: usize = 64;
/// Rows of q that are transformed before they are multiplied; a multiple of most tile heights.
pub(super) const QUERY_BLOCK: usize = 48;

/// How one head is cut up.
#[derive(Clone, Copy)]
pub(super) struct HeadShape<'a> {
    /// D.
    pub(super) head_dim: usize,
    /// Dv.
    pub(super) value_dim: usize,
    /// Numbers in one vector.
    pub(super) lanes: usize,
    /// D rounded up to whole vectors.
    pub(super) padded_dim: usize,
    /// The value columns.
    pub(super) panels: &'a [Panel],
    /// Sum of the panels' widths.
    pub(super) width: usize,
}

impl HeadShape<'_> {
    /// Numbers in φ(k)ᵀv as it is stored: panel by panel, D rows each.
    pub(super) fn sums_len(&self) -> usize {
        self.head_dim * self.width
    }

    /// Numbers in the sums of one head: φ(k)ᵀv, then φ(k).
    pub(super) fn part_len(&self) -> usize {
        self.sums_len() + self.padded_dim
    }

    /// Scratch numbers that phase 1 needs.
    pub(super) fn accumulate_scratch(&self) -> usize {
        KEY_BLOCK * (self.padded_dim + self.width)
    }

    /// Scratch numbers that phase 2 needs.
    pub(super) fn apply_scratch(&self) -> usize {
        QUERY_BLOCK * (self.padded_dim + self.lanes + 1)
    }
}

/// Rows of one head of a tensor.
#[derive(Clone, Copy)]
pub(super) struct Rows<P> {
    /// The first element of the first row.
    pub(super) first: P,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Elements from one head to the next.
    pub(super) head_step: usize,
}

impl<P: Step> Rows<P> {
    /// The rows of one head from `start` on.
    ///
    /// # Safety
    /// They must exist.
    #[inline(always)]
    pub(super) unsafe fn block(self, head: usize, start: usize) -> Self {
        let offset = head * self.head_step + start * self.stride;
        // SAFETY: as for the caller.
        let first = unsafe { self.first.step(offset) };
        Self { first, ..self }
    }
}

/// Pointers to elements.
pub(super) trait Step: Copy {
    /// # Safety
    /// As for the pointer's `add`.
    unsafe fn step(self, elements: usize) -> Self;
}

impl<T> Step for *const T {
    #[inline(always)]
    unsafe fn step(self, elements: usize) -> Self {
        // SAFETY: as for the caller.
        unsafe { self.add(elements) }
    }
}

impl<T> Step for *mut T {
    #[inline(always)]
    unsafe fn step(self, elements: usize) -> Self {
        // SAFETY: as for the caller.
        unsafe { self.add(elements) }
    }
}

impl<T> Rows<*mut T> {
    pub(super) fn read(self) -> Rows<*const T> {
        Rows {
            first: self.first.cast_const(),
            stride: self.stride,
            head_step: self.head_step,
        }
    }
}

/// Phase 1 for some rows of some heads.
///
/// Safety of [`super::simd::Kernel::run`]: `k` and `v` must have `rows` readable rows of D and Dv elements for
/// each of `heads` heads, `sums` room for `shape.part_len()` numbers at each of `heads` multiples
/// of `sums_step`, and `scratch` for `shape.accumulate_scratch()`; nobody else may use those
/// meanwhile.
pub(super) struct Accumulate<'a, T, A> {
    pub(super) shape: HeadShape<'a>,
    pub(super) heads: usize,
    pub(super) k: Rows<*const T>,
    pub(super) v: Rows<*const T>,
    pub(super) rows: usize,
    /// Rows of the tensors before these, which the task before has probably just done.
    pub(super) rows_before: usize,
    /// Rows of the tensors from the first of these on, which the next task may take up.
    pub(super) rows_ahead: usize,
    /// Out, per head: Σ φ(k)ᵀv, then Σ φ(k), whose padding holds nothing meaningful.
    pub(super) sums: *mut A,
    /// Numbers from one head's sums to the next's.
    pub(super) sums_step: usize,
    pub(super) scratch: *mut A,
}

/// Phase 2 for some rows of some heads.
///
/// Safety of [`super::simd::Kernel::run`]: `q` must have `rows` readable rows of D elements for each of `heads`
/// heads, `out` as many writable ones of Dv that nobody else uses meanwhile, `sums` must hold what
/// its comment says, and `scratch` must be room for `shape.apply_scratch()` numbers of its own.
pub(super) struct Apply<'a, T, A> {
    pub(super) shape: HeadShape<'a>,
    pub(super) heads: usize,
    pub(super) q: Rows<*const T>,
    pub(super) out: Rows<*mut T>,
    pub(super) rows: usize,
    /// Rows of the tensors before these, which the task before has probably just done.
    pub(super) rows_before: usize,
    /// Rows of the tensors from the first of these on, which the next task may take up.
    pub(super) rows_ahead: usize,
    /// Per head: mean of φ(k)ᵀv, panel by panel, then mean of φ(k), whose padding is zero.
    pub(super) sums: *const A,
    /// Numbers from one head's sums to the next's.
    pub(super) sums_step: usize,
    pub(super) eps: A,
    pub(super) scratch: *mut A,
}

/// A task together with the instruction set that runs it.
pub(super) struct On<S, K>(pub(super) K, pub(super) PhantomData<S>);
