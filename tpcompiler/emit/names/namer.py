"""Names for the local variables of one function: those of the user's source where they are known."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Iterable, Mapping

from tpcompiler.emit.ops.nodes import NodeResult, aten_name, runtime_name

# What emitted functions use. An argument may hide any other built-in name, as `input` often does.
USED = frozenset("torch nn F self Tensor ranks _ getattr setattr next zip range max min float int tuple".split())
RESERVED = USED | frozenset(keyword.kwlist) | frozenset(dir(builtins))

POOL = ("y", "z", "u", "v", "w")  # names that say nothing

_MASKS = "tril triu eq ne lt le gt ge __and__ bitwise_and logical_and".split()
_BY_OPERATOR = dict.fromkeys(_MASKS, "mask") | {
    "embedding": "x",
    "lookup": "x",
    "arange": "positions",
    "cross_entropy_loss": "loss",
    "cross_entropy": "loss",
    "linear_cross_entropy": "loss",
    "cos": "cos",
    "sin": "sin",
    "topk": "top",
    "_softmax": "weights",
    "softmax": "weights",
}


class Namer:
    """Gives names to values. A name is free again when its value has been used for the last time."""

    def __init__(self, taken: Iterable[str], known: Mapping[NodeResult, str]) -> None:
        self._others = set(taken)
        self._known = dict(known)  # value → name in the user's source
        self._live: dict[str, NodeResult] = {}
        self.names: dict[NodeResult, str] = {}  # all names given, of values dead or alive

    def bind(self, v: NodeResult, name: str) -> str:
        assert name not in self._live, f"{name} is in use"
        self.names[v], self._live[name] = name, v
        return name

    def release(self, dead: Iterable[NodeResult]) -> None:
        """Frees the names of values that are not used any more."""
        for v in dead:
            if self.holds(v):
                del self._live[self.names[v]]

    def holds(self, v: NodeResult) -> bool:
        """Does the value's name still stand for the value?"""
        return v in self.names and self._live.get(self.names[v]) == v

    def free(self, name: str) -> bool:
        return name not in RESERVED and self._unused(name)

    def _unused(self, name: str) -> bool:
        return name not in self._live and name not in self._others

    def prefer(self, v: NodeResult, name: str) -> None:
        """Asks for a name for a value before all others."""
        self._known[v] = name

    def fresh(self, v: NodeResult, reuse: str | None = None) -> str:
        """Binds `v` to its known name, else to `reuse` (the name of what it is made from), else to a new one."""
        node = v[0] if isinstance(v, tuple) else v
        operator = aten_name(node) or runtime_name(node)
        wanted = [self._known.get(v), reuse, _BY_OPERATOR.get(operator), *POOL]
        return self.bind(v, next((n for n in wanted if n and self.free(n)), None) or self._numbered("y", 1))

    def argument(self, v: NodeResult, name: str) -> str:
        """Binds an argument of the function to `name`, or to `name` with a number if it is in use."""
        usable = name not in USED and self._unused(name)
        return self.bind(v, name if usable else self._numbered(name, 2))

    def _numbered(self, stem: str, start: int) -> str:
        i = start
        while not self.free(f"{stem}{i}"):
            i += 1
        return f"{stem}{i}"
