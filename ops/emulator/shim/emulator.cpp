// Runs a kernel's blocks one after the other, a block's threads as fibers in a seeded order.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include "params.h"
#include "ptx.cuh"
#include "watch.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

using lf::bits_float;
using lf::float_bits;

namespace lf_emu {
namespace {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 256 << 10;

// ---- fibers ----

#if defined(__x86_64__)
// System V: these six registers and the stack pointer are the callee's to keep.
extern "C" void lf_switch(void** save, void* load);
asm(".text\n"
    ".globl lf_switch\n"
    ".type lf_switch,@function\n"
    "lf_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n"
    ".size lf_switch,.-lf_switch\n");

struct Fiber {
    void* at = nullptr;

    void start(unsigned char* stack, void (*entry)()) {
        void** top = reinterpret_cast<void**>(stack + STACK_BYTES);
        *--top = nullptr; // the return address of `entry`, which never returns; keeps the stack aligned as after a call
        *--top = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        at = top;
    }
};
inline void change(Fiber& from, Fiber& to) { lf_switch(&from.at, to.at); }
#else
struct Fiber {
    ucontext_t context;

    void start(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = STACK_BYTES;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
};
inline void change(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- state of the running block ----

struct Copy {
    unsigned char* to;
    const void* from;
    bool valid;
    bool early;
    unsigned char bytes[16];
};

enum class Wait { Ready, Block, Warp, Done };

struct Thread {
    Fiber fiber;
    Wait wait = Wait::Ready;
    Collective collective = Collective::None;
    Operands operands{};
    const void* site = nullptr;
    int barriers = 0;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

struct Kernel {
    void (*run)(const void*);
    size_t params_bytes;
    int threads;
};

std::map<std::string, Kernel>& kernels(Build build = Build::Plain) {
    static std::map<std::string, Kernel> plain, watched;
    return build == Build::Plain ? plain : watched;
}

/// Planted bugs, as `Plant` in lib.rs numbers them.
enum Plant { PLANT_NONE, PLANT_MISSING_BARRIER, PLANT_MISSING_WARP_BARRIER, PLANT_WAIT_OFF_BY_ONE };

struct Machine {
    std::vector<Thread> threads;
    unsigned char* stacks = nullptr;
    size_t stack_count = 0;
    Fiber scheduler;
    Thread* current = nullptr;
    int current_index = 0;
    const Kernel* kernel = nullptr;
    const char* kernel_name = "";
    const void* params = nullptr;
    int block[3] = {0, 0, 0};
    unsigned char* shared = nullptr;
    size_t shared_bytes = 0;
    unsigned plant = PLANT_NONE;
    uint64_t random = 1;
    std::string error;

    /// xorshift64*
    uint32_t next_random() {
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        return uint32_t(random * 2685821657736338717ull >> 32);
    }

    std::string place() const {
        char text[160];
        std::snprintf(text, sizeof text, "kernel %s, block (%d, %d, %d), thread %d", kernel_name, block[0], block[1], block[2],
                      current_index);
        return text;
    }

    void fail(const std::string& what) {
        if (error.empty()) error = place() + ": " + what;
    }
};

thread_local Machine machine;

/// Back to the scheduler; returns when the thread goes on. A block that has failed never does.
void stop() {
    Thread* thread = machine.current;
    change(thread->fiber, machine.scheduler);
}

void entry() {
    machine.kernel->run(machine.params);
    machine.current->wait = Wait::Done;
    stop();
    std::abort();
}

const char* name_of(Collective what) {
    switch (what) {
    case Collective::WarpBarrier: return "a warp barrier";
    case Collective::ShuffleFloat:
    case Collective::ShuffleDouble: return "a shuffle";
    case Collective::Load:
    case Collective::LoadTransposed: return "a matrix load";
    case Collective::MultiplyF16:
    case Collective::MultiplyBF16: return "a product";
    case Collective::None: break;
    }
    return "nothing";
}

/// Whether 16 bytes at `p` lie in shared memory, aligned.
bool in_shared(const void* p, const char* what) {
    const unsigned char* at = static_cast<const unsigned char*>(p);
    const intptr_t offset = at - machine.shared;
    if (offset < 0 || size_t(offset) + 16 > machine.shared_bytes || offset % 16 != 0) {
        machine.fail(std::string(what) + " of 16 bytes at offset " + std::to_string(offset) + " of " +
                     std::to_string(machine.shared_bytes) + " bytes of shared memory");
        return false;
    }
    return true;
}

// ---- collectives of a warp whose lanes have all come ----

template <typename V>
void shuffle(Thread* lanes, V* Operands::*value) {
    V values[LANES];
    for (int i = 0; i < LANES; ++i) values[i] = *(lanes[i].operands.*value);
    for (int i = 0; i < LANES; ++i) *(lanes[i].operands.*value) = values[(i ^ lanes[i].operands.mask) & 31];
}

void load(Thread* lanes, bool transposed) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t elements[8][8];
        for (int row = 0; row < 8; ++row) {
            const void* from = lanes[matrix * 8 + row].operands.row;
            machine.current_index = int(lanes - machine.threads.data()) + matrix * 8 + row;
            if (!in_shared(from, "a matrix load")) return;
            if (watching()) watch_matrix_row(from);
            std::memcpy(elements[row], from, 16);
        }
        for (int lane = 0; lane < LANES; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = transposed ? elements[2 * t][g] : elements[g][2 * t];
            const uint16_t high = transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
            lanes[lane].operands.registers[matrix] = low | uint32_t(high) << 16;
        }
    }
}

/// The products of one step are exact and summed in double precision: tensor cores keep more than single precision
/// within a step and round between steps.
void multiply(Thread* lanes, float (*value)(uint16_t)) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            for (int half = 0; half < 2; ++half)
                a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value(uint16_t(lanes[lane].operands.a[i] >> 16 * half));
        }
        for (int i = 0; i < 2; ++i) {
            for (int half = 0; half < 2; ++half)
                b[2 * t + i * 8 + half][g] = value(uint16_t(lanes[lane].operands.b[i] >> 16 * half));
        }
    }
    for (int lane = 0; lane < LANES; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + i / 2 * 8, column = 2 * t + i % 2;
            double sum = lanes[lane].operands.c[i];
            for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * double(b[k][column]);
            lanes[lane].operands.c[i] = float(sum);
        }
    }
}

