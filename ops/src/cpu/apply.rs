//! Phase 2: φ(q) times the finished sums, over the normaliser.

use super::ahead::Ahead;
use super::columns::{Features, query_features};
use super::simd::{Accumulator, Convert, Kernel, Vector};
use super::task::{Apply, On, QUERY_BLOCK};
use super::tile::WriteTile;

impl<S, T> Kernel for On<S, Apply<'_, T, S::Number>>
where
    S: Convert<T>,
    T: Copy,
{
    #[inline(always)]
    unsafe fn run(self) {
        let task = self.0;
        let shape = task.shape;
        // SAFETY: as for phase 1; features, overlaps and inverse partition `scratch`.
        unsafe {
            let features = task.scratch;
            let overlaps = features.add(QUERY_BLOCK * shape.padded_dim);
            let inverse = overlaps.add(QUERY_BLOCK * S::Full::LANES);
            let tensors = [(task.q, shape.head_dim), (task.out.read(), shape.value_dim)];
            if task.rows_before == 0 {
                Ahead::new(tensors, [0, QUERY_BLOCK.min(task.rows)], task.heads).fetch_all();
            }
            let mut start = 0;
            while start < task.rows {
                let block = QUERY_BLOCK.min(task.rows - start);
                let next = start + block;
                let rows = [next, QUERY_BLOCK.min(task.rows_ahead - next)];
                let mut ahead = Ahead::new(tensors, rows, task.heads);
                for head in 0..task.heads {
                    let q = task.q.block(head, start);
                    let out = task.out.block(head, start);
                    let sums = task.sums.add(head * task.sums_step);
                    let to = Features {
                        first: features,
                        stride: shape.padded_dim,
                    };
                    let mean_key = sums.add(shape.sums_len());
                    query_features::<S, T>(q, block, shape.head_dim, to, mean_key, overlaps);
                    for row in 0..block {
                        let overlap = S::sum(S::Full::load(overlaps.add(row * S::Full::LANES)));
                        let normaliser = overlap.add(task.eps);
                        inverse
                            .add(row)
                            .write(S::Number::from_f64(1.0).div(normaliser));
                    }
                    for panel in shape.panels {
                        let tile = WriteTile::<S, T> {
                            depth: shape.head_dim,
                            a: features,
                            a_row: shape.padded_dim,
                            b: sums.add(panel.offset * shape.head_dim),
                            width: panel.width,
                            inverse,
                            out: out.first.add(panel.first),
                            out_stride: out.stride,
                            columns: panel.columns,
                            ahead: &raw mut ahead,
                        };
                        tile.all_rows(block, panel);
                    }
                }
                start += block;
            }
        }
    }
}
