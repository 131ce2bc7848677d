"""Joins an enter with the products that read it: linear(enter(x), w), linear(enter(x), v) → entered_linear(x, (w, v)).

The joined operator's backward starts the all-reduce of the gradient of `x`, computes the gradients of the weights
meanwhile, and waits afterwards. An enter that anything but products reads stays as it is, because its all-reduce has to
wait for the gradients of the other readers too.
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
    """Joins every `enter` that only products read with those products."""
    graph = copy_graph(program.graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if node.target is runtime.enter and (products := _products(node, position)):
            _join(graph, node, products)
    erase_dead(graph)
    return replace(program, graph=graph)


def _products(entered: fx.Node, position: dict[fx.Node, int]) -> list[fx.Node]:
    """The products that read an entered value, in the graph's order.

    The list is empty when another operation reads it too, or when a weight is computed after the first product.
    """
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
    """The origin of the joined operator: that of the first product, in the innermost module that holds all of them."""
    found = origin(products[0])
    shared = tuple(found.get("stack", ()))
    for p in products[1:]:
        other = tuple(p.meta.get("stack", ()))
        same = [a == b for a, b in zip(shared, other, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return {**found, "stack": shared, "module": shared[-1][0] if shared else ""}
