"""Terms: how a value is computed. Equal computations are the same object.

A term is an operation's name, its arguments (terms, numbers, dtypes, nested tuples), and its result's shape and dtype.
Two terms are equal exactly when they are the same object, so that comparing them needs no numbers.
"""

from __future__ import annotations

from typing import Any

import torch

Shape = tuple[int, ...]


class Term:
    """One value. `shape` and `dtype` are None for a list of tensors, whose `items` are described instead."""

    __slots__ = ("args", "dtype", "index", "items", "name", "op", "shape")

    def __init__(self, index: int, op: str, args: tuple[Any, ...], shape: Any, dtype: Any, items: Any = None) -> None:
        self.index = index
        self.op = op
        self.args = args
        self.shape: Shape = shape
        self.dtype: torch.dtype = dtype
        self.items: tuple[tuple[Shape, torch.dtype], ...] | None = items
        self.name = ""

    def __repr__(self) -> str:
        return self.name or f"{self.op}#{self.index}"

    @property
    def rank(self) -> int:
        return len(self.shape)


class TermStore:
    """All terms made so far, each once."""

    def __init__(self) -> None:
        self._made: dict[Any, Term] = {}

    def find(self, op: str, args: tuple[Any, ...]) -> Term | None:
        """The term of this operation on these arguments, if it was made before."""
        return self._made.get((op, keyed(args)))

    def make(self, op: str, args: tuple[Any, ...], shape: Any, dtype: Any, items: Any = None, key: Any = None) -> Term:
        """The term of this operation on these arguments. A shorter `key` may identify the arguments."""
        key = (op, keyed(args) if key is None else key)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Term(len(self._made), op, args, shape, dtype, items)
        return found


_PLAIN = frozenset((int, Term, str, type(None), torch.dtype))  # types whose equal values are the same argument


def keyed(a: Any) -> Any:
    """A hashable stand-in for an argument, different for 1, 1.0 and True."""
    kind = type(a)
    if kind is tuple:
        for x in a:
            if type(x) not in _PLAIN:
                return tuple([keyed(x) for x in a])
        return a
    if kind in _PLAIN:
        return a
    if kind is float or kind is bool or kind is complex:
        return (kind.__name__, repr(a))
    if kind is slice:
        return ("slice", keyed(a.start), keyed(a.stop), keyed(a.step))
    return a


def children(a: Any) -> list[Term]:
    """The terms among nested arguments, in order."""
    found: list[Term] = []
    todo = [a]
    while todo:
        x = todo.pop()
        if type(x) is Term:
            found.append(x)
        elif type(x) is tuple:
            todo.extend(reversed(x))
    return found


def described(term: Term) -> str:
    """A term as text, for messages: the operation with its arguments."""

    def said(a: Any) -> str:
        if isinstance(a, tuple):
            return "(" + ", ".join(map(said, a)) + ")"
        return f"{a!r}{list(a.shape)}" if isinstance(a, Term) and a.shape is not None else str(a)

    return f"{term}: {term.op}{said(term.args)}"
