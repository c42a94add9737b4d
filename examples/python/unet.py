"""One step of a converted UNet in ONNX Runtime, with and without LinFusion's operator library.

    pip install onnxruntime
    python unet.py unet.linfusion.onnx /path/to/liblinfusion_ops.so
"""

import sys

import numpy as np
import onnxruntime as ort


def waves(*shape):
    """sin(0), sin(1), sin(2), ... in this shape: the same numbers in every language."""
    return np.sin(np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)


def step(model, library=None):
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {
        "sample": waves(2, 4, 16, 16),
        "timestep": np.array(500, dtype=np.float32),
        "encoder_hidden_states": waves(2, 7, 12),
    }
    return session.run(["out_sample"], inputs)[0]


def report(name, out):
    values = out.astype(np.float64).ravel()
    first = " ".join(f"{v:.4f}" for v in values[:4])
    print(f"{name}: mean {values.mean():.4f} std {values.std():.4f} first {first}")


model, library = sys.argv[1:]
report("without library", step(model))
report("with library", step(model, library))
