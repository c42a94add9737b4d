#!/usr/bin/env python3
"""Trains a small diffusion transformer on handwritten digits, and a classifier that judges what it makes.

    pip install -r models/scripts/requirements.txt scikit-learn==1.9.1
    python3 models/scripts/train_digits_dit.py models/fixtures/digits [--steps N] [--seed N] [--samples N]

Writes digits-dit.onnx (inputs x [batch, 1, 16, 16], t [batch] in 0 .. 1, label [batch]; output velocity),
classifier.onnx (image to logits) and expected.json (what was trained and how often the classifier
recognises 1,000 samples). About ten minutes of one core.

The data are the 1,797 digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, E. Alpaydin and
C. Kaynak, CC BY 4.0), 8 x 8 pixels, here doubled to 16 x 16, every pixel a token. The model follows
"Scalable Diffusion Models with Transformers" (Peebles and Xie, arXiv 2212.09748), blocks with adaLN-Zero,
trained as a rectified flow (Liu et al., arXiv 2209.03003): x_t = (1 - t) image + t noise, velocity = noise - image.
"""

import argparse
import json
import pathlib
import time

import numpy
import onnx
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

SIDE, WIDTH, HEADS, BLOCKS, CLASSES = 16, 64, 4, 5, 10
EULER_STEPS = 20


def digits():
    """Images of -1 .. 1, doubled bilinearly, and labels; the last 297 are for testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target)
    return (images[:-297], labels[:-297]), (images[-297:], labels[-297:])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = (
            project(x).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](out.transpose(1, 2).reshape(batch, tokens, WIDTH))


class Block(nn.Module):
    """Attention and MLP, each scaled, shifted and gated by the time and the label."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.attn1 = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn1(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ff(self.norm2(x) * (1 + scale2) + shift2)


def sinusoids(values, width):
    """[n] to [n, width]: cosines and sines at periods from 2 pi to 2 pi times 10,000."""
    frequencies = torch.exp(-torch.arange(width // 2) * (2 * numpy.log(10000.0) / width)).to(values.dtype)
    angles = values[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class DigitsDiT(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in = nn.Linear(1, WIDTH)
        places = torch.arange(SIDE, dtype=torch.float32)
        half = sinusoids(places, WIDTH // 2)
        rows, columns = half[:, None].expand(-1, SIDE, -1), half[None].expand(SIDE, -1, -1)
        self.register_buffer("pos_embed", torch.cat([rows, columns], dim=-1).reshape(1, SIDE * SIDE, WIDTH))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.label = nn.Embedding(CLASSES, WIDTH)
        self.transformer_blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.norm_out = nn.LayerNorm(WIDTH, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(WIDTH, 1)
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x, t, label):
        tokens = self.proj_in(x.flatten(2).transpose(1, 2)) + self.pos_embed
        condition = F.silu(self.time(sinusoids(1000 * t, WIDTH)) + self.label(label))
        for block in self.transformer_blocks:
            tokens = block(tokens, condition)
        return self.proj_out(self.norm_out(tokens)).transpose(1, 2).reshape(x.shape)


def classifier():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (SIDE // 4) ** 2, 48), nn.ReLU(), nn.Linear(48, CLASSES),
    )


def batches(images, labels, size, steps, generator):
    for _ in range(steps):
        index = torch.randint(len(images), (size,), generator=generator)
        yield images[index], labels[index]


def train(model, loss_of, data, size, steps, rate, generator):
    """AdamW, a cosine after a short warm-up; gives the model with averaged weights."""
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    began = time.time()
    for step, (images, labels) in enumerate(batches(*data, size, steps, generator), 1):
        loss = loss_of(model, images, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        if step % 100 == 0 or step == steps:
            print(f"step {step}/{steps}: loss {loss.item():.4f}, {time.time() - began:.0f} s", flush=True)
    return average.module.eval()


def export(model, path, example, inputs, output):
    dynamic = {name: {0: "batch"} for name in [*inputs, output]}
    torch.onnx.export(
        model, example, str(path), input_names=inputs, output_names=[output], dynamic_axes=dynamic,
        opset_version=17, dynamo=False,
    )
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def recognised(dit, judge, samples, seed):
    """Fraction of `samples` Euler samples, labels 0 to 9 in turn, that the classifier takes for what they are."""
    random = numpy.random.default_rng(seed)
    right, size = 0, 100
    for start in range(0, samples, size):
        count = min(size, samples - start)
        labels = (start + numpy.arange(count)) % CLASSES
        x = random.standard_normal((count, 1, SIDE, SIDE), dtype=numpy.float32)
        for step in range(EULER_STEPS):
            t = numpy.full(count, 1 - step / EULER_STEPS, dtype=numpy.float32)
            (velocity,) = dit.run(None, {"x": x, "t": t, "label": labels})
            x = x - velocity / EULER_STEPS
        (logits,) = judge.run(None, {"image": x})
        right += int((logits.argmax(1) == labels).sum())
    return right / samples


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    training, testing = digits()

    judge = train(
        classifier(), lambda model, images, labels: F.cross_entropy(model(images), labels),
        training, 64, 400, 2e-3, generator,
    )
    with torch.no_grad():
        accuracy = (judge(testing[0]).argmax(1) == testing[1]).float().mean().item()
    print(f"classifier: {accuracy:.1%} of {len(testing[0])} digits that it has not seen")

    def flow(model, images, labels):
        noise = torch.randn(images.shape, generator=generator)
        t = torch.rand(len(images), generator=generator)
        mixed = torch.lerp(images, noise, t[:, None, None, None])
        return F.mse_loss(model(mixed, t, labels), noise - images)

    began = time.time()
    dit = train(DigitsDiT(), flow, training, options.batch, options.steps, 2e-3, generator)
    seconds = time.time() - began

    x, t, label = torch.randn(2, 1, SIDE, SIDE), torch.rand(2), torch.tensor([3, 7])
    dit_session = export(dit, options.folder / "digits-dit.onnx", (x, t, label), ["x", "t", "label"], "velocity")
    judge_session = export(judge, options.folder / "classifier.onnx", (x,), ["image"], "logits")
    with torch.no_grad():
        expected = dit(x, t, label).numpy()
    (found,) = dit_session.run(None, {"x": x.numpy(), "t": t.numpy(), "label": label.numpy()})
    numpy.testing.assert_allclose(found, expected, atol=1e-4)

    rate = recognised(dit_session, judge_session, options.samples, options.seed)
    print(f"{rate:.1%} of {options.samples} samples recognised")
    expected = {
        "license": "MIT OR Apache-2.0 for the weights; data CC BY 4.0 (UCI Optical Recognition of Handwritten Digits)",
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "training_seconds": round(seconds),
        "euler_steps": EULER_STEPS,
        "samples": options.samples,
        "recognised": rate,
        "classifier_accuracy": round(accuracy, 4),
    }
    (options.folder / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
