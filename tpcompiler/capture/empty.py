"""Removes empty tensors, and sets uninitialised ones.

A rotary embedding of the whole head still splits off an empty rest and joins it again. Both calls leave the graph. A
tensor that is allocated and not set becomes zero, so that all ranks and all runs have the same values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_JOINS = (aten.cat.default, aten.concat.default, aten.concatenate.default)
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default)


def drop_empty(graph: fx.Graph) -> None:
    """Drops the empty operands of `cat`, and every split that leaves all elements in one part, in place."""
    for node in list(graph.nodes):
        if node.target in _JOINS:
            parts: Any = node.args[0]
            full = [p for p in parts if not _empty(p.meta["val"])]
            if len(full) == 1:
                node.replace_all_uses_with(full[0])
            elif full and len(full) < len(parts):
                node.args = (full, *node.args[1:])
        elif node.target in _SPLITS:
            full_parts = [i for i, part in enumerate(node.meta["val"]) if not _empty(part)]
            if len(full_parts) == 1:
                for user in list(node.users):
                    if user.target is operator.getitem and user.args[1] == full_parts[0]:
                        user.replace_all_uses_with(node.args[0])


def set_unset(graph: fx.Graph) -> None:
    """Turns `empty` into `zeros`, in place."""
    for node in graph.nodes:
        if node.target in _UNSET:
            node.target = _UNSET[node.target]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}


_UNSET = {
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
}


def _empty(value: Tensor) -> bool:
    return any(isinstance(n, int) and n == 0 for n in value.shape)
