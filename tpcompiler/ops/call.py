"""A node as rules see it, and the words that lines are written with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tpcompiler.ops.views import Shape


@dataclass(frozen=True)
class Call:
    """A node as rules see it: shapes of its tensor operands in schema order (lists flattened, None where left out)."""

    operands: tuple[Shape | None, ...]
    results: tuple[Shape, ...]
    args: Mapping[str, Any]  # every argument by its schema name, defaults filled in; tensors are left as nodes
    floating: tuple[bool, ...] = ()  # per operand: of a floating dtype

    def shape(self, i: int = 0) -> Shape:
        shape = self.operands[i]
        assert shape is not None
        return shape

    def rank(self, i: int = 0) -> int:
        return len(self.shape(i))

    def dim(self, name: str = "dim", i: int = 0) -> int:
        return int(self.args[name]) % max(self.rank(i), 1)

    def dims(self, name: str = "dim") -> list[int]:
        """The dimensions that an argument lists: all when it is left out or empty, as torch has it."""
        given, n = self.args.get(name), self.rank()
        if given is None or given == [] or n == 0:
            return list(range(n))
        return [i % n for i in (given if isinstance(given, list | tuple) else [given])]


Line = str | tuple[str, dict[str, int]] | None  # None: no rule for these arguments
Rule = str | Callable[[Call], Line]


def letters(n: int, prefix: str = "d") -> list[str]:
    return [f"{prefix}{i}" for i in range(n)]


def line(operand: list[str], result: list[str]) -> str:
    return f"{' '.join(operand)} -> {' '.join(result)}"


def changed(d: list[str], i: int, before: list[str], after: list[str]) -> str:
    """The line of an op that changes dimension `i` alone."""
    return line(d[:i] + before + d[i + 1 :], d[:i] + after + d[i + 1 :])
