#!/usr/bin/env python3
"""Makes end-to-end cases of hybrid and window attention: an exported transformer, a checkpoint, and what the
model computes with its attentions replaced.

    python3 models/scripts/make_hybrid_parity.py models/fixtures [CASE ...]

Each case is a folder of model.onnx.gz (the original model), linfusion/ (a random checkpoint), inputs.npz and
expected.npz. The reference here is dense and runs in float64 on the same weights. A case is written only if
the exported file computes what PyTorch does, if the reference with a window that covers the image is the
original model, and if every tensor of the checkpoint and both axes of the window matter to the output.

Image queries of a hybrid give, a head,
    local_scale · softmax over the window's and the text's keys + global_scale · LinFusion over the image,
text queries full softmax. LinFusion is phi(q')(phi(k')^T v' / N) / (phi(q') · mean phi(k') + 1e-4) with
phi = elu + 1, q' = to_q(x + F_q(x)), k' = to_k(x + F_k(x)), v' = to_v(x), of the checkpoint's layers where it
has them and else of the model's, without the norms and rotations of the softmax's q and k.
"""

import dataclasses
import gzip
import json
import pathlib
import sys
import tempfile

import numpy
import torch
from safetensors.torch import save_file
from torch.nn import functional

import export_transformer

EPS = 1e-4
QKV = ("to_q", "to_k", "to_v")
TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


@dataclasses.dataclass
class Entry:
    """One of modules_list: the attention that is replaced, and which layers the checkpoint brings for it."""

    module: str
    layers: tuple = ()
    mid: int | None = None


@dataclasses.dataclass
class Case:
    architecture: str
    attention: str
    window: dict
    grid: tuple
    entries: list
    how: dict = dataclasses.field(default_factory=dict)
    # PixArt's positional embedding is of one size, so that it must be exported at the size it runs at.
    traced_at_grid: bool = False
    builder: object = None


CASES = {
    "hybrid-pixart": Case(
        "pixart", "hybrid", {"window": [4, 4], "border": "clamp"}, (6, 10),
        [Entry("transformer_blocks.0.attn1", QKV), Entry("transformer_blocks.1.attn1", QKV, mid=16)],
        traced_at_grid=True,
    ),
    "hybrid-sd3": Case(
        "sd3", "hybrid", {"window": [5, 3], "border": "truncate"}, (6, 10),
        [Entry("transformer_blocks.0.attn", ("add_k_proj",)),
         Entry("transformer_blocks.1.attn", ("to_out.0",), mid=16)],
    ),
    "hybrid-sd35": Case(
        "sd35", "hybrid", {"radius": 3}, (6, 10),
        [Entry("transformer_blocks.0.attn"), Entry("transformer_blocks.0.attn2", ("to_q",)),
         Entry("transformer_blocks.1.attn")],
        how=export_transformer.DYNAMO20,
    ),
    "hybrid-flux": Case(
        "flux", "hybrid", {"window": [3, 3]}, (4, 6),
        [Entry("transformer_blocks.0.attn", ("to_q", "to_k", "to_out.0")), Entry("transformer_blocks.1.attn"),
         Entry("single_transformer_blocks.0.attn", QKV, mid=16), Entry("single_transformer_blocks.1.attn")],
        how=export_transformer.DYNAMO20, builder=lambda: export_transformer.flux(layers=2),
    ),
    "window-sd3": Case(
        "sd3", "window", {"window": [4, 4]}, (6, 10),
        [Entry("transformer_blocks.0.attn", (*QKV, "to_out.0", *TEXT_QKV, "to_add_out")),
         Entry("transformer_blocks.1.attn", ("to_q", "to_out.0", "add_v_proj"))],
    ),
}


