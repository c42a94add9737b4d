//! Fetching ahead: the next rows are brought into the second-level cache one cache line at a time
//! while the tiles are computed.
//!
//! The rows of one head are short and far apart, which the hardware does not foresee. One line per
//! step of a tile keeps memory busy evenly; many at once would fill the queue of outstanding
//! misses and stall the arithmetic behind it.

use super::task::Rows;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Rows of fewer lines are fetched line by line down the rows, the others along each row.
const SHORT: usize = 8;

/// Cache lines to fetch: `runs` times `lines` lines.
#[derive(Clone, Copy)]
struct Stretch {
    first: *const u8,
    /// Bytes from one line to the next.
    step: usize,
    lines: usize,
    /// Bytes from the start of one run to the next.
    run_step: usize,
    /// Runs that are left.
    runs: usize,
}

impl Stretch {
    /// Rows `start..start + count` of some heads, each `width` elements wide.
    #[inline(always)]
    fn new<T>(
        rows: Rows<*const T>,
        [start, count]: [usize; 2],
        heads: usize,
        width: usize,
    ) -> Self {
        let side_by_side = rows.head_step == width;
        let bytes = size_of::<T>() * width * if side_by_side { heads } else { 1 };
        let stride = size_of::<T>() * rows.stride;
        let first = rows.first.wrapping_add(start * rows.stride).cast();
        let lines = bytes.div_ceil(LINE);
        let [step, lines, run_step, runs] = if bytes == stride {
            // Rows that touch are one run.
            [LINE, (bytes * count).div_ceil(LINE), 0, 1]
        } else if lines < SHORT {
            [stride, count, LINE, lines]
        } else {
            [LINE, lines, stride, count]
        };
        Self {
            first,
            step,
            lines,
            run_step,
            runs: if lines == 0 { 0 } else { runs },
        }
    }
}

/// The cache lines to fetch, in order.
pub(super) struct Ahead {
    at: *const u8,
    step: usize,
    /// Lines that are left of this run.
    left: usize,
    now: Stretch,
    then: Stretch,
}

impl Ahead {
    /// Rows `start..start + count` of two tensors, given with the width of their rows.
    #[inline(always)]
    pub(super) fn new<T>(
        [(a, a_width), (b, b_width)]: [(Rows<*const T>, usize); 2],
        rows: [usize; 2],
        heads: usize,
    ) -> Self {
        let mut ahead = Self {
            at: a.first.cast(),
            step: LINE,
            left: 0,
            now: Stretch::new(a, rows, heads, a_width),
            then: Stretch::new(b, rows, heads, b_width),
        };
        ahead.next_run();
        ahead
    }

    /// Fetches one line, if any is left.
    #[inline(always)]
    pub(super) fn fetch(&mut self) {
        if self.left != 0 {
            prefetch(self.at);
            self.at = self.at.wrapping_add(self.step);
            self.left -= 1;
            if self.left == 0 {
                self.next_run();
            }
        }
    }

    /// Fetches all lines.
    pub(super) fn fetch_all(mut self) {
        while self.left != 0 {
            self.fetch();
        }
    }

    #[cold]
    #[inline(never)]
    fn next_run(&mut self) {
        if self.now.runs == 0 {
            self.now = self.then;
            self.then.runs = 0;
        }
        if self.now.runs == 0 {
            return;
        }
        self.at = self.now.first;
        self.step = self.now.step;
        self.left = self.now.lines;
        self.now.first = self.now.first.wrapping_add(self.now.run_step);
        self.now.runs -= 1;
    }
}

/// Brings a cache line into the second level. Harmless for any address.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lines that are fetched, relative to the start of a 64-byte-aligned tensor.
    fn lines(
        stride: usize,
        head_step: usize,
        rows: [usize; 2],
        heads: usize,
        width: usize,
    ) -> Vec<usize> {
        let base = 1 << 20;
        let tensor = Rows {
            first: std::ptr::without_provenance::<f32>(base),
            stride,
            head_step,
        };
        let empty = Rows {
            first: tensor.first,
            stride: 0,
            head_step: 0,
        };
        let mut ahead = Ahead::new([(tensor, width), (empty, 0)], rows, heads);
        let mut found = vec![];
        while ahead.left != 0 {
            found.push((ahead.at.addr() - base) / LINE);
            ahead.fetch();
        }
        found
    }

    #[test]
    fn every_line_once_and_in_order() {
        // All heads of packed rows: one run.
        assert_eq!(lines(80, 40, [2, 3], 2, 40), (10..25).collect::<Vec<_>>());
        // Some heads of many: along the rows where they are long, else down the rows.
        assert_eq!(
            lines(512, 64, [0, 2], 2, 64),
            [0, 1, 2, 3, 4, 5, 6, 7, 32, 33, 34, 35, 36, 37, 38, 39]
        );
        assert_eq!(lines(64, 16, [0, 3], 2, 16), [0, 4, 8, 1, 5, 9]);
        // One head of its own, whose rows touch.
        assert_eq!(lines(8, 800, [4, 8], 1, 8), [2, 3, 4, 5]);
        // No rows, and rows without columns.
        assert_eq!(lines(80, 40, [2, 0], 2, 40), [0usize; 0]);
        assert_eq!(lines(0, 0, [0, 4], 2, 0), [0usize; 0]);
    }
}
