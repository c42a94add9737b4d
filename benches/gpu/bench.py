"""Times of the operators on a GPU beside FlashAttention, eager PyTorch, Triton and a plain copy.

python3 bench.py --library liblinfusion_ops.so -o benches/results [--quick]

Every figure is a median of CUDA-event timings, all of one shape taken side by side in one run. Ours runs inside ONNX
Runtime, tensors bound by address, several nodes in a row where one is short. Writes gpu-NAME.md, .json and .svg.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model import Element, Window
from plot import plot
from roofline import BATCH, SHAPES, TOKENS

TYPES = {"f16": Element.F16, "bf16": Element.BF16}
# The longest a peer's run may be expected to take: softmax attention at 4M tokens takes minutes.
MOST_SECONDS = 5.0
# Bytes that a copy moves to measure the bandwidth; more gives no other figure and may not fit beside the tensors.
COPY_BYTES = 4 << 30
# What libraries and workspaces may take beside a shape's tensors.
SPARE_BYTES = 4 << 30


@dataclass(frozen=True)
class Record:
    """One shape: seconds by peer; bytes a second of a copy (rate of a product for windows); bytes that ours took
    beside q, k, v and the output, the session's own included."""

    kind: str
    element: str
    heads: int
    width: int
    tokens: int
    seconds: dict[str, float]
    limit: float
    peak: int
    note: str = ""

    def traffic(self) -> float:
        """Bytes that linear attention has to move."""
        return 8.0 * BATCH * self.heads * self.width * self.tokens

    def share(self) -> float:
        """Of the measured copy bandwidth, for linear attention."""
        return self.traffic() / self.seconds["ours"] / self.limit

    def faster(self, peer: str) -> float | None:
        """How many times faster than a peer."""
        return self.seconds[peer] / self.seconds["ours"] if peer in self.seconds else None


def median_seconds(work: Callable[[], None], stream: torch.cuda.Stream, nodes: int = 1) -> float:
    """The median time of one of the nodes that `work` enqueues on the stream."""
    for _ in range(3):
        work()
    times = []
    for _ in range(11):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / nodes)
    return statistics.median(times)


def repeated(work: Callable[[], object], length: int) -> Callable[[], None]:
    """So many calls between two events: a peer's launches overlap with the work before them as our nodes' do."""
    def run() -> None:
        for _ in range(length):
            work()

    return run


def memory_used() -> int:
    """Bytes of the device that are taken, by whomever."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
    """LinFusion's attention as PyTorch runs it without a kernel of its own. [B,N,H*D]."""
    split = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in split[:2])
    tokens = k.shape[1]
    z = 1 / (phi_q @ phi_k.mean(dim=2, keepdim=True).transpose(2, 3) + 1e-4)
    kv = (phi_k.transpose(2, 3) * tokens**-0.5) @ (split[2] * tokens**-0.5)
    return (phi_q @ kv * z).transpose(1, 2).flatten(2)


def flash3() -> Callable[..., torch.Tensor] | None:
    """FlashAttention-3 where it is installed."""
    try:
        from flash_attn_interface import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def copy_bandwidth(bytes_moved: int) -> float:
    """Bytes a second of a copy that reads and writes so many together."""
    count = min(max(bytes_moved, 1 << 27), COPY_BYTES) // 8
    source, target = torch.empty(count, device="cuda"), torch.empty(count, device="cuda")
    seconds = median_seconds(lambda: target.copy_(source) and None, torch.cuda.current_stream())
    return 2 * 4 * count / seconds


def linear_record(library: str, name: str, heads: int, width: int, tokens: int, rate: float) -> Record:
    from session import DTYPES, Operator, outlike
    from triton_linear import linear as triton_linear

    element = TYPES[name]
    shape = (BATCH, tokens, heads * width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=DTYPES[element]) for _ in range(3))
    stream = torch.cuda.Stream()
    seconds: dict[str, float] = {}
    length = 16 if tokens <= 1 << 16 else 1
    out = outlike(q, v)
    before = memory_used()
    single = Operator(library, "cuda", heads, element, stream=stream)
    alone = single.bind((q, k, v), out)
    single.run(alone)
    peak = memory_used() - before
    seconds["one run"] = median_seconds(lambda: single.run(alone), stream)
    del single, alone
    ours = Operator(library, "cuda", heads, element, length=length, stream=stream)
    binding = ours.bind((q, k, v), out)
    torch.cuda.synchronize()
    seconds["ours"] = median_seconds(lambda: ours.run(binding), stream, length)
    del ours, binding
    main = torch.cuda.current_stream()
    split = [x.view(BATCH, tokens, heads, width).transpose(1, 2) for x in (q, k, v)]

    def peer(work: Callable[[], object]) -> float:
        torch.cuda.empty_cache()
        return median_seconds(repeated(work, length), main, length)

    softmax_floor = 4.0 * BATCH * heads * width * float(tokens) ** 2 / 4e14
    if softmax_floor < MOST_SECONDS / 20:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            seconds["flash"] = peer(lambda: torch.nn.functional.scaled_dot_product_attention(*split))
        third = flash3()
        if third is not None:
            packed = [x.view(BATCH, tokens, heads, width) for x in (q, k, v)]
            seconds["flash3"] = peer(lambda: third(*packed))
    # It makes some six tensors of the size of q.
    if 6 * q.nbytes < torch.cuda.mem_get_info()[0]:
        seconds["eager"] = peer(lambda: eager(q, k, v, heads))
    seconds["triton"] = peer(lambda: triton_linear(q, k, v, heads))
    torch.cuda.empty_cache()
    limit = copy_bandwidth(8 * BATCH * heads * width * tokens)
    return Record("linear", name, heads, width, tokens, seconds, limit, peak, f"{rate:.3g}")


