"""The arguments of a call: by position, to rewrite them, and by the schema's names, for the tables of idioms."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import fx

from tpcompiler.emit.ops.nodes import val_of
from tpcompiler.emit.text.expr import ATOM, Expr, tuple_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
ArgumentPath = tuple[Any, ...]  # an argument's position or keyword, then the positions inside nested containers

PLACEMENT = ("device", "layout", "pin_memory")  # these follow from the tensors that a tensor is made from


def arguments_of(node: fx.Node) -> Arguments:
    return tuple(node.args), dict(node.kwargs)


def replaced(arguments: Arguments, path: ArgumentPath, new: Any) -> Arguments:
    """The arguments with the value at `path` replaced."""
    args, kwargs = arguments
    if isinstance(path[0], int):
        return _put(args, path, new), kwargs
    return args, {**kwargs, path[0]: _put(kwargs[path[0]], path[1:], new)}


def _put(container: Any, path: ArgumentPath, new: Any) -> Any:
    if not path:
        return new
    if isinstance(container, slice):
        return slice(*_put((container.start, container.stop, container.step), path, new))
    items = list(container)
    items[path[0]] = _put(items[path[0]], path[1:], new)
    return tuple(items) if isinstance(container, tuple) else items


class Speaker(Protocol):
    """Writes the operands of a call as the function that is being written names them."""

    def expr(self, value: Any) -> Expr:
        """Any argument of a graph node."""

    def positive(self, value: Any) -> bool:
        """Is the size above zero on every rank?"""

    def device(self) -> str:
        """The device at run time, for calls that make a tensor from no other tensor."""


class AtenCall:
    """One ATen call with its arguments by the schema's names, defaults filled in."""

    def __init__(self, node: fx.Node, arguments: Arguments, speaker: Speaker) -> None:
        self.speaker = speaker
        self.op = cast(Any, node.target)
        self.schema = self.op._schema.arguments
        self.name = self.op._schema.name.split("::")[-1]
        given = dict(zip((a.name for a in self.schema), arguments[0], strict=False)) | arguments[1]
        self.values = {a.name: given.get(a.name, a.default_value) for a in self.schema}
        self.changed = [a.name for a in self.schema if a.name in given and not _is_default(a, given[a.name])]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def x(self, name: str) -> Expr:
        """The argument as an expression."""
        return self.speaker.expr(self.values[name])

    def receiver(self) -> str:
        """The argument `self`, as text that a method or an attribute can follow."""
        return self.x("self").at(ATOM)

    def rank(self, name: str) -> int:
        """The number of dimensions of a tensor argument."""
        return val_of(self.values[name]).dim()

    def listed(self, name: str) -> list[str]:
        """The members of an argument that is a list."""
        return [self.speaker.expr(v).text for v in self.values[name]]

    def arguments(self, skip: tuple[str, ...] = ()) -> list[str]:
        """The arguments as text: required ones and tensors by position, other changed ones by keyword."""
        out: list[str] = []
        positional = True
        for a in self.schema:
            if a.name in skip or a.name in PLACEMENT:
                continue
            if a.has_default_value() and a.name not in self.changed:
                positional = False
                continue
            bare = positional and not a.kwarg_only and (not a.has_default_value() or "Tensor" in str(a.type))
            out.append(self.text(a.name) if bare else f"{a.name}={self.text(a.name)}")
        return out

    def text(self, name: str) -> str:
        """The argument as text. Lists of numbers are tuples, and a list of one dimension is that dimension."""
        value = self.values[name]
        if isinstance(value, (list, tuple)) and not any(_is_tensor(v) for v in value):
            said = self.listed(name)
            return said[0] if name in ("dim", "dims") and len(said) == 1 else tuple_of(said)
        return self.x(name).text


def _is_default(argument: Any, given: Any) -> bool:
    default, numbers = argument.default_value, (int, float)
    alike = type(given) is type(default) or type(given) in numbers and type(default) in numbers
    return bool(argument.has_default_value()) and alike and bool(given == default)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(val_of(value), torch.Tensor)
