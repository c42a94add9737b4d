// What the host passes to a kernel: one structure by value.
//
// The Rust side has the same structures in `ops/src/cuda/params.rs`; the emulator refuses other sizes. Pointers are device addresses; strides and counts are in elements unless named bytes.
#pragma once

#ifdef __CUDACC_RTC__
// The runtime compiler has no headers of the host.
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

/// Where element (b, h, n, i) of a tensor lies: data + b*batch + h*head + n*token + i.
struct LfTensor {
    uint64_t data;
    int64_t batch;
    int64_t head;
    int64_t token;
};

/// Kernels of LinFusionAttention. Grids are documented with each kernel.
struct LfLinear {
    LfTensor q, k, v, out;
    /// Sums of each split of the keys: per head and split, see `StateLayout` in linear.cuh.
    uint64_t partial;
    /// The sums as the second phase reads them, per head.
    uint64_t state;
    int64_t queries;
    int64_t keys;
    int64_t keys_per_split;
    int64_t queries_per_block;
    int32_t batch;
    int32_t heads;
    int32_t splits;
    /// Width of a head of q and k.
    int32_t head_dim;
    /// Width of a head of v and out.
    int32_t value_dim;
    float eps;
};

/// Kernels of WindowAttention.
struct LfWindow {
    LfTensor q, k, v, out;
    /// Results of each split of the keys for text queries, see window_text.cuh.
    uint64_t partial;
    int64_t tokens;
    /// First token of the image and of the text.
    int64_t image_start;
    int64_t text_start;
    int64_t keys_per_split;
    int32_t batch;
    int32_t heads;
    int32_t splits;
    int32_t head_dim;
    int32_t value_dim;
    /// Text tokens P.
    int32_t text;
    /// The image.
    int32_t rows, cols;
    /// The window, or the bounding box of a circle.
    int32_t window_rows, window_cols;
    /// Square of the radius; 0: the window is rectangular.
    int64_t radius_squared;
    /// Factor on q·k.
    double scale;
    /// 1: the window is shifted inside at the border; 0: it is cut there.
    int32_t clamp;
};
