"""A partial value is summed where it is small: sum(gather(reduce(p) · w)) → reduce(sum(gather(p · w))).

A mixture of experts makes a row for each expert of a token, weighs the rows, and adds them up. All of that is linear,
so the all-reduce may come after it, of one row a token. What weighs the rows then meets a partial value, and enters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import cause_of, copy_graph, copy_value, erase_dead, example_size, operand, over, partial_note
from tpcompiler.layout import Over
from tpcompiler.ops.operands import tensor_operands
from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.program import Program

aten = torch.ops.aten


def sink_reductions(program: Program) -> Program:
    """Move every all-reduce to the smallest of the values that it may be taken of, or to where it meets another."""
    graph = copy_graph(program.graph)
    sources = program.capture.differentiable
    for to_meet in (False, True):
        for node in list(graph.nodes):
            if node.target is runtime.reduce:
                _sink(graph, node, sources, to_meet)
    erase_dead(graph)
    return replace(program, graph=graph)


@dataclass(frozen=True)
class LinearStep:
    """An op that is linear in the value before it, and what it scales that by, if anything."""

    node: fx.Node
    weight: fx.Node | None


def _sink(graph: fx.Graph, node: fx.Node, sources: frozenset[str], to_meet: bool) -> None:
    path: list[LinearStep] = []
    while (step := _next(path[-1].node if path else node)) is not None:
        path.append(step)
    if not path:
        return
    best = path[-1] if to_meet else min(reversed(path), key=lambda step: _elements(step.node))
    if to_meet and not _meets(best.node, over(node)):
        return
    path = path[: path.index(best) + 1]
    weighed = [(s.node, s.weight) for s in path if s.weight is not None and _carries(s.weight, sources)]
    saved = _elements(node) - (0 if to_meet else _elements(best.node))
    if sum(_elements(w) for _, w in weighed) >= saved:
        return
    path[0].node.replace_input_with(node, operand(node))
    for step in path:
        copy_value(step.node, step.node, partial_note(over(node)))
    for at, weight in weighed:
        at.replace_input_with(weight, _entered(graph, weight, node, at))
    with graph.inserting_after(best.node):
        total = graph.call_function(runtime.reduce, (best.node, over(node)))
    copy_value(total, best.node, "all-reduce", cause_of(node))
    best.node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    graph.erase_node(node)


def _meets(value: fx.Node, names: Over) -> bool:
    """Whether a value is added to one that is reduced over the same ranks: one all-reduce then does for both."""
    (user,) = value.users if len(value.users) == 1 else (None,)
    if user is None or user.target is not aten.add.Tensor or user.kwargs:
        return False
    other = next((x for x in user.args if x is not value), None)
    reduced = isinstance(other, fx.Node) and other.target is runtime.reduce and len(other.users) == 1
    return reduced and over(other) == names  # type: ignore[arg-type]


def _next(value: fx.Node) -> LinearStep | None:
    """The op that a value goes to, when it is linear in it, keeps its dtype, and nobody else uses the value."""
    if len(value.users) != 1:
        return None
    (node,) = value.users
    made, used = node.meta.get("val"), list[fx.Node]()
    fx.map_arg((node.args, node.kwargs), used.append)
    if not isinstance(made, torch.Tensor) or made.dtype != value.meta["val"].dtype or used.count(value) != 1:
        return None
    operands = tensor_operands(node)
    if operands.index(value) not in (find(node.target) or UNKNOWN).linear:
        return None
    weights = [n for n in operands if n is not None and n is not value and n.meta["val"].is_floating_point()]
    return LinearStep(node, weights[0] if weights else None)


def _entered(graph: fx.Graph, w: fx.Node, reduction: fx.Node, step: fx.Node) -> fx.Node:
    with graph.inserting_before(step):
        new = graph.call_function(runtime.enter, (w, over(reduction)))
    return copy_value(new, w, "backward: all-reduce", cause_of(reduction))


def _carries(node: fx.Node, sources: frozenset[str]) -> bool:
    """Whether a trainable parameter, or an input that may need a gradient, stands behind a value."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        n = stack.pop()
        if n.op == "placeholder" and n.name in sources:
            return True
        if n not in seen:
            seen.add(n)
            stack.extend(n.all_input_nodes)
    return False


def _elements(node: fx.Node) -> int:
    shape: Any = node.meta["val"].shape
    return prod(map(example_size, shape))
