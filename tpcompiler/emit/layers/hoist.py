"""What one layer makes for others too, out of nothing of its own, is made before it.

The first of several layers that read an encoder's output also prepares it (`enter`, a mask's cast). By its stack that
call is the first layer's, which would for that alone be unlike the others.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem

from torch import fx

from tpcompiler.emit.layers.tidy import RANDOM, aten_name

Stack = tuple[tuple[str, str, int], ...]  # of module calls: qualified name, class, call number


def hoist(
    nodes: list[fx.Node], stacks: dict[fx.Node, Stack], owns: Callable[[str, fx.Node], bool]
) -> tuple[list[fx.Node], dict[fx.Node, Stack]]:
    """The nodes in a new order, and their stacks, such calls being before the layer that made them.

    `owns(module, parameter)` tells whether a parameter is a module's.
    """
    order, stacks = list(nodes), dict(stacks)
    for node in nodes:
        if getattr(node.target, "__name__", "") in _ON_THE_WAY:
            stacks[node] = _shared([stacks[n] for n in (node, *node.users) if n in stacks])
    for node in nodes:
        depth = _leaves(node, stacks, owns)
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


# Runtime operators that stand between who makes a value and who uses it, whatever their stack says.
_ON_THE_WAY = {"enter", "take"}


def _shared(stacks: list[Stack]) -> Stack:
    """The calls that all stacks begin with."""
    out = stacks[0]
    for s in stacks[1:]:
        out = out[: next((i for i, (a, b) in enumerate(zip(out, s, strict=False)) if a != b), min(len(out), len(s)))]
    return out


def _leaves(node: fx.Node, stacks: dict[fx.Node, Stack], owns: Callable[[str, fx.Node], bool]) -> int | None:
    """How deep in its stack the outermost call is that a node serves others beside, and owes nothing."""
    name = aten_name(node) or getattr(node.target, "__name__", "")
    if name in RANDOM or any(u.target is getitem for u in (node, *node.users)):
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
