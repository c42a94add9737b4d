//! Phase 1: φ(k)ᵀv and Σ φ(k) over some rows.
//!
//! φ is taken once per element into a scratch block that stays in the first-level cache, v is
//! read straight from its layout, converted and padded on the way where need be, and the
//! micro-kernel multiplies the two.

use super::ahead::Ahead;
use super::columns::{Features, key_features};
use super::panels::Panel;
use super::simd::{Convert, Kernel, Vector};
use super::task::{Accumulate, KEY_BLOCK, On, Rows};
use super::tile::AddTile;

impl<S, T> Kernel for On<S, Accumulate<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let shape = task.shape;
        // SAFETY: the pointers stay inside the ranges that `Accumulate` asks for: block rows
        // start + block <= rows; features and values partition `scratch`; panels lie
        // one after another in `sums`.
        unsafe {
            let features = task.scratch;
            let values = features.add(KEY_BLOCK * shape.padded_dim);
            let in_place = spread(
                task.v.stride * size_of::<T>(),
                shape.value_dim * size_of::<T>(),
            );
            for head in 0..task.heads {
                let sums = task.sums.add(head * task.sums_step);
                sums.write_bytes(0, shape.part_len());
            }
            let tensors = [(task.k, shape.head_dim), (task.v, shape.value_dim)];
            if task.rows_before == 0 {
                Ahead::new(tensors, [0, KEY_BLOCK.min(task.rows)], task.heads).fetch_all();
            }
            let mut start = 0;
            while start < task.rows {
                let block = KEY_BLOCK.min(task.rows - start);
                let next = start + block;
                let rows = [next, KEY_BLOCK.min(task.rows_ahead - next)];
                let mut ahead = Ahead::new(tensors, rows, task.heads);
                for head in 0..task.heads {
                    let k = task.k.block(head, start);
                    let v = task.v.block(head, start);
                    let sums = task.sums.add(head * task.sums_step);
                    let to = Features {
                        first: features,
                        stride: shape.padded_dim,
                    };
                    let key_sum = sums.add(shape.sums_len());
                    key_features::<S, T>(k, block, shape.head_dim, to, key_sum);
                    for panel in shape.panels {
                        let (b, b_step) = match S::in_place(v.first.add(panel.first)) {
                            Some(b) if panel.is_exact(S::Full::LANES) && in_place => (b, v.stride),
                            _ => {
                                let packed = values.add(panel.offset * KEY_BLOCK);
                                pack_values::<S, T>(v, block, panel, packed);
                                (packed.cast_const(), panel.width)
                            }
                        };
                        let tile = AddTile::<S> {
                            depth: block,
                            a: features,
                            a_step: shape.padded_dim,
                            b,
                            b_step,
                            width: panel.width,
                            c: sums.add(panel.offset * shape.head_dim),
                            ahead: &raw mut ahead,
                        };
                        tile.all_rows(shape.head_dim, panel);
                    }
                }
                start += block;
            }
        }
    }
}

/// Whether a block of rows of some bytes, `stride` bytes apart, stays in half of a first-level
/// cache of 64 sets of eight lines. Rows at a distance of a large power of two compete for few
/// sets.
fn spread(stride: usize, bytes: usize) -> bool {
    const LINE: usize = 64;
    const SETS: usize = 64;
    if !stride.is_multiple_of(LINE) {
        return stride == bytes;
    }
    let distance = 1usize << (stride / LINE).trailing_zeros().min(SETS.trailing_zeros());
    let rows_per_set = (KEY_BLOCK * distance).div_ceil(SETS);
    // Rows wider than the distance lie over their neighbours.
    let lines = bytes.div_ceil(LINE) + 1;
    rows_per_set * lines.div_ceil(distance) <= 4
}

/// One panel's columns of `rows` rows of v, widened and zero-padded.
#[inline(always)]
unsafe fn pack_values<S, T>(v: Rows<*const T>, rows: usize, panel: &Panel, packed: *mut S::Number)
where
    S: Convert<T>,
    T: Copy,
{
    let lanes = S::Full::LANES;
    // SAFETY: the caller gives `rows` rows of `panel.columns` elements and room for `rows` rows of
    // `panel.width` numbers.
    unsafe {
        for row in 0..rows {
            let from = v.first.add(panel.first + row * v.stride);
            let to = packed.add(row * panel.width);
            let mut c = 0;
            while c < panel.full * lanes {
                let left = panel.columns - c;
                let numbers = if left >= lanes {
                    S::read(from.add(c))
                } else {
                    S::read_part(from.add(c), left)
                };
                numbers.store(to.add(c));
                c += lanes;
            }
            if panel.half {
                S::read_half(from.add(c), panel.columns - c).store(to.add(c));
            }
        }
    }
}
