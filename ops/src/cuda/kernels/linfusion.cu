// Every kernel, under the names that `ops/src/cuda/plan` launches.
#include "linear_apply.cuh"
#include "plain.cuh"
#include "window.cuh"
#include "window_plain.cuh"

namespace lf {

#ifdef LF_TENSOR_CORES
// Of a width D = Dv: rows of a warp in phase 1, warps across them and threads, tokens and stages of a block, its
// share of a multiprocessor; queries and stages of a warp in phase 2.
#define LF_LINEAR(T, name, D, ROWS, THREADS, TOKENS, STAGES, BLOCKS, QUERY_TILES, SLOTS, APPLY_BLOCKS)                 \
    typedef StateShape<T, D, D, ROWS, D / 8, TOKENS, STAGES> State_##name##_##D;                                       \
    typedef ApplyShape<T, D, D, (D + 15) / 16, QUERY_TILES, SLOTS> Apply_##name##_##D;                                 \
    LF_KERNEL(linfusion_state_##name##_d##D, LfLinear, THREADS, BLOCKS, state_kernel<State_##name##_##D>)              \
    LF_KERNEL(linfusion_apply_##name##_d##D, LfLinear, 128, APPLY_BLOCKS, apply_kernel<Apply_##name##_##D>)

// The first phase's stages for 40 elements: four blocks fit into the shared memory of data-centre GPUs, two into the 100 KB
// of others, where registers for more would be bought with spills.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
#define LF_BLOCKS_40 2
#else
#define LF_BLOCKS_40 4
#endif

// Both phases in one launch: warps, tokens and stages of the first.
#define LF_FUSED(T, name, D, ROWS, THREADS, TOKENS, STAGES, QUERY_TILES, SLOTS)                                        \
    typedef StateShape<T, D, D, ROWS, D / 8, TOKENS, STAGES> FusedState_##name##_##D;                                  \
    typedef ApplyShape<T, D, D, (D + 15) / 16, QUERY_TILES, SLOTS> FusedApply_##name##_##D;                            \
    LF_KERNEL(linfusion_fused_##name##_d##D, LfLinear, THREADS, 1, (fused_kernel<FusedState_##name##_##D, FusedApply_##name##_##D>))

// Of any widths that are multiples of 8, D up to 256, in panels of columns of the number in the name.
#define LF_ANY(T, name, WIDTH, TOKENS, STAGES)                                                                         \
    typedef StateShape<T, 0, 0, 1, WIDTH / 8, TOKENS, STAGES> State_##name##_any##WIDTH;                               \
    LF_KERNEL(linfusion_state_##name##_any##WIDTH, LfLinear, 512, 1, state_kernel<State_##name##_any##WIDTH>)

#define LF_TYPE(T, name)                                                                                               \
    LF_LINEAR(T, name, 40, 3, 128, 64, 4, LF_BLOCKS_40, 2, 4, 4)                                                       \
    LF_LINEAR(T, name, 64, 4, 128, 64, 4, 2, 2, 3, 3)                                                                  \
    LF_LINEAR(T, name, 72, 3, 128, 64, 4, 2, 2, 3, 3)                                                                  \
    LF_LINEAR(T, name, 80, 3, 128, 64, 4, 2, 2, 3, 2)                                                                  \
    LF_LINEAR(T, name, 128, 2, 128, 32, 4, 2, 1, 3, 2)                                                                 \
    LF_LINEAR(T, name, 160, 1, 320, 32, 4, 1, 1, 2, 2)                                                                 \
    LF_FUSED(T, name, 40, 3, 256, 128, 4, 1, 3)                                                                        \
    LF_FUSED(T, name, 64, 4, 256, 128, 3, 1, 3)                                                                        \
    LF_FUSED(T, name, 72, 3, 256, 64, 4, 1, 3)                                                                         \
    LF_FUSED(T, name, 80, 3, 256, 64, 4, 1, 3)                                                                         \
    LF_FUSED(T, name, 128, 2, 256, 32, 4, 1, 2)                                                                        \
    LF_FUSED(T, name, 160, 1, 320, 16, 4, 1, 2)                                                                        \
    LF_ANY(T, name, 64, 32, 3)                                                                                         \
    LF_ANY(T, name, 128, 32, 3)                                                                                        \
    typedef ApplyShape<T, 0, 0, 16, 1, 2> Apply_##name##_any;                                                          \
    LF_KERNEL(linfusion_apply_##name##_any, LfLinear, 128, 1, apply_kernel<Apply_##name##_any>)                        \
    LF_KERNEL(linfusion_reduce_##name, LfLinear, 128, 1, reduce_kernel<T>)

LF_TYPE(F16, f16)
LF_TYPE(BF16, bf16)

// Heads of up to so many elements: tiles of queries a warp, keys at a time, blocks of a multiprocessor.
#define LF_WINDOW(T, name, WIDTH, ROWS, KEYS, BLOCKS)                                                                  \
    typedef FlashShape<T, WIDTH, ROWS, KEYS> Flash_##name##_##WIDTH;                                                   \
    LF_KERNEL(linfusion_window_##name##_w##WIDTH, LfWindow, Flash_##name##_##WIDTH::Threads, BLOCKS,                   \
              window_kernel<Flash_##name##_##WIDTH>)                                                                   \
    LF_KERNEL(linfusion_window_text_##name##_w##WIDTH, LfWindow, Flash_##name##_##WIDTH::Threads, BLOCKS,              \
              window_text_kernel<Flash_##name##_##WIDTH>)

#define LF_WINDOWS(T, name)                                                                                            \
    LF_WINDOW(T, name, 64, 2, 64, 4)                                                                                   \
    LF_WINDOW(T, name, 80, 2, 32, 4)                                                                                   \
    LF_WINDOW(T, name, 128, 1, 64, 2)                                                                                  \
    LF_WINDOW(T, name, 256, 1, 16, 2)                                                                                  \
    LF_KERNEL(linfusion_window_combine_##name, LfWindow, 128, 1, window_combine_kernel<T>)

LF_WINDOWS(F16, f16)
LF_WINDOWS(BF16, bf16)
#endif

#define LF_PLAIN(T, name)                                                                                              \
    LF_KERNEL(linfusion_plain_state_##name, LfLinear, 256, 1, plain_state_kernel<T>)                                   \
    LF_KERNEL(linfusion_plain_reduce_##name, LfLinear, 256, 1, plain_reduce_kernel<T>)                                 \
    LF_KERNEL(linfusion_plain_apply_##name, LfLinear, 256, 1, plain_apply_kernel<T>)

LF_PLAIN(F16, f16)
LF_PLAIN(BF16, bf16)
LF_PLAIN(float, f32)
LF_PLAIN(double, f64)

#define LF_WINDOW_PLAIN(T, name) LF_KERNEL(linfusion_window_plain_##name, LfWindow, 128, 1, window_plain_kernel<T>)

LF_WINDOW_PLAIN(F16, f16)
LF_WINDOW_PLAIN(BF16, bf16)
LF_WINDOW_PLAIN(float, f32)
LF_WINDOW_PLAIN(double, f64)

} // namespace lf
