#!/usr/bin/env python3
"""Exports the small terrain UNets of models/fixtures/terrain: random weights, fixed seed.

    python3 models/scripts/export_terrain.py models/fixtures/terrain

A one-step model of heights in the form of the trained one that `make terrain` fetches: pixels, not latents; a
noise level and a difficulty for each image; channels-first attention written with Einsum; exported by dynamo
with an open batch and one fixed image size (terrain-fixed.onnx.gz). terrain-dynamic.onnx.gz has the same weights
and takes any size: what a resized terrain-fixed must compute. Both are loaded and run by ONNX Runtime and
compared with PyTorch before they are written.
"""

import gzip
import pathlib
import sys
import tempfile
import warnings

import numpy
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

from export_unet import strip_traces

SIDE, WIDTHS, EMBEDDING, GROUPS, HEADS = 32, (8, 16, 16), 16, 4, 2


class ResBlock(nn.Module):
    """Two convolutions; the embedding scales and shifts between them; may halve or double the image."""

    def __init__(self, before, after, resample=None):
        super().__init__()
        self.resample = resample
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(EMBEDDING, 2 * after))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, after), nn.SiLU(), nn.Conv2d(after, after, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def resampled(self, x):
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return x

    def forward(self, x, embedding):
        hidden = self.in_layers[2](self.resampled(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(embedding)[:, :, None, None].chunk(2, dim=1)
        hidden = self.out_layers[0](hidden) * (1 + scale) + shift
        return self.skip_connection(self.resampled(x)) + self.out_layers[2](self.out_layers[1](hidden))


class Attention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x, _embedding):
        batch, channels, height, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, 3 * channels, height * width).chunk(3, dim=1)
        scale = (channels // HEADS) ** -0.25
        heads = (batch * HEADS, channels // HEADS, height * width)
        weight = torch.einsum("bct,bcs->bts", (q * scale).reshape(heads), (k * scale).reshape(heads))
        out = torch.einsum("bts,bcs->bct", weight.softmax(dim=-1), v.reshape(heads))
        return x + self.proj_out(out.reshape(batch, channels, height * width).reshape(x.shape))


class Stage(nn.ModuleList):
    def forward(self, x, embedding):
        for module in self:
            x = module(x, embedding)
        return x


class UNet(nn.Module):
    """Attention at all levels but the largest; two blocks a level."""

    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(8, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label_emb = nn.Sequential(nn.Linear(1, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.first = nn.Conv2d(1, WIDTHS[0], 3, padding=1)
        self.input_blocks, skips, width = nn.ModuleList(), [WIDTHS[0]], WIDTHS[0]
        for level, after in enumerate(WIDTHS):
            for _ in range(2):
                self.input_blocks.append(self.stage(width, after, level))
                width = after
                skips.append(width)
            if level + 1 < len(WIDTHS):
                self.input_blocks.append(Stage([ResBlock(width, width, "down")]))
                skips.append(width)
        self.middle_block = Stage([ResBlock(width, width), Attention(width), ResBlock(width, width)])
        self.output_blocks = nn.ModuleList()
        for level, after in reversed(list(enumerate(WIDTHS))):
            for index in range(3):
                stage = self.stage(width + skips.pop(), after, level)
                width = after
                if index == 2 and level > 0:
                    stage.append(ResBlock(width, width, "up"))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    @staticmethod
    def stage(before, after, level):
        return Stage([ResBlock(before, after)] + ([Attention(after)] if level > 0 else []))

    def forward(self, x, time, label):
        embedding = self.time_embed(time) + self.label_emb(label)
        hidden = [self.first(x)]
        for stage in self.input_blocks:
            hidden.append(stage(hidden[-1], embedding))
        x = self.middle_block(hidden[-1], embedding)
        for stage in self.output_blocks:
            x = stage(torch.cat([x, hidden.pop()], dim=1), embedding)
        return self.out(x)


class Terrain(nn.Module):
    """The UNet between the scales of "Elucidating the Design Space of Diffusion-Based Generative Models"
    (Karras et al., arXiv 2206.00364, table 1)."""

    def __init__(self, data=0.5):
        super().__init__()
        self.network, self.data = UNet(), data

    def forward(self, noisy, sigma, difficulty):
        norm = (sigma**2 + self.data**2).sqrt()
        image = lambda scale: scale[:, None, None, None]
        angles = 0.25 * sigma.log()[:, None] * torch.tensor([1.0, 3.0, 10.0, 30.0])
        time = torch.cat([angles.cos(), angles.sin()], dim=1)
        made = self.network(noisy * image(1 / norm), time, difficulty[:, None])
        skip, out = self.data**2 / norm**2, sigma * self.data / norm
        return (image(out) * made + image(skip) * noisy).clamp(-1, 1)


def main(folder):
    torch.manual_seed(0)
    model = Terrain().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # In steps of 1/128, so that a file packs to a third.
            parameter.copy_(torch.round(parameter * 128) / 128)
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    auto = torch.export.Dim.AUTO
    for name, image in [("terrain-fixed", {}), ("terrain-dynamic", {2: auto, 3: auto})]:
        inputs = {
            "noisy": torch.randn(2, 1, SIDE, SIDE) * 2,
            "sigma": torch.tensor([2.0, 0.3]),
            "difficulty": torch.tensor([0.1, 0.9]),
        }
        shapes = {"noisy": {0: auto, **image}, "sigma": {0: auto}, "difficulty": {0: auto}}
        with tempfile.TemporaryDirectory() as scratch:
            path = pathlib.Path(scratch, f"{name}.onnx")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    model, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=["denoised"],
                    opset_version=18, dynamo=True, dynamic_shapes=shapes, external_data=False,
                )
                expected = model(*inputs.values()).numpy()
            strip_traces(path)
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
            numpy.testing.assert_allclose(found, expected, atol=1e-5)
            packed = gzip.compress(path.read_bytes(), 9, mtime=0)
        target = pathlib.Path(folder, f"{name}.onnx.gz")
        target.write_bytes(packed)
        print(f"{target}: {len(packed)} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
