"""The op that a node calls: its name, its arguments by name, its tensor operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """The name of a node's op: `linear` for one of ATen, `mylib::rotate` for one of another library."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.replace("aten::", "")
    return getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by their schema names, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.format_node()} has no schema"
    out: dict[str, Any] = {}
    for i, a in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            out[a.name] = node.args[i]
        elif a.name in node.kwargs:
            out[a.name] = node.kwargs[a.name]
        else:
            out[a.name] = a.default_value if a.has_default_value() else None
    return out


def argument_place(node: fx.Node, name: str) -> int:
    """The position of an argument in a call's schema."""
    assert isinstance(node.target, torch._ops.OpOverload), f"{node.format_node()} has no schema"
    return next(i for i, a in enumerate(node.target._schema.arguments) if a.name == name)


def tensor_operands(node: fx.Node) -> list[fx.Node | None]:
    """The tensor operands in schema order: lists are flattened, and an operand that is left out is None. Operands of a
    node without a schema come in fx's order."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    out: list[fx.Node | None] = []
    given = bind(node)
    for a in node.target._schema.arguments:
        if "Tensor" not in str(a.type):
            continue
        value = given[a.name]
        for v in value if isinstance(value, list | tuple) else [value]:
            if isinstance(v, fx.Node):
                if isinstance(v.meta.get("val"), torch.Tensor):
                    out.append(v)
            elif v is None:
                out.append(None)
    return out
