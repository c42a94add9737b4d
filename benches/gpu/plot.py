"""A plot of times over tokens, both logarithmic, as SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench import Record

WIDTH, HEIGHT, MARGIN = 720, 420, 60
COLOURS = {"ours": "#d62728", "flash": "#1f77b4", "flash3": "#17becf", "eager": "#7f7f7f", "triton": "#2ca02c"}


def plot(records: list[Record]) -> str:
    """Microseconds by tokens of the first shape among the records, a line a peer."""
    if not records:
        return '<svg xmlns="http://www.w3.org/2000/svg"/>\n'
    first = records[0]
    shape = [r for r in records if (r.heads, r.width) == (first.heads, first.width)]
    xs = [math.log2(r.tokens) for r in shape]
    ys = [math.log10(s * 1e6) for r in shape for peer, s in r.seconds.items() if peer in COLOURS]
    low, high = math.floor(min(ys)), math.ceil(max(ys))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / max(max(xs) - min(xs), 1)
        up = (y - low) / max(high - low, 1)
        return MARGIN + across * (WIDTH - 2 * MARGIN), HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{MARGIN}" y="24">{first.element}, {first.heads} heads of {first.width}: microseconds by tokens</text>',
    ]
    for x in xs:
        px, py = at(x, low)
        parts.append(f'<text x="{px:.0f}" y="{py + 18:.0f}" text-anchor="middle">{2 ** round(x):,}</text>')
    for y in range(low, high + 1):
        px, py = at(min(xs), y)
        parts.append(f'<line x1="{px:.0f}" y1="{py:.0f}" x2="{WIDTH - MARGIN}" y2="{py:.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{px - 6:.0f}" y="{py + 4:.0f}" text-anchor="end">{10.0**y:g}</text>')
    for row, (peer, colour) in enumerate(COLOURS.items()):
        points = [at(math.log2(r.tokens), math.log10(r.seconds[peer] * 1e6)) for r in shape if peer in r.seconds]
        if not points:
            continue
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{MARGIN + 10}" y="{44 + 16 * row}" fill="{colour}">{peer}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
