"""What enters products alone is one operator with them: linear(enter(x), w), linear(enter(x), v) → entered_linear.

Its backward computes the weights' gradients while the gradient of `x` crosses the ranks. Of an `enter` that anything
else reads too nothing is changed: the sum over ranks would have to wait for that gradient as well.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import (
    call,
    cause_of,
    copy_graph,
    erase_dead,
    layout_of,
    operand,
    origin,
    over,
    place_node,
)
from tpcompiler.program import Placed, Program

aten = torch.ops.aten


def overlap_enters(program: Program) -> Program:
    """Join every `enter` with the products that read it, if only products do."""
    graph = copy_graph(program.graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is runtime.enter and (products := _products(node, position)):
            _join(graph, node, products)
    erase_dead(graph)
    return replace(program, graph=graph)


def _products(entered: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node]:
    """All users of what entered, in the graph's order; none, when one is no product whose weight is there by then."""
    users = sorted(entered.users, key=position.__getitem__)
    for user in users:
        if user.target is not aten.linear.default or user.args[0] is not entered:
            return []
        others = [n for n in (*user.args[1:], *user.kwargs.values()) if isinstance(n, fx.Node)]
        if any(n is entered or position[n] > position[users[0]] for n in others):
            return []
    return users


def _join(graph: fx.Graph, entered: fx.Node, products: list[fx.Node]) -> None:
    weights = tuple(operand(p, 1) for p in products)
    biases = tuple(p.kwargs.get("bias", p.args[2] if len(p.args) > 2 else None) for p in products)
    with graph.inserting_before(products[0]):
        joined = call(graph, runtime.entered_linear, (operand(entered), over(entered), weights, biases))
        made = [graph.call_function(operator.getitem, (joined, i)) for i in range(len(products))]
    joined.meta = _shared_origin(products) | {"val": [p.meta["val"] for p in products]}
    layouts = [layout for p in products if (layout := layout_of(p)) is not None]
    known = tuple(layouts) if len(layouts) == len(products) else ()
    place_node(joined, Placed(known, "backward: all-reduce beside the weights' gradients", cause_of(entered)))
    for old, new in zip(products, made, strict=True):
        new.meta = {**old.meta, **_shared_origin(products)}
        old.replace_all_uses_with(new)


def _shared_origin(products: list[fx.Node]) -> dict[str, Any]:
    """The origin of the first product, or the innermost module that all of them lie in."""
    found = origin(products[0])
    shared = tuple(found.get("stack", ()))
    for p in products[1:]:
        other = tuple(p.meta.get("stack", ()))
        same = [a == b for a, b in zip(shared, other, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return {**found, "stack": shared, "module": shared[-1][0] if shared else ""}
