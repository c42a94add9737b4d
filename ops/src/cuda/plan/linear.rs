//! `LinFusionAttention`: its kernels and how they are launched.

use super::{
    Addresses, Device, Launch, PlanError, Step, fits_tensor_cores, grid, in_31_bits, row_bytes,
    suffix, tensor,
};
use crate::cuda::params::{LinearParams, Params};
use crate::schema::{Dims, ElementType};

/// Most keys that one block adds up: single precision sums of more would lose digits that half
/// precision shows.
const MAX_SPLIT: usize = 16 << 10;
/// Fewest keys and queries that are worth a block of their own.
const MIN_SPLIT: usize = 256;
/// Most queries of a block of the second phase: many blocks of even size end together.
const MAX_QUERIES: usize = 4096;
/// Most keys and most queries of a head for one launch by one block a head, and most bytes it reads and writes.
const FUSED_TOKENS: usize = 1024;
const FUSED_BYTES: usize = 512 << 10;
/// Rows or columns of one tile of the plain kernels, tokens of a slab, threads of a block.
const PLAIN_TILE: usize = 64;
const PLAIN_SLAB: usize = 16;
const PLAIN_THREADS: usize = 256;
/// What a matrix load may read behind the last row.
const SLACK: usize = 32;

/// Phase 1 of one width, as linfusion.cu instantiates it.
#[derive(Debug, Clone, Copy)]
struct StateShape {
    /// M tiles of 16 rows a warp.
    row_tiles: usize,
    /// Columns of one block at most.
    panel: usize,
    threads: usize,
    tokens: usize,
    stages: usize,
    /// Blocks that a multiprocessor runs at once.
    blocks: usize,
}

impl StateShape {
    fn row_warps(self, head_dim: usize) -> usize {
        head_dim.div_ceil(16 * self.row_tiles)
    }

    fn shared_bytes(self, head_dim: usize, value_dim: usize) -> usize {
        let panel = value_dim.min(self.panel);
        let ring = self.stages * self.tokens * (row_bytes(head_dim) + row_bytes(panel));
        let warps = self.row_warps(head_dim);
        let slices = self.threads / 32 / warps;
        let merge = warps * self.row_tiles * (self.panel / 8 + 1) * 4 * 32 * 4;
        ring.max(if slices > 1 { merge } else { 0 }) + SLACK
    }
}

/// Phase 2 of one width.
#[derive(Debug, Clone, Copy)]
struct ApplyShape {
    /// Tiles of 16 queries a warp.
    query_tiles: usize,
    slots: usize,
    /// Blocks that a multiprocessor runs at once.
    blocks: usize,
    state_in_shared: bool,
}

/// Warps of a block of phase 2.
const APPLY_WARPS: usize = 4;

impl ApplyShape {
    fn slots_bytes(self, head_dim: usize, value_dim: usize, warps: usize) -> usize {
        let row = row_bytes(head_dim).max(row_bytes(value_dim));
        warps * self.slots * 16 * self.query_tiles * row + SLACK
    }
}

/// The shapes of one width D = Dv.
struct Tuned {
    width: usize,
    state: StateShape,
    apply: ApplyShape,
    fused_state: StateShape,
    fused_apply: ApplyShape,
}

/// As `LF_LINEAR` and `LF_FUSED` in linfusion.cu.
#[rustfmt::skip]
const TUNED: [Tuned; 6] = [
    tuned(40, [3, 128, 64, 4, 4], [2, 4, 4], [256, 128, 4, 3]),
    tuned(64, [4, 128, 64, 4, 2], [2, 3, 3], [256, 128, 3, 3]),
    tuned(72, [3, 128, 64, 4, 2], [2, 3, 3], [256, 64, 4, 3]),
    tuned(80, [3, 128, 64, 4, 2], [2, 3, 2], [256, 64, 4, 3]),
    tuned(128, [2, 128, 32, 4, 2], [1, 3, 2], [256, 32, 4, 2]),
    tuned(160, [1, 320, 32, 4, 1], [1, 2, 2], [320, 16, 4, 2]),
];

