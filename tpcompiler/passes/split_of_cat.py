"""Removes a concatenation whose only use is to be split again: split(cat(q, k, v)) → q, k, v."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import call, copy_graph, copy_value, erase_dead, layout_of, operand
from tpcompiler.layout import Concat, Dim, LocalSize
from tpcompiler.program import Program

aten = torch.ops.aten


def drop_joined_segments(program: Program) -> Program:
    """Uses the operands of a `cat` directly where a `split` returns them, one by one or several joined."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if node.target is aten.split_with_sizes.default and (pieces := _pieces(node)) is not None:
            for use in list(node.users):
                assert use.target is operator.getitem
                index: Any = use.args[1]
                use.replace_all_uses_with(_joined(graph, pieces[index], use))
    erase_dead(graph)
    return replace(program, graph=graph)


def _pieces(node: fx.Node) -> list[list[fx.Node]] | None:
    """The joined values that each result of a split consists of. None when the split cuts through one of them."""
    cat: Any = node.args[0]
    sizes: Any = node.args[1]
    dim: Any = node.args[2]
    if cat.target is not aten.cat.default or len(cat.args) < 2:
        return None
    rank = cat.meta["val"].dim()
    along = cat.args[1] % rank
    if along != dim % rank:
        return None
    left = list(cat.args[0])
    out: list[list[fx.Node]] = []
    for size in sizes:
        taken: list[fx.Node] = []
        while left and not _same(taken, along, size):
            taken.append(left.pop(0))
        if not _same(taken, along, size):
            return None
        out.append(taken)
    return None if left else out


def _same(parts: list[fx.Node], along: int, size: LocalSize | int) -> bool:
    """Whether the values laid end to end have this size, which may be a rank's local size."""
    dims = [x for p in parts for x in _segments((layout_of(p) or ())[along])]
    if isinstance(size, LocalSize):
        return dims == _segments(size.dim)
    return not any(d.over for d in dims) and sum(d.size for d in dims) == size


def _segments(dim: Dim) -> list[Dim]:
    return [x for p in dim.parts for x in _segments(p)] if isinstance(dim, Concat) else [dim]


def _joined(graph: fx.Graph, parts: list[fx.Node], use: fx.Node) -> fx.Node:
    if len(parts) == 1:
        return parts[0]
    with graph.inserting_before(use):
        new = call(graph, aten.cat.default, (parts, operand(use).args[2]))
    return copy_value(new, use)
