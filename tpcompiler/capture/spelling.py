"""One spelling for what ATen can say in several ways, so that every stage after knows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_NAMES: dict[Any, Any] = {
    getattr(getattr(aten, f"__{name}__"), overload): getattr(getattr(aten, plain), overload)
    for name, plain in {
        "and": "bitwise_and",
        "or": "bitwise_or",
        "xor": "bitwise_xor",
        "lshift": "bitwise_left_shift",
        "rshift": "bitwise_right_shift",
    }.items()
    for overload in ("Tensor",)
}


def one_spelling(graph: fx.Graph) -> None:
    """`a & b` as `bitwise_and`, `index_select` as `x[:, i]`, and `repeat` of dimensions of one element as `expand`."""
    for node in graph.nodes:
        if node.target in _NAMES:
            node.target = _NAMES[node.target]
        elif node.target is aten.index_select.default and node.args[2].meta["val"].dim() == 1:
            x, dim, index = node.args
            node.target = aten.index.Tensor
            node.args = (x, [None] * (dim % x.meta["val"].dim()) + [index])
        elif node.target is aten.repeat.default:
            x, times = node.args
            shape = tuple(x.meta["val"].shape)
            shape = (1,) * (len(times) - len(shape)) + shape
            if all(_one(n) or _one(k) for n, k in zip(shape, times, strict=True)):
                node.target = aten.expand.default
                node.args = (x, [k if _one(n) else -1 for n, k in zip(shape, times, strict=True)])


def _one(n: Any) -> bool:
    return isinstance(n, int) and n == 1
