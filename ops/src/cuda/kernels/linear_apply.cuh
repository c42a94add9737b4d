// LinFusionAttention, second phase: out = phi(q) S / (phi(q) z + eps), on tensor cores.
#pragma once
#include "linear_reduce.cuh"

#ifdef LF_TENSOR_CORES
namespace lf {

/// How a warp computes its rows: `RowTiles` times 16 queries at a time, `Stages` such blocks under way. `Dim` and
/// `ValueDim` are 0 where known at run time only; then `Steps` bounds ceil(D / 16) and the sums stay in global memory.
template <typename Element, int Dim, int ValueDim, int Steps_, int RowTiles_, int Stages_>
struct ApplyShape {
    typedef Element T;
    static constexpr int Steps = Steps_;
    static constexpr int RowTiles = RowTiles_;
    static constexpr int Stages = Stages_;
    static constexpr int Queries = 16 * RowTiles;
    static constexpr bool StateInShared = Dim != 0;

    int head_dim, value_dim;

    LF_DEVICE explicit ApplyShape(const LfLinear& p)
        : head_dim(Dim ? Dim : p.head_dim), value_dim(ValueDim ? ValueDim : p.value_dim) {}

    LF_DEVICE int dim() const { return Dim ? Dim : head_dim; }
    LF_DEVICE int value() const { return ValueDim ? ValueDim : value_dim; }
    LF_DEVICE int steps() const { return (dim() + 15) / 16; }
    LF_DEVICE int query_row() const { return row_bytes(dim()); }
    LF_DEVICE int out_row() const { return row_bytes(value()); }
    /// A block of queries, later of results.
    LF_DEVICE int slot_bytes() const { return Queries * larger(query_row(), out_row()); }
};

/// One warp's work on the queries of a block.
template <typename Shape>
struct Apply {
    typedef typename Shape::T T;
    Shape shape;
    StateLayout layout;
    Rows<const T> q;
    Rows<T> out;
    /// Fragments and factors, in shared or global memory.
    const unsigned char* state;
    /// This warp's slots.
    unsigned char* slots;
    int64_t end;
    float eps;

    LF_DEVICE Apply(const LfLinear& p, int batch, int head, const unsigned char* state, unsigned char* slots)
        : shape(p), layout(shape.dim(), shape.value()), q(p.q, batch, head), out(p.out, batch, head), state(state),
          slots(slots + warp_index() * Shape::Stages * shape.slot_bytes()), end(0), eps(p.eps) {}

    LF_DEVICE void fetch(int slot, int64_t start) {
        unsigned char* to = slots + slot * shape.slot_bytes();
        const int chunks = shape.dim() / 8;
        for (int i = lane_index(); i < Shape::Queries * chunks; i += 32) {
            const int token = i / chunks, chunk = i - token * chunks;
            const bool valid = start + token < end;
            copy_async(to + token * shape.query_row() + chunk * 16, q.row(valid ? start + token : start) + chunk * 8, valid);
        }
    }

