"""The peers that our kernels are measured against compute the same: python3 -m unittest test_peers (no GPU needed:
Triton's interpreter runs the kernels; that of Triton 3.6 needs NumPy before 2.3)."""

import os
import unittest

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch  # noqa: E402

import reference  # noqa: E402
from bench import Record, eager, table  # noqa: E402
from model import Layout  # noqa: E402
from triton_linear import linear  # noqa: E402


class Peers(unittest.TestCase):
    def inputs(self, tokens: int, heads: int, width: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(tokens)
        return [torch.randn(2, tokens, heads * width, generator=generator).half() for _ in range(3)]

    def exact(self, qkv: list[torch.Tensor], heads: int) -> torch.Tensor:
        parts = [reference.heads_of(x, heads, Layout.PACKED) for x in qkv]
        return reference.layout_of(reference.linear(*parts, torch.float64), Layout.PACKED)

    def test_triton(self) -> None:
        for tokens, heads, width in ((5, 2, 40), (200, 1, 64), (70, 2, 72)):
            qkv = self.inputs(tokens, heads, width)
            error = (linear(*qkv, heads).double() - self.exact(qkv, heads)).abs().max()
            self.assertLess(float(error), 4e-3)

    def test_eager(self) -> None:
        qkv = self.inputs(100, 2, 40)
        error = (eager(*[x.float() for x in qkv], 2).double() - self.exact(qkv, 2)).abs().max()
        self.assertLess(float(error), 1e-5)

    def test_table(self) -> None:
        record = Record("linear", "f16", 8, 40, 4096, {"ours": 0.01, "flash": 0.04, "triton": 0.2}, 2.9e12, 0)
        text = table([record])
        self.assertIn("4.0", text)
        self.assertIn("20.0", text)


if __name__ == "__main__":
    unittest.main()
