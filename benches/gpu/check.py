"""Correctness of the operators inside ONNX Runtime, against double precision: exit code 1 if anything is wrong.

python3 check.py --library liblinfusion_ops.so [--device cuda|cpu] [--small] [--only NAME]

Bound of every case: twice the error that the element type's own arithmetic makes, and no less than two units in the
last place of the largest output.
"""

import argparse
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

import reference
from model import Element, Layout, Window
from session import DTYPES, Operator, outlike

# Queries whose exact output is made at once.
QUERIES = 1 << 18
DIGITS = {Element.F32: 24, Element.F16: 11, Element.BF16: 8, Element.F64: 53}


@dataclass(frozen=True)
class Settings:
    """What the whole check runs on."""

    library: str
    device: str
    small: bool


def tensors(
    settings: Settings, element: Element, layout: Layout, sizes: tuple[int, int, int, int, int, int], spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of batch, heads, queries, keys, D, Dv; numbers from -spread to spread."""
    batch, heads, queries, keys, head, value = sizes
    generator = torch.Generator(device=settings.device).manual_seed(queries * 31 + head)

    def tensor(rows: int, width: int) -> torch.Tensor:
        shape = (batch, rows, heads * width) if layout is Layout.PACKED else (batch, heads, rows, width)
        x = torch.empty(shape, dtype=torch.float32, device=settings.device)
        return x.uniform_(-spread, spread, generator=generator).to(DTYPES[element])

    return tensor(queries, head), tensor(keys, head), tensor(keys, value)


@dataclass
class Comparison:
    """How far an output is from the exact one, gathered part by part."""

    element: Element
    finite: bool = True
    error: float = 0.0
    plain_error: float = 0.0
    largest: float = 0.0

    def add(self, out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
        """A part of the output, its exact values and those of the element type's own arithmetic."""
        self.finite &= bool(torch.isfinite(out).all())
        self.error = max(self.error, float((out.double() - exact).abs().max()))
        self.plain_error = max(self.plain_error, float((plain - exact).abs().max()))
        self.largest = max(self.largest, float(exact.abs().max()))

    def problem(self) -> str | None:
        """What is wrong with the output, if anything."""
        if not self.finite:
            return "the output has NaNs or infinities"
        unit = self.largest * 2.0 ** (1 - DIGITS[self.element])
        bound = 2 * max(self.plain_error, unit)
        if self.element in (Element.F32, Element.F64):
            # Sums in the element type err more than its roundings.
            bound = max(bound, 64 * unit)
        return None if self.error <= bound else f"error {self.error:.3e}, at most {bound:.3e}"


def check_linear(
    settings: Settings, element: Element, layout: Layout, sizes: tuple[int, int, int, int, int, int], spread: float = 2.0
) -> str | None:
    q, k, v = tensors(settings, element, layout, sizes, spread)
    operator = Operator(settings.library, settings.device, sizes[1], element, layout)
    out = outlike(q, v)
    operator.run(operator.bind((q, k, v), out))
    q, k, v, out = (reference.heads_of(x, sizes[1], layout) for x in (q, k, v, out))
    comparison = Comparison(element)
    # A part of the queries at a time: every one needs all keys, and double precision of all would not fit.
    exact_state = reference.linear_state(k, v, torch.float64)
    plain_state = reference.linear_state(k, v, DTYPES[element])
    for part in range(0, q.shape[2], QUERIES):
        queries = q[:, :, part : part + QUERIES]
        exact = reference.linear_output(queries, exact_state, torch.float64)
        plain = reference.linear_output(queries, plain_state, DTYPES[element])
        comparison.add(out[:, :, part : part + QUERIES], exact, plain)
    return comparison.problem()


def check_window(
    settings: Settings, element: Element, layout: Layout, heads: int, width: int, grid: tuple[int, int], text: int, window: Window
) -> str | None:
    tokens = text + grid[0] * grid[1]
    q, k, v = tensors(settings, element, layout, (2, heads, tokens, tokens, width, width))
    operator = Operator(settings.library, settings.device, heads, element, layout, window)
    out = outlike(q, v)
    sizes = torch.tensor(grid, dtype=torch.int64)
    operator.run(operator.bind((q, k, v), out, sizes))
    parts = [reference.heads_of(x, heads, layout) for x in (q, k, v, out)]
    mask = reference.window_mask(grid, text, window, q.device)
    exact = reference.windowed(*parts[:3], mask, torch.float64)
    plain = reference.windowed(*parts[:3], mask, DTYPES[element])
    comparison = Comparison(element)
    comparison.add(parts[3], exact, plain)
    return comparison.problem()


def linear_cases(settings: Settings) -> list[tuple[str, Callable[[], str | None]]]:
    cases: list[tuple[str, Callable[[], str | None]]] = []

    def add(element: Element, layout: Layout, sizes: tuple[int, int, int, int, int, int], spread: float = 2.0) -> None:
        name = f"linear {element.name} {layout.name} {sizes} ±{spread:g}"
        cases.append((name, lambda: check_linear(settings, element, layout, sizes, spread)))

    for element in (Element.F16, Element.BF16, Element.F32, Element.F64):
        for index, width in enumerate((40, 64, 72, 80, 128, 160, 8, 48, 256, 7, 300)):
            layout = (Layout.PACKED, Layout.HEADS)[index % 2]
            # 1100: past the one launch of few tokens.
            for tokens in (1, 63, 257, 1100) if settings.small else (1, 63, 257, 1100, 5000):
                add(element, layout, (2, 3, tokens, tokens + 1, width, width))
        add(element, Layout.PACKED, (1, 2, 300, 77, 40, 96))
    for element in (Element.F16, Element.BF16):
        for spread in (1e-3, 30.0, 60000.0):
            add(element, Layout.PACKED, (1, 8, 2000, 2000, 40, 40), spread)
    if not settings.small:
        add(Element.F16, Layout.PACKED, (1, 8, 1 << 22, 1 << 22, 40, 40))
        add(Element.BF16, Layout.PACKED, (1, 10, 1 << 20, 1 << 20, 64, 64))
        # More than 2^31 elements in a tensor.
        add(Element.F16, Layout.PACKED, (2, 10, 1 << 21, 1 << 21, 64, 64))
    return cases


def window_cases(settings: Settings) -> list[tuple[str, Callable[[], str | None]]]:
    cases: list[tuple[str, Callable[[], str | None]]] = []
    windows = [
        Window(sides=(5, 7)),
        Window(sides=(16, 16)),
        Window(sides=(4, 6), border="truncate"),
        Window(sides=(99, 99)),
        Window(radius=5, text="suffix"),
    ]
    grids = [(9, 17)] if settings.small else [(9, 17), (40, 33), (1, 200)]
    for element in (Element.F16, Element.BF16, Element.F32):
        for width in (64, 72, 128, 160, 20):
            for index, window in enumerate(windows):
                for grid in grids:
                    layout = (Layout.PACKED, Layout.HEADS)[index % 2]
                    text = (0, 77, 5, 0, 130)[index]
                    name = f"window {element.name} {layout.name} D={width} {grid} text {text} {window}"
                    values = (element, layout, 2, width, grid, text, window)
                    cases.append((name, lambda values=values: check_window(settings, *values)))
    return cases


def check_determinism(settings: Settings) -> str | None:
    sizes = (2, 8, 9000, 9000, 40, 40)
    q, k, v = tensors(settings, Element.F16, Layout.PACKED, sizes)
    operator = Operator(settings.library, settings.device, 8, Element.F16)
    results = []
    for _ in range(3):
        out = outlike(q, v)
        operator.run(operator.bind((q, k, v), out))
        results.append(out)
    same = all(torch.equal(results[0], other) for other in results[1:])
    return None if same else "the same input gave different bits"


def check_threads(settings: Settings) -> str | None:
    """Threads on one session, and sessions of their own, on streams of their own: the numbers of a run alone."""
    shared = Operator(settings.library, settings.device, 8, Element.F16)
    failures: list[str] = []
    alone = []
    for index in range(6):
        q, k, v = tensors(settings, Element.F16, Layout.PACKED, (1, 8, 3000 + index, 3000, 64, 64))
        out = outlike(q, v)
        shared.run(shared.bind((q, k, v), out))
        alone.append(out.clone())
    if settings.device == "cuda":
        torch.cuda.synchronize()

    def work(index: int) -> None:
        q, k, v = tensors(settings, Element.F16, Layout.PACKED, (1, 8, 3000 + index, 3000, 64, 64))
        stream = torch.cuda.Stream() if settings.device == "cuda" and index % 2 else None
        own = Operator(settings.library, settings.device, 8, Element.F16, stream=stream) if index % 2 else shared
        outs = []
        for _ in range(20):
            out = outlike(q, v)
            if settings.device == "cuda":
                torch.cuda.synchronize()
            own.run(own.bind((q, k, v), out))
            outs.append(out)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        if not all(torch.equal(alone[index], out) for out in outs):
            failures.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return f"other numbers on {failures}" if failures else None


def check_graph(settings: Settings) -> str | None:
    """A captured CUDA graph, run again with other numbers in the same tensors."""
    operator = Operator(settings.library, settings.device, 8, Element.F16, cuda_graph=True)
    plain = Operator(settings.library, settings.device, 8, Element.F16)
    q, k, v = tensors(settings, Element.F16, Layout.PACKED, (2, 8, 5000, 5000, 40, 40))
    out, expected = outlike(q, v), outlike(q, v)
    binding = operator.bind((q, k, v), out)
    for round_number in range(4):
        for x in (q, k, v):
            x.mul_(0.9).add_(0.01 * round_number)
        torch.cuda.synchronize()
        operator.run(binding)
        plain.run(plain.bind((q, k, v), expected))
        torch.cuda.synchronize()
        if not torch.equal(out, expected):
            return f"replay {round_number} differs from a run without a graph"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="liblinfusion_ops.so")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="few tokens: for compute-sanitizer and for the CPU")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    arguments = parser.parse_args()
    settings = Settings(arguments.library, arguments.device, arguments.small)
    cases = linear_cases(settings) + window_cases(settings)
    cases.append(("determinism", lambda: check_determinism(settings)))
    cases.append(("threads", lambda: check_threads(settings)))
    if settings.device == "cuda":
        cases.append(("CUDA graph", lambda: check_graph(settings)))
    cases = [(name, case) for name, case in cases if arguments.only in name]
    if settings.device == "cpu":
        # ONNX Runtime's Python binding has no bfloat16 on the CPU in every release; the GPU check has.
        cases = [(name, case) for name, case in cases if "BF16" not in name]
    wrong = 0
    for name, case in cases:
        try:
            problem = case()
        except Exception as error:  # noqa: BLE001: one case that cannot run hides no other
            problem = f"{type(error).__name__}: {error}"
        if problem:
            wrong += 1
            print(f"WRONG  {name}: {problem}")
        if settings.device == "cuda":
            torch.cuda.empty_cache()
    print(f"{len(cases)} cases, {wrong} wrong")
    return 1 if wrong or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
