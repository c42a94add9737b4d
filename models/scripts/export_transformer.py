#!/usr/bin/env python3
"""Exports the small diffusion transformers of models/fixtures: random weights, fixed seed.

    python3 models/scripts/export_transformer.py models/fixtures/transformers [NAME ...]

The blocks are those of the real architectures; widths and depths are shrunken. Files are gzipped (with no
time stamp, so that the same graph gives the same bytes). expected.json says how many attentions of each
kind a file has. Every file is loaded and run by ONNX Runtime and compared with PyTorch before it is written.
"""

import gzip
import json
import logging
import pathlib
import sys
import tempfile
import types
import warnings

import numpy
import onnx
import onnxruntime
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.models.attention_processor import AttnProcessor

from export_unet import strip_traces


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, caption_channels=24, sample_size=16, patch_size=2,
    )
    model.proj_out.register_forward_hook(lambda _module, _inputs, output: Tokens(output))
    return model


class Tokens:
    """The [batch, tokens, channels] that PixArt's forward squeezes on axis 1 and then reshapes.

    With more than one token the squeeze does nothing. Exported, it is a branch that ONNX Runtime refuses to
    load, or a Squeeze of an axis that is not 1 long.
    """

    def __init__(self, tensor):
        self.tensor = tensor

    def squeeze(self, _axis):
        return self.tensor


def dit():
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=16, patch_size=2, num_embeds_ada_norm=10,
    )


def sd3(**changes):
    return SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=20, caption_projection_dim=32, pooled_projection_dim=12, out_channels=4,
        pos_embed_max_size=12, **changes,
    )


def sd35():
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def flux(layers=1):
    return FluxTransformer2DModel(
        in_channels=8, num_layers=layers, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )


class PackedAttention(torch.nn.Module):
    """Self-attention with one layer for q, k and v, as vision transformers write it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.proj = torch.nn.Linear(width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        packed = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class SiTBlock(torch.nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PackedAttention(width, heads)
        self.norm2 = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU("tanh"), torch.nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(width, 6 * width))

    def forward(self, x, condition):
        modulation = self.adaLN_modulation(condition).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class SiT(torch.nn.Module):
    """A scalable interpolant transformer, conditioned on time alone."""

    def __init__(self, width=32, heads=4, layers=2, channels=4, patch=2, side=8):
        super().__init__()
        self.patch, self.side, self.channels = patch, side, channels
        self.x_embedder = torch.nn.Conv2d(channels, width, patch, stride=patch)
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, side * side, width))
        self.t_embedder = torch.nn.Sequential(
            torch.nn.Linear(1, width), torch.nn.SiLU(), torch.nn.Linear(width, width)
        )
        self.blocks = torch.nn.ModuleList([SiTBlock(width, heads) for _ in range(layers)])
        self.norm_final = torch.nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = torch.nn.Linear(width, patch * patch * channels)

    def forward(self, x, t):
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        condition = self.t_embedder(t.unsqueeze(-1) / 1000)
        for block in self.blocks:
            x = block(x, condition)
        x = self.linear(self.norm_final(x))
        x = x.reshape(-1, self.side, self.side, self.patch, self.patch, self.channels)
        size = self.side * self.patch
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, size, size)


def randomise(model):
    """Fresh transformers have layers of zeros, behind which no attention would matter.

    Weights come in steps of 1/16 (norms and biases too): still random, but a file packs to a fifth.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                spread = 2.0 if name.endswith(("to_q.weight", "to_k.weight", "qkv.weight")) else 1.0
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=spread * fan_in**-0.5)
            else:
                torch.nn.init.normal_(parameter, mean="norm" in name and name.endswith("weight"), std=0.2)
            parameter.copy_(torch.round(parameter * 16) / 16)
    return model


def built(make):
    torch.manual_seed(0)
    return randomise(make()).eval()


# Times are small: the sine of a large one depends on the last bit of the frequency, which would hide
# every other difference between two runs.
def latent(channels, height, width):
    return torch.randn(2, channels, height, width)


