// Arithmetic that the kernels share: the feature map, minima, maxima, rounded divisions.
#pragma once
#include "params.h"
#include "ptx.cuh"

#ifdef __CUDACC_RTC__
#define INFINITY __int_as_float(0x7f800000)
#else
#include <math.h>
#endif

namespace lf {

constexpr float LOG2_E = 1.4426950408889634f;

/// φ(u) = elu(u) + 1 in single precision, for 16-bit elements: exp2 is good to 2^-22 where the result matters.
LF_DEVICE float feature(float u) { return u > 0.0f ? u + 1.0f : exp2_fast(u * LOG2_E); }

/// φ(u) to the full precision of its type.
LF_DEVICE float feature_exact(float u) { return u > 0.0f ? u + 1.0f : expf(u); }
LF_DEVICE double feature_exact(double u) { return u > 0.0 ? u + 1.0 : exp(u); }

/// φ of both elements of a pair.
template <typename T>
LF_DEVICE uint32_t feature_pair(uint32_t pair) {
    float first, second;
    unpack<T>(pair, first, second);
    return pack<T>(feature(first), feature(second));
}

LF_DEVICE float exponential(float x) { return expf(x); }
LF_DEVICE double exponential(double x) { return exp(x); }

template <typename V>
LF_DEVICE V smaller(V a, V b) {
    return a < b ? a : b;
}
template <typename V>
LF_DEVICE V larger(V a, V b) {
    return a > b ? a : b;
}

LF_DEVICE int round_up(int n, int to) { return (n + to - 1) / to * to; }

/// Bytes from one row of 16-bit elements in shared memory to the next: an odd multiple of 16, so that the eight rows
/// that a matrix load reads lie in different banks.
LF_DEVICE int row_bytes(int width) { return (width / 8) % 2 == 1 ? width * 2 : width * 2 + 16; }

/// The head and the batch element that a block works on, and the addresses of its rows.
template <typename T>
struct Rows {
    T* first;
    int64_t token;

    LF_DEVICE Rows(const LfTensor& tensor, int batch, int head)
        : first(reinterpret_cast<T*>(tensor.data) + batch * tensor.batch + head * tensor.head), token(tensor.token) {}

    LF_DEVICE T* row(int64_t n) const { return first + n * token; }
};

/// The largest of all threads' values; `scratch` has room for 33 floats. All threads of the block take part.
LF_DEVICE float block_largest(float value, float* scratch) {
    LF_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) value = larger(value, shuffle_xor(value, mask));
    if (lane_index() == 0) scratch[warp_index()] = value;
    barrier();
    const int warps = block_size() / 32;
    float all = scratch[0];
    for (int w = 1; w < warps; ++w) all = larger(all, scratch[w]);
    barrier();
    return all;
}

} // namespace lf