/// Phase 1: row tiles, threads, tokens, stages, blocks; phase 2: query tiles, slots, blocks; in one launch: threads,
/// tokens, stages, slots.
const fn tuned(width: usize, state: [usize; 5], apply: [usize; 3], fused: [usize; 4]) -> Tuned {
    Tuned {
        width,
        state: StateShape {
            row_tiles: state[0],
            panel: width,
            threads: state[1],
            tokens: state[2],
            stages: state[3],
            blocks: state[4],
        },
        apply: ApplyShape {
            query_tiles: apply[0],
            slots: apply[1],
            blocks: apply[2],
            state_in_shared: true,
        },
        fused_state: StateShape {
            row_tiles: state[0],
            panel: width,
            threads: fused[0],
            tokens: fused[1],
            stages: fused[2],
            blocks: 1,
        },
        fused_apply: ApplyShape {
            query_tiles: 1,
            slots: fused[3],
            blocks: 1,
            state_in_shared: true,
        },
    }
}

/// As `LF_ANY`: panels of at most 64 or 128 columns.
fn any_state(head_dim: usize, panel: usize) -> StateShape {
    let warps = head_dim.div_ceil(16);
    StateShape {
        row_tiles: 1,
        panel,
        threads: 32 * if warps <= 8 { 2 * warps } else { warps },
        tokens: 32,
        stages: 3,
        blocks: 2,
    }
}

const ANY_APPLY: ApplyShape = ApplyShape {
    query_tiles: 1,
    slots: 2,
    blocks: 2,
    state_in_shared: false,
};

/// The kernels of one call.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearPlan {
    dims: Dims,
    element: ElementType,
    eps: f32,
    steps: Vec<Step>,
    splits: usize,
    keys_per_split: usize,
    queries_per_block: usize,
    partial_bytes: usize,
    state_bytes: usize,
}

impl LinearPlan {
    /// Plans a call.
    ///
    /// `aligned` says that all tensors' addresses are multiples of 16.
    ///
    /// # Errors
    /// [`PlanError`] for sizes that no kernel takes.
    pub fn new(
        dims: &Dims,
        element: ElementType,
        eps: f32,
        aligned: bool,
        device: &Device,
    ) -> Result<Self, PlanError> {
        let mut plan = Self {
            dims: *dims,
            element,
            eps,
            steps: vec![],
            splits: 1,
            keys_per_split: dims.keys.max(1),
            queries_per_block: dims.queries.max(1),
            partial_bytes: 0,
            state_bytes: 0,
        };
        in_31_bits("heads of all batch elements", plan.heads())?;
        in_31_bits(
            "sums of a head",
            dims.head_dim
                .saturating_mul(dims.value_dim.saturating_add(1)),
        )?;
        if plan.heads() == 0 || dims.queries == 0 || dims.value_dim == 0 {
            return Ok(plan);
        }
        let widths = [dims.head_dim, dims.value_dim];
        if fits_tensor_cores(element, widths, aligned, device) {
            let tuned = TUNED.iter().find(|t| widths == [t.width; 2]);
            if let Some(tuned) = tuned
                && (plan.fused(tuned, device) || plan.two_phases(tuned, device)?)
            {
                return Ok(plan);
            }
            if plan.any_width(device)? {
                return Ok(plan);
            }
        }
        plan.plain(device)?;
        Ok(plan)
    }

    /// Heads of all batch elements.
    fn heads(&self) -> usize {
        self.dims.batch.saturating_mul(self.dims.heads)
    }

    /// Bytes of device memory that the launches use, aligned to 256.
    pub fn workspace_bytes(&self) -> usize {
        self.partial_bytes.saturating_add(self.state_bytes)
    }

