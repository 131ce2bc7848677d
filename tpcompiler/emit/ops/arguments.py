"""An ATen call with its arguments by name, as the tables of idioms see it."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import fx

from tpcompiler.emit.text.expr import Expr, tuple_of


class Says(Protocol):
    """What the function being written knows: how to say its values."""

    def expr(self, value: Any) -> Expr:
        """Any argument of a graph node."""

    def positive(self, value: Any) -> bool:
        """Is the size above zero on every rank?"""

    def device(self) -> str:
        """The run-time device, for calls that make a tensor out of nothing."""


class Call:
    """One ATen call, its arguments by the schema's names, defaults filled in."""

    def __init__(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], scope: Says) -> None:
        self.node, self.scope = node, scope
        self.op = cast(Any, node.target)
        self.schema = self.op._schema.arguments
        self.name = self.op._schema.name.split("::")[-1]
        given = dict(zip((a.name for a in self.schema), args, strict=False)) | kwargs
        self.values = {a.name: given.get(a.name, a.default_value) for a in self.schema}
        self.changed = [a.name for a in self.schema if a.name in given and not _is_default(a, given[a.name])]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def x(self, name: str) -> Expr:
        return self.scope.expr(self.values[name])

    def rank(self, name: str) -> int:
        return self.values[name].meta["val"].dim()

    def arguments(self, skip: tuple[str, ...] = (), tuples: bool = True) -> list[str]:
        """The arguments as text: required ones and tensors by position, other changed ones by keyword."""
        out: list[str] = []
        positional = True
        for a in self.schema:
            if a.name in skip or a.name in PLACEMENT:
                continue
            if a.has_default_value() and a.name not in self.changed:
                positional = False
                continue
            text = self.text(a.name)
            if positional and not a.kwarg_only and (not a.has_default_value() or "Tensor" in str(a.type)):
                out.append(text)
            else:
                out.append(f"{a.name}={text}")
        return out

    def text(self, name: str) -> str:
        value = self.values[name]
        if isinstance(value, (list, tuple)) and not any(isinstance(v, fx.Node) and _is_tensor(v) for v in value):
            if name in ("dim", "dims") and len(value) == 1:
                return self.scope.expr(value[0]).text
            return tuple_of(self.scope.expr(v).text for v in value)
        return self.scope.expr(value).text


PLACEMENT = ("device", "layout", "pin_memory")  # where a tensor lies is said by the tensors it is made from


def _is_default(argument: Any, given: Any) -> bool:
    return bool(argument.has_default_value()) and _same(given, argument.default_value)


def _same(a: Any, b: Any) -> bool:
    numbers = (int, float)
    return (type(a) is type(b) or type(a) in numbers and type(b) in numbers) and bool(a == b)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
