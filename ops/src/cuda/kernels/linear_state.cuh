// LinFusionAttention, first phase: S = sum of phi(k)^T v and z = sum of phi(k) over a split of the keys, on tensor cores.
#pragma once
#include "numbers.cuh"

#ifdef LF_TENSOR_CORES
namespace lf {

/// How a block computes a head's sums of D x Dv: M tiles of 16 rows (of D) by N tiles of 8 columns (of Dv).
///
/// `Dim` and `ValueDim` are 0 where the widths are known at run time only; then a block has a panel of at most
/// `ColumnTiles` of the columns. A warp has `RowTiles` M tiles and all N tiles; `RowWarps` warps have all rows (at run time where the width is);
/// the other warps take other tokens of the block's tile of `Tokens` tokens, of which `Stages` are under way.
template <typename Element, int Dim, int ValueDim, int RowTiles_, int ColumnTiles_, int Tokens_, int Stages_>
struct StateShape {
    typedef Element T;
    static constexpr int RowTiles = RowTiles_;
    static constexpr int ColumnTiles = ColumnTiles_;
    static constexpr int Tokens = Tokens_;
    static constexpr int Stages = Stages_;

    static constexpr int Panel = ColumnTiles * 8;

    int head_dim, value_dim;

    LF_DEVICE StateShape(const LfLinear& p, int panel)
        : head_dim(p.head_dim), value_dim(smaller(Panel, p.value_dim - panel * Panel)) {}

    LF_DEVICE int dim() const { return Dim ? Dim : head_dim; }
    LF_DEVICE int value() const { return ValueDim ? ValueDim : value_dim; }
    LF_DEVICE int column_tiles() const { return value() / 8; }
    LF_DEVICE int row_warps() const { return (dim() + 16 * RowTiles - 1) / (16 * RowTiles); }
    LF_DEVICE int key_row() const { return row_bytes(dim()); }
    LF_DEVICE int value_row() const { return row_bytes(value()); }
    LF_DEVICE int stage_bytes() const { return Tokens * (key_row() + value_row()); }
};

/// Floats of one partial result: for each N tile [D][8], then z [D].
LF_DEVICE int64_t partial_length(int head_dim, int value_dim) { return int64_t(head_dim) * (value_dim + 1); }

/// One block's sums.
template <typename Shape>
struct State {
    typedef typename Shape::T T;
    Shape shape;
    Rows<const T> k, v;
    int64_t end;
    unsigned char* shared;
    int row_warp, slice, slices;
    FragmentC sums[Shape::RowTiles][Shape::ColumnTiles];
    FragmentC norms[Shape::RowTiles];

    LF_DEVICE State(const LfLinear& p, int batch, int head, int panel, unsigned char* shared)
        : shape(p, panel), k(p.k, batch, head), v(p.v, batch, head), end(0), shared(shared) {
        v.first += panel * Shape::Panel;
        const int across = shape.row_warps();
        row_warp = warp_index() % across;
        slice = warp_index() / across;
        slices = block_size() / 32 / across;
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            LF_UNROLL
            for (int c = 0; c < 4; ++c) norms[m][c] = 0.0f;
            LF_UNROLL
            for (int n = 0; n < Shape::ColumnTiles; ++n) {
                LF_UNROLL
                for (int c = 0; c < 4; ++c) sums[m][n][c] = 0.0f;
            }
        }
    }

    /// Begins to copy the tile of tokens at `start` into a stage; tokens behind the end are zeros.
    LF_DEVICE void fetch(int stage, int64_t start) {
        unsigned char* keys = shared + stage * shape.stage_bytes();
        unsigned char* values = keys + Shape::Tokens * shape.key_row();
        copy_rows(keys, shape.key_row(), k, shape.dim() / 8, start);
        copy_rows(values, shape.value_row(), v, shape.value() / 8, start);
    }

