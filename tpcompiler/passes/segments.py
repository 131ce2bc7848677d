"""Segments that were joined only to be taken apart again stay apart: split(cat(q, k, v)) → q, k, v."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler.layout import LocalSize
from tpcompiler.passes.copy import copy_graph, erase_dead
from tpcompiler.program import Program

aten = torch.ops.aten


def drop_joined_segments(program: Program) -> Program:
    """Where a `cat`'s operands are what its `split` or `slice` gives back, use them directly."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not _is_cat(node.args[0]):
            continue
        cat: Any = node.args[0]
        parts, dim = cat.args[0], cat.args[1]
        if node.target is aten.split_with_sizes.default and _same_dim(node.args[2], dim, parts[0]):
            if [_size(p, dim) for p in parts] == list(node.args[1]):
                for use in list(node.users):
                    assert use.target is operator.getitem
                    use.replace_all_uses_with(parts[use.args[1]])
    erase_dead(graph)
    return replace(program, graph=graph)


def _is_cat(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.cat.default and len(node.args) > 1


def _same_dim(a: Any, b: Any, like: fx.Node) -> bool:
    n = like.meta["val"].dim()
    return bool(a % n == b % n)


def _size(part: fx.Node, dim: int) -> Any:
    found = part.meta["dims"][dim]
    return LocalSize(found) if found.over else found.size
