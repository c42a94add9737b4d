"""The floors under the operators' times: bytes over bandwidth and products over rate. Computed; nothing is measured.

python3 roofline.py [--bandwidth TB/s] [--tensor TFLOP/s] [-o FILE.md]
"""

import argparse
from pathlib import Path

SHAPES = [(8, 40), (8, 80), (8, 160), (10, 64), (20, 64), (16, 72)]
TOKENS = [256, 512] + [1 << n for n in (10, 12, 14, 16, 18, 20, 22)]
BATCH = 2


def linear_seconds(heads: int, width: int, tokens: int, bandwidth: float) -> float:
    """q, k and v read once, the output written once, two bytes an element."""
    return 8.0 * BATCH * heads * width * tokens / bandwidth


def softmax_seconds(heads: int, width: int, tokens: int, rate: float) -> float:
    """Two products of N x N x D, two operations a product."""
    return 4.0 * BATCH * heads * width * float(tokens) ** 2 / rate


def window_work(window: int, tile: int) -> float:
    """Keys that a tile of queries visits over the keys that each of its queries attends to."""
    return ((window + tile - 1) / window) ** 2


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def report(bandwidth: float, rate: float) -> str:
    lines = [
        "# Floors of the operators on a GPU",
        "",
        f"Computed, not measured, by `python3 benches/gpu/roofline.py`: {bandwidth / 1e12:g} TB/s of memory and "
        f"{rate / 1e12:g} TFLOP/s of 16-bit products, batch {BATCH}.",
        "",
        "LinFusionAttention reads q, k and v once and writes the output once; softmax attention is taken to run at the "
        "full rate of the tensor cores.",
        "",
        "| heads × D | " + " | ".join(f"N = {n:,}" for n in TOKENS) + " |",
        "| --- |" + " ---: |" * len(TOKENS),
    ]
    for heads, width in SHAPES:
        cells = [
            f"{duration(linear_seconds(heads, width, n, bandwidth))} / {duration(softmax_seconds(heads, width, n, rate))}"
            for n in TOKENS
        ]
        lines.append(f"| {heads} × {width} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Linear / softmax. Below some 10 µs launches cost more than the work.",
        "",
        "WindowAttention computes whole tiles of queries; keys visited over keys attended to, in the middle of an image:",
        "",
        "| window | tile of 8 × 8 | tile of 16 × 16 |",
        "| --- | ---: | ---: |",
    ]
    for window in (8, 16, 32, 64):
        lines.append(f"| {window} × {window} | {window_work(window, 8):.2f} | {window_work(window, 16):.2f} |")
    lines += [
        "",
        "So with tiles of 8 × 8 and a window of 16 × 16 no more than 48 % of the dense rate can be useful, with 32 × 32 67 %.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=2.9, help="TB/s (H100 SXM, copying)")
    parser.add_argument("--tensor", type=float, default=650.0, help="TFLOP/s (H100 SXM, FlashAttention-3)")
    parser.add_argument("-o", "--output", type=Path, help="a file instead of the terminal")
    arguments = parser.parse_args()
    text = report(arguments.bandwidth * 1e12, arguments.tensor * 1e12)
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