def pixart_inputs(height=16, width=16):
    mask = torch.ones(2, 9)
    mask[1, 6:] = 0
    return {
        "hidden_states": latent(4, height, width),
        "encoder_hidden_states": torch.randn(2, 9, 24),
        "timestep": torch.tensor([20, 7]),
        "encoder_attention_mask": mask,
    }


def dit_inputs():
    return {
        "hidden_states": latent(4, 16, 16),
        "timestep": torch.tensor([20, 7]),
        "class_labels": torch.tensor([3, 7]),
    }


def sit_inputs():
    return {"x": latent(4, 16, 16), "t": torch.tensor([0.5, 0.25])}


def sd3_inputs(height=16, width=16):
    return {
        "hidden_states": latent(4, height, width),
        "encoder_hidden_states": torch.randn(2, 9, 20),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([20.0, 7.0]),
    }


def flux_inputs(rows=8, cols=8):
    ids = torch.zeros(rows, cols, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(cols)[None, :]
    return {
        "hidden_states": torch.randn(2, rows * cols, 8),
        "encoder_hidden_states": torch.randn(2, 9, 20),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([1 / 64, 1 / 128]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(9, 3),
        "guidance": torch.tensor([1 / 32, 1 / 64]),
    }


# PixArt's positional embedding is a constant of the traced size, and DiT and SiT take only squares of one
# size; all the same, height and width of PixArt are declared free, as exports of it usually do.
IMAGE = {0: "batch", 2: "height", 3: "width"}
TEXT = {0: "batch", 1: "sequence"}
BATCH = {0: "batch"}
ARCHITECTURES = {
    "pixart": (pixart, pixart_inputs, dict(self=2, cross=2, joint=0), {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "timestep": BATCH, "encoder_attention_mask": TEXT,
    }),
    "dit": (dit, dit_inputs, dict(self=2, cross=0, joint=0), {
        "hidden_states": BATCH, "timestep": BATCH, "class_labels": BATCH,
    }),
    "sit": (SiT, sit_inputs, dict(self=2, cross=0, joint=0), {"x": BATCH, "t": BATCH}),
    "sd3": (sd3, sd3_inputs, dict(self=0, cross=0, joint=2), {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "pooled_projections": BATCH, "timestep": BATCH,
    }),
    "sd35": (sd35, sd3_inputs, dict(self=1, cross=0, joint=2), {
        "hidden_states": IMAGE, "encoder_hidden_states": TEXT, "pooled_projections": BATCH, "timestep": BATCH,
    }),
    "flux": (flux, flux_inputs, dict(self=0, cross=0, joint=3), {
        "hidden_states": {0: "batch", 1: "image"}, "encoder_hidden_states": TEXT, "pooled_projections": BATCH,
        "timestep": BATCH, "img_ids": {0: "image"}, "txt_ids": {0: "sequence"}, "guidance": BATCH,
    }),
}


def bound(model, names):
    """The model itself, called by position as exporters do: a wrapper would add its name to every module path."""
    original = model.forward

    def forward(_self, *values):
        out = original(**dict(zip(names, values, strict=True)))
        return out if isinstance(out, torch.Tensor) else out.sample

    model.forward = types.MethodType(forward, model)
    return model


def export(path, model, inputs, dynamic, *, exporter="ts", opset=17, shapes="dyn", attention="sdpa"):
    if attention == "attn":
        model.set_attn_processor(AttnProcessor())
    options = dict(input_names=list(inputs), output_names=["out_sample"], opset_version=opset)
    if exporter == "ts":
        options.update(dynamic_axes=dynamic if shapes == "dyn" else None, dynamo=False)
    else:
        auto = torch.export.Dim.AUTO
        free = [{axis: auto for axis in dynamic[name]} for name in inputs]
        options.update(
            dynamic_shapes=(tuple(free),) if shapes == "dyn" else None, dynamo=True, external_data=False,
            verbose=False,
        )
    model = bound(model, list(inputs))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, tuple(inputs.values()), str(path), **options)
    strip_traces(path)


def session_optimised(source, path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])


