"""Our operators in ONNX Runtime, on tensors of PyTorch by their addresses."""

from dataclasses import dataclass, field

import onnxruntime
import torch

from model import Element, Layout, Window, chain

DTYPES = {
    Element.F32: torch.float32,
    Element.F16: torch.float16,
    Element.BF16: torch.bfloat16,
    Element.F64: torch.float64,
}


@dataclass
class Operator:
    """A session of a chain of `length` nodes, on the CPU or on the first GPU."""

    library: str
    device: str
    heads: int
    element: Element
    layout: Layout = Layout.PACKED
    window: Window | None = None
    length: int = 1
    cuda_graph: bool = False
    stream: torch.cuda.Stream | None = None
    session: onnxruntime.InferenceSession = field(init=False)

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(self.library)
        providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
        if self.device == "cuda":
            # Anything that would run on the CPU is an error, not a copy.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            settings = {"device_id": "0", "enable_cuda_graph": str(int(self.cuda_graph))}
            if self.stream is not None:
                settings["user_compute_stream"] = str(self.stream.cuda_stream)
            providers = [("CUDAExecutionProvider", settings)]
        model = chain(self.heads, self.element, self.layout, self.window, self.length)
        self.session = onnxruntime.InferenceSession(model, options, providers=providers)
        found = self.session.get_providers()
        if self.device == "cuda" and "CUDAExecutionProvider" not in found:
            raise SystemExit(f"ONNX Runtime has no CUDA provider here: it fell back to {found}")

    def bind(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        out: torch.Tensor,
        grid: torch.Tensor | None = None,
    ) -> onnxruntime.IOBinding:
        """Inputs and the output by address; they must outlive the binding. `grid`: int64 [2] on the CPU."""
        binding = self.session.io_binding()
        for name, x in zip(("q", "k", "v"), qkv):
            binding.bind_input(name, self.device, 0, int(self.element), list(x.shape), x.data_ptr())
        if grid is not None:
            binding.bind_input("grid", "cpu", 0, int(Element.INT64), [2], grid.data_ptr())
        binding.bind_output("out", self.device, 0, int(self.element), list(out.shape), out.data_ptr())
        return binding

    def run(self, binding: onnxruntime.IOBinding) -> None:
        """One run; on the GPU it waits for the result unless the stream is the caller's."""
        options = onnxruntime.RunOptions()
        if self.stream is not None:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self.session.run_with_iobinding(binding, options)
        if self.device == "cuda" and self.stream is None:
            binding.synchronize_outputs()


def outlike(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """An output of NaNs for q and v."""
    width = v.shape[-1]
    shape = (*q.shape[:-1], width)
    return torch.full(shape, float("nan"), dtype=q.dtype, device=q.device)