    /// What to launch, in order, on one stream.
    pub fn launches(&self, at: &Addresses) -> Vec<Launch> {
        let Dims {
            layout,
            heads,
            queries,
            keys,
            head_dim,
            value_dim,
            ..
        } = self.dims;
        let params = LinearParams {
            q: tensor(at.q, layout, heads, queries, head_dim),
            k: tensor(at.k, layout, heads, keys, head_dim),
            v: tensor(at.v, layout, heads, keys, value_dim),
            out: tensor(at.out, layout, heads, queries, value_dim),
            partial: at.workspace,
            state: at.workspace + self.partial_bytes as u64,
            queries: queries as i64,
            keys: keys as i64,
            keys_per_split: self.keys_per_split as i64,
            queries_per_block: self.queries_per_block as i64,
            batch: self.dims.batch as i32,
            heads: heads as i32,
            splits: self.splits as i32,
            head_dim: head_dim as i32,
            value_dim: value_dim as i32,
            eps: self.eps,
        };
        self.steps
            .iter()
            .map(|step| step.launch(Params::Linear(params)))
            .collect()
    }

    /// One launch for few tokens, if they are that few and the device has room.
    fn fused(&mut self, tuned: &Tuned, device: &Device) -> bool {
        let Dims {
            queries,
            keys,
            head_dim,
            value_dim,
            ..
        } = self.dims;
        let bytes = (queries + keys) * (head_dim + value_dim) * self.element.size();
        let state = tuned.fused_state.shared_bytes(head_dim, value_dim);
        let warps = tuned.fused_state.threads / 32;
        let apply = tuned.fused_apply.slots_bytes(head_dim, value_dim, warps);
        let partial = (self.partial_length() * 4).next_multiple_of(128);
        let first = partial + state.max(reduce_shared(head_dim));
        let shared = self.head_state_bytes().next_multiple_of(128) + first.max(apply);
        if queries.max(keys) > FUSED_TOKENS
            || bytes > FUSED_BYTES
            || shared > device.shared_bytes as usize
        {
            return false;
        }
        self.steps = vec![Step {
            kernel: format!("linfusion_fused_{}_d{}", suffix(self.element), tuned.width),
            grid: [self.heads() as u32, 1, 1],
            threads: tuned.fused_state.threads,
            shared_bytes: shared,
        }];
        true
    }

    fn two_phases(&mut self, tuned: &Tuned, device: &Device) -> Result<bool, PlanError> {
        let name = format!("{}_d{}", suffix(self.element), tuned.width);
        self.tensor(tuned.state, tuned.apply, [&name, &name], device)
    }

    fn any_width(&mut self, device: &Device) -> Result<bool, PlanError> {
        let panel = if self.dims.value_dim <= 64 { 64 } else { 128 };
        let element = suffix(self.element);
        let names = [format!("{element}_any{panel}"), format!("{element}_any")];
        let state = any_state(self.dims.head_dim, panel);
        self.tensor(state, ANY_APPLY, [&names[0], &names[1]], device)
    }

