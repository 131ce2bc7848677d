"""What values are called: as the user's own source calls them where that can be seen, else as a person would."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import fx

from tpcompiler.emit.layers import is_item
from tpcompiler.emit.outline import items
from tpcompiler.emit.tidy import aten_name

Value = fx.Node | tuple[fx.Node, int]  # a node's result, or one of several

RESERVED = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"torch", "nn", "F", "self", "Tensor", "ranks", "_"}


def value(node: fx.Node) -> Value:
    """What the node stands for: item nodes are the item of the node they pick from."""
    return (node.args[0], node.args[1]) if is_item(node) else node  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def targets(line: str) -> tuple[str, ...]:
    """The names that a line of source assigns: ("q", "k", "v") of `q, k, v = self.qkv(x).chunk(3, -1)`."""
    found = re.match(r"\s*([A-Za-z_][\w.,\s()*]*?)\s*(?::[^=]+)?(?:[-+*/@|&^%]|//|\*\*|>>|<<)?=(?!=)", line)
    if not found:
        return ()
    try:
        target = ast.parse(found[1].strip(), mode="eval").body
    except SyntaxError:
        return ()
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
    return tuple(p.id if isinstance(p, ast.Name) else "" for p in parts)


def hints(nodes: Iterable[fx.Node]) -> dict[Value, str]:
    """Names from the user's source, for the values that its assignments end in."""
    out: dict[Value, str] = {}
    for node in nodes:
        line = node.meta.get("line")
        if line is None or not line[2]:
            continue
        names = targets(line[2])
        if len(names) == 1 and names[0] and not any(_line(u) == line[:2] for u in node.users if not is_item(u)):
            out[node] = names[0]
        elif len(names) > 1 and (parts := items(node)):
            out.update({(node, i): names[i] for i in range(len(names)) if names[i] and len(names) > max(parts)})
    return {v: n for v, n in out.items() if n not in RESERVED and n.isidentifier()}


def _line(node: fx.Node) -> Any:
    line = node.meta.get("line")
    return None if line is None else line[:2]


_BY_OPERATOR = {
    "embedding": "x",
    "lookup": "x",
    "arange": "positions",
    "cross_entropy_loss": "loss",
    "cross_entropy": "loss",
    "tril": "mask",
    "triu": "mask",
    "eq": "mask",
    "ne": "mask",
    "lt": "mask",
    "le": "mask",
    "gt": "mask",
    "ge": "mask",
    "__and__": "mask",
    "bitwise_and": "mask",
    "logical_and": "mask",
    "cos": "cos",
    "sin": "sin",
    "topk": "top",
    "_softmax": "weights",
    "softmax": "weights",
}
_POOL = ("y", "z", "u", "v", "w")


class Namer:
    """Names for one function's local variables. A name is free again when its value has been used for the last time."""

    def __init__(self, taken: Iterable[str], known: Mapping[Value, str]) -> None:
        self.taken = set(taken) | RESERVED
        self.known = known
        self.live: dict[str, Value] = {}
        self.names: dict[Value, str] = {}

    def release(self, dead: Iterable[Value]) -> None:
        for v in dead:
            name = self.names.get(v)
            if name is not None and self.live.get(name) == v:
                del self.live[name]

    def bind(self, v: Value, name: str) -> str:
        assert name not in self.live, f"{name} is in use"
        self.names[v], self.live[name] = name, v
        return name

    def free(self, name: str) -> bool:
        return name not in self.live and name not in self.taken

    def fresh(self, v: Value, reuse: str | None = None) -> str:
        """Binds `v` to its own name from the source, else to `reuse` (the name of what it is made from), else to a new one."""
        node = v[0] if isinstance(v, tuple) else v
        operator = aten_name(node) or getattr(node.target, "__name__", "")
        wanted = [self.known.get(v), reuse if reuse in _POOL else None, _BY_OPERATOR.get(operator), *_POOL]
        for name in wanted:
            if name is not None and self.free(name):
                return self.bind(v, name)
        i = 1
        while not self.free(f"y{i}"):
            i += 1
        return self.bind(v, f"y{i}")

    def argument(self, v: Value, default: str) -> str:
        name = self.known.get(v, default)
        stem, i = name, 2
        while not self.free(name):
            name, i = f"{stem}{i}", i + 1
        return self.bind(v, name)
