#!/usr/bin/env python3
"""Exports the small UNets of models/fixtures: one per exporter variant, random weights, fixed seed.

    python3 models/scripts/export_unet.py models/fixtures [NAME ...]

The blocks are those of the real architectures; only widths are shrunken, so that a file is mostly
graph. Files are gzipped (with no time stamp, so that the same graph gives the same bytes).
"""

import gzip
import pathlib
import sys
import tempfile
import warnings

import onnx
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

SD_BLOCKS = dict(
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    block_out_channels=(4, 8, 16, 16),
)
COMMON = dict(sample_size=16, layers_per_block=2, norm_num_groups=4, cross_attention_dim=12)


def sd15(**changes):
    return UNet2DConditionModel(**SD_BLOCKS, **COMMON, **{"attention_head_dim": 2, **changes})


def sd21(**changes):
    return sd15(attention_head_dim=(1, 2, 4, 4), use_linear_projection=True, **changes)


def sdxl():
    return UNet2DConditionModel(
        **COMMON,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8, 16),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 2, 3),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )


class ControlNet(torch.nn.Module):
    """Gives the residuals as a flat tuple: exporters take no dataclass."""

    def __init__(self):
        super().__init__()
        blocks = {k: v for k, v in SD_BLOCKS.items() if k != "up_block_types"}
        self.net = ControlNetModel(
            **blocks,
            layers_per_block=2,
            norm_num_groups=4,
            cross_attention_dim=12,
            attention_head_dim=2,
            conditioning_embedding_out_channels=(4, 8),
        )
        # The output convolutions start at zero, which would make every comparison trivial.
        for name, parameter in self.net.named_parameters():
            if "controlnet_" in name:
                torch.nn.init.normal_(parameter, std=0.2)

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond):
        down, mid = self.net(
            sample, timestep, encoder_hidden_states, controlnet_cond, return_dict=False
        )
        return (*down, mid)


class PixelAttention(torch.nn.Module):
    """Attention as pixel-space UNets write it: channels first, Einsum over [batch·heads, channels, tokens]."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.norm = torch.nn.GroupNorm(4, channels)
        self.qkv = torch.nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = torch.nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        batch, channels, height, width = x.shape
        flat = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(flat))
        qkv = qkv.reshape(batch * self.heads, 3 * channels // self.heads, -1)
        q, k, v = qkv.chunk(3, dim=1)
        scale = (channels // self.heads) ** -0.25
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        out = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, -1)
        return (flat + self.proj_out(out)).reshape(batch, channels, height, width)


class PixelUNet(torch.nn.Module):
    """Two levels, one attention each and one in the middle; no text."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.down_attention = PixelAttention(8, 2)
        self.down = torch.nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle_attention = PixelAttention(16, 2)
        self.up = torch.nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.up_attention = PixelAttention(8, 2)
        self.conv_out = torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, sample):
        outer = self.down_attention(self.conv_in(sample))
        inner = self.middle_attention(self.down(outer))
        return self.conv_out(self.up_attention(outer + self.up(inner)))


def arguments(model, dtype):
    torch.manual_seed(1)
    if isinstance(model, PixelUNet):
        return {"sample": torch.randn(2, 3, 16, 16, dtype=dtype)}
    named = {
        "sample": torch.randn(2, 4, 16, 16, dtype=dtype),
        "timestep": torch.tensor(500.0, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 12, dtype=dtype),
    }
    if isinstance(model, ControlNet):
        named["controlnet_cond"] = torch.randn(2, 3, 32, 32, dtype=dtype)
    return named


DYNAMIC = {
    "sample": {0: "batch", 2: "height", 3: "width"},
    "encoder_hidden_states": {0: "batch", 1: "sequence"},
    "controlnet_cond": {0: "batch", 2: "pixel_height", 3: "pixel_width"},
}


def export(path, model, *, exporter="ts", opset=17, shapes="dyn", attention="sdpa", dtype=torch.float32):
    model = model.eval().to(dtype)
    if attention == "fused":
        model.fuse_qkv_projections()
    elif isinstance(model, UNet2DConditionModel):
        model.set_attn_processor(AttnProcessor() if attention == "attn" else AttnProcessor2_0())
    if isinstance(model, UNet2DConditionModel):
        model.forward = _tuple(model.forward)
    named = arguments(model, dtype)
    with torch.no_grad():
        count = len(model(**named))
    outputs = ["out_sample"] if not isinstance(model, ControlNet) else [f"residual_{i}" for i in range(count)]
    options = dict(input_names=list(named), output_names=outputs)
    if exporter == "ts":
        dynamic = {k: v for k, v in DYNAMIC.items() if k in named} if shapes == "dyn" else None
        options.update(opset_version=opset, dynamic_axes=dynamic, dynamo=False)
    else:
        auto = torch.export.Dim.AUTO
        dynamic = {k: {axis: auto for axis in DYNAMIC.get(k, {})} for k in named} if shapes == "dyn" else None
        options.update(opset_version=opset, dynamic_shapes=dynamic, dynamo=True, external_data=False)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, tuple(named.values()), str(path), **options)


