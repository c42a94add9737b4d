// libcuda.so.1 as far as `ops/src/cuda/driver.rs` needs it: device memory is the host's, launches run in the emulator.
//
// It checks what a driver checks (a context is current, handles are its own, shared memory was asked for), writes down
// every call, and fails where a test tells it to.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

extern "C" {
int lf_emulate(const char* name, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes, const void* params,
               size_t params_bytes, uint64_t seed, uint32_t plant, int watched, char* message, size_t message_bytes);
size_t lf_params_bytes(const char* name);
void lf_link_kernels();
}

namespace {

// Numbers of cuda.h.
enum Result { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NO_BINARY_FOR_GPU = 209, NOT_FOUND = 500, LAUNCH_FAILED = 719 };

struct Context {
    int number;
};
struct Stream {
    Context* context;
};
struct Module {
    Context* context;
};
struct Function {
    Context* context;
    std::string name;
    uint32_t shared_bytes = 48 << 10;
};

std::mutex lock;
std::string calls;
std::string failing;
Result failure = SUCCESS;
int capability[2] = {9, 0};
Context contexts[2] = {{0}, {1}};
Stream streams[2] = {{&contexts[0]}, {&contexts[1]}};
thread_local std::vector<Context*> current;

/// Writes a call down; what it has to return.
Result record(const char* function, const std::string& detail = "") {
    const std::lock_guard<std::mutex> guard(lock);
    calls += function;
    if (!detail.empty()) calls += " " + detail;
    calls += "\n";
    return failing == function ? failure : SUCCESS;
}

Context* now() { return current.empty() ? nullptr : current.back(); }

} // namespace

extern "C" {

// ---- for tests ----

/// What was called since the last time, a call a line; whoever asks frees nothing.
const char* fake_calls() {
    static thread_local std::string taken;
    const std::lock_guard<std::mutex> guard(lock);
    taken.swap(calls);
    calls.clear();
    return taken.c_str();
}
void* fake_stream(int device) { return &streams[device]; }
/// From now on the function returns the result; "" for none.
void fake_fail(const char* function, int result) {
    failing = function;
    failure = Result(result);
}
void fake_capability(int major, int minor) {
    capability[0] = major;
    capability[1] = minor;
}
/// Contexts that the calling thread has pushed and not popped.
int fake_depth() { return int(current.size()); }

// ---- the driver ----

Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return record("cuDriverGetVersion");
}
Result cuGetErrorName(Result error, const char** text) {
    switch (error) {
    case OUT_OF_MEMORY: *text = "CUDA_ERROR_OUT_OF_MEMORY"; return SUCCESS;
    case INVALID_VALUE: *text = "CUDA_ERROR_INVALID_VALUE"; return SUCCESS;
    case INVALID_CONTEXT: *text = "CUDA_ERROR_INVALID_CONTEXT"; return SUCCESS;
    case NO_BINARY_FOR_GPU: *text = "CUDA_ERROR_NO_BINARY_FOR_GPU"; return SUCCESS;
    case NOT_FOUND: *text = "CUDA_ERROR_NOT_FOUND"; return SUCCESS;
    case LAUNCH_FAILED: *text = "CUDA_ERROR_LAUNCH_FAILED"; return SUCCESS;
    default: *text = nullptr; return INVALID_VALUE;
    }
}
Result cuGetErrorString(Result error, const char** text) {
    *text = error == OUT_OF_MEMORY ? "out of memory" : "a failure";
    return SUCCESS;
}
Result cuStreamGetCtx(Stream* stream, Context** context) {
    *context = stream ? stream->context : now();
    return record("cuStreamGetCtx");
}
Result cuCtxGetCurrent(Context** context) {
    *context = now();
    return record("cuCtxGetCurrent");
}
Result cuCtxPushCurrent_v2(Context* context) {
    const Result result = record("cuCtxPushCurrent", std::to_string(context->number));
    if (result == SUCCESS) current.push_back(context);
    return result;
}
Result cuCtxPopCurrent_v2(Context** context) {
    if (!now()) return INVALID_CONTEXT;
    *context = now();
    current.pop_back();
    return record("cuCtxPopCurrent");
}
Result cuCtxGetDevice(int* device) {
    if (!now()) return INVALID_CONTEXT;
    *device = now()->number;
    return record("cuCtxGetDevice");
}
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 4; break; // multiprocessors
    case 75: *value = capability[0]; break;
    case 76: *value = capability[1]; break;
    case 97: *value = 227 << 10; break; // shared memory of a block, if asked for
    default: return INVALID_VALUE;
    }
    return record("cuDeviceGetAttribute");
}
Result cuModuleLoadData(Module** module, const void*) {
    if (!now()) return INVALID_CONTEXT;
    *module = new Module{now()};
    return record("cuModuleLoadData", std::to_string(now()->number));
}
Result cuModuleGetFunction(Function** function, Module* module, const char* name) {
    if (!now() || module->context != now()) return INVALID_CONTEXT;
    lf_link_kernels();
    if (lf_params_bytes(name) == 0) return NOT_FOUND;
    *function = new Function{now(), name};
    return record("cuModuleGetFunction", name);
}
Result cuFuncSetAttribute(Function* function, int attribute, int value) {
    if (attribute != 8 || value < 0 || value > 227 << 10) return INVALID_VALUE;
    function->shared_bytes = uint32_t(value);
    return record("cuFuncSetAttribute", function->name + " " + std::to_string(value));
}
Result cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned, unsigned shared,
                      Stream* stream, void** params, void** extra) {
    if (!now() || function->context != now() || (stream && stream->context != now())) return INVALID_CONTEXT;
    if (extra || shared > function->shared_bytes || x == 0 || y == 0 || z == 0 || y > 65535 || z > 65535) return INVALID_VALUE;
    const Result result = record("cuLaunchKernel", function->name);
    if (result != SUCCESS) return result;
    const uint32_t grid[3] = {x, y, z};
    char message[512];
    const size_t bytes = lf_params_bytes(function->name.c_str());
    if (lf_emulate(function->name.c_str(), grid, threads, shared, params[0], bytes, 1, 0, 0, message, sizeof message) == 0)
        return SUCCESS;
    std::fprintf(stderr, "%s\n", message);
    return LAUNCH_FAILED;
}

} // extern "C"