    /// The results of the queries in a slot, which they take the place of.
    LF_DEVICE void compute(int slot, int64_t start) {
        unsigned char* rows = slots + slot * shape.slot_bytes();
        const int lane = lane_index(), g = lane >> 2, t = lane & 3;
        FragmentA features[Shape::RowTiles][Shape::Steps];
        const unsigned char* at = rows + (lane & 15) * shape.query_row() + (lane >> 4) * 16;
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            LF_UNROLL
            for (int s = 0; s < Shape::Steps; ++s) {
                if (s >= shape.steps()) break;
                // The second half of the last step may lie behind the row, where a copy may be under way.
                const bool whole = s * 16 + 8 < shape.dim();
                load_matrices(features[m][s], at + m * 16 * shape.query_row() + s * 32 - (whole ? 0 : (lane >> 4) * 16));
                LF_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const bool inside = i < 2 || whole;
                    features[m][s][i] = inside ? feature_pair<T>(features[m][s][i]) : 0u;
                }
            }
        }
        const float* scales = reinterpret_cast<const float*>(state + layout.scales());
        float factors[Shape::RowTiles][2];
        LF_UNROLL
        for (int m = 0; m < Shape::RowTiles; ++m) {
            FragmentC norm;
            multiply_tile(norm, features[m], layout.tiles - 1);
            const float scale = scales[layout.tiles - 1];
            factors[m][0] = 1.0f / ((norm[0] + norm[1]) * scale + eps);
            factors[m][1] = 1.0f / ((norm[2] + norm[3]) * scale + eps);
        }
        // All lanes have read their queries; the results may take their place.
        warp_barrier();
        for (int n = 0; n + 1 < layout.tiles; ++n) {
            const float scale = scales[n];
            LF_UNROLL
            for (int m = 0; m < Shape::RowTiles; ++m) {
                FragmentC sums;
                multiply_tile(sums, features[m], n);
                LF_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const float factor = scale * factors[m][half];
                    const uint32_t pair = pack<T>(sums[half * 2] * factor, sums[half * 2 + 1] * factor);
                    unsigned char* to = rows + (m * 16 + half * 8 + g) * shape.out_row() + n * 16 + t * 4;
                    *reinterpret_cast<uint32_t*>(to) = pair;
                }
            }
        }
        warp_barrier();
        const int chunks = shape.value() / 8;
        for (int i = lane; i < Shape::Queries * chunks; i += 32) {
            const int token = i / chunks, chunk = i - token * chunks;
            if (start + token >= end) continue;
            *reinterpret_cast<Bytes16*>(out.row(start + token) + chunk * 8) =
                *reinterpret_cast<const Bytes16*>(rows + token * shape.out_row() + chunk * 16);
        }
    }

    LF_DEVICE void multiply_tile(FragmentC& sums, const FragmentA (&features)[Shape::Steps], int tile) const {
        LF_UNROLL
        for (int c = 0; c < 4; ++c) sums[c] = 0.0f;
        const unsigned char* fragments = state + tile * layout.tile_bytes() + lane_index() * 8;
        LF_UNROLL
        for (int s = 0; s < Shape::Steps; ++s) {
            if (s >= shape.steps()) break;
            const Bytes8 words = *reinterpret_cast<const Bytes8*>(fragments + s * 256);
            const FragmentB b = {words.words[0], words.words[1]};
            multiply_add<T>(sums, features[s], b);
        }
    }

    /// Queries [start, stop), the block's warps taking turns.
    LF_DEVICE void run(int64_t start, int64_t stop) {
        end = stop;
        const int warps = block_size() / 32;
        const int64_t step = int64_t(warps) * Shape::Queries;
        int64_t next = start + warp_index() * Shape::Queries;
        LF_UNROLL
        for (int s = 0; s < Shape::Stages - 1; ++s) {
            if (next < stop) fetch(s, next);
            copy_commit();
            next += step;
        }
        int slot = 0;
        for (int64_t at = start + warp_index() * Shape::Queries; at < stop; at += step) {
            copy_wait<Shape::Stages - 2>();
            warp_barrier();
            if (next < stop) fetch(slot == 0 ? Shape::Stages - 1 : slot - 1, next);
            copy_commit();
            next += step;
            compute(slot, at);
            slot = slot + 1 == Shape::Stages ? 0 : slot + 1;
        }
        copy_wait<0>();
    }
};

/// Grid: x = head + B·H * block of queries. Shared memory: the state where it is kept there, then the warps' slots.
template <typename Shape>
LF_DEVICE void apply_kernel(const LfLinear& p) {
    const int all_heads = p.batch * p.heads;
    const int head = block_x() % all_heads;
    const int64_t start = block_x() / all_heads * p.queries_per_block;
    const Shape shape(p);
    const StateLayout layout(shape.dim(), shape.value());
    const unsigned char* state = reinterpret_cast<const unsigned char*>(p.state) + int64_t(head) * layout.bytes();
    unsigned char* shared = shared_memory();
    if (Shape::StateInShared) {
        for (int i = thread_index() * 16; i < layout.bytes(); i += block_size() * 16)
            *reinterpret_cast<Bytes16*>(shared + i) = *reinterpret_cast<const Bytes16*>(state + i);
        barrier();
        state = shared;
        shared += layout.bytes();
    }
    Apply<Shape> apply(p, head / p.heads, head % p.heads, state, shared);
    apply.run(start, smaller(p.queries, start + p.queries_per_block));
}

/// Both phases in one launch, for few tokens: a block a head. Grid: x = head.
/// Shared memory: the state; then the partial sums and what the first phase uses, later what the second does.
template <typename First, typename Second>
LF_DEVICE void fused_kernel(const LfLinear& p) {
    const int batch = block_x() / p.heads, head = block_x() % p.heads;
    const StateLayout layout(p.head_dim, p.value_dim);
    unsigned char* shared = shared_memory();
    unsigned char* rest = shared + round_up(layout.bytes(), 128);
    float* partial = reinterpret_cast<float*>(rest);
    unsigned char* free = rest + round_up(int(partial_length(p.head_dim, p.value_dim)) * 4, 128);
    {
        State<First> sums(p, batch, head, 0, free);
        sums.accumulate(0, p.keys);
        sums.merge_slices();
        sums.store(partial, partial + int64_t(p.head_dim) * p.value_dim);
    }
    barrier();
    for (int tile = 0; tile < layout.tiles; ++tile) {
        reduce_tile<typename First::T>(p, partial, shared, tile, reinterpret_cast<float*>(free));
        barrier();
    }
    Apply<Second> apply(p, batch, head, shared, rest);
    apply.run(0, p.queries);
}

} // namespace lf
#endif
