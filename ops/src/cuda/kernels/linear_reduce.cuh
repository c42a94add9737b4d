// LinFusionAttention, between the phases: the splits' sums are added up in order, divided by the number of keys, and
// laid out as the second phase's products read them.
#pragma once
#include "linear_state.cuh"

#ifdef LF_TENSOR_CORES
namespace lf {

/// Where a head's sums lie for the second phase.
///
/// Columns of S in tiles of 8, each as the B fragments of its ceil(D / 16) products: [tile][step][lane][2 words].
/// After Dv / 8 tiles of S comes one of z: even columns hold z rounded, odd columns what rounding lost, so that the
/// normaliser is exact to single precision. Each tile is scaled by a power of two so that half precision neither
/// over- nor underflows, whatever the number of keys; then come the factors that undo it, a float a tile.
struct StateLayout {
    int steps, tiles;
    LF_DEVICE StateLayout(int head_dim, int value_dim) : steps((head_dim + 15) / 16), tiles(value_dim / 8 + 1) {}

    LF_DEVICE int tile_bytes() const { return steps * 256; }
    LF_DEVICE int scales() const { return tiles * tile_bytes(); }
    LF_DEVICE int bytes() const { return scales() + (tiles * 4 + 15) / 16 * 16; }
};

/// The power of two that brings `largest` between 512 and 1024.
LF_DEVICE float scale_for(float largest) {
    const int exponent = int(float_bits(largest) >> 23 & 0xff);
    // Zeros, and what is no number: left as it is.
    if (exponent == 0 || exponent == 0xff) return 1.0f;
    const int wanted = 127 + 9 - (exponent - 127);
    return bits_float(uint32_t(smaller(larger(wanted, 1), 253)) << 23);
}

/// Adds up one tile of a head: `partial` of the head's first split, all threads of the block.
/// `scratch`: 33 floats and 8 floats for each row of a tile.
template <typename T>
LF_DEVICE void reduce_tile(const LfLinear& p, const float* partial, unsigned char* state, int tile, float* scratch) {
    const StateLayout layout(p.head_dim, p.value_dim);
    const int64_t length = partial_length(p.head_dim, p.value_dim);
    const bool is_norm = tile + 1 == layout.tiles;
    const int columns = is_norm ? 1 : 8;
    const float mean = 1.0f / float(larger(p.keys, int64_t(1)));
    float* values = scratch + 33;
    float largest = 0.0f;
    for (int i = thread_index(); i < p.head_dim * columns; i += block_size()) {
        const float* from = partial + int64_t(tile) * p.head_dim * 8 + i;
        float sum = 0.0f;
        LF_UNROLL_BY(8)
        for (int s = 0; s < p.splits; ++s) sum += from[s * length];
        sum *= mean;
        values[i] = sum;
        largest = larger(largest, fabsf(sum));
    }
    const float scale = scale_for(block_largest(largest, scratch));
    T* fragments = reinterpret_cast<T*>(state + tile * layout.tile_bytes());
    for (int i = thread_index(); i < layout.steps * 16 * 8; i += block_size()) {
        const int d = i / 8, column = i % 8;
        float value = 0.0f;
        if (d < p.head_dim) value = values[is_norm ? d : i] * scale;
        T rounded;
        from_float(rounded, value);
        if (is_norm && column % 2 == 1) from_float(rounded, value - to_float(rounded));
        const int row = d % 16;
        const int lane = column * 4 + row % 8 / 2;
        fragments[((d / 16 * 32 + lane) * 2 + row / 8) * 2 + row % 2] = rounded;
    }
    if (thread_index() == 0) reinterpret_cast<float*>(state + layout.scales())[tile] = 1.0f / scale;
}

/// Grid: x = tile + tiles * head. Shared memory: 33 + 8·D floats.
template <typename T>
LF_DEVICE void reduce_kernel(const LfLinear& p) {
    const StateLayout layout(p.head_dim, p.value_dim);
    const int tile = block_x() % layout.tiles;
    const int64_t head = block_x() / layout.tiles;
    const float* partial = reinterpret_cast<const float*>(p.partial) +
                           head * p.splits * partial_length(p.head_dim, p.value_dim);
    unsigned char* state = reinterpret_cast<unsigned char*>(p.state) + head * layout.bytes();
    reduce_tile<T>(p, partial, state, tile, reinterpret_cast<float*>(shared_memory()));
}

} // namespace lf
#endif
