"""Moves calls out of a layer that other layers use too and that need nothing of the layer, to before the layer.

The first of several layers that read an encoder's output also prepares that output (`enter`, the cast of a mask). The
preparing call is part of the first layer according to its stack, which would make that layer unlike the others.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile

from torch import fx

from tpcompiler.emit.ops.nodes import RANDOM, Stack, aten_name, is_item, runtime_name

Owns = Callable[[str, fx.Node], bool]  # (module, parameter): is the parameter the module's?


def hoist(nodes: list[fx.Node], stacks: dict[fx.Node, Stack], owns: Owns) -> tuple[list[fx.Node], dict[fx.Node, Stack]]:
    """The nodes in their new order, and their stacks without the layers that they have left."""
    order, stacks = list(nodes), dict(stacks)
    for node in nodes:
        # An operator between a value and its readers belongs to the calls that all its readers have in common.
        if runtime_name(node) in ("enter", "take"):
            stacks[node] = _shared([stacks[n] for n in (node, *node.users) if n in stacks])
    for node in nodes:
        depth = _depth_to_leave(node, stacks, owns)
        if depth is None:
            continue
        left = stacks[node][: depth + 1]
        first = next(i for i, n in enumerate(order) if stacks[n][: depth + 1] == left)
        before = set(order[:first])
        if all(n in before or n not in stacks for n in node.all_input_nodes):
            order.remove(node)
            order.insert(first, node)
            stacks[node] = left[:depth]
    return order, stacks


def _shared(stacks: list[Stack]) -> Stack:
    """The calls that all stacks begin with."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*stacks, strict=False))
    return tuple(level[0] for level in levels)


def _depth_to_leave(node: fx.Node, stacks: dict[fx.Node, Stack], owns: Owns) -> int | None:
    """The depth in the stack of the outermost call that a node can leave.

    The node is read both inside and outside of that call, and reads nothing that the call made or its module owns.
    """
    if aten_name(node) in RANDOM or runtime_name(node) in RANDOM or any(map(is_item, (node, *node.users))):
        return None
    stack = stacks[node]
    for depth, (module, _, _) in enumerate(stack):
        own = stack[: depth + 1]
        readers = {stacks[u][: depth + 1] == own for u in node.users if u in stacks}
        if readers != {True, False}:
            continue
        made_inside = any(n in stacks and stacks[n][: depth + 1] == own for n in node.all_input_nodes)
        if not made_inside and not any(n.op == "placeholder" and owns(module, n) for n in node.all_input_nodes):
            return depth
    return None
