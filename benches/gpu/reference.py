"""What the operators compute, in double precision and in the element type, with PyTorch on any device.

Tensors are [B,H,N,D] here; `heads_of` and `layout_of` change from and to the operators' layouts.
"""

from dataclasses import dataclass

import torch

from model import Layout, Window

# The attribute's default: a single precision number.
EPS = torch.tensor(1e-4, dtype=torch.float32).item()
# Tokens at a time: keeps temporaries small beside the tensors themselves.
CHUNK = 1 << 16


def heads_of(x: torch.Tensor, heads: int, layout: Layout) -> torch.Tensor:
    """[B,N,H*D] or [B,H,N,D] as [B,H,N,D]."""
    if layout is Layout.HEADS:
        return x
    batch, tokens, width = x.shape
    return x.view(batch, tokens, heads, width // heads).transpose(1, 2)


def layout_of(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """[B,H,N,D] as the layout has it, contiguous."""
    if layout is Layout.HEADS:
        return x.contiguous()
    batch, heads, tokens, width = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * width)


def feature(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1, without the rounding of that sum for negative x."""
    return torch.where(x > 0, x + 1, torch.exp(x))


def round_to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x with the digits of dtype, whatever its range."""
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}.get(dtype)
    if digits is None:
        return x
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2**digits), exponent - digits)


@dataclass(frozen=True)
class State:
    """What phase 1 leaves: [B,H,D,Dv] and [B,H,D,1], means over the keys."""

    state: torch.Tensor
    norm: torch.Tensor


def linear_state(k: torch.Tensor, v: torch.Tensor, rounding: torch.dtype) -> State:
    """Sums in double precision; `rounding` as for `linear`."""
    keys = k.shape[2]
    state = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3], dtype=torch.float64, device=k.device)
    norm = torch.zeros(*k.shape[:2], k.shape[3], 1, dtype=torch.float64, device=k.device)
    for at in range(0, keys, CHUNK):
        phi = round_to(feature(k[:, :, at : at + CHUNK].double()), rounding)
        state += phi.transpose(2, 3) @ v[:, :, at : at + CHUNK].double()
        norm += phi.sum(2).unsqueeze(3)
    return State(round_to(state / keys, rounding), round_to(norm / keys, rounding))


def linear_output(q: torch.Tensor, state: State, rounding: torch.dtype, eps: float = EPS) -> torch.Tensor:
    """Phase 2 of any of the queries."""
    out = torch.empty(*q.shape[:3], state.state.shape[3], dtype=torch.float64, device=q.device)
    for at in range(0, q.shape[2], CHUNK):
        phi = round_to(feature(q[:, :, at : at + CHUNK].double()), rounding)
        out[:, :, at : at + CHUNK] = round_to(phi @ state.state / (phi @ state.norm + eps), rounding)
    return out


def linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rounding: torch.dtype, eps: float = EPS
) -> torch.Tensor:
    """LinFusionAttention, all sums in double precision.

    `rounding` float64: the exact result; else features, the keys' sums and the output are rounded to that type, as an
    implementation in it does; float32 sums nothing differently, so it serves as a lower bound of its error.
    """
    return linear_output(q, linear_state(k, v, rounding), rounding, eps)


def window_mask(grid: tuple[int, int], text: int, window: Window, device: torch.device) -> torch.Tensor:
    """Which keys (columns) each query (row) attends to, text before or after the image: bool [N,N]."""
    rows, cols = grid

    def axis(size: int, reach: int) -> torch.Tensor:
        at = torch.arange(size, device=device)
        if window.border == "clamp" and window.radius is None:
            reach = min(reach, size)
            start = (at - reach // 2).clamp(0, size - reach)
        else:
            start = at - reach // 2
        key = torch.arange(size, device=device)
        return (key >= start[:, None]) & (key < start[:, None] + reach)

    sides = window.sides or (2 * (window.radius or 0) - 1,) * 2
    inside = axis(rows, sides[0])[:, None, :, None] & axis(cols, sides[1])[None, :, None, :]
    if window.radius is not None:
        dy = torch.arange(rows, device=device)[:, None] - torch.arange(rows, device=device)
        dx = torch.arange(cols, device=device)[:, None] - torch.arange(cols, device=device)
        far = dy[:, None, :, None] ** 2 + dx[None, :, None, :] ** 2
        inside &= far < window.radius**2
    pixels = rows * cols
    mask = torch.ones(text + pixels, text + pixels, dtype=torch.bool, device=device)
    first = text if window.text == "prefix" else 0
    mask[first : first + pixels, first : first + pixels] = inside.reshape(pixels, pixels)
    return mask


def windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, rounding: torch.dtype
) -> torch.Tensor:
    """WindowAttention by a full mask, in double precision; `rounding`: weights and output are rounded to that type."""
    scores = q.double() @ k.double().transpose(2, 3) / q.shape[3] ** 0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.exp(scores - scores.amax(3, keepdim=True))
    total = weights.sum(3, keepdim=True)
    return round_to(round_to(weights, rounding) @ v.double() / total, rounding)
