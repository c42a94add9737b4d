"""Small ONNX models of our operators, written without the onnx package.

Protocol buffers need two wire types here: numbers as varints (type 0) and length-delimited bytes (type 2);
floats are four bytes (type 5). Field numbers are those of onnx.proto.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum


class Element(IntEnum):
    """Element types by their number in TensorProto.DataType."""

    F32 = 1
    INT64 = 7
    F16 = 10
    F64 = 11
    BF16 = 16


class Layout(IntEnum):
    """Rank of all tensors: PACKED [B,N,H*D], HEADS [B,H,N,D]."""

    PACKED = 3
    HEADS = 4


@dataclass(frozen=True)
class Window:
    """Attributes of WindowAttention: either sides or a radius."""

    sides: tuple[int, int] | None = None
    radius: int | None = None
    border: str = "clamp"
    text: str = "prefix"


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        low, value = value & 0x7F, value >> 7
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _attribute(name: str, value: int | float | str | tuple[int, ...]) -> bytes:
    head = _bytes(1, name)
    if isinstance(value, float):
        return head + _varint(2 << 3 | 5) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, int):
        return head + _number(3, value) + _number(20, 2)
    if isinstance(value, str):
        return head + _bytes(4, value) + _number(20, 3)
    return head + b"".join(_number(8, v) for v in value) + _number(20, 7)


def _tensor(name: str, element: Element, rank: int) -> bytes:
    dims = b"".join(_bytes(1, _bytes(2, f"{name}_{axis}")) for axis in range(rank))
    tensor_type = _number(1, int(element)) + _bytes(2, dims)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor_type))


def chain(
    heads: int, element: Element, layout: Layout, window: Window | None = None, length: int = 1
) -> bytes:
    """A model with inputs q, k, v (and grid for a window) and the output out, all sizes free.

    Of `length` nodes each takes the output of the one before as its q: their time without ONNX Runtime's share.
    """
    attributes: dict[str, int | float | str | tuple[int, ...]] = {"num_heads": heads}
    others = ["k", "v"]
    if window is not None:
        others.append("grid")
        attributes["text"] = window.text
        if window.sides is not None:
            attributes |= {"window": window.sides, "border": window.border}
        if window.radius is not None:
            attributes["radius"] = window.radius
    operator = "LinFusionAttention" if window is None else "WindowAttention"
    graph = b""
    for index in range(length):
        first = "q" if index == 0 else f"out_{index - 1}"
        last = "out" if index + 1 == length else f"out_{index}"
        node = b"".join(_bytes(1, name) for name in [first, *others]) + _bytes(2, last)
        node += _bytes(3, f"site_{index}") + _bytes(4, operator)
        node += b"".join(_bytes(5, _attribute(n, v)) for n, v in attributes.items())
        graph += _bytes(1, node + _bytes(7, "ai.linfusion"))
    graph += _bytes(2, "chain")
    for name in ("q", "k", "v"):
        graph += _bytes(11, _tensor(name, element, int(layout)))
    if window is not None:
        grid = _number(1, int(Element.INT64)) + _bytes(2, _bytes(1, _number(1, 2)))
        graph += _bytes(11, _bytes(1, "grid") + _bytes(2, _bytes(1, grid)))
    graph += _bytes(12, _tensor("out", element, int(layout)))
    opsets = _bytes(8, _bytes(1, "") + _number(2, 17))
    opsets += _bytes(8, _bytes(1, "ai.linfusion") + _number(2, 1))
    return _number(1, 8) + _bytes(7, graph) + opsets