    fn tensor(
        &mut self,
        state: StateShape,
        apply: ApplyShape,
        names: [&str; 2],
        device: &Device,
    ) -> Result<bool, PlanError> {
        let Dims {
            head_dim,
            value_dim,
            ..
        } = self.dims;
        let state_shared = state.shared_bytes(head_dim, value_dim);
        let mut apply_shared = apply.slots_bytes(head_dim, value_dim, APPLY_WARPS);
        if apply.state_in_shared {
            apply_shared += self.head_state_bytes();
        }
        if state_shared.max(apply_shared) > device.shared_bytes as usize {
            return Ok(false);
        }
        let heads = self.heads();
        let panels = value_dim.div_ceil(state.panel);
        self.split_keys(
            device.multiprocessors as usize * state.blocks / panels,
            state.tokens,
        );
        let block = APPLY_WARPS * 16 * apply.query_tiles;
        let wanted = (device.multiprocessors as usize * apply.blocks / heads).max(1);
        self.queries_per_block = self
            .dims
            .queries
            .div_ceil(wanted)
            .clamp(MIN_SPLIT, MAX_QUERIES)
            .next_multiple_of(block);
        self.partial_bytes = self.all_partials(4);
        self.state_bytes = heads * self.head_state_bytes();
        let tiles = value_dim / 8 + 1;
        let blocks = self.dims.queries.div_ceil(self.queries_per_block);
        self.steps = vec![
            Step {
                kernel: format!("linfusion_state_{}", names[0]),
                grid: grid(heads, self.splits, panels)?,
                threads: state.threads,
                shared_bytes: state_shared,
            },
            Step {
                kernel: format!("linfusion_reduce_{}", suffix(self.element)),
                grid: grid(heads, tiles, 1)?,
                threads: 128,
                shared_bytes: reduce_shared(head_dim),
            },
            Step {
                kernel: format!("linfusion_apply_{}", names[1]),
                grid: grid(heads, blocks, 1)?,
                threads: APPLY_WARPS * 32,
                shared_bytes: apply_shared,
            },
        ];
        Ok(true)
    }

    fn plain(&mut self, device: &Device) -> Result<(), PlanError> {
        let Dims {
            queries,
            head_dim,
            value_dim,
            ..
        } = self.dims;
        let heads = self.heads();
        let tiles = head_dim.div_ceil(PLAIN_TILE) * value_dim.div_ceil(PLAIN_TILE);
        self.split_keys(device.multiprocessors as usize * 4 / tiles, PLAIN_SLAB);
        let number = self.element.accumulator().size();
        let length = self.partial_length();
        self.partial_bytes = self.all_partials(number);
        self.state_bytes = heads.saturating_mul(length * number);
        let slabs = 2 * PLAIN_SLAB * PLAIN_TILE;
        let element = suffix(self.element);
        let step = |kernel, grid, numbers: usize| Step {
            kernel: format!("linfusion_plain_{kernel}_{element}"),
            grid,
            threads: PLAIN_THREADS,
            shared_bytes: numbers * number,
        };
        self.steps = vec![
            step("state", grid(heads, self.splits, tiles)?, slabs),
            step("reduce", grid(heads, length.div_ceil(PLAIN_THREADS), 1)?, 0),
            step(
                "apply",
                grid(
                    heads,
                    queries.div_ceil(PLAIN_TILE),
                    value_dim.div_ceil(PLAIN_TILE),
                )?,
                slabs + PLAIN_SLAB,
            ),
        ];
        Ok(())
    }

    /// Cuts the keys so that `blocks` blocks share them, one wave of a device or whole waves.
    fn split_keys(&mut self, blocks: usize, tokens: usize) {
        let keys = self.dims.keys.max(1);
        let per_head = (blocks / self.heads()).max(1);
        let share = keys.div_ceil(per_head);
        let waves = share.div_ceil(MAX_SPLIT);
        self.keys_per_split = share
            .div_ceil(waves)
            .max(MIN_SPLIT)
            .next_multiple_of(tokens);
        self.splits = keys.div_ceil(self.keys_per_split);
    }

    /// Bytes of all partial sums, numbers of `size` bytes.
    fn all_partials(&self, size: usize) -> usize {
        let numbers = self.heads() * self.splits;
        numbers
            .saturating_mul(self.partial_length() * size)
            .saturating_add(255)
            / 256
            * 256
    }

    /// Sums of one head: S and z.
    fn partial_length(&self) -> usize {
        self.dims.head_dim * (self.dims.value_dim + 1)
    }

    /// Bytes of one head's sums for phase 2 (`StateLayout` in linear_reduce.cuh).
    fn head_state_bytes(&self) -> usize {
        let tiles = self.dims.value_dim / 8 + 1;
        tiles * self.dims.head_dim.div_ceil(16) * 256 + (tiles * 4).next_multiple_of(16)
    }
}

fn reduce_shared(head_dim: usize) -> usize {
    (33 + 8 * head_dim) * 4
}
