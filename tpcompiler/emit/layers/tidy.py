"""Removes what no one would write from a program's graph: identities, assertions and unused calls."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.ops.nodes import aten_name, line_of, stack_of, val_of

_COPIES_IF_NEEDED = {"reshape", "flatten", "contiguous"}
_ALIASES = {"alias", "lift_fresh", "lift"}
_SILENT = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}
_SILENT |= {"sym_constrain_range", "sym_constrain_range_for_size"}
_PIECES = {"slice", "select", "unsqueeze", "view", "transpose", "expand"}


def tidy(graph: fx.Graph) -> fx.Graph:
    """A tidied copy of `graph`. Nodes keep their names and their meta."""
    copy = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    seen: dict[Any, fx.Node] = {}
    scaled = {_written(n) for n in graph.nodes if aten_name(n) in ("add", "mul") and not is_neutral(n)}
    for node in graph.nodes:
        if aten_name(node) in _SILENT:
            continue
        repeated = _repeated(node, scaled)
        piece = _piece(node, twin) if repeated is None else None
        if repeated is not None:
            twin[node] = twin[repeated]
        elif piece is not None and piece in seen:
            twin[node] = seen[piece]
        else:
            twin[node] = copy.node_copy(node, twin.__getitem__)
            if piece is not None:
                seen[piece] = twin[node]
    for node in reversed(copy.nodes):
        if node.op == "call_function" and not node.users:
            copy.erase_node(node)
    return copy


def _piece(node: fx.Node, twin: dict[fx.Node, fx.Node]) -> Any:
    """Equal for two nodes that take the same piece out of the same value in one module call."""
    if aten_name(node) not in _PIECES or not isinstance(node.args[0], fx.Node):
        return None
    arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: twin[n].name)
    return node.target, repr(arguments), stack_of(node)


def _written(node: fx.Node) -> Any:
    return aten_name(node), line_of(node)


def _repeated(node: fx.Node, scaled: set[Any]) -> fx.Node | None:
    """The node whose value `node` only repeats, if there is one.

    A neutral number stays if the same line of the model computes with another number elsewhere (the line is in
    `scaled`): the number is then one of several that tell equal layers apart.
    """
    name = aten_name(node)
    if (
        name in _ALIASES
        or (name == "slice" and _is_whole(node.args))
        or (name == "contiguous" and node.users and all(aten_name(u) in _COPIES_IF_NEEDED for u in node.users))
        or (is_neutral(node) and _written(node) not in scaled)
    ):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def _is_whole(args: tuple[Any, ...]) -> bool:
    start, end, step = (tuple(args) + (0, None, None, 1)[len(args) - 1 :])[2:]
    return start in (0, None) and step == 1 and (end is None or isinstance(end, int) and end == sys.maxsize)


def is_neutral(node: fx.Node) -> bool:
    """Is the call `x + 0` of integers, or `x * 1.0`, with a result of the type of `x`?"""
    if aten_name(node) not in ("add", "mul") or node.kwargs:
        return False
    x, other = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or type(other) not in (int, float):
        return False
    before, after = val_of(x), val_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    if aten_name(node) == "mul":
        return bool(other == 1)
    return bool(other == 0) and not before.is_floating_point() and not before.is_complex()