def window_record(library: str, name: str, heads: int, width: int, side: int, window: int, rate: float) -> Record:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from session import DTYPES, Operator, outlike

    # Every shape is compiled anew; past its limit of recompilations PyTorch would run the mask unfused.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    element = TYPES[name]
    tokens = side * side
    shape = (BATCH, tokens, heads * width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=DTYPES[element]) for _ in range(3))
    stream = torch.cuda.Stream()
    out = outlike(q, v)
    before = memory_used()
    ours = Operator(library, "cuda", heads, element, window=Window(sides=(window, window)), stream=stream)
    binding = ours.bind((q, k, v), out, torch.tensor([side, side], dtype=torch.int64))
    ours.run(binding)
    peak = memory_used() - before
    seconds = {"ours": median_seconds(lambda: ours.run(binding), stream)}
    main = torch.cuda.current_stream()
    split = [x.view(BATCH, tokens, heads, width).transpose(1, 2).contiguous() for x in (q, k, v)]

    def reaches(_b, _h, query, key):  # type: ignore[no-untyped-def]
        def axis(at, other):  # type: ignore[no-untyped-def]
            start = torch.clamp(at - window // 2, 0, side - window)
            return (other >= start) & (other < start + window)

        return axis(query // side, key // side) & axis(query % side, key % side)

    mask = create_block_mask(reaches, None, None, tokens, tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex_attention)
    seconds["flex"] = median_seconds(repeated(lambda: compiled(*split, block_mask=mask), 1), main)
    if tokens <= 1 << 16:
        attention = torch.nn.functional.scaled_dot_product_attention
        seconds["flash"] = median_seconds(repeated(lambda: attention(*split), 1), main)
    return Record("window", name, heads, width, tokens, seconds, rate, peak, f"{window} × {window}")


def dense_rate() -> float:
    """Operations a second of a large bf16 matrix product."""
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return 2.0 * size**3 / median_seconds(lambda: torch.mm(a, b) is None or None, torch.cuda.current_stream())


def useful(record: Record) -> float:
    """Operations a second of a window record, of the pairs that queries attend to."""
    side = int(record.note.split()[0])
    return 4.0 * BATCH * record.heads * record.width * record.tokens * side**2 / record.seconds["ours"]


def goals(record: Record) -> list[tuple[str, bool]]:
    """What an H100 should reach for this shape, and whether it did."""
    if record.kind == "window":
        found = [("flex ≥ 1", (record.faster("flex") or 0) > 1)]
        if int(record.note.split()[0]) >= 16:
            found.append(("≥ 50 % of the dense rate", useful(record) >= 0.5 * record.limit))
        return found
    found = []
    if record.tokens >= 1 << 16:
        least = 0.85 if record.width >= 64 else 0.75
        found.append((f"≥ {least:.0%} of a copy", record.share() >= least))
    flash = record.faster("flash")
    if flash is not None and record.tokens >= 1024:
        found.append(("flash ≥ 1", flash > 1 if record.tokens >= 4096 else flash >= 1))
    if BATCH * record.heads == 16 and record.tokens >= 1 << 14:
        found.append(("triton ≥ 5", (record.faster("triton") or 0) >= 5))
    return found


def table(records: list[Record]) -> str:
    """The records as Markdown."""
    def times(record: Record, peer: str) -> str:
        ratio = record.faster(peer)
        return "–" if ratio is None else f"{ratio:.1f}"

    lines = []
    linear = [r for r in records if r.kind == "linear"]
    if linear:
        lines += [
            "| type | heads × D | N | µs | GB/s | of a copy | one run, µs | MB beside | × flash | × flash 3 | × eager | × triton | goals |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
    for r in linear:
        peers = " | ".join(times(r, p) for p in ("flash", "flash3", "eager", "triton"))
        met = ", ".join(f"{name}: {'met' if ok else 'missed'}" for name, ok in goals(r))
        alone = f"{r.seconds['one run'] * 1e6:.1f}" if "one run" in r.seconds else "–"
        lines.append(
            f"| {r.element} | {r.heads} × {r.width} | {r.tokens:,} | {r.seconds['ours'] * 1e6:.1f} | "
            f"{r.traffic() / r.seconds['ours'] / 1e9:.0f} | {r.share():.0%} | {alone} | {r.peak / 1e6:.0f} | {peers} | {met} |"
        )
    windows = [r for r in records if r.kind == "window"]
    if windows:
        lines += [
            "",
            "| type | heads × D | N | window | µs | TFLOP/s, useful | of the dense rate | MB beside | × flex | × flash, all keys | goals |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        ]
    for r in windows:
        met = ", ".join(f"{name}: {'met' if ok else 'missed'}" for name, ok in goals(r))
        lines.append(
            f"| {r.element} | {r.heads} × {r.width} | {r.tokens:,} | {r.note} | {r.seconds['ours'] * 1e6:.1f} | "
            f"{useful(r) / 1e12:.0f} | {useful(r) / r.limit:.0%} | {r.peak / 1e6:.0f} | {times(r, 'flex')} | {times(r, 'flash')} | {met} |"
        )
    return "\n".join(lines) + "\n"


def heading(command: str) -> str:
    """Date, device, versions, command."""
    import onnxruntime
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    return (
        f"# The operators on {torch.cuda.get_device_name()}\n\n"
        f"{datetime.date.today()}, driver {driver}, ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}, "
        f"Triton {triton.__version__}, Python {platform.python_version()}; batch {BATCH}. `{command}`\n\n"
        "Medians of CUDA-event timings; × is how many times faster ours is. The limit of linear attention is memory: the "
        "share is of a copy of as many bytes, measured beside it.\n\n"
    )


@dataclass
class Results:
    """What was measured so far, written after every shape: a shape that fails loses no other."""

    stem: Path
    title: str
    records: list[Record]
    missing: list[str]

    def add(self, name: str, bytes_needed: int, measure: Callable[[], Record]) -> None:
        """Measures a shape if its tensors fit."""
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if bytes_needed + SPARE_BYTES > free:
            self.missing.append(f"{name}: its tensors take {bytes_needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
        else:
            try:
                self.records.append(measure())
            except torch.cuda.OutOfMemoryError as error:
                self.missing.append(f"{name}: {str(error).splitlines()[0]}")
        self.write()

    def write(self) -> None:
        """All three files."""
        gone = "".join(f"\nNot measured: {line}.\n" for line in self.missing)
        self.stem.with_suffix(".md").write_text(self.title + table(self.records) + gone)
        self.stem.with_suffix(".json").write_text(json.dumps([asdict(r) for r in self.records], indent=1) + "\n")
        curves = [r for r in self.records if r.kind == "linear" and r.element == "f16"]
        if curves:
            self.stem.with_suffix(".svg").write_text(plot(curves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", required=True, help="liblinfusion_ops.so with CUDA kernels")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="two shapes and four sizes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench: PyTorch finds no GPU")
    rate = dense_rate()
    shapes = SHAPES[:1] + SHAPES[3:4] if arguments.quick else SHAPES
    tokens = TOKENS[:6:2] + TOKENS[5:6] if arguments.quick else TOKENS
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / f"gpu-{torch.cuda.get_device_name().split()[1].lower()}"
    results = Results(stem, heading(" ".join(["python3", *sys.argv])), [], [])
    for name in TYPES:
        for heads, width in shapes:
            for count in tokens:
                size = 4 * 2 * BATCH * heads * width * count
                results.add(
                    f"{name}, {heads} × {width}, N {count:,}", size,
                    lambda: linear_record(arguments.library, name, heads, width, count, rate),
                )
    for heads, width in ((16, 72), (24, 64), (24, 128)):
        for side in (32, 64, 128) if arguments.quick else (32, 64, 128, 256, 512):
            for window in (8, 16, 32):
                size = 7 * 2 * BATCH * heads * width * side * side
                results.add(
                    f"window {window} × {window}, {heads} × {width}, side {side}", size,
                    lambda: window_record(arguments.library, "bf16", heads, width, side, window, rate),
                )
    print(stem.with_suffix(".md").read_text())
    if not results.records:
        raise SystemExit("bench: nothing could be measured")


if __name__ == "__main__":
    main()
