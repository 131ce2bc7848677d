"""Segments that were joined only to be taken apart again stay apart: split(cat(q, k, v)) → q, k, v."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import copy_graph, erase_dead
from tpcompiler.layout import size_argument
from tpcompiler.program import Program

aten = torch.ops.aten


def drop_joined_segments(program: Program) -> Program:
    """Where a `cat`'s operands are what its `split` gives back, use them directly."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if node.target is aten.split_with_sizes.default and (parts := _joined_alike(node)) is not None:
            for use in list(node.users):
                assert use.target is operator.getitem
                use.replace_all_uses_with(parts[use.args[1]])
    erase_dead(graph)
    return replace(program, graph=graph)


def _joined_alike(node: fx.Node) -> list[fx.Node] | None:
    """What a split's operand was joined from, when the split takes it apart at the same places."""
    cat: Any = node.args[0]
    sizes: Any = node.args[1]
    dim: Any = node.args[2]
    if cat.target is not aten.cat.default or len(cat.args) < 2:
        return None
    parts, along = cat.args[0], cat.args[1] % cat.meta["val"].dim()
    alike = along == dim % cat.meta["val"].dim() and [size_argument(p.meta["dims"][along]) for p in parts] == list(
        sizes
    )
    return list(parts) if alike else None
