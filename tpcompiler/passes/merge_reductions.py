"""Reduces a sum of partial values once: reduce(p) + reduce(q) → reduce(p + q).

A transformer block with parallel attention and feed-forward then has one all-reduce instead of two. Linear operations
may stand between the reductions and their sum: additions of replicated values (biases, the residual), and dropout,
whose counter-based mask is the same on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import cause_of, copy_graph, copy_value, erase_dead, operand, over, partial_note
from tpcompiler.layout import Over
from tpcompiler.program import Cause, Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Open:
    """A value written as `reduce(partial) + rest`."""

    partial: fx.Node
    over: Over
    rest: fx.Node | None
    cause: Cause | None


def merge_reductions(program: Program) -> Program:
    """Merges reductions wherever that saves an all-reduce."""
    graph = copy_graph(program.graph)
    for node in list(graph.nodes):
        if _is_sum(node):
            left, right = _reduction(operand(node)), _reduction(operand(node, 1))
            if left is not None and right is not None and over(left) == over(right):
                _merge(graph, node)
    erase_dead(graph)
    return replace(program, graph=graph)


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors of its own dtype."""
    return (
        node.target is aten.add.Tensor
        and not node.kwargs
        and all(
            isinstance(x, fx.Node) and getattr(x.meta["val"], "dtype", None) == node.meta["val"].dtype
            for x in node.args
        )
    )


def _reduction(node: fx.Node) -> fx.Node | None:
    """The reduction behind a value, if only operations that nothing else uses lie between them."""
    if len(node.users) != 1:
        return None
    if node.target is runtime.reduce:
        return node
    if node.target is runtime.dropout:
        return _reduction(operand(node))
    if _is_sum(node):
        found = [f for i in (0, 1) if (f := _reduction(operand(node, i))) is not None]
        return found[0] if len(found) == 1 else None
    return None


def _merge(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        a, b = _open(graph, operand(node)), _open(graph, operand(node, 1))
        partial = _add(graph, a.partial, b.partial, node)
        total = graph.call_function(runtime.reduce, (partial, a.over))
        copy_value(total, node, "all-reduce", a.cause)
        copy_value(partial, node, partial_note(a.over))
        out = total
        for rest in (a.rest, b.rest):
            if rest is not None:
                out = _add(graph, out, rest, node)
    node.replace_all_uses_with(out)


def _open(graph: fx.Graph, node: fx.Node) -> Open:
    if node.target is runtime.reduce:
        return Open(operand(node), over(node), None, cause_of(node))
    if node.target is runtime.dropout:
        inner = _open(graph, operand(node))
        return replace(
            inner,
            partial=_dropped(graph, inner.partial, node),
            rest=None if inner.rest is None else _dropped(graph, _expanded(graph, inner.rest, node), node),
        )
    left, right = operand(node), operand(node, 1)
    opened, other = (left, right) if _reduction(left) is not None else (right, left)
    inner = _open(graph, opened)
    return replace(inner, rest=other if inner.rest is None else _add(graph, inner.rest, other, node))


def _add(graph: fx.Graph, a: fx.Node, b: fx.Node, like: fx.Node) -> fx.Node:
    return copy_value(graph.call_function(aten.add.Tensor, (a, b)), like)


def _dropped(graph: fx.Graph, x: fx.Node, dropout: fx.Node) -> fx.Node:
    new = graph.call_function(runtime.dropout, (x, *dropout.args[1:]), dict(dropout.kwargs))
    new.meta = dict(dropout.meta)
    return new


def _expanded(graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
    """A bias in the shape of the value it is added to, because dropout draws a mask for every element."""
    source = operand(like)
    if x.meta["val"].shape == source.meta["val"].shape:
        return x
    return copy_value(graph.call_function(aten.expand_as.default, (x, source)), source)
