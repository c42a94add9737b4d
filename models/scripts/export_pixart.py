#!/usr/bin/env python3
"""Exports PixArt's transformer to ONNX, for any batch, image size and length of text.

    python3 models/scripts/export_pixart.py PixArt-alpha/PixArt-Sigma-XL-2-1024-MS pixart/transformer.onnx
    python3 models/scripts/export_pixart.py --random 4 pixart/transformer.onnx

The first downloads the weights (or reads a local folder); the second makes random ones, with so many
of the 28 blocks. Inputs: sample [batch, 4, height/8, width/8], encoder_hidden_states [batch, text, 4096],
timestep [batch], encoder_attention_mask [batch, text]; output: out_sample [batch, 8, height/8, width/8].
"""

import argparse
import pathlib
import tempfile

import onnx
import torch
from diffusers import PixArtTransformer2DModel

SIGMA_XL = dict(
    sample_size=128, num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8,
    patch_size=2, cross_attention_dim=1152, caption_channels=4096, attention_bias=True,
    norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
    activation_fn="gelu-approximate", use_additional_conditions=False, interpolation_scale=2,
)


class Transformer(torch.nn.Module):
    """The model's parts in their order, with two steps written so that the graph takes any size:
    the position table is computed from the image's size (the model's own is a constant of the
    traced one), and the last squeeze, which ONNX Runtime refuses, is left out: it drops nothing."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def positions(self, rows, cols):
        embed, config = self.model.pos_embed, self.model.config
        width = config.num_attention_heads * config.attention_head_dim
        steps = torch.arange(width // 4, dtype=torch.float32) / (width // 4)
        rates = 10000.0**-steps

        def waves(count):
            place = torch.arange(count, dtype=torch.float32) * embed.base_size / count
            angle = (place / embed.interpolation_scale)[:, None] * rates
            return torch.cat([angle.sin(), angle.cos()], dim=1)

        across = waves(cols)[None].expand(rows, cols, width // 2)
        down = waves(rows)[:, None].expand(rows, cols, width // 2)
        return torch.cat([across, down], dim=2).reshape(1, rows * cols, width)

    def forward(self, sample, encoder_hidden_states, timestep, encoder_attention_mask):
        model, patch = self.model, self.model.config.patch_size
        batch, rows, cols = sample.shape[0], sample.shape[2] // patch, sample.shape[3] // patch
        tokens = model.pos_embed.proj(sample).flatten(2).transpose(1, 2)
        tokens = tokens + self.positions(rows, cols).to(tokens.dtype)
        time, embedded = model.adaln_single(
            timestep, {"resolution": None, "aspect_ratio": None}, batch_size=batch, hidden_dtype=tokens.dtype
        )
        text = model.caption_projection(encoder_hidden_states)
        mask = (1 - encoder_attention_mask.to(tokens.dtype))[:, None] * -10000.0
        for block in model.transformer_blocks:
            tokens = block(
                tokens, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=time
            )
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        tokens = model.proj_out(model.norm_out(tokens) * (1 + scale) + shift)
        channels = model.config.out_channels
        image = tokens.reshape(batch, rows, cols, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(batch, channels, rows * patch, cols * patch)


def example(rows, cols, text):
    torch.manual_seed(1)
    return (
        torch.randn(2, 4, rows, cols),
        torch.randn(2, text, 4096),
        torch.tensor([500, 20]),
        (torch.arange(text)[None] < torch.tensor([[text], [5]])).to(torch.int64),
    )


def check(wrapped):
    """Ours against the model's own forward, at a size that it was not made for."""
    inputs = example(24, 40, 12)
    ours = wrapped(*inputs)
    sample, text, timestep, mask = inputs
    theirs = wrapped.model(
        sample, encoder_hidden_states=text, timestep=timestep, encoder_attention_mask=mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
    )[0]
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if error > 1e-4:
        raise SystemExit(f"the exported form is {error:.1e} off the model's own: this diffusers differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="name or folder of the pipeline")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--random", type=int, metavar="BLOCKS", help="random weights, so many blocks")
    options = parser.parse_args()
    if options.random:
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(num_layers=options.random, **SIGMA_XL)
    elif options.model:
        model = PixArtTransformer2DModel.from_pretrained(options.model, subfolder="transformer")
    else:
        parser.error("name a model, or --random BLOCKS")
    wrapped = Transformer(model.eval())
    names = ["sample", "encoder_hidden_states", "timestep", "encoder_attention_mask"]
    image, text = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "text"}
    axes = dict(zip(names, [image, text, {0: "batch"}, text]), out_sample=image)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch, torch.no_grad():
        check(wrapped)
        raw = f"{scratch}/transformer.onnx"
        torch.onnx.export(
            wrapped, example(32, 32, 20), raw, input_names=names, output_names=["out_sample"],
            dynamic_axes=axes, opset_version=17, dynamo=False,
        )
        onnx.save(
            onnx.load(raw), options.out, save_as_external_data=True, all_tensors_to_one_file=True,
            location=f"{options.out.name}.data",
        )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
