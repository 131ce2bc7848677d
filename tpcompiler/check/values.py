"""What the sweeps need to know about the model: its placeholders, its number of samples, and its dropouts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.cones import TensorInfo
from tpcompiler.check.sizes import Sizes
from tpcompiler.program import Capture


class ModelValues:
    """What the sweeps need of a capture, at given sizes."""

    def __init__(self, capture: Capture, sizes: Sizes) -> None:
        self.sizes = sizes
        self.operands: dict[str, TensorInfo] = {}  # placeholders by name
        self.batched: dict[int, bool] = {}  # whether a dropout's masks differ between samples, by its site
        batch = _batch(capture)
        self.samples = None if batch is None else sizes(batch)
        stored = {p.node: p for p in capture.parameters}
        for node in capture.graph.nodes:
            val = node.meta.get("val")
            if node.op == "placeholder" and isinstance(val, Tensor):
                p = stored.get(node.name)
                real = val.is_floating_point() or val.is_complex()
                grad = p is not None and not p.buffer and p.trainable and real
                self.operands[node.name] = TensorInfo(sizes.shape(val.shape), val.dtype, grad)
            elif node.target is torch.ops.aten.dropout.default:
                self.batched[len(self.batched)] = _has(node.meta["val"].shape, batch)


def _batch(capture: Capture) -> Any:
    """The number of samples in a batch: the size of dimension 0 of the first input."""
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node.name in capture.inputs[:1] and node.meta["val"].dim():
            return node.meta["val"].shape[0]
    return None


def _has(shape: Sequence[Any], batch: Any) -> bool:
    """Whether a shape depends on the batch size, where that is symbolic."""
    if not isinstance(batch, torch.SymInt):
        return False
    found = {symbol for n in shape if isinstance(n, torch.SymInt) for symbol in n.node.expr.free_symbols}
    return batch.node.expr in found
