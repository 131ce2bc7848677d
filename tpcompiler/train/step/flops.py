"""Counts a model's FLOPs from the matrix products of the plain graph, so that all degrees report the same number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import tensors
from tpcompiler.ops.product_flops import product_flops
from tpcompiler.ops.views import Shape


def forward_flops(graph: fx.Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Floating-point operations of one forward: 2·m·n·k for each matrix product, by the ops' records.

    Other ops count nothing. `shapes` has the shapes of the input placeholders, from which the graph's symbolic sizes
    follow.
    """
    values = _symbols(graph, shapes or {})

    def local(node: fx.Node) -> list[Shape]:
        return [_shape(v, node, values) for v in tensors(node.meta["val"])]

    return sum(product_flops(node, local) for node in graph.nodes if node.op == "call_function")


def flops_per_token(graph: fx.Graph, shapes: Mapping[str, Sequence[int]], tokens: int) -> float:
    """Floating-point operations per token of a training step over `tokens` tokens in inputs of these `shapes`. Backward
    has two products for each one of forward."""
    return 3 * forward_flops(graph, shapes) / tokens


def _symbols(graph: fx.Graph, shapes: Mapping[str, Sequence[int]]) -> dict[Any, int]:
    values: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in shapes:
            for size, value in zip(node.meta["val"].shape, shapes[node.name], strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    values[size.node.expr] = value
    return values


def _shape(value: torch.Tensor, node: fx.Node, values: Mapping[Any, int]) -> Shape:
    def size(n: int | torch.SymInt) -> int:
        if not isinstance(n, torch.SymInt):
            return n
        expr = n.node.expr.subs(values)
        assert expr.is_number, f"size {n} of {node}: not given by the inputs' shapes"
        return int(expr)

    return tuple(size(n) for n in value.shape)


# Dense peak rates of matrix products, TFLOP/s, from the makers' data sheets: (16 bit, 32 bit as torch computes it).
_PEAKS = {
    "B200": (2250.0, 80.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "V100": (125.0, 15.7),
    "L40S": (362.0, 91.6),
    "MI300X": (1307.0, 163.4),
}


def peak_tflops(device: str, precision: str) -> float | None:
    """The peak of a device by its name (`torch.cuda.get_device_name()`), or None when it is not known."""
    for name, (half, single) in _PEAKS.items():
        if name.replace(" ", "") in device.replace(" ", ""):
            return {"bf16": half, "fp16": half, "fp32": single}.get(precision)
    return None
