// What kernels ask of the machine: thread indices, barriers, shuffles, asynchronous copies, matrix
// loads and products.
//
// Compiled by nvcc these are single instructions. Compiled as host C++ (`ops/emulator`) each is a
// call into the emulator, which runs a block's threads as fibers; kernels use nothing of CUDA but
// what is named here, so the same source runs in both.
#pragma once
#include "params.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LF_DEVICE __device__ __forceinline__
#define LF_UNROLL _Pragma("unroll")
#define LF_UNROLL_BY(n) LF_PRAGMA(unroll n)
#define LF_PRAGMA(text) _Pragma(#text)
#else
#define LF_DEVICE inline
#define LF_UNROLL
#define LF_UNROLL_BY(n)
#endif

namespace lf {

/// IEEE half precision as it lies in memory.
struct F16 {
    uint16_t bits;
};
/// Brain float as it lies in memory.
struct BF16 {
    uint16_t bits;
};

/// Registers of one thread for a 16x8x16 product: A 16x16, B 16x8, C 16x8, as PTX's
/// mma.sync.m16n8k16 lays them out. With g = lane / 4 and t = lane % 4:
///   a[0] = A[g][2t..], a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]
///   b[0] = B[2t..][g], b[1] = B[2t+8..][g]
///   c[0..2] = C[g][2t..], c[2..4] = C[g+8][2t..]
typedef uint32_t FragmentA[4];
typedef uint32_t FragmentB[2];
typedef float FragmentC[4];

} // namespace lf

#ifndef __CUDACC__
#include "cuda_shim.h"
#else
namespace lf {

LF_DEVICE int thread_index() { return threadIdx.x; }
LF_DEVICE int block_size() { return blockDim.x; }
LF_DEVICE int block_x() { return blockIdx.x; }
LF_DEVICE int block_y() { return blockIdx.y; }
LF_DEVICE int block_z() { return blockIdx.z; }

/// The block's dynamic shared memory, aligned to 128 bytes.
LF_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char lf_shared[];
    return lf_shared;
}

/// All threads of the block.
LF_DEVICE void barrier() { __syncthreads(); }
/// All threads of the warp.
LF_DEVICE void warp_barrier() { __syncwarp(); }

LF_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
LF_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

LF_DEVICE float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
LF_DEVICE float to_float(BF16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
/// Rounded to nearest even.
LF_DEVICE void from_float(F16& x, float value) { x.bits = __half_as_ushort(__float2half_rn(value)); }
LF_DEVICE void from_float(BF16& x, float value) { x.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

/// 2^x, to 2 units in the last place.
LF_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
LF_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
LF_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
LF_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

LF_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

#if __CUDA_ARCH__ >= 800
#define LF_TENSOR_CORES 1

/// Begins a copy of 16 bytes from global to shared memory; zeros where not `valid`. Both 16-byte aligned.
LF_DEVICE void copy_async(void* shared, const void* global, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
}
/// Closes the group of copies begun so far.
LF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
LF_DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

/// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
LF_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
/// The same, each matrix transposed.
LF_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// c += a * b, sums in single precision.
template <typename T>
LF_DEVICE void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b);
template <>
LF_DEVICE void multiply_add<F16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
LF_DEVICE void multiply_add<BF16>(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif // __CUDA_ARCH__ >= 800

/// Two neighbours, the first in the low half, rounded to nearest even.
template <typename T>
LF_DEVICE uint32_t pack(float first, float second);
template <>
LF_DEVICE uint32_t pack<F16>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
LF_DEVICE uint32_t pack<BF16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

/// What [`pack`] packed.
template <typename T>
LF_DEVICE void unpack(uint32_t pair, float& first, float& second);
template <>
LF_DEVICE void unpack<F16>(uint32_t pair, float& first, float& second) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&pair));
    first = both.x;
    second = both.y;
}
template <>
LF_DEVICE void unpack<BF16>(uint32_t pair, float& first, float& second) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
}

/// Defines a kernel `name` that runs `body(params)` in blocks of at most `threads`, at least `blocks` of them a
/// multiprocessor.
#define LF_KERNEL(name, Params, threads, blocks, body)                                              \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params params) { \
        body(params);                                                                               \
    }

} // namespace lf
#endif // __CUDACC__

namespace lf {

LF_DEVICE float to_float(float x) { return x; }
LF_DEVICE double to_float(double x) { return x; }
LF_DEVICE void from_float(float& x, float value) { x = value; }
LF_DEVICE void from_float(double& x, double value) { x = value; }

/// 8 and 16 bytes that move as one.
struct alignas(8) Bytes8 {
    uint32_t words[2];
};
struct alignas(16) Bytes16 {
    uint32_t words[4];
};

LF_DEVICE int lane_index() { return thread_index() & 31; }
LF_DEVICE int warp_index() { return thread_index() >> 5; }

} // namespace lf