def _tuple(forward):
    def run(sample, timestep, encoder_hidden_states):
        return forward(sample, timestep, encoder_hidden_states, return_dict=False)

    return run


def slim(source, path):
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), str(path))


def int8(source, path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(path), op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8)


def ort_optimised(source, path, float16):
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    fusion = FusionOptions("unet")
    fusion.enable_packed_qkv = fusion.enable_packed_kv = float16
    # These fusions make operators that have no CPU kernel.
    for name in ("group_norm", "skip_group_norm", "nhwc_conv", "bias_splitgelu", "bias_add", "skip_layer_norm"):
        setattr(fusion, f"enable_{name}", False)
    model = optimize_model(
        str(source), model_type="unet", num_heads=0, hidden_size=0, opt_level=0,
        optimization_options=fusion, use_gpu=float16, only_onnxruntime=False,
    )
    if float16:
        model.convert_float_to_float16(keep_io_types=False)
    model.save_model_to_file(str(path))


def post(step, *args, **source):
    def run(path, model):
        with tempfile.TemporaryDirectory() as folder:
            plain = pathlib.Path(folder, "plain.onnx")
            export(plain, model, **source)
            step(plain, path, *args)

    return run


HALF = dict(dtype=torch.float16)
FIXTURES = {
    "sd15-ts14-dyn-sdpa": (sd15, dict(opset=14)),
    "sd15-ts17-dyn-attn": (sd15, dict(attention="attn")),
    "sd15-ts17-fix-sdpa": (sd15, dict(shapes="fix")),
    "sd15-ts17-dyn-fused": (sd15, dict(attention="fused")),
    "sd15-ts17-dyn-sdpa-fp16": (sd15, HALF),
    "sd15-dynamo20-fix-sdpa": (sd15, dict(exporter="dynamo", opset=20, shapes="fix")),
    "sd15-dynamo20-dyn-sdpa": (sd15, dict(exporter="dynamo", opset=20)),
    "sd15-dynamo23-fix-sdpa": (sd15, dict(exporter="dynamo", opset=23, shapes="fix")),
    "sd21-ts17-dyn-sdpa": (sd21, {}),
    "sd21-ts17-dyn-attn-fp16-upcast": (
        lambda: sd21(upcast_attention=True), dict(attention="attn", **HALF)),
    "controlnet-ts17-dyn-sdpa": (ControlNet, {}),
    "pixel-ts17-dyn-einsum": (PixelUNet, {}),
    "sd15-ts17-fix-sdpa-slim": (sd15, post(slim, shapes="fix")),
    "sd15-ts17-dyn-sdpa-int8": (sd15, post(int8)),
    "sd15-ts17-fix-attn-ort": (sd15, post(ort_optimised, False, attention="attn", shapes="fix")),
    "sd15-ts17-fix-sdpa-ort-fp16": (sd15, post(ort_optimised, True, shapes="fix")),
}


def coarse(make):
    """Weights in steps of 1/128: still random, but a file packs to a third."""

    def made():
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.round(parameter * 128) / 128)
        return model

    return made


def strip_traces(path):
    """Stack traces name the exporting machine's folders and are most of a dynamo file."""
    model = onnx.load(str(path))
    for node in model.graph.node:
        kept = [p for p in node.metadata_props if p.key != "pkg.torch.onnx.stack_trace"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    onnx.save(model, str(path))


def main(folder, names):
    failed = []
    for name in names or FIXTURES:
        make, how = coarse(FIXTURES[name][0]), FIXTURES[name][1]
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as scratch:
            path = pathlib.Path(scratch, f"{name}.onnx")
            try:
                how(path, make()) if callable(how) else export(path, make(), **how)
            except Exception as error:  # one exporter's failure must not hide the others' results
                failed.append(name)
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            strip_traces(path)
            packed = gzip.compress(path.read_bytes(), 9, mtime=0)
            target = pathlib.Path(folder, f"{name}.onnx.gz")
            target.write_bytes(packed)
            print(f"{target}: {path.stat().st_size} bytes, {len(packed)} packed", flush=True)
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