void perform(Thread* lanes) {
    switch (lanes[0].collective) {
    case Collective::WarpBarrier: watch_warp_barrier(int(lanes - machine.threads.data()) / LANES); break;
    case Collective::None: break;
    case Collective::ShuffleFloat: shuffle(lanes, &Operands::f); break;
    case Collective::ShuffleDouble: shuffle(lanes, &Operands::d); break;
    case Collective::Load: load(lanes, false); break;
    case Collective::LoadTransposed: load(lanes, true); break;
    case Collective::MultiplyF16: multiply(lanes, half_to_float); break;
    case Collective::MultiplyBF16: multiply(lanes, brain_to_float); break;
    }
}

// ---- the scheduler ----

/// Runs a warp's lanes, and its collectives, until all wait for the block or are done. False: the block has failed.
bool run_warp(int warp) {
    Thread* lanes = &machine.threads[size_t(warp) * LANES];
    for (;;) {
        const int first = int(machine.next_random() % LANES);
        for (int i = 0; i < LANES; ++i) {
            const int lane = (first + i) % LANES;
            machine.current = &lanes[lane];
            machine.current_index = warp * LANES + lane;
            if (lanes[lane].wait == Wait::Ready) change(machine.scheduler, lanes[lane].fiber);
            if (!machine.error.empty()) return false;
        }
        const bool collective = std::any_of(lanes, lanes + LANES, [](const Thread& t) { return t.wait == Wait::Warp; });
        if (!collective) return true;
        for (int i = 0; i < LANES; ++i) {
            if (lanes[i].wait != Wait::Warp || lanes[i].collective != lanes[0].collective || lanes[i].site != lanes[0].site) {
                machine.current_index = warp * LANES + i;
                const auto says = [](const Thread& t) {
                    return std::string(t.wait == Wait::Warp    ? name_of(t.collective)
                                       : t.wait == Wait::Block ? "the block's barrier"
                                                               : "nothing, it has ended");
                };
                machine.fail("divergence: waits for " + says(lanes[i]) + ", lane 0 for " + says(lanes[0]) +
                             ", or for the same at another place");
                return false;
            }
        }
        perform(lanes);
        if (!machine.error.empty()) return false;
        for (int i = 0; i < LANES; ++i) lanes[i].wait = Wait::Ready;
    }
}

