#!/usr/bin/env python3
"""How far a converted terrain model is from its original on inputs that no distillation has seen.

    python3 models/scripts/measure_unseen.py ORIGINAL.onnx CONVERTED.onnx [COUNT]

The inputs are drawn by NumPy as the generator's own program draws them. Prints the PSNR of each output, with the range of the
original's as its peak, their mean, and that of all together: of the mean of the squared errors relative to the peaks.
"""

import sys

import numpy
import onnxruntime


def inputs(count):
    random = numpy.random.default_rng(12345)
    noise = random.standard_normal((count, 1, 128, 128), dtype=numpy.float32) * numpy.float32(80)
    difficulty = random.uniform(0, 1, count).astype(numpy.float32)
    sigma = numpy.full(1, 80, numpy.float32)
    return [{"noisy": noise[i : i + 1], "sigma": sigma, "difficulty": difficulty[i : i + 1]} for i in range(count)]


def outputs(path, feeds):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [session.run(None, feed)[0].astype(numpy.float64) for feed in feeds]


def main(original, converted, count=24):
    feeds = inputs(int(count))
    pairs = list(zip(outputs(original, feeds), outputs(converted, feeds)))
    errors = numpy.array([((a - b) ** 2).mean() / (a.max() - a.min()) ** 2 for a, b in pairs])
    decibels = -10 * numpy.log10(errors)
    print("each:", ", ".join(f"{value:.1f}" for value in sorted(decibels)))
    print(f"mean {decibels.mean():.1f} dB, all together {-10 * numpy.log10(errors.mean()):.1f} dB")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
