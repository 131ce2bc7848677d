"""What a node of the graph stands for: a call, one of a call's results, or a size. All of `meta` is read here."""

from __future__ import annotations

from functools import lru_cache
from operator import getitem
from typing import Any

import torch
from torch import fx

NodeResult = fx.Node | tuple[fx.Node, int]  # the result of a node, or one of its several results
Stack = tuple[tuple[str, str, int], ...]  # module calls, outermost first: qualified name, class, which call of it

# Calls that draw random numbers, from ATen and from the run-time library.
RANDOM = set("dropout native_dropout bernoulli rand randn rand_like randn_like randint multinomial".split())


def aten_name(node: fx.Node) -> str:
    """`linear` for a call of `aten.linear.default`, "" for anything else."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return ""


def runtime_name(node: fx.Node) -> str:
    """`reduce` for a call of `tpcompiler.runtime.reduce`, "" for anything else."""
    if not str(getattr(node.target, "__module__", "")).startswith("tpcompiler.runtime"):
        return ""
    return str(getattr(node.target, "__name__", ""))


# --- several results --------------------------------------------------------------------------------------------------


def is_item(node: fx.Node) -> bool:
    """Does the node pick one of several results of a call? Such a node is written together with the call."""
    return node.target is getitem and isinstance(node.args[0], fx.Node) and not is_size(node.args[0])


def result_of(node: fx.Node) -> NodeResult:
    """The result that the node stands for."""
    return (node.args[0], node.args[1]) if is_item(node) else node  # type: ignore[return-value]


def items(node: fx.Node) -> dict[int, fx.Node]:
    """The nodes that pick the call's several results, by index."""
    return {u.args[1]: u for u in node.users if is_item(u) and isinstance(u.args[1], int)}


def count(node: fx.Node) -> int | None:
    """The number of results of a call that has several, None for a call with one result."""
    val = val_of(node)
    if isinstance(val, (list, tuple)):
        return len(val)
    picked = items(node)
    if not picked:
        return None
    sizes = node.args[1] if len(node.args) > 1 else None
    return len(sizes) if isinstance(sizes, (list, tuple)) else max(picked) + 1


def node_of(result: NodeResult) -> fx.Node | None:
    """The node whose meta describes the result; None for an item that nothing picks."""
    return result if isinstance(result, fx.Node) else items(result[0]).get(result[1])


def users(result: NodeResult) -> list[fx.Node]:
    """The nodes that need a result itself, not only its sizes."""
    if isinstance(result, fx.Node):
        return [u for u in result.users if not aten_name(u).startswith("sym_")]
    return [u for picked in result[0].users if picked.args[1:] == (result[1],) for u in users(picked)]


# --- what the stages before have recorded about a node ----------------------------------------------------------------


def val_of(node: fx.Node) -> Any:
    """The fake tensor, the several fake tensors or the size that the node computes."""
    return node.meta.get("val")


def line_of(node: fx.Node) -> tuple[str, int, str] | None:
    """The line of the user's model that made the node: file, line number, text."""
    return node.meta.get("line")


def stack_of(node: fx.Node) -> Stack | None:
    """The module calls that made the node, the root's call included."""
    return node.meta.get("stack")


# --- sizes ------------------------------------------------------------------------------------------------------------


def is_size(node: fx.Node) -> bool:
    """Is the node's value a number rather than a tensor? Such nodes are written where they are used."""
    return isinstance(val_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def key(size: Any) -> str:
    """The text of a size's symbolic expression, which is the same for equal sizes."""
    return _text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@lru_cache(maxsize=4096)
def _text(expression: Any) -> str:
    return str(expression)  # This is slow, and a program has only a few different sizes.
