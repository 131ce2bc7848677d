"""Model FLOPs, counted from the matrix products of the plain graph, so that every degree reports the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

Size = tuple[int, ...]


def forward_flops(graph: fx.Graph, shapes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Floating-point operations of the graph's matrix products, 2·m·n·k each; everything else counts nothing.

    `shapes` are those of the input placeholders: they give the graph's symbolic sizes their values. Attention counts
    whole even where it is causal, as the paper does (arXiv 1909.08053; the formula of arXiv 2104.04473, §5.1).
    """
    values = _symbols(graph, shapes or {})
    total = 0
    for node in graph.nodes:
        rule = _RULES.get(_op(node)) if node.op == "call_function" else None
        if rule is not None:
            total += rule(node, lambda n: _shape(n, values))
    return total


def flops_per_token(graph: fx.Graph, shapes: Mapping[str, Sequence[int]], tokens: int) -> float:
    """Of a training step over `tokens` tokens in `shapes`: backward has two products for each one of forward."""
    return 3 * forward_flops(graph, shapes) / tokens


ShapeOf = Callable[[Any], Size]
Rule = Callable[[fx.Node, ShapeOf], int]


def _linear(node: fx.Node, shape: ShapeOf) -> int:
    return 2 * prod(shape(node.args[0])) * shape(node.args[1])[0]


def _product(first: int) -> Rule:
    """The operands stand at `first` and after it; the left one's last dimension is contracted."""
    return lambda node, shape: 2 * prod(shape(node)) * shape(node.args[first])[-1]


def _attention(node: fx.Node, shape: ShapeOf) -> int:
    query, key = shape(node.args[0]), shape(node.args[1])
    return 2 * (prod(query) + prod(shape(node))) * key[-2]


def _convolution(node: fx.Node, shape: ShapeOf) -> int:
    return 2 * prod(shape(node)) * prod(shape(node.args[1])[1:])


def _einsum(node: fx.Node, shape: ShapeOf) -> int:
    """Two operands multiply every combination of their indices once; each operand more does so again."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    assert isinstance(operands, (list, tuple))
    if len(operands) < 2:
        return 0
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        for index, size in _named(letters, shape(operand)):
            sizes[index] = max(size, sizes.get(index, 1))
    return 2 * (len(operands) - 1) * prod(sizes.values())


def _named(letters: str, sizes: Size) -> Iterator[tuple[str, int]]:
    """Dimensions under an ellipsis are named by their distance from its end, as they broadcast."""
    before, dots, after = letters.partition("...")
    hidden = len(sizes) - len(before) - len(after)
    names = [*before, *(f"...{hidden - i}" for i in range(hidden if dots else 0)), *after]
    return zip(names, sizes, strict=True)


_RULES: dict[str, Rule] = {
    "aten::linear": _linear,
    "aten::mm": _product(0),
    "aten::bmm": _product(0),
    "aten::matmul": _product(0),
    "aten::mv": _product(0),
    "aten::_grouped_mm": _product(0),
    "aten::addmm": _product(1),
    "aten::baddbmm": _product(1),
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "aten::convolution": _convolution,
    "aten::conv1d": _convolution,
    "aten::conv2d": _convolution,
}


def _op(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name if schema is not None else ""


def _symbols(graph: fx.Graph, shapes: Mapping[str, Sequence[int]]) -> dict[Any, int]:
    values: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and node.name in shapes:
            for size, value in zip(node.meta["val"].shape, shapes[node.name], strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    values[size.node.expr] = value
    return values


def _shape(node: Any, values: Mapping[Any, int]) -> Size:
    def size(n: int | torch.SymInt) -> int:
        if not isinstance(n, torch.SymInt):
            return n
        expr = n.node.expr.subs(values)
        assert expr.is_number, f"size {n} of {node}: not given by the inputs' shapes"
        return int(expr)

    return tuple(size(n) for n in node.meta["val"].shape)


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