    LF_DEVICE void copy_rows(unsigned char* to, int row, const Rows<const T>& from, int chunks, int64_t start) {
        for (int i = thread_index(); i < Shape::Tokens * chunks; i += block_size()) {
            const int token = i / chunks, chunk = i - token * chunks;
            const bool valid = start + token < end;
            const T* source = from.row(valid ? start + token : start) + chunk * 8;
            copy_async(to + token * row + chunk * 16, source, valid);
        }
    }

    /// Adds a stage that has arrived; `count` of its tokens exist.
    LF_DEVICE void add(int stage, int count) {
        const unsigned char* keys = shared + stage * shape.stage_bytes();
        const unsigned char* values = keys + Shape::Tokens * shape.key_row();
        const int lane = lane_index();
        const int per_slice = Shape::Tokens / slices;
        // A: rows of d, columns of tokens; stored by token, so transposed. B: the values, likewise.
        const unsigned char* key_at = keys + ((lane & 7) + (lane >> 4) * 8) * shape.key_row() +
                                      (row_warp * Shape::RowTiles * 16 + (lane >> 3 & 1) * 8) * 2;
        const unsigned char* value_at = values + ((lane & 7) + (lane >> 3 & 1) * 8) * shape.value_row() + (lane >> 4) * 16;
        // Where a row ends in the middle of a load, its last 8 elements are read twice, not what lies behind: that may be
        // under way. The products are left out.
        for (int token = slice * per_slice; token < (slice + 1) * per_slice; token += 16) {
            FragmentA features[Shape::RowTiles];
            LF_UNROLL
            for (int m = 0; m < Shape::RowTiles; ++m) {
                const int first = (row_warp * Shape::RowTiles + m) * 16;
                if (first >= shape.dim()) continue;
                const int back = first + 8 >= shape.dim() ? (lane & 8) * 2 : 0;
                load_matrices_transposed(features[m], key_at + token * shape.key_row() + m * 32 - back);
                LF_UNROLL
                for (int i = 0; i < 4; ++i) features[m][i] = feature_pair<T>(features[m][i]);
            }
            // phi(0) = 1 of a token that doesn't exist counts in S for nothing, since its value is 0; in z it must not.
            const int left = count - token - 2 * (lane & 3);
            const FragmentB ones = {pack<T>(left > 0 ? 1.0f : 0.0f, left > 1 ? 1.0f : 0.0f),
                                    pack<T>(left > 8 ? 1.0f : 0.0f, left > 9 ? 1.0f : 0.0f)};
            LF_UNROLL
            for (int n = 0; n < Shape::ColumnTiles; n += 2) {
                if (n >= shape.column_tiles()) break;
                uint32_t pair[4];
                const int back = n + 1 >= shape.column_tiles() ? lane & 16 : 0;
                load_matrices_transposed(pair, value_at + token * shape.value_row() + n * 16 - back);
                const FragmentB first = {pair[0], pair[1]}, second = {pair[2], pair[3]};
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    if ((row_warp * Shape::RowTiles + m) * 16 >= shape.dim()) continue;
                    multiply_add<T>(sums[m][n], features[m], first);
                    if (n + 1 < Shape::ColumnTiles && n + 1 < shape.column_tiles())
                        multiply_add<T>(sums[m][n + 1], features[m], second);
                }
            }
            LF_UNROLL
            for (int m = 0; m < Shape::RowTiles; ++m) {
                if ((row_warp * Shape::RowTiles + m) * 16 >= shape.dim()) continue;
                multiply_add<T>(norms[m], features[m], ones);
            }
        }
    }

    /// Sums over the keys [start, stop); afterwards shared memory is free.
    LF_DEVICE void accumulate(int64_t start, int64_t stop) {
        end = stop;
        const int64_t tiles = stop > start ? (stop - start + Shape::Tokens - 1) / Shape::Tokens : 0;
        LF_UNROLL
        for (int s = 0; s < Shape::Stages - 1; ++s) {
            if (s < tiles) fetch(s, start + int64_t(s) * Shape::Tokens);
            copy_commit();
        }
        int stage = 0;
        for (int64_t i = 0; i < tiles; ++i) {
            copy_wait<Shape::Stages - 2>();
            barrier();
            // The stage that was read in the last round: all have passed the barrier since.
            const int64_t ahead = i + Shape::Stages - 1;
            if (ahead < tiles) fetch(stage == 0 ? Shape::Stages - 1 : stage - 1, start + ahead * Shape::Tokens);
            copy_commit();
            add(stage, int(smaller(stop - start - i * Shape::Tokens, int64_t(Shape::Tokens))));
            stage = stage + 1 == Shape::Stages ? 0 : stage + 1;
        }
        copy_wait<0>();
        barrier();
    }

    /// Adds the other slices' sums to those of slice 0, in order. Afterwards shared memory is free.
    LF_DEVICE void merge_slices() {
        float* buffer = reinterpret_cast<float*>(shared);
        constexpr int per_thread = Shape::RowTiles * (Shape::ColumnTiles + 1) * 4;
        float* mine = buffer + row_warp * per_thread * 32 + lane_index();
        for (int from = 1; from < slices; ++from) {
            if (slice == from) {
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    LF_UNROLL
                    for (int c = 0; c < 4; ++c) mine[(m * (Shape::ColumnTiles + 1) * 4 + c) * 32] = norms[m][c];
                    LF_UNROLL
                    for (int n = 0; n < Shape::ColumnTiles; ++n) {
                        LF_UNROLL
                        for (int c = 0; c < 4; ++c)
                            mine[((m * (Shape::ColumnTiles + 1) + n + 1) * 4 + c) * 32] = sums[m][n][c];
                    }
                }
            }
            barrier();
            if (slice == 0) {
                LF_UNROLL
                for (int m = 0; m < Shape::RowTiles; ++m) {
                    LF_UNROLL
                    for (int c = 0; c < 4; ++c) norms[m][c] += mine[(m * (Shape::ColumnTiles + 1) * 4 + c) * 32];
                    LF_UNROLL
                    for (int n = 0; n < Shape::ColumnTiles; ++n) {
                        LF_UNROLL
                        for (int c = 0; c < 4; ++c)
                            sums[m][n][c] += mine[((m * (Shape::ColumnTiles + 1) + n + 1) * 4 + c) * 32];
                    }
                }
            }
            barrier();
        }
    }

    /// Writes the merged sums: S from `partial` on, z where it isn't null.
    LF_DEVICE void store(float* partial, float* z) const {
        if (slice != 0) return;
        const int g = lane_index() >> 2, t = lane_index() & 3;
        const int dim = shape.dim();
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            const int row = (row_warp * Shape::RowTiles + m) * 16 + g;
            LF_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int d = row + half * 8;
                if (d >= dim) continue;
                if (t == 0 && z) z[d] = norms[m][half * 2];
                LF_UNROLL
                for (int n = 0; n < Shape::ColumnTiles; ++n) {
                    if (n >= shape.column_tiles()) break;
                    float* to = partial + (int64_t(n) * dim + d) * 8 + 2 * t;
                    to[0] = sums[m][n][half * 2];
                    to[1] = sums[m][n][half * 2 + 1];
                }
            }
        }
    }
};

/// Grid: x = head + B·H * split, y = panel of columns.
template <typename Shape>
LF_DEVICE void state_kernel(const LfLinear& p) {
    const int all_heads = p.batch * p.heads;
    const int at = block_x() % all_heads, split = block_x() / all_heads, panel = block_y();
    State<Shape> state(p, at / p.heads, at % p.heads, panel, shared_memory());
    const int64_t start = split * p.keys_per_split;
    state.accumulate(start, smaller(p.keys, start + p.keys_per_split));
    state.merge_slices();
    float* partial = reinterpret_cast<float*>(p.partial) +
                     (int64_t(at) * p.splits + split) * partial_length(p.head_dim, p.value_dim);
    float* z = panel == 0 ? partial + int64_t(p.head_dim) * p.value_dim : nullptr;
    state.store(partial + int64_t(p.head_dim) * panel * Shape::Panel, z);
}

} // namespace lf
#endif
