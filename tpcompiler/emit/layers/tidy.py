"""A program's graph without what no one would write: identities, assertions, dead calls. Values stay bit for bit."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

_RELAYING = {"reshape", "flatten", "contiguous"}  # they copy by themselves where strides ask for it
_ALIASES = {"alias", "lift_fresh", "lift"}
_SILENT = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async"}
_SILENT |= {"sym_constrain_range", "sym_constrain_range_for_size"}


# Calls that draw random numbers, ATen's and the run-time library's.
RANDOM = set("dropout native_dropout bernoulli rand randn rand_like randn_like randint multinomial".split())


def tidy(graph: fx.Graph) -> fx.Graph:
    """A copy of `graph` (whose nodes keep their names and meta), tidied."""
    copy = fx.Graph()
    twin: dict[fx.Node, fx.Node] = {}
    seen: dict[Any, fx.Node] = {}
    scaled = {_line(n) for n in graph.nodes if aten_name(n) in ("add", "mul") and not _is_neutral(n)}
    for node in graph.nodes:
        if aten_name(node) in _SILENT:
            continue
        kept = _source(node, scaled)
        if kept is not None:
            twin[node] = twin[kept]
            continue
        key = _key(node, twin)
        if key is not None and key in seen:
            twin[node] = seen[key]
            continue
        twin[node] = copy.node_copy(node, twin.__getitem__)
        if key is not None:
            seen[key] = twin[node]
    for node in reversed(copy.nodes):
        if node.op == "call_function" and not node.users:
            copy.erase_node(node)
    return copy


def aten_name(node: fx.Node) -> str:
    """`linear` of a call of `aten.linear.default`; "" for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return ""


def _key(node: fx.Node, twin: dict[fx.Node, fx.Node]) -> Any:
    """What two pieces of one table share that one module call takes out of it twice, in a loop over its layers say."""
    if aten_name(node) not in _PIECES or not isinstance(node.args[0], fx.Node):
        return None
    arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: twin[n].name)
    return node.target, repr(arguments), node.meta.get("stack")


_PIECES = {"slice", "select", "unsqueeze", "view", "transpose", "expand"}


def _line(node: fx.Node) -> Any:
    return aten_name(node), node.meta.get("line")


def _source(node: fx.Node, scaled: set[Any]) -> fx.Node | None:
    """The node whose value `node` repeats, if it does.

    A neutral number stays where the same line of the model has another one elsewhere (in `scaled`): there it is one of
    a row that tells equal layers apart.
    """
    name = aten_name(node)
    if (
        name in _ALIASES
        or (name == "slice" and _is_whole(node.args))
        or (name == "contiguous" and node.users and all(aten_name(u) in _RELAYING for u in node.users))
        or (_is_neutral(node) and _line(node) not in scaled)
    ):
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    return None


def _is_whole(args: tuple[Any, ...]) -> bool:
    start, end, step = (tuple(args) + (0, None, None, 1)[len(args) - 1 :])[2:]
    return start in (0, None) and step == 1 and (end is None or isinstance(end, int) and end == sys.maxsize)


def _is_neutral(node: fx.Node) -> bool:
    """`x + 0` of integers and `x * 1.0`, where the result has the type of `x`."""
    if aten_name(node) not in ("add", "mul") or node.kwargs:
        return False
    x, other = node.args[0], node.args[1]
    if not isinstance(x, fx.Node) or type(other) not in (int, float):
        return False
    before, after = x.meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    if aten_name(node) == "mul":
        return bool(other == 1)
    return bool(other == 0) and not before.is_floating_point() and not before.is_complex()
