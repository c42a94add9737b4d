#!/usr/bin/env python3
"""Makes end-to-end cases: an exported UNet, a LinFusion checkpoint, and what the official PyTorch code
computes with both.

    python3 models/scripts/make_parity.py OFFICIAL_CHECKOUT models/fixtures [CASE ...]

OFFICIAL_CHECKOUT is a checkout of the official LinFusion repository (the folder with `src/linfusion`).
Each case is a folder of unet.onnx.gz (the original model), linfusion/ (a checkpoint as the official code
saves it), inputs.npz and expected.npz (the output with every attn1 replaced). Weights are random.
"""

import gzip
import pathlib
import sys
import tempfile

import numpy
import onnxruntime
import torch

import export_unet

CASES = {
    # name: (model, width of the MLPs from the module's width, how to export)
    "sd15-identity": (export_unet.sd15, lambda dim: -1, dict(opset=14)),
    "sd21-narrow": (export_unet.sd21, lambda dim: max(dim // 4, 1), dict(exporter="dynamo", opset=20, shapes="fix")),
}


def check(path, model, inputs):
    """The exported file must be the model that the expected output is made with."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {k: v.numpy() for k, v in inputs.items()}
    (got,) = session.run(None, feeds)
    with torch.no_grad():
        error = abs(got - model(**inputs).sample.numpy()).max()
    if not error < 1e-4:
        sys.exit(f"{path} is off by {error}")


def make(folder, make_model, width, how, LinFusion):
    torch.manual_seed(0)
    model = export_unet.coarse(make_model)().eval()
    inputs = export_unet.arguments(model, torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "unet.onnx")
        # Exporting wraps the model's forward, so it gets a copy of its own.
        original = make_model()
        original.load_state_dict(model.state_dict())
        export_unet.export(path, original, **how)
        export_unet.strip_traces(path)
        folder.mkdir(parents=True, exist_ok=True)
        check(path, model, inputs)
        (folder / "unet.onnx.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))

    config = LinFusion.get_default_config(unet=model)
    for entry in config["modules_list"]:
        entry["projection_mid_dim"] = width(entry["dim_n"])
    torch.manual_seed(2)
    linfusion = LinFusion(**config).eval()
    # A fresh module scales by ones and adds zeros in its norms; real ones do not.
    with torch.no_grad():
        for name, parameter in linfusion.named_parameters():
            if ".1." in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    linfusion.mount_to(unet=model)
    linfusion.save_pretrained(folder / "linfusion")
    with torch.no_grad():
        expected = model(**inputs).sample
    numpy.savez(folder / "inputs.npz", **{k: v.numpy() for k, v in inputs.items()})
    numpy.savez(folder / "expected.npz", out_sample=expected.numpy())
    print(f"{folder}: output standard deviation {expected.std():.3f}")


def main(checkout, fixtures, names):
    sys.path.insert(0, str(pathlib.Path(checkout, "src")))
    from linfusion.linfusion import LinFusion

    for name in names or CASES:
        make(pathlib.Path(fixtures, name), *CASES[name], LinFusion)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
