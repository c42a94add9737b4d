#!/usr/bin/env python3
"""Writes what Pillow, diffusers and the formula of SSIM give for small images.

    python3 models/scripts/make_images.py models/fixtures/images

cases.npz holds `noise` (an image of noise and of hard edges, which windows overshoot at), `resized/WxH` (it after
the Lanczos of Pillow 13 or later, which changed the order of passes), `blurred` and `shifted` (images to compare it with) with `psnr/...` and `ssim/...`, and what
diffusers' VaeImageProcessor makes of every byte (`encoded`) and of some `values` (`decoded`). Where scikit-image is
installed, SSIM and PSNR are checked against it.
"""

import pathlib
import sys

import numpy
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

SIZES = [(37, 29), (64, 48), (16, 16), (37, 11), (90, 29), (1, 1), (3, 70), (111, 2), (30, 14)]


def noise():
    generator = numpy.random.default_rng(0)
    image = generator.integers(0, 256, (29, 37, 3), dtype=numpy.uint8)
    image[8:20, 6:24] = 255
    image[11:17, 9:20] = 0
    return image


def psnr(a, b):
    return 10 * numpy.log10(255**2 / ((a.astype(float) - b) ** 2).mean())


def ssim(a, b):
    """Wang et al. 2004: the mean over channels and over the places where the whole window lies in the image."""
    offsets = numpy.arange(-5, 6)
    line = numpy.exp(-0.5 * (offsets / 1.5) ** 2)
    window = numpy.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(3):
        x, y = a[..., channel].astype(float), b[..., channel].astype(float)
        for row in range(a.shape[0] - 10):
            for column in range(a.shape[1] - 10):
                place = numpy.s_[row : row + 11, column : column + 11]
                mean_x, mean_y = (window * x[place]).sum(), (window * y[place]).sum()
                spread_x = (window * (x[place] - mean_x) ** 2).sum()
                spread_y = (window * (y[place] - mean_y) ** 2).sum()
                both = (window * (x[place] - mean_x) * (y[place] - mean_y)).sum()
                values.append(
                    (2 * mean_x * mean_y + c1)
                    * (2 * both + c2)
                    / ((mean_x**2 + mean_y**2 + c1) * (spread_x + spread_y + c2))
                )
    return numpy.mean(values)


def check(a, b):
    try:
        from skimage.metrics import peak_signal_noise_ratio, structural_similarity
    except ImportError:
        return
    other = structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2, data_range=255
    )
    assert abs(other - ssim(a, b)) < 1e-9, (other, ssim(a, b))
    assert abs(peak_signal_noise_ratio(a, b, data_range=255) - psnr(a, b)) < 1e-9
    print("as scikit-image")


def main(folder):
    image = noise()
    pillow = Image.fromarray(image)
    arrays = {"noise": image}
    for size in SIZES:
        arrays["resized/%dx%d" % size] = numpy.asarray(pillow.resize(size, Image.Resampling.LANCZOS))

    arrays["blurred"] = numpy.asarray(pillow.resize((20, 16), Image.Resampling.BOX).resize(pillow.size))
    arrays["shifted"] = numpy.clip(image.astype(int) + 9, 0, 255).astype(numpy.uint8)
    for name in ["blurred", "shifted"]:
        check(image, arrays[name])
        arrays[f"psnr/{name}"] = numpy.array([psnr(image, arrays[name])])
        arrays[f"ssim/{name}"] = numpy.array([ssim(image, arrays[name])])

    processor = VaeImageProcessor(vae_scale_factor=1)
    every = numpy.arange(256, dtype=numpy.uint8).reshape(16, 16)
    encoded = processor.preprocess(Image.fromarray(numpy.stack([every] * 3, axis=2)))
    arrays["encoded"] = encoded[0, 0].numpy().reshape(-1)
    # Halves between bytes, their neighbours, and what lies outside.
    halves = (numpy.arange(255, dtype=numpy.float32) + numpy.float32(0.5)) / numpy.float32(127.5) - numpy.float32(1)
    values = numpy.concatenate([
        numpy.nextafter(halves, numpy.float32(-2)), halves, numpy.nextafter(halves, numpy.float32(2)),
        numpy.array([-1, -1.5, 1, 1.5, 0, -0.0, numpy.inf, -numpy.inf, 1e-30], dtype=numpy.float32),
    ]).astype(numpy.float32)
    planes = torch.from_numpy(values)[None, None, None].expand(1, 3, 1, -1)
    (decoded,) = processor.postprocess(planes, output_type="pil")
    arrays["values"] = values
    arrays["decoded"] = numpy.asarray(decoded)[0, :, 0].copy()

    folder.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(folder / "cases.npz", **arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
