"""Gradients are summed where they are small: enter(gather(x)) → gather(enter(x)).

A mixture of experts copies a token for each of its experts, and the copies enter. Let the token enter: its gradient is
the sum of its copies', so the all-reduce may come after that, of one row a token. Where the token enters for something
else too (a shared expert), once is enough.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import copy_graph, erase_dead, example_size, operand, over, tensors, value_meta
from tpcompiler.layout import Over
from tpcompiler.program import Program

aten = torch.ops.aten
_VIEWS = frozenset({aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default})
_COMMUNICATES = frozenset({runtime.enter, runtime.reduce, runtime.gather, runtime.lookup, runtime.cross_entropy})


def raise_enters(program: Program) -> Program:
    """Move every `enter` to the smallest value that what enters was made from, and those that then meet into one."""
    graph = copy_graph(program.graph)
    trainable = {p.node for p in program.capture.parameters if p.trainable and not p.buffer}
    carrying = _carrying(graph, trainable)
    for node in list(graph.nodes):
        if node.target is runtime.enter:
            _raise(graph, node, carrying)
    erase_dead(graph)
    return replace(program, graph=graph)


def _carrying(graph: fx.Graph, trainable: set[str]) -> set[fx.Node]:
    """Values that a trainable parameter stands behind, indices apart."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        made = tensors(node.meta.get("val"))
        if node.name in trainable or (any(n in out for n in node.all_input_nodes) and any(map(_floats, made))):
            out.add(node)
    return out


def _floats(value: torch.Tensor) -> bool:
    return value.dtype.is_floating_point or value.dtype.is_complex


def _raise(graph: fx.Graph, node: fx.Node, carrying: set[fx.Node]) -> None:
    names, start = over(node), operand(node)
    path = [start]
    while (source := _source(path[-1], node if len(path) == 1 else path[-2], carrying)) is not None:
        path.append(source)
    best = min(path, key=_elements)  # the last that was made, of the smallest
    if _elements(best) >= _elements(start) or any(set(d.over) & set(names) for d in best.meta.get("dims", ())):
        return
    step = path[path.index(best) - 1]
    step.replace_input_with(best, _entered(graph, best, names, node))
    node.replace_all_uses_with(start)
    graph.erase_node(node)


def _source(value: fx.Node, user: fx.Node, carrying: set[fx.Node]) -> fx.Node | None:
    """The one value with gradients that `value` was made from, when `value` is made for `user` alone."""
    if set(value.users) != {user} or value.op != "call_function" or value.target in _COMMUNICATES:
        return None
    behind = [n for n in value.all_input_nodes if n in carrying]
    if len(behind) != 1 or behind[0].op != "call_function" or not isinstance(behind[0].meta.get("val"), torch.Tensor):
        return None
    return behind[0]


def _entered(graph: fx.Graph, value: fx.Node, names: Over, like: fx.Node) -> fx.Node:
    """`value`, entered: with what enters anyway, where there is such, seen the same way if it is a view of that."""
    views: list[fx.Node] = []
    source = value
    while _enters(source, names) is None and source.target in _VIEWS:
        views.append(source)
        source = operand(source)
    if (entered := _enters(source, names)) is None:
        views, source = [], value
        with graph.inserting_after(value):
            entered = graph.call_function(runtime.enter, (value, names))
        about = {"note": "backward: all-reduce", "because": like.meta.get("because")}
        entered.meta = {**value_meta(value), **about}
    else:
        source.append(entered)  # before all that may use it
    for view in reversed(views):
        with graph.inserting_after(view):
            copied = graph.node_copy(view, lambda n, view=view, entered=entered: entered if n is view.args[0] else n)  # type: ignore[misc]
        copied.meta = dict(view.meta)
        entered = copied
    return entered


def _enters(value: fx.Node, names: Over) -> fx.Node | None:
    return next((u for u in value.users if u.target is runtime.enter and over(u) == names), None)


def _elements(node: fx.Node) -> int:
    shape: Any = node.meta["val"].shape
    return prod(map(example_size, shape))
