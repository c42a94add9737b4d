// Last run: 2026-11-29, g++ 12.2, headers of ONNX Runtime 1.21, libonnxruntime 1.32, Linux x86-64.
//
// One step of a converted UNet in ONNX Runtime, with and without LinFusion's operator library.
//
//     g++ -std=c++17 -I ORT/include unet.cpp -L ORT/lib -lonnxruntime -o unet    (ORT: a release of ONNX Runtime)
//     ./unet unet.linfusion.onnx /path/to/liblinfusion_ops.so

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <vector>

#include <onnxruntime_cxx_api.h>

// sin(0), sin(1), sin(2), ...: the same numbers in every language.
static std::vector<float> waves(const std::vector<int64_t>& shape) {
    std::vector<float> values(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(std::sin(static_cast<double>(i)));
    return values;
}

static std::vector<float> step(Ort::Env& env, const char* model, const char* library) {
    Ort::SessionOptions options;
    if (library != nullptr) options.RegisterCustomOpsLibrary(library);
    Ort::Session session(env, model, options);

    const std::vector<int64_t> sample_shape{2, 4, 16, 16}, text_shape{2, 7, 12};
    std::vector<float> sample = waves(sample_shape), text = waves(text_shape), timestep{500.0f};
    const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    const auto tensor = [&](std::vector<float>& values, const std::vector<int64_t>& shape) {
        return Ort::Value::CreateTensor<float>(memory, values.data(), values.size(), shape.data(), shape.size());
    };
    std::array<Ort::Value, 3> inputs{tensor(sample, sample_shape), tensor(timestep, {}), tensor(text, text_shape)};
    const std::array<const char*, 3> names{"sample", "timestep", "encoder_hidden_states"};
    const char* output = "out_sample";
    const auto outputs =
        session.Run(Ort::RunOptions{nullptr}, names.data(), inputs.data(), inputs.size(), &output, 1);

    const float* values = outputs[0].GetTensorData<float>();
    return {values, values + outputs[0].GetTensorTypeAndShapeInfo().GetElementCount()};
}

static void report(const char* name, const std::vector<float>& values) {
    double mean = 0, square = 0;
    for (double v : values) mean += v / static_cast<double>(values.size());
    for (double v : values) square += (v - mean) * (v - mean) / static_cast<double>(values.size());
    std::printf("%s: mean %.4f std %.4f first %.4f %.4f %.4f %.4f\n", name, mean, std::sqrt(square), values[0],
                values[1], values[2], values[3]);
}

int main(int count, char** arguments) {
    if (count != 3) {
        std::fprintf(stderr, "usage: %s MODEL.onnx LIBRARY.so\n", arguments[0]);
        return 2;
    }
    try {
        Ort::Env env(ORT_LOGGING_LEVEL_WARNING);
        report("without library", step(env, arguments[1], nullptr));
        report("with library", step(env, arguments[1], arguments[2]));
    } catch (const Ort::Exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
