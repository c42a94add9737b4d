// Last run: never, and never compiled: no .NET SDK was at hand. Written by the API of Microsoft.ML.OnnxRuntime 1.31.
//
// One step of a converted UNet in ONNX Runtime, with and without LinFusion's operator library.
//
//     dotnet run -- unet.linfusion.onnx /path/to/liblinfusion_ops.so

using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

static class Unet
{
    // sin(0), sin(1), sin(2), ... in this shape: the same numbers in every language.
    static DenseTensor<float> Waves(params int[] shape)
    {
        int count = shape.Aggregate(1, (a, b) => a * b);
        float[] values = Enumerable.Range(0, count).Select(i => (float)Math.Sin(i)).ToArray();
        return new DenseTensor<float>(values, shape);
    }

    static float[] Step(string model, string library)
    {
        using (var options = new SessionOptions())
        {
            if (library != null) options.RegisterCustomOpLibraryV2(library, out _);
            using (var session = new InferenceSession(model, options))
            {
                var inputs = new List<NamedOnnxValue>
                {
                    NamedOnnxValue.CreateFromTensor("sample", Waves(2, 4, 16, 16)),
                    NamedOnnxValue.CreateFromTensor("timestep", new DenseTensor<float>(new[] { 500f }, new int[0])),
                    NamedOnnxValue.CreateFromTensor("encoder_hidden_states", Waves(2, 7, 12)),
                };
                using (var outputs = session.Run(inputs)) return outputs.First().AsTensor<float>().ToArray();
            }
        }
    }

    static void Report(string name, float[] values)
    {
        double mean = values.Average(v => (double)v);
        double std = Math.Sqrt(values.Average(v => (v - mean) * (v - mean)));
        string first = string.Join(" ", values.Take(4).Select(v => Four(v)));
        Console.WriteLine($"{name}: mean {Four(mean)} std {Four(std)} first {first}");
    }

    static string Four(double value) => value.ToString("F4", CultureInfo.InvariantCulture);

    static int Main(string[] arguments)
    {
        if (arguments.Length != 2)
        {
            Console.Error.WriteLine("usage: unet MODEL.onnx LIBRARY.so");
            return 2;
        }
        Report("without library", Step(arguments[0], null));
        Report("with library", Step(arguments[0], arguments[1]));
        return 0;
    }
}
