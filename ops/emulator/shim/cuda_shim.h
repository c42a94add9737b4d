// The machine that kernels see when they are compiled as host C++: what `ptx.cuh` promises, by calls into the emulator.
//
// A thread of a block is a fiber. At a barrier or a warp's collective (shuffle, matrix load, product) it stops until
// the others have come; between those it runs alone, so the order of warps and lanes is the emulator's to choose.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define LF_TENSOR_CORES 1

// Outside of `lf`, of which there are two: see watched.cpp.
namespace lf_emu {

/// A warp's collectives. All lanes must come to the same one at the same place of the program.
enum class Collective { None, WarpBarrier, ShuffleFloat, ShuffleDouble, Load, LoadTransposed, MultiplyF16, MultiplyBF16 };

/// What one lane brings to a collective.
struct Operands {
    float* f;
    double* d;
    int mask;
    uint32_t* registers;
    const void* row;
    float* c;
    const uint32_t* a;
    const uint32_t* b;
};

int thread_index();
int block_size();
int block_index(int axis);
unsigned char* shared_memory();
void block_barrier();
void collective(Collective what, const Operands& operands, const void* site);
void copy_async(void* shared, const void* global, bool valid);
void copy_commit();
void copy_wait(int pending);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);
float brain_to_float(uint16_t bits);
uint16_t float_to_brain(float value);

/// The two builds of the kernels.
enum class Build { Plain, Watched };
#ifdef LF_WATCHED
constexpr Build THIS_BUILD = Build::Watched;
#else
constexpr Build THIS_BUILD = Build::Plain;
#endif

struct Registrar {
    Registrar(Build build, const char* name, void (*run)(const void*), size_t params_bytes, int threads);
};

} // namespace lf_emu

namespace lf {
namespace emu = lf_emu;

// A function of its own, so that its return address is the place in the program.
#define LF_SITE __builtin_return_address(0)
#define LF_COLLECTIVE __attribute__((noinline)) inline

inline int thread_index() { return emu::thread_index(); }
inline int block_size() { return emu::block_size(); }
inline int block_x() { return emu::block_index(0); }
inline int block_y() { return emu::block_index(1); }
inline int block_z() { return emu::block_index(2); }
inline unsigned char* shared_memory() { return emu::shared_memory(); }
inline void barrier() { emu::block_barrier(); }

LF_COLLECTIVE void warp_barrier() { emu::collective(emu::Collective::WarpBarrier, emu::Operands{}, LF_SITE); }

LF_COLLECTIVE float shuffle_xor(float value, int mask) {
    emu::Operands o{};
    o.f = &value;
    o.mask = mask;
    emu::collective(emu::Collective::ShuffleFloat, o, LF_SITE);
    return value;
}
LF_COLLECTIVE double shuffle_xor(double value, int mask) {
    emu::Operands o{};
    o.d = &value;
    o.mask = mask;
    emu::collective(emu::Collective::ShuffleDouble, o, LF_SITE);
    return value;
}

inline float to_float(F16 x) { return emu::half_to_float(x.bits); }
inline float to_float(BF16 x) { return emu::brain_to_float(x.bits); }
inline void from_float(F16& x, float value) { x.bits = emu::float_to_half(value); }
inline void from_float(BF16& x, float value) { x.bits = emu::float_to_brain(value); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float divide_fast(float a, float b) { return a / b; }
inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline void copy_async(void* shared, const void* global, bool valid) { emu::copy_async(shared, global, valid); }
inline void copy_commit() { emu::copy_commit(); }
template <int Pending>
inline void copy_wait() {
    emu::copy_wait(Pending);
}

LF_COLLECTIVE void load_matrices(uint32_t (&r)[4], const void* row) {
    emu::Operands o{};
    o.registers = r;
    o.row = row;
    emu::collective(emu::Collective::Load, o, LF_SITE);
}
LF_COLLECTIVE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
    emu::Operands o{};
    o.registers = r;
    o.row = row;
    emu::collective(emu::Collective::LoadTransposed, o, LF_SITE);
}

template <typename T>
__attribute__((noinline)) void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
    emu::Operands o{};
    o.c = c;
    o.a = a;
    o.b = b;
    const bool half = std::is_same<T, F16>::value;
    emu::collective(half ? emu::Collective::MultiplyF16 : emu::Collective::MultiplyBF16, o, LF_SITE);
}

template <typename T>
inline uint32_t pack(float first, float second) {
    T low, high;
    from_float(low, first);
    from_float(high, second);
    return low.bits | uint32_t(high.bits) << 16;
}
template <typename T>
inline void unpack(uint32_t pair, float& first, float& second) {
    first = to_float(T{uint16_t(pair & 0xffff)});
    second = to_float(T{uint16_t(pair >> 16)});
}

} // namespace lf

#define LF_KERNEL(name, Params, threads, blocks, body)                                                     \
    static void lf_emulated_##name(const void* params) { body(*static_cast<const Params*>(params)); }      \
    static const lf_emu::Registrar lf_registrar_##name(lf_emu::THIS_BUILD, #name, lf_emulated_##name, sizeof(Params), threads);
