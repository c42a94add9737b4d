#!/usr/bin/env python3
"""Checks that the official PyTorch code loads a checkpoint that `linfusion-convert distill` wrote, and computes the same.

    python3 models/scripts/check_distilled.py OFFICIAL_CHECKOUT LINFUSION_CONVERT

OFFICIAL_CHECKOUT is a checkout of the official LinFusion repository (the folder with `src/linfusion`), LINFUSION_CONVERT
the program. A small UNet with random weights is exported, distilled and converted; the official code loads the
checkpoint into the PyTorch model. Its output must be the converted file's, and not the original's.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import onnxruntime
import torch

import export_unet

SPEC = {
    "sample": {"normal": {}, "shape": [1, 4, 16, 16]},
    "timestep": {"uniform": {"min": 0, "max": 999}},
    "encoder_hidden_states": {"normal": {}, "shape": [1, 7, 12]},
}
# Sums of at most some thousand float32 terms in another order, through 16 attentions.
SAME = 1e-4


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(part) for part in command)}: {done.stderr}")


def onnx_output(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(output)


def check(LinFusion, convert, make, folder):
    torch.manual_seed(0)
    model = make().eval()
    inputs = export_unet.arguments(model, torch.float32)
    # Exporting wraps the model's forward, so it gets a copy of its own.
    exported = make()
    exported.load_state_dict(model.state_dict())
    original, checkpoint, converted = folder / "unet.onnx", folder / "linfusion", folder / "unet.linfusion.onnx"
    export_unet.export(original, exported)
    (folder / "spec.json").write_text(json.dumps(SPEC))
    run(convert, "distill", original, "-o", checkpoint, "--random", folder / "spec.json", "--samples", 4, "--holdout", 2, "--steps", 40)
    run(convert, original, "--weights", checkpoint, "-o", converted)

    linfusion = LinFusion.from_pretrained(checkpoint)
    assert len(linfusion.modules_dict) == 16, linfusion.modules_dict
    linfusion.mount_to(unet=model)
    with torch.no_grad():
        expected = model.eval()(**inputs).sample
    scale = expected.abs().max()
    same = ((onnx_output(converted, inputs) - expected).abs().max() / scale).item()
    other = ((onnx_output(original, inputs) - expected).abs().max() / scale).item()
    print(f"{make.__name__}: {same:.1e} of the largest value from the converted file, {other:.1e} from the original")
    if not same < SAME < other:
        sys.exit("the official code computes something else")


def main(checkout, convert):
    sys.path.insert(0, str(pathlib.Path(checkout, "src")))
    from linfusion.linfusion import LinFusion

    for make in (export_unet.sd15, export_unet.sd21):
        with tempfile.TemporaryDirectory() as folder:
            check(LinFusion, pathlib.Path(convert).resolve(), make, pathlib.Path(folder))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
