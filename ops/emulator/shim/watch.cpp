#include "watch.h"

#include <algorithm>
#include <array>
#include <vector>

namespace lf_emu {
namespace {

constexpr int LANES = 32;
/// The smallest element: two threads may write neighbouring ones.
constexpr size_t GRANULE = 2;

enum class Access { Read, Write };

/// What has happened to one granule. Counters are never the same twice in a launch, so nothing is ever cleared; 0 is never.
struct Granule {
    uint32_t write_block = 0, write_phase = 0, write_step = 0;
    uint32_t read_block = 0, read_phase = 0, read_step = 0;
    uint32_t copy_block = 0;
    uint16_t writer = 0, reader = 0, copier = 0;
    /// Others have read it as well: in other blocks, in other warps since the barrier, in other lanes since the warp's.
    bool many_blocks = false, many_warps = false, many_lanes = false;
};

/// A tensor within its pages.
struct Region {
    uintptr_t base;
    size_t extent;
    uintptr_t data;
    size_t bytes;
    bool writable;
    std::vector<Granule> granules;
};

struct Watch {
    uintptr_t shared_base = 0, shared = 0;
    size_t shared_bytes = 0, shared_extent = 0;
    std::vector<Granule> granules;
    /// Since the launch: blocks, barriers of blocks and, per warp, barriers of warps.
    uint32_t block = 0, phase = 0;
    std::array<uint32_t, 32> steps{};
    std::vector<Region> regions;
};

thread_local Watch watch;
/// Looked at first and most often.
thread_local bool enabled = false;

std::string number(uint64_t n) { return std::to_string(n); }

/// With whom the running thread races for a granule, or nothing.
std::string race(Granule& g, Access access, bool whole_warp) {
    const int thread = running_thread(), warp = thread / LANES;
    const uint32_t step = watch.steps[size_t(warp)];
    const char* verb = access == Access::Write ? "written" : "read";
    const auto tell = [&](const char* how, int other) {
        return std::string(verb) + " here and " + how + " by thread " + number(uint64_t(other));
    };
    if (g.copy_block == watch.block) return tell("the target of a copy that has not been waited for", g.copier);
    if (g.write_block != 0 && g.write_block != watch.block) return std::string(verb) + " here and written by another block";
    // Its own writes a thread sees; but a matrix row goes to other lanes as well.
    const bool same = g.writer == thread && !whole_warp;
    if (g.write_phase == watch.phase && !same && (g.writer / LANES != warp || g.write_step == step))
        return tell("written", g.writer);
    if (access == Access::Write) {
        if (g.many_blocks || (g.read_block != 0 && g.read_block != watch.block)) return "written here and read by another block";
        if (g.read_phase == watch.phase) {
            const bool other_lane = g.reader / LANES == warp && g.read_step == step && (g.many_lanes || g.reader != thread);
            if (g.many_warps || g.reader / LANES != warp || other_lane) return tell("read", g.reader);
        }
        g.write_block = watch.block;
        g.write_phase = watch.phase;
        g.write_step = step;
        g.writer = uint16_t(thread);
        return {};
    }
    if (g.read_block != 0 && g.read_block != watch.block) g.many_blocks = true;
    const bool fresh = g.read_phase != watch.phase;
    if (!fresh && g.reader / LANES != warp) g.many_warps = true;
    if (fresh) g.many_warps = false;
    const bool new_step = fresh || g.reader / LANES != warp || g.read_step != step;
    g.many_lanes = whole_warp || (!new_step && (g.many_lanes || g.reader != thread));
    g.read_block = watch.block;
    g.read_phase = watch.phase;
    g.read_step = step;
    g.reader = uint16_t(thread);
    return {};
}

/// The mistake in an access to `bytes` of shared memory at `offset`, or nothing.
std::string in_shared(uintptr_t at, size_t bytes, Access access, bool whole_warp) {
    const size_t offset = at - watch.shared;
    if (at < watch.shared || offset + bytes > watch.shared_bytes)
        return number(bytes) + " bytes at offset " + std::to_string(int64_t(offset)) + " of " + number(watch.shared_bytes) + " bytes of shared memory";
    for (size_t i = offset / GRANULE; i <= (offset + bytes - 1) / GRANULE; ++i) {
        // Blocks have shared memory of their own: what another did to this granule is over.
        Granule& granule = watch.granules[i];
        if (granule.write_block != watch.block) granule.write_block = granule.write_phase = 0;
        if (granule.read_block != watch.block) granule.read_block = granule.read_phase = 0;
        granule.many_blocks = false;
        const std::string found = race(granule, access, whole_warp);
        if (!found.empty()) return "race: offset " + number(i * GRANULE) + " of shared memory is " + found + ", with no barrier between";
    }
    return {};
}

std::string in_region(Region& region, uintptr_t at, size_t bytes, Access access) {
    const int64_t offset = int64_t(at) - int64_t(region.data);
    const std::string tensor = " of a tensor of " + number(region.bytes) + " bytes";
    if (offset < 0 || size_t(offset) + bytes > region.bytes)
        return number(bytes) + " bytes at offset " + std::to_string(offset) + tensor;
    if (access == Access::Write && !region.writable) return "a store into an input, offset " + number(size_t(offset)) + tensor;
    for (size_t i = size_t(offset) / GRANULE; i <= (size_t(offset) + bytes - 1) / GRANULE; ++i) {
        const std::string found = race(region.granules[i], access, false);
        if (!found.empty()) return "race: offset " + number(i * GRANULE) + tensor + " is " + found + ", with nothing between";
    }
    return {};
}

/// The mistake in an access, or nothing: memory that is neither shared nor a tensor is the thread's own.
std::string mistake(uintptr_t at, size_t bytes, Access access) {
    if (at - watch.shared_base < watch.shared_extent) return in_shared(at, bytes, access, false);
    for (Region& region : watch.regions) {
        if (at - region.base < region.extent) return in_region(region, at, bytes, access);
    }
    return {};
}

inline void accessed(const void* at, size_t bytes, Access access) {
    if (!enabled || bytes == 0) return;
    const std::string found = mistake(reinterpret_cast<uintptr_t>(at), bytes, access);
    if (!found.empty()) report_and_stop(found);
}

} // namespace

void watch_launch(const unsigned char* base, size_t extent, const unsigned char* shared, size_t bytes) {
    watch.shared_base = reinterpret_cast<uintptr_t>(base);
    watch.shared = reinterpret_cast<uintptr_t>(shared);
    watch.shared_bytes = bytes;
    watch.shared_extent = extent;
    watch.granules.assign(bytes / GRANULE + 1, Granule{});
    watch.block = watch.phase = 0;
    watch.steps.fill(1);
    for (Region& region : watch.regions) region.granules.assign(region.bytes / GRANULE + 1, Granule{});
    enabled = true;
}
void watch_nothing() { enabled = false; }
bool watching() { return enabled; }

void watch_block() {
    ++watch.block;
    ++watch.phase;
}
void watch_barrier() { ++watch.phase; }
void watch_warp_barrier(int warp) { ++watch.steps[size_t(warp)]; }

void watch_copy(const void* shared, const void* global, bool valid) {
    if (valid) accessed(global, 16, Access::Read);
    accessed(shared, 16, Access::Write);
    const size_t first = (reinterpret_cast<uintptr_t>(shared) - watch.shared) / GRANULE;
    for (size_t i = first; i < first + 16 / GRANULE; ++i) {
        watch.granules[i].copy_block = watch.block;
        watch.granules[i].copier = uint16_t(running_thread());
    }
}
void watch_landing(const void* shared) {
    const size_t first = (reinterpret_cast<uintptr_t>(shared) - watch.shared) / GRANULE;
    for (size_t i = first; i < first + 16 / GRANULE; ++i) watch.granules[i].copy_block = 0;
    accessed(shared, 16, Access::Write);
}
void watch_matrix_row(const void* shared) {
    const std::string found = in_shared(reinterpret_cast<uintptr_t>(shared), 16, Access::Read, true);
    if (!found.empty()) report(found);
}

} // namespace lf_emu