def slim(source, path):
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), str(path))


def half(source, path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(str(source)), keep_io_types=False), str(path))


def nbits(source, path):
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))


DYNAMO20, DYNAMO23 = dict(exporter="dynamo", opset=20), dict(exporter="dynamo", opset=23)
FIXTURES = {
    # name: (architecture, how to export, what comes after, largest difference from PyTorch)
    "pixart-ts17-dyn-sdpa": ("pixart", {}, None, 1e-4),
    "pixart-ts17-fix-attn": ("pixart", dict(shapes="fix", attention="attn"), None, 1e-4),
    "pixart-dynamo20-dyn-sdpa": ("pixart", DYNAMO20, None, 1e-4),
    "pixart-ts17-fix-sdpa-ort": ("pixart", dict(shapes="fix"), session_optimised, 1e-4),
    "pixart-ts17-fix-sdpa-fp16": ("pixart", dict(shapes="fix"), half, 0.1),
    "dit-ts17-dyn-sdpa": ("dit", {}, None, 1e-4),
    "dit-ts17-dyn-sdpa-nbits": ("dit", {}, nbits, None),
    "sit-ts17-dyn-sdpa": ("sit", {}, None, 1e-4),
    "sit-dynamo23-fix-sdpa": ("sit", dict(DYNAMO23, shapes="fix"), None, 1e-4),
    "sd3-ts17-dyn-sdpa": ("sd3", {}, None, 1e-4),
    "sd3-ts17-dyn-sdpa-slim": ("sd3", {}, slim, 1e-4),
    "sd35-dynamo20-dyn-sdpa": ("sd35", DYNAMO20, None, 1e-4),
    "flux-dynamo20-dyn-sdpa": ("flux", DYNAMO20, None, 1e-4),
    "flux-dynamo23-dyn-sdpa": ("flux", DYNAMO23, None, 1e-4),
}


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    cast = {"tensor(float16)": numpy.float16, "tensor(float)": numpy.float32, "tensor(int64)": numpy.int64}
    feeds = {i.name: inputs[i.name].numpy().astype(cast[i.type]) for i in session.get_inputs()}
    (out,) = session.run(None, feeds)
    return out.astype(numpy.float64)


def make(name, folder):
    architecture, how, after, tolerance = FIXTURES[name]
    builder, make_inputs, counts, dynamic = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    inputs = make_inputs()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        expected = built(builder)(**inputs)
        expected = (expected if isinstance(expected, torch.Tensor) else expected.sample).numpy()
        path = plain = pathlib.Path(scratch, "plain.onnx")
        export(plain, built(builder), inputs, dynamic, **how)
        if after:
            path = pathlib.Path(scratch, "after.onnx")
            after(plain, path)
        error = abs(run(path, inputs) - expected).max()
        if not numpy.isfinite(error) or (tolerance and error > tolerance):
            raise ValueError(f"the output is off by {error}")
        packed = gzip.compress(path.read_bytes(), 9, mtime=0)
        target = pathlib.Path(folder, f"{name}.onnx.gz")
        target.write_bytes(packed)
    print(f"{target}: {len(packed)} bytes, runs, off by {error:.1e} of {expected.std():.2f}", flush=True)
    return counts


def quiet():
    """onnxslim turns on everybody's messages."""
    logging.getLogger("onnx_ir").setLevel(logging.WARNING)


def main(folder, names):
    quiet()
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    record = pathlib.Path(folder, "expected.json")
    expected = json.loads(record.read_text()) if record.exists() else {}
    failed = []
    for name in names or FIXTURES:
        try:
            expected[f"{name}.onnx.gz"] = make(name, folder)
        except Exception as error:  # one exporter's failure must not hide the others' results
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    record.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
