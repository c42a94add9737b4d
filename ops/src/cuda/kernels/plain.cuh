// LinFusionAttention without tensor cores: every element type and head size, for devices before sm_80 and for what the
// other kernels don't take. Sums in single precision, in double for double.
#pragma once
#include "numbers.cuh"

namespace lf {

/// The type that sums of T are taken in.
template <typename T>
struct Accumulator {
    typedef float Type;
};
template <>
struct Accumulator<double> {
    typedef double Type;
};

/// A block of 256 threads computes 64 x 64 results, each thread 4 x 4, from slabs of 16.
constexpr int PLAIN_TILE = 64;
constexpr int PLAIN_SLAB = 16;
constexpr int PLAIN_THREADS = 256;

/// Grid: x = head + B·H * split, y = tile of S. Shared memory: 2·16·64 sums.
/// Partial sums of a head and split: S [D][Dv], then z [D].
template <typename T>
LF_DEVICE void plain_state_kernel(const LfLinear& p) {
    typedef typename Accumulator<T>::Type A;
    const int all_heads = p.batch * p.heads;
    const int head = block_x() % all_heads, split = block_x() / all_heads;
    const int across = (p.value_dim + PLAIN_TILE - 1) / PLAIN_TILE;
    const int row0 = block_y() / across * PLAIN_TILE, column0 = block_y() % across * PLAIN_TILE;
    const Rows<const T> k(p.k, head / p.heads, head % p.heads), v(p.v, head / p.heads, head % p.heads);
    A* features = reinterpret_cast<A*>(shared_memory());
    A* values = features + PLAIN_SLAB * PLAIN_TILE;
    const int row = thread_index() / 16 * 4, column = thread_index() % 16 * 4;
    A sums[4][4], norms[4];
    for (int i = 0; i < 4; ++i) {
        norms[i] = 0;
        for (int j = 0; j < 4; ++j) sums[i][j] = 0;
    }
    const int64_t start = split * p.keys_per_split, end = smaller(p.keys, start + p.keys_per_split);
    for (int64_t slab = start; slab < end; slab += PLAIN_SLAB) {
        for (int i = thread_index(); i < PLAIN_SLAB * PLAIN_TILE; i += PLAIN_THREADS) {
            const int64_t token = slab + i / PLAIN_TILE;
            const int d = row0 + i % PLAIN_TILE, c = column0 + i % PLAIN_TILE;
            const bool exists = token < end;
            features[i] = exists && d < p.head_dim ? feature_exact(A(to_float(k.row(token)[d]))) : A(0);
            values[i] = exists && c < p.value_dim ? A(to_float(v.row(token)[c])) : A(0);
        }
        barrier();
        for (int n = 0; n < PLAIN_SLAB; ++n) {
            const A* f = features + n * PLAIN_TILE + row;
            const A* x = values + n * PLAIN_TILE + column;
            LF_UNROLL
            for (int i = 0; i < 4; ++i) {
                norms[i] += f[i];
                LF_UNROLL
                for (int j = 0; j < 4; ++j) sums[i][j] += f[i] * x[j];
            }
        }
        barrier();
    }
    A* to = reinterpret_cast<A*>(p.partial) +
            (int64_t(head) * p.splits + split) * int64_t(p.head_dim) * (p.value_dim + 1);
    for (int i = 0; i < 4; ++i) {
        const int d = row0 + row + i;
        if (d >= p.head_dim) break;
        for (int j = 0; j < 4; ++j) {
            const int c = column0 + column + j;
            if (c < p.value_dim) to[int64_t(d) * p.value_dim + c] = sums[i][j];
        }
        if (column0 == 0 && column == 0) to[int64_t(p.head_dim) * p.value_dim + d] = norms[i];
    }
}

/// Adds up the splits in order and divides by the number of keys. Grid: x = head + B·H * block of 256 sums.
template <typename T>
LF_DEVICE void plain_reduce_kernel(const LfLinear& p) {
    typedef typename Accumulator<T>::Type A;
    const int all_heads = p.batch * p.heads;
    const int64_t head = block_x() % all_heads;
    const int64_t length = int64_t(p.head_dim) * (p.value_dim + 1);
    const int64_t i = int64_t(block_x() / all_heads) * PLAIN_THREADS + thread_index();
    if (i >= length) return;
    const A* from = reinterpret_cast<const A*>(p.partial) + head * p.splits * length + i;
    A sum = 0;
    for (int s = 0; s < p.splits; ++s) sum += from[s * length];
    reinterpret_cast<A*>(p.state)[head * length + i] = sum / A(larger(p.keys, int64_t(1)));
}

/// Grid: x = head + B·H * block of 64 queries, y = 64 columns of the output. Shared memory: 2·16·64 + 16 sums.
template <typename T>
LF_DEVICE void plain_apply_kernel(const LfLinear& p) {
    typedef typename Accumulator<T>::Type A;
    const int all_heads = p.batch * p.heads;
    const int head = block_x() % all_heads;
    const int64_t query0 = int64_t(block_x() / all_heads) * PLAIN_TILE;
    const int column0 = block_y() * PLAIN_TILE;
    const Rows<const T> q(p.q, head / p.heads, head % p.heads);
    const Rows<T> out(p.out, head / p.heads, head % p.heads);
    const A* state = reinterpret_cast<const A*>(p.state) + int64_t(head) * p.head_dim * (p.value_dim + 1);
    const A* z = state + int64_t(p.head_dim) * p.value_dim;
    A* features = reinterpret_cast<A*>(shared_memory());
    A* sums_in = features + PLAIN_SLAB * PLAIN_TILE;
    A* mean_key = sums_in + PLAIN_SLAB * PLAIN_TILE;
    const int row = thread_index() / 16 * 4, column = thread_index() % 16 * 4;
    A sums[4][4], norms[4];
    for (int i = 0; i < 4; ++i) {
        norms[i] = 0;
        for (int j = 0; j < 4; ++j) sums[i][j] = 0;
    }
    for (int d0 = 0; d0 < p.head_dim; d0 += PLAIN_SLAB) {
        for (int i = thread_index(); i < PLAIN_SLAB * PLAIN_TILE; i += PLAIN_THREADS) {
            const int d = d0 + i % PLAIN_SLAB;
            const int64_t query = query0 + i / PLAIN_SLAB;
            const bool exists = d < p.head_dim && query < p.queries;
            features[i % PLAIN_SLAB * PLAIN_TILE + i / PLAIN_SLAB] =
                exists ? feature_exact(A(to_float(q.row(query)[d]))) : A(0);
            const int from = d0 + i / PLAIN_TILE, c = column0 + i % PLAIN_TILE;
            sums_in[i] = from < p.head_dim && c < p.value_dim ? state[int64_t(from) * p.value_dim + c] : A(0);
        }
        if (thread_index() < PLAIN_SLAB)
            mean_key[thread_index()] = d0 + thread_index() < p.head_dim ? z[d0 + thread_index()] : A(0);
        barrier();
        for (int d = 0; d < PLAIN_SLAB; ++d) {
            const A* f = features + d * PLAIN_TILE + row;
            const A* s = sums_in + d * PLAIN_TILE + column;
            LF_UNROLL
            for (int i = 0; i < 4; ++i) {
                norms[i] += f[i] * mean_key[d];
                LF_UNROLL
                for (int j = 0; j < 4; ++j) sums[i][j] += f[i] * s[j];
            }
        }
        barrier();
    }
    for (int i = 0; i < 4; ++i) {
        const int64_t query = query0 + row + i;
        if (query >= p.queries) break;
        for (int j = 0; j < 4; ++j) {
            const int c = column0 + column + j;
            if (c < p.value_dim) from_float(out.row(query)[c], sums[i][j] / (norms[i] + A(p.eps)));
        }
    }
}

} // namespace lf