/// Makes a tensor known to this thread's watch: `bytes` at `data`, alone in `extent` bytes from `base` on.
extern "C" void lf_watch_tensor(uint64_t base, size_t extent, uint64_t data, size_t bytes, int writable) {
    lf_emu::watch.regions.push_back({uintptr_t(base), extent, uintptr_t(data), bytes, writable != 0, {}});
}
extern "C" void lf_forget_tensor(uint64_t base) {
    auto& regions = lf_emu::watch.regions;
    const auto gone = [&](const lf_emu::Region& region) { return region.base == uintptr_t(base); };
    regions.erase(std::remove_if(regions.begin(), regions.end(), gone), regions.end());
}

// ---- what instrumented code calls ----

#define LF_WATCHED_SIZE(bytes)                                                                                         \
    void __tsan_read##bytes(void* at) { lf_emu::accessed(at, bytes, lf_emu::Access::Read); }                           \
    void __tsan_write##bytes(void* at) { lf_emu::accessed(at, bytes, lf_emu::Access::Write); }                         \
    void __tsan_unaligned_read##bytes(void* at) { lf_emu::accessed(at, bytes, lf_emu::Access::Read); }                 \
    void __tsan_unaligned_write##bytes(void* at) { lf_emu::accessed(at, bytes, lf_emu::Access::Write); }

extern "C" {
LF_WATCHED_SIZE(1)
LF_WATCHED_SIZE(2)
LF_WATCHED_SIZE(4)
LF_WATCHED_SIZE(8)
LF_WATCHED_SIZE(16)
void __tsan_read_range(void* at, size_t bytes) { lf_emu::accessed(at, bytes, lf_emu::Access::Read); }
void __tsan_write_range(void* at, size_t bytes) { lf_emu::accessed(at, bytes, lf_emu::Access::Write); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