/// Runs one block to its end.
void run_block() {
    const int warps = int(machine.threads.size()) / LANES;
    std::memset(machine.shared, 0xff, machine.shared_bytes);
    watch_block();
    for (size_t i = 0; i < machine.threads.size(); ++i) {
        Thread& thread = machine.threads[i];
        thread.wait = Wait::Ready;
        thread.barriers = 0;
        thread.open.clear();
        thread.groups.clear();
        thread.fiber.start(machine.stacks + i * STACK_BYTES, entry);
    }
    std::vector<int> order(warps);
    for (int i = 0; i < warps; ++i) order[i] = i;
    for (;;) {
        for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[machine.next_random() % (i + 1)]);
        for (int warp : order) {
            if (!run_warp(warp)) return;
        }
        size_t done = 0;
        for (const Thread& thread : machine.threads) done += thread.wait == Wait::Done;
        if (done == machine.threads.size()) return;
        if (done != 0) {
            machine.current_index = 0;
            while (machine.threads[machine.current_index].wait == Wait::Done) ++machine.current_index;
            machine.fail("deadlock: waits for the block's barrier, which " + std::to_string(done) + " of " +
                         std::to_string(machine.threads.size()) + " threads never came to");
            return;
        }
        for (Thread& thread : machine.threads) thread.wait = Wait::Ready;
        watch_barrier();
    }
}

/// Memory whose end is the end of a page, with an inaccessible page behind it.
struct Guarded {
    unsigned char* base = nullptr;
    size_t mapped = 0;

    unsigned char* map(size_t bytes) {
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t used = (bytes + page - 1) / page * page;
        mapped = used + page;
        void* at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED) return nullptr;
        base = static_cast<unsigned char*>(at);
        mprotect(base + used, page, PROT_NONE);
        return base + used - (bytes + 127) / 128 * 128;
    }
    ~Guarded() {
        if (base) munmap(base, mapped);
    }
};

} // namespace

// ---- what the watch asks for ----

int running_thread() { return machine.current_index; }
void report(const std::string& what) { machine.fail(what); }
void report_and_stop(const std::string& what) {
    machine.fail(what);
    stop();
}

// ---- what kernels call ----

int thread_index() { return machine.current_index; }
int block_size() { return int(machine.threads.size()); }
int block_index(int axis) { return machine.block[axis]; }
unsigned char* shared_memory() { return machine.shared; }

void block_barrier() {
    if (machine.plant == PLANT_MISSING_BARRIER && machine.current->barriers++ % 3 == 1) return;
    machine.current->wait = Wait::Block;
    stop();
}

void collective(Collective what, const Operands& operands, const void* site) {
    if (what == Collective::WarpBarrier && machine.plant == PLANT_MISSING_WARP_BARRIER) return;
    Thread& thread = *machine.current;
    thread.wait = Wait::Warp;
    thread.collective = what;
    thread.operands = operands;
    thread.site = site;
    stop();
}

void copy_async(void* shared, const void* global, bool valid) {
    if (!in_shared(shared, "an asynchronous copy")) return stop();
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0) {
        machine.fail("an asynchronous copy from an address that is no multiple of 16");
        return stop();
    }
    if (watching()) watch_copy(shared, global, valid);
    Copy copy{static_cast<unsigned char*>(shared), global, valid, machine.next_random() % 2 == 0, {}};
    // The hardware may read at any time from now on.
    if (valid && copy.early) std::memcpy(copy.bytes, global, 16);
    machine.current->open.push_back(copy);
}

void copy_commit() {
    machine.current->groups.push_back(std::move(machine.current->open));
    machine.current->open.clear();
}

void copy_wait(int pending) {
    if (machine.plant == PLANT_WAIT_OFF_BY_ONE) ++pending;
    auto& groups = machine.current->groups;
    while (groups.size() > size_t(pending)) {
        for (Copy& copy : groups.front()) {
            if (!copy.valid) std::memset(copy.bytes, 0, 16);
            else if (!copy.early) std::memcpy(copy.bytes, copy.from, 16);
            std::memcpy(copy.to, copy.bytes, 16);
            if (watching()) watch_landing(copy.to);
        }
        groups.pop_front();
    }
}