def axis_keys(at, size, width, border):
    """The keys of one axis in the window of the query at `at`; of an even window one more lies before it."""
    if border == "clamp":
        width = min(width, size)
        start = min(max(at - width // 2, 0), size - width)
        return range(start, start + width)
    start = at - width // 2
    return range(max(start, 0), min(start + width, size))


def window_mask(window, rows, cols):
    """[queries, keys] of the image's tokens in raster order: whether the query's window holds the key."""
    radius = window.get("radius")
    height, width = (2 * radius - 1,) * 2 if radius else window["window"]
    border = window.get("border", "truncate" if radius else "clamp")
    mask = torch.zeros(rows, cols, rows, cols, dtype=torch.bool)
    for y in range(rows):
        for x in range(cols):
            for ky in axis_keys(y, rows, height, border):
                for kx in axis_keys(x, cols, width, border):
                    mask[y, x, ky, kx] = not radius or (ky - y) ** 2 + (kx - x) ** 2 < radius**2
    return mask.reshape(rows * cols, rows * cols)


def project(layer, x, weights, name):
    """A linear layer of the checkpoint, or else the model's own."""
    return functional.linear(x, weights.get(f"{name}.weight", layer.weight), weights.get(f"{name}.bias", layer.bias))


def mlp(x, weights, name):
    x = functional.linear(x, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
    x = functional.layer_norm(x, x.shape[-1:], weights[f"{name}.1.weight"], weights[f"{name}.1.bias"], 1e-5)
    x = functional.leaky_relu(x, 0.01)
    return functional.linear(x, weights[f"{name}.3.weight"], weights[f"{name}.3.bias"])


def rms_norm(norm, x):
    """Written out, because the models' own norms compute in float32."""
    if norm is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * norm.weight


def rotate(x, rotary):
    """Rotates pairs of neighbouring channels of [batch, heads, tokens, channels]."""
    if rotary is None:
        return x
    cos, sin = (table.double() for table in rotary)
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin


class Replaced:
    """An attention processor of diffusers that computes the replacement."""

    def __init__(self, attention, window, grid, text, weights):
        self.attention, self.weights, self.text = attention, weights, text
        self.mask = window_mask(window, *grid)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None,
                 image_rotary_emb=None, **_unused):
        assert attention_mask is None
        image_tokens = self.mask.shape[0]
        own = self.weights if self.attention == "window" else {}
        q, k, v = (
            self.heads(attn, project(getattr(attn, name), hidden_states, own, name)) for name in QKV
        )
        q, k = (rms_norm(getattr(attn, n, None), x) for n, x in (("norm_q", q), ("norm_k", k)))
        if encoder_hidden_states is not None:
            tq, tk, tv = (
                self.heads(attn, project(getattr(attn, name), encoder_hidden_states, self.weights, name))
                for name in TEXT_QKV
            )
            tq, tk = (
                rms_norm(getattr(attn, n, None), x) for n, x in (("norm_added_q", tq), ("norm_added_k", tk))
            )
            q, k, v = (self.join(t, i) for t, i in ((tq, q), (tk, k), (tv, v)))
        q, k = rotate(q, image_rotary_emb), rotate(k, image_rotary_emb)

        allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        image = slice(q.shape[2] - image_tokens, None) if self.text == "prefix" else slice(0, image_tokens)
        allowed[image, image] = self.mask
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        out = scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
        if self.attention == "hybrid":
            # Blocks of one stream have text and image in hidden_states; the linear branch sees the image.
            x = hidden_states if encoder_hidden_states is not None else hidden_states[:, image]
            scales = (self.weights[name].reshape(-1, 1, 1) for name in ("local_scale", "global_scale"))
            local, glob = scales
            out[:, :, image] = local * out[:, :, image] + glob * self.linear(attn, x)
        out = out.transpose(1, 2).flatten(2)
        return self.outputs(attn, out, image, joint=encoder_hidden_states is not None)

    def linear(self, attn, x):
        xq, xk = (x + mlp(x, self.weights, name) for name in ("to_q_", "to_k_"))
        q, k, v = (
            self.heads(attn, project(getattr(attn, name), value, self.weights, name))
            for name, value in zip(QKV, (xq, xk, x), strict=True)
        )
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        summed = k.transpose(-1, -2) @ v / x.shape[1]
        return (q @ summed) / (q @ k.mean(2).unsqueeze(-1) + EPS)

    def outputs(self, attn, out, image, joint):
        """The layers after the attention, of each stream its own."""
        final = getattr(attn, "to_out", None)
        if not joint:
            return out if final is None else project(final[0], out, self.weights, "to_out.0")
        text_rows = slice(0, image.start) if self.text == "prefix" else slice(image.stop, None)
        text, added = out[:, text_rows], getattr(attn, "to_add_out", None)
        if added is not None:
            text = project(added, text, self.weights, "to_add_out")
        return project(final[0], out[:, image], self.weights, "to_out.0"), text

    def join(self, text, image):
        return torch.cat([text, image] if self.text == "prefix" else [image, text], dim=2)

    @staticmethod
    def heads(attn, x):
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def coarse(tensor):
    return torch.round(tensor * 64) / 64


def random_weights(entry, attn, attention):
    """The tensors of an entry, without its index."""
    dim = attn.to_q.in_features
    weights = {}
    for name in entry.layers:
        weights[f"{name}.weight"] = torch.randn(dim, dim) * (2 if name[-2:] in ("_q", "_k") else 1) * dim**-0.5
        weights[f"{name}.bias"] = 0.2 * torch.randn(dim)
    if attention == "hybrid":
        mid = entry.mid or dim
        for name in ("to_q_", "to_k_"):
            weights[f"{name}.0.weight"] = torch.randn(mid, dim) * dim**-0.5
            weights[f"{name}.0.bias"] = 0.2 * torch.randn(mid)
            weights[f"{name}.1.weight"] = 1 + 0.2 * torch.randn(mid)
            weights[f"{name}.1.bias"] = 0.2 * torch.randn(mid)
            weights[f"{name}.3.weight"] = torch.randn(dim, mid) * (2 / mid) ** 0.5
            weights[f"{name}.3.bias"] = 0.2 * torch.randn(dim)
        weights["local_scale"] = 0.6 + 0.2 * torch.randn(attn.heads)
        weights["global_scale"] = 1.0 + 0.3 * torch.randn(attn.heads)
    return {name: coarse(tensor) for name, tensor in weights.items()}


def config_entry(case, entry, attn):
    fields = {"module_name": entry.module, "dim_n": attn.to_q.in_features, "heads": attn.heads}
    if case.attention == "hybrid":
        fields["projection_mid_dim"] = entry.mid
    return {**fields, "attention": case.attention, **case.window}


class Reference:
    """A model in float64, to be run with this or that in place of its attentions."""

    def __init__(self, case, inputs):
        self.case = case
        self.model = export_transformer.built(case.builder or export_transformer.ARCHITECTURES[case.architecture][0])
        self.attentions = [self.model.get_submodule(entry.module) for entry in case.entries]
        self.model.double()
        self.originals = [attn.processor for attn in self.attentions]
        self.inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}

    def run(self, processors):
        for attn, processor in zip(self.attentions, processors, strict=True):
            attn.processor = processor
        with torch.no_grad():
            return self.model(**self.inputs).sample.numpy()

    def original(self):
        return self.run(self.originals)

    def replaced(self, weights, attention=None, window=None):
        text = "prefix" if self.case.architecture == "flux" else "suffix"
        attention, window = attention or self.case.attention, window or self.case.window
        double = [{name: tensor.double() for name, tensor in of_entry.items()} for of_entry in weights]
        return self.run([Replaced(attention, window, self.case.grid, text, of_entry) for of_entry in double])


def check(reference, weights, expected):
    """Refuses a case in which something could be wrong and go unnoticed; gives the least that a part matters."""
    everything = {"window": [1 << 10, 1 << 10]}
    error = abs(reference.replaced([{} for _ in weights], "window", everything) - reference.original()).max()
    if not error < 1e-5:
        raise ValueError(f"with a window that covers the image the reference is off by {error}")
    least = {}
    window = reference.case.window
    if "window" in window and window["window"][0] != window["window"][1]:
        swapped = {**window, "window": window["window"][::-1]}
        least["the window's axes"] = abs(reference.replaced(weights, window=swapped) - expected).max()
    least["the window"] = abs(reference.replaced(weights, window=everything) - expected).max()
    for i, of_entry in enumerate(weights):
        for name in of_entry:
            others = {k: v for k, v in of_entry.items() if k != name}
            # Layers fall back to the model's own; the others are no part without a value.
            if name.startswith(("to_q_.", "to_k_.")) or name.endswith("scale"):
                others[name] = torch.zeros_like(of_entry[name])
            changed = reference.replaced([*weights[:i], others, *weights[i + 1 :]])
            least[f"{i}.{name}"] = abs(changed - expected).max()
    part, change = min(least.items(), key=lambda item: item[1])
    if not change > 1e-3:
        raise ValueError(f"without {part} the output changes by {change} only")
    return part, change


def export_original(case, path, inputs):
    builder, make_inputs, _, dynamic = export_transformer.ARCHITECTURES[case.architecture]
    traced = inputs if case.traced_at_grid else make_inputs()
    model = export_transformer.built(case.builder or builder)
    export_transformer.export(path, model, traced, dynamic, **case.how)


def make(name, folder):
    case = CASES[name]
    _, make_inputs, _, _ = export_transformer.ARCHITECTURES[case.architecture]
    torch.manual_seed(1)
    tokens_wide = 1 if case.architecture == "flux" else 2
    inputs = make_inputs(case.grid[0] * tokens_wide, case.grid[1] * tokens_wide)
    reference = Reference(case, inputs)
    original = reference.original()

    torch.manual_seed(2)
    weights = [
        random_weights(entry, attn, case.attention)
        for entry, attn in zip(case.entries, reference.attentions, strict=True)
    ]
    expected = reference.replaced(weights)
    part, change = check(reference, weights, expected)

    checkpoint = folder / "linfusion"
    checkpoint.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch, "model.onnx")
        export_original(case, path, inputs)
        error = abs(export_transformer.run(path, inputs) - original).max()
        if not error < 5e-5:
            raise ValueError(f"the exported model is off by {error}")
        (folder / "model.onnx.gz").write_bytes(gzip.compress(path.read_bytes(), 9, mtime=0))
    entries = [config_entry(case, e, a) for e, a in zip(case.entries, reference.attentions, strict=True)]
    config = {"_class_name": "LinFusion", "modules_list": entries}
    (checkpoint / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"{i}.{n}": t.contiguous() for i, of_entry in enumerate(weights) for n, t in of_entry.items()}
    save_file(tensors, checkpoint / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    numpy.savez(folder / "inputs.npz", **{k: v.numpy() for k, v in inputs.items()})
    numpy.savez(folder / "expected.npz", out_sample=expected.astype(numpy.float32))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(
        f"{folder}: {size} bytes; the original is off by {error:.1e}; output standard deviation {expected.std():.2f}, "
        f"{abs(expected - original).std():.2f} from the original's; least change {change:.1e}, without {part}",
        flush=True,
    )


def main(fixtures, names):
    export_transformer.quiet()
    failed = []
    for name in names or CASES:
        try:
            make(name, pathlib.Path(fixtures, name))
        except Exception as error:  # one case's failure must not hide the others' results
            failed.append(name)
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
