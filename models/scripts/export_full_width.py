#!/usr/bin/env python3
"""Exports an SD 1.5 UNet of full width (860 M parameters, random weights, f32, 3.4 GB of external data), to measure on.

    python3 models/scripts/export_full_width.py FOLDER      # writes FOLDER/unet.onnx and unet.onnx.data
    cargo run --release -p linfusion-tests --example synthetic_checkpoint FOLDER/unet.onnx FOLDER
    linfusion-convert FOLDER/unet.onnx
    linfusion-run bench FOLDER/unet.onnx FOLDER/unet.linfusion.onnx --batch 1
"""

import pathlib
import sys
import tempfile

import onnx
import torch
from diffusers import UNet2DConditionModel


class Wrapped(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, sample, timestep, encoder_hidden_states):
        return self.net(sample, timestep, encoder_hidden_states, return_dict=False)[0]


def main():
    folder = pathlib.Path(sys.argv[1])
    torch.manual_seed(0)
    net = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    ).eval()
    example = (torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 77, 768))
    axes = {
        "sample": {0: "batch", 2: "height", 3: "width"},
        "encoder_hidden_states": {0: "batch", 1: "sequence"},
        "out_sample": {0: "batch", 2: "height", 3: "width"},
    }
    with tempfile.TemporaryDirectory(dir=folder) as scratch, torch.no_grad():
        raw = f"{scratch}/unet.onnx"
        torch.onnx.export(
            Wrapped(net),
            example,
            raw,
            input_names=["sample", "timestep", "encoder_hidden_states"],
            output_names=["out_sample"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        onnx.save(
            onnx.load(raw),
            folder / "unet.onnx",
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location="unet.onnx.data",
        )


main()
