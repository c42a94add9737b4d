// WindowAttention without tensor cores: every element type and head size. A warp a query; sums in single precision, in
// double for double.
#pragma once
#include "plain.cuh"
#include "window_keys.cuh"

namespace lf {

/// Queries of a block.
constexpr int PLAIN_QUERIES = 4;

/// One warp's query. Its shared memory: the query [D], sums [Dv], weights [32], tokens [32] of 4 bytes.
template <typename T, typename KeyList>
LF_DEVICE void plain_attend(const LfWindow& p, const KeyList& keys, const Reach& reach, int batch, int head, int query,
                            unsigned char* shared) {
    typedef typename Accumulator<T>::Type A;
    A* const query_row = reinterpret_cast<A*>(shared);
    A* const sums = query_row + p.head_dim;
    A* const weights = sums + p.value_dim;
    int* const tokens = reinterpret_cast<int*>(weights + 32);
    const Rows<const T> q(p.q, batch, head), k(p.k, batch, head), v(p.v, batch, head);
    const Rows<T> out(p.out, batch, head);
    const int lane = lane_index();
    for (int i = lane; i < p.head_dim; i += 32) query_row[i] = A(to_float(q.row(query)[i])) * A(p.scale);
    for (int i = lane; i < p.value_dim; i += 32) sums[i] = 0;
    warp_barrier();
    A top = -INFINITY, total = 0;
    const int count = keys.count();
    for (int first = 0; first < count; first += 32) {
        const Key key = keys.at(first + lane);
        A score = -INFINITY;
        if (key.row != NO_QUERY && reach.has(key.row, key.column)) {
            const T* row = k.row(key.token);
            score = 0;
            for (int i = 0; i < p.head_dim; ++i) score += query_row[i] * A(to_float(row[i]));
        }
        A largest = larger(top, score);
        for (int mask = 16; mask > 0; mask /= 2) largest = larger(largest, shuffle_xor(largest, mask));
        const A base = largest == A(-INFINITY) ? A(0) : largest;
        const A before = exponential(top - base);
        const A weight = exponential(score - base);
        top = largest;
        A sum = weight;
        for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        total = total * before + sum;
        weights[lane] = weight;
        tokens[lane] = key.token;
        warp_barrier();
        const int here = smaller(32, count - first);
        for (int c = lane; c < p.value_dim; c += 32) {
            A column = sums[c] * before;
            for (int i = 0; i < here; ++i) column += weights[i] * A(to_float(v.row(tokens[i])[c]));
            sums[c] = column;
        }
        warp_barrier();
    }
    for (int c = lane; c < p.value_dim; c += 32) from_float(out.row(query)[c], sums[c] / total);
}

/// Grid: x = head + B·H * 4 tokens. Shared memory: a warp each, in multiples of 16 bytes.
template <typename T>
LF_DEVICE void window_plain_kernel(const LfWindow& p) {
    typedef typename Accumulator<T>::Type A;
    const int all_heads = p.batch * p.heads;
    const int at = block_x() % all_heads, batch = at / p.heads, head = at % p.heads;
    const int64_t query = int64_t(block_x() / all_heads) * PLAIN_QUERIES + warp_index();
    if (query >= p.tokens) return;
    const int bytes = round_up((p.head_dim + p.value_dim + 32) * int(sizeof(A)) + 32 * 4, 16);
    unsigned char* shared = shared_memory() + warp_index() * bytes;
    const int64_t pixel = query - p.image_start;
    if (pixel >= 0 && pixel < int64_t(p.rows) * p.cols) {
        const int y = int(pixel / p.cols), x = int(pixel % p.cols);
        const ImageKeys keys(p, y, y, x, x);
        plain_attend<T>(p, keys, Reach::of(p, keys, y, x), batch, head, int(query), shared);
    } else {
        const AllKeys keys{0, int(p.tokens)};
        plain_attend<T>(p, keys, Reach::of(p, keys, 0, 0), batch, head, int(query), shared);
    }
}

} // namespace lf
