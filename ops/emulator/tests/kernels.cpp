// Kernels that test the emulator itself: right ones, and ones with the mistakes that it must find.
#include "numbers.cuh"

namespace lf {

/// c = a b for 16 x 16 matrices of half precision, b by columns; k steps of 16 through two stages.
/// q: a [16][16 steps], k: b [16][16 steps] by columns, out: c [16][16] in single precision.
LF_DEVICE void product_kernel(const LfLinear& p) {
    unsigned char* shared = shared_memory();
    const int lane = lane_index(), steps = int(p.keys);
    const F16* a = reinterpret_cast<const F16*>(p.q.data);
    const F16* b = reinterpret_cast<const F16*>(p.k.data);
    const auto fetch = [&](int step) {
        unsigned char* to = shared + step % 2 * 1024;
        const int row = lane / 2, half = lane % 2;
        copy_async(to + row * 32 + half * 16, a + (row * steps + step) * 16 + half * 8, true);
        copy_async(to + 512 + row * 32 + half * 16, b + (row * steps + step) * 16 + half * 8, true);
    };
    FragmentC sums[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
    fetch(0);
    copy_commit();
    for (int step = 0; step < steps; ++step) {
        copy_wait<0>();
        barrier();
        if (step + 1 < steps) fetch(step + 1);
        copy_commit();
        const unsigned char* from = shared + step % 2 * 1024;
        FragmentA rows;
        load_matrices(rows, from + (lane & 15) * 32 + (lane >> 4) * 16);
        uint32_t columns[4];
        load_matrices(columns, from + 512 + ((lane & 7) + (lane >> 4) * 8) * 32 + (lane >> 3 & 1) * 16);
        const FragmentB first = {columns[0], columns[1]}, second = {columns[2], columns[3]};
        multiply_add<F16>(sums[0], rows, first);
        multiply_add<F16>(sums[1], rows, second);
    }
    float* c = reinterpret_cast<float*>(p.out.data);
    const int g = lane >> 2, t = lane & 3;
    for (int n = 0; n < 2; ++n) {
        for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 16 + n * 8 + 2 * t + i % 2] = sums[n][i];
    }
}

/// out[block] = the sum of q over the block's 256 numbers, by halves in shared memory.
LF_DEVICE void sum_kernel(const LfLinear& p) {
    float* numbers = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    numbers[i] = reinterpret_cast<const float*>(p.q.data)[block_x() * 256 + i];
    for (int half = 128; half > 0; half /= 2) {
        barrier();
        if (i < half) numbers[i] += numbers[i + half];
    }
    if (i == 0) reinterpret_cast<float*>(p.out.data)[block_x()] = numbers[0];
}

/// Reverses 32 numbers of q through shared memory.
LF_DEVICE void reverse_kernel(const LfLinear& p) {
    float* numbers = reinterpret_cast<float*>(shared_memory());
    numbers[lane_index()] = reinterpret_cast<const float*>(p.q.data)[lane_index()];
    warp_barrier();
    reinterpret_cast<float*>(p.out.data)[lane_index()] = numbers[31 - lane_index()];
}

/// Half a warp takes part in a shuffle.
LF_DEVICE void divergence_kernel(const LfLinear&) {
    if (lane_index() < 16) shuffle_xor(1.0f, 1);
    else warp_barrier();
}

/// One warp never comes to the barrier.
LF_DEVICE void deadlock_kernel(const LfLinear&) {
    if (warp_index() == 0) barrier();
}

/// Reads a matrix that isn't in shared memory.
LF_DEVICE void stray_kernel(const LfLinear&) {
    uint32_t r[4];
    load_matrices(r, shared_memory() + lane_index() * 64);
}

/// All numbers come out right, but the second round reads what the warps of the first may not have read yet.
LF_DEVICE void overtaken_kernel(const LfLinear& p) {
    float* numbers = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index(), other = (i + 32) % block_size();
    for (int round = 0; round < 2; ++round) {
        numbers[i] = float(i);
        barrier();
        reinterpret_cast<float*>(p.out.data)[i] = numbers[other];
    }
}

/// A matrix load right behind the stores of the same warp.
LF_DEVICE void hasty_kernel(const LfLinear& p) {
    Bytes16* rows = reinterpret_cast<Bytes16*>(shared_memory());
    rows[lane_index()] = Bytes16{{1, 2, 3, 4}};
    uint32_t r[4];
    load_matrices(r, rows + lane_index());
    reinterpret_cast<uint32_t*>(p.out.data)[lane_index()] = r[0];
}

/// Every block writes the first number of out.
LF_DEVICE void clash_kernel(const LfLinear& p) {
    if (thread_index() == 0) *reinterpret_cast<float*>(p.out.data) = 1.0f;
}

/// Reads the number behind the last of q.
LF_DEVICE void behind_kernel(const LfLinear& p) {
    reinterpret_cast<float*>(p.out.data)[lane_index()] = reinterpret_cast<const float*>(p.q.data)[lane_index() + 1];
}

/// Writes q.
LF_DEVICE void input_kernel(const LfLinear& p) { reinterpret_cast<float*>(p.q.data)[lane_index()] = 0.0f; }

/// Stores behind the end of shared memory.
LF_DEVICE void spill_kernel(const LfLinear&) { reinterpret_cast<float*>(shared_memory())[lane_index() + 1] = 0.0f; }

LF_KERNEL(emulator_overtaken, LfLinear, 64, 1, overtaken_kernel)
LF_KERNEL(emulator_hasty, LfLinear, 32, 1, hasty_kernel)
LF_KERNEL(emulator_clash, LfLinear, 32, 1, clash_kernel)
LF_KERNEL(emulator_behind, LfLinear, 32, 1, behind_kernel)
LF_KERNEL(emulator_input, LfLinear, 32, 1, input_kernel)
LF_KERNEL(emulator_spill, LfLinear, 32, 1, spill_kernel)
LF_KERNEL(emulator_product, LfLinear, 32, 1, product_kernel)
LF_KERNEL(emulator_sum, LfLinear, 256, 1, sum_kernel)
LF_KERNEL(emulator_reverse, LfLinear, 32, 1, reverse_kernel)
LF_KERNEL(emulator_divergence, LfLinear, 32, 1, divergence_kernel)
LF_KERNEL(emulator_deadlock, LfLinear, 64, 1, deadlock_kernel)
LF_KERNEL(emulator_stray, LfLinear, 32, 1, stray_kernel)

} // namespace lf

extern "C" void lf_link_test_kernels() {}
