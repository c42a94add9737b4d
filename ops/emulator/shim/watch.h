// Follows every access to shared memory and to tensors, to find races and strays.
//
// Kernels compiled with `-fsanitize=thread` call a function before each load and store. The sanitizer's own runtime
// knows nothing of fibers, warps and shared memory; `watch.cpp` takes its place.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace lf_emu {

/// Begins to watch a launch on this thread; a block may use `bytes` from `shared` on, alone in `extent` from `base` on.
void watch_launch(const unsigned char* base, size_t extent, const unsigned char* shared, size_t bytes);
void watch_nothing();
bool watching();

/// What the emulator tells of the block that runs. A barrier orders what all threads did before with what they do
/// afterwards; a warp's barrier does so for its lanes.
void watch_block();
void watch_barrier();
void watch_warp_barrier(int warp);

/// A copy of 16 bytes to shared memory is under way from its issue until the wait that covers it.
void watch_copy(const void* shared, const void* global, bool valid);
void watch_landing(const void* shared);
/// A lane names 16 bytes that the lanes of its warp read.
void watch_matrix_row(const void* shared);

// ---- what the watch asks of the emulator ----

int running_thread();
void report(const std::string& what);
/// Reports and never goes on with the running thread, from within a kernel.
void report_and_stop(const std::string& what);

} // namespace lf_emu