float half_to_float(uint16_t bits) {
    const uint32_t sign = uint32_t(bits >> 15) << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return bits_float(sign | (exponent + 112) << 23 | mantissa << 13);
    const float tiny = std::ldexp(float(mantissa), -24);
    return sign ? -tiny : tiny;
}

uint16_t float_to_half(float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return sign | 0x7e00;
    // From half way between the largest number and the next power of two on.
    if (magnitude >= 0x477ff000u) return sign | 0x7c00;
    if (magnitude < 0x38800000u) return sign | uint16_t(std::nearbyint(std::ldexp(std::fabs(value), 24)));
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return sign | uint16_t((rounded >> 13) - (112 << 10));
}

float brain_to_float(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }

uint16_t float_to_brain(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

Registrar::Registrar(Build build, const char* name, void (*run)(const void*), size_t params_bytes, int threads) {
    kernels(build)[name] = Kernel{run, params_bytes, threads};
}

} // namespace lf_emu

using namespace lf_emu;

/// Runs a launch; 0, or 1 with a message. `watched`: with the build that tells of races and strays.
extern "C" int lf_emulate(const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, const void* params,
                          size_t params_bytes, uint64_t seed, uint32_t plant, int watched, char* message, size_t message_bytes) {
    const auto& all = kernels(watched ? Build::Watched : Build::Plain);
    const auto found = all.find(name);
    std::string error;
    if (found == all.end()) error = std::string("no kernel ") + name;
    else if (found->second.params_bytes != params_bytes)
        error = std::string("kernel ") + name + " takes " + std::to_string(found->second.params_bytes) + " bytes, given " +
                std::to_string(params_bytes);
    else if (threads == 0 || threads % LANES != 0 || int(threads) > found->second.threads)
        error = std::string("kernel ") + name + " runs in whole warps of at most " + std::to_string(found->second.threads) +
                " threads, given " + std::to_string(threads);
    Guarded shared;
    if (error.empty()) {
        machine.kernel = &found->second;
        machine.kernel_name = found->first.c_str();
        machine.params = params;
        machine.threads = std::vector<Thread>(threads);
        machine.shared_bytes = shared_bytes;
        machine.shared = shared.map(std::max<size_t>(shared_bytes, 1));
        machine.plant = plant;
        machine.random = seed * 0x9e3779b97f4a7c15ull + 0x1234567;
        machine.error.clear();
        if (machine.stack_count < threads) {
            if (machine.stacks) munmap(machine.stacks, machine.stack_count * STACK_BYTES);
            void* stacks = mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            machine.stacks = stacks == MAP_FAILED ? nullptr : static_cast<unsigned char*>(stacks);
            machine.stack_count = machine.stacks ? threads : 0;
        }
        if (!machine.shared || !machine.stacks) error = "out of memory";
        else if (watched) watch_launch(shared.base, shared.mapped, machine.shared, shared_bytes);
    }
    if (error.empty()) {
        const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
        std::vector<uint64_t> order(blocks);
        for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
        for (uint64_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[machine.next_random() % i]);
        for (uint64_t i : order) {
            machine.block[0] = int(i % grid[0]);
            machine.block[1] = int(i / grid[0] % grid[1]);
            machine.block[2] = int(i / grid[0] / grid[1]);
            run_block();
            if (!machine.error.empty()) break;
        }
        error = machine.error;
        watch_nothing();
    }
    if (error.empty()) return 0;
    std::snprintf(message, message_bytes, "%s", error.c_str());
    return 1;
}

/// The name of the kernel with this number in order of names; null from the last on.
extern "C" const char* lf_kernel_name(size_t index) {
    for (const auto& kernel : kernels()) {
        if (index-- == 0) return kernel.first.c_str();
    }
    return nullptr;
}

/// Conversions, for their test.
extern "C" float lf_half_to_float(uint16_t bits) { return half_to_float(bits); }
extern "C" uint16_t lf_float_to_half(float value) { return float_to_half(value); }
extern "C" uint16_t lf_float_to_brain(float value) { return float_to_brain(value); }

/// Size of a kernel's argument; 0: there is no such kernel.
extern "C" size_t lf_params_bytes(const char* name) {
    const auto found = kernels().find(name);
    return found == kernels().end() ? 0 : found->second.params_bytes;
}
