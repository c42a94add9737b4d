"""Linear attention in Triton as it is commonly written: what our kernels are measured against.

Two passes, a program a head in the first: it walks over all keys and keeps the state on the chip; no split over the
keys, so few heads leave most of the GPU idle. The second gives every block of queries a program. Feature maps are
computed in the kernels; head widths are padded to powers of two.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _feature(x):
    return tl.where(x > 0, x + 1, tl.exp(x))


@triton.jit
def _state(
    k, v, state, norm, tokens, heads,
    batch_stride, head_stride, token_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    base = (pid // heads).to(tl.int64) * batch_stride + (pid % heads) * head_stride
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    sums = tl.zeros((PADDED, PADDED), dtype=tl.float32)
    total = tl.zeros((PADDED,), dtype=tl.float32)
    for start in range(0, tokens, BLOCK):
        n = start + tl.arange(0, BLOCK)
        mask = (n < tokens)[:, None] & inside[None, :]
        at = base + n[:, None].to(tl.int64) * token_stride + d[None, :]
        keys = tl.load(k + at, mask=mask, other=0.0)
        values = tl.load(v + at, mask=mask, other=0.0)
        phi = tl.where(mask, _feature(keys.to(tl.float32)), 0.0)
        sums += tl.dot(tl.trans(phi.to(keys.dtype)), values)
        total += tl.sum(phi, axis=0)
    out = pid.to(tl.int64) * PADDED * PADDED + d[:, None] * PADDED + d[None, :]
    tl.store(state + out, sums / tokens)
    tl.store(norm + pid * PADDED + d, total / tokens)


@triton.jit
def _apply(
    q, state, norm, out, tokens, heads, eps,
    batch_stride, head_stride, token_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):
    pid = tl.program_id(1)
    base = (pid // heads).to(tl.int64) * batch_stride + (pid % heads) * head_stride
    d = tl.arange(0, PADDED)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (n < tokens)[:, None] & (d < WIDTH)[None, :]
    at = base + n[:, None].to(tl.int64) * token_stride + d[None, :]
    queries = tl.load(q + at, mask=mask, other=0.0)
    phi = tl.where(mask, _feature(queries.to(tl.float32)), 0.0)
    here = state + pid.to(tl.int64) * PADDED * PADDED + d[:, None] * PADDED + d[None, :]
    sums = tl.load(here)
    total = tl.load(norm + pid * PADDED + d)
    top = tl.dot(phi.to(queries.dtype), sums.to(queries.dtype))
    bottom = tl.sum(phi * total[None, :], axis=1) + eps
    tl.store(out + at, (top / bottom[:, None]).to(queries.dtype), mask=mask)


def linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, eps: float = 1e-4) -> torch.Tensor:
    """q, k, v [B,N,H*D] of a 16-bit type; the same number of queries and keys. The output [B,N,H*D]."""
    batch, tokens, width = q.shape
    head = width // heads
    padded = max(16, triton.next_power_of_2(head))
    block = 64 if padded <= 128 else 32
    state = torch.empty(batch * heads, padded, padded, dtype=torch.float32, device=q.device)
    norm = torch.empty(batch * heads, padded, dtype=torch.float32, device=q.device)
    out = torch.empty_like(q)
    strides = (tokens * width, head, width)
    _state[(batch * heads,)](k, v, state, norm, tokens, heads, *strides, WIDTH=head, PADDED=padded, BLOCK=block)
    grid = (triton.cdiv(tokens, block), batch * heads)
    _apply[grid](q, state, norm, out, tokens, heads, eps, *strides, WIDTH=head, PADDED=padded, BLOCK=block)
    return out
