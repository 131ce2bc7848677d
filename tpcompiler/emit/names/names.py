"""What values are called: as the user's own source calls them where that can be seen, else as a person would."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Names, is_item
from tpcompiler.emit.layers.outline import items
from tpcompiler.emit.layers.tidy import aten_name
from tpcompiler.emit.names.symbols import is_size

Value = fx.Node | tuple[fx.Node, int]  # a node's result, or one of several

RESERVED = frozenset(keyword.kwlist) | frozenset(dir(builtins)) | {"torch", "nn", "F", "self", "Tensor", "ranks", "_"}


def value(node: fx.Node) -> Value:
    """What the node stands for: item nodes are the item of the node they pick from."""
    return (node.args[0], node.args[1]) if is_item(node) else node  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def targets(line: str) -> tuple[str, ...]:
    """The names that a line of source assigns: ("q", "k", "v") of `q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)`."""
    found = re.match(r"\s*([A-Za-z_(][\w.,\s()*]*?)\s*(?::[^=]+)?(?:[-+*/@|&^%]|//|\*\*|>>|<<)?=(?!=)", line)
    if not found:
        return ()
    try:
        target = ast.parse(found[1].strip(), mode="eval").body
    except SyntaxError:
        return ()
    return tuple(_names(target))


def _names(target: ast.expr) -> Iterable[str]:
    if isinstance(target, (ast.Tuple, ast.List)):
        for part in target.elts:
            yield from _names(part)
    else:
        yield target.id if isinstance(target, ast.Name) else ""


def hints(nodes: Iterable[fx.Node], names: Names) -> dict[Value, str]:
    """Names from the user's source, for the values that its assignments end in; then from what a value is or is for."""
    out: dict[Value, str] = {}
    place = {n: i for i, n in enumerate(nodes)}
    for run in _executions(place):
        assigned = targets(run[0].meta["line"][2])
        ends = _ends(run, place) if any(assigned) else []
        if len(ends) == len(assigned):
            out.update({v: name for v, name in zip(ends, assigned, strict=True) if name})
    for node in place:
        said = _role(node, names)
        if said is not None:
            out.setdefault(node, said)
    return {v: n for v, n in out.items() if n not in RESERVED and n.isidentifier()}


def _executions(nodes: Iterable[fx.Node]) -> Iterable[list[fx.Node]]:
    """The nodes that one execution of one line of source made, for all lines and all their executions."""
    by_call: dict[Any, list[fx.Node]] = {}
    for n in nodes:
        line = n.meta.get("line")
        if n.op == "call_function" and not is_size(n) and not is_item(n) and line is not None and line[2]:
            by_call.setdefault((line, _caller(n)), []).append(n)
    for found in by_call.values():  # in a loop, a call executes its line again and again
        said = [(n.target, n.meta.get("stack"), _tables(n)) for n in found]
        starts = [i for i, s in enumerate(said) if s == said[0]]
        period = next(p for p in (*starts[1:], len(said)) if all(a == b for a, b in zip(said, said[p:], strict=False)))
        period = len(said) if len(said) % period else period
        for i in range(0, len(found), period):
            yield found[i : i + period]


def _tables(node: fx.Node) -> list[str]:
    """The parameters that a node reads, those of a list (or numbered) being one."""
    return [re.sub(r"\d+", "", n.name) for n in node.all_input_nodes if n.op == "placeholder"]


def _caller(node: fx.Node) -> tuple[Any, ...]:
    """The module call whose own code holds the node's line: torch's modules stand for a line of who calls them."""
    stack = tuple(node.meta.get("stack", ()))
    while stack and hasattr(torch.nn, stack[-1][1]):
        stack = stack[:-1]
    return stack


def _ends(run: list[fx.Node], place: Mapping[fx.Node, int]) -> list[Value]:
    """The values of an execution that it does not use up itself, be it on a detour through other lines."""
    inside, last = set(run), place[run[-1]]
    out: list[Value] = []
    for n in run:
        several = items(n)
        for v, node in [((n, i), u) for i, u in sorted(several.items())] if several else [(n, n)]:
            if not _reaches(node, inside - {n}, place, last):
                out.append(v)
    return out


def _reaches(node: fx.Node, goal: set[fx.Node], place: Mapping[fx.Node, int], last: int) -> bool:
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in goal:
                return True
            if user not in seen and place.get(user, last) < last:
                seen.add(user)
                todo.append(user)
    return False


_PIECES = {"slice", "select", "index_select", "index"}


def _role(node: fx.Node, names: Names) -> str | None:
    """A name that says what a value is: a mask, a piece of a table, the queries."""
    name = aten_name(node)
    for user in node.users:
        added = (*user.args[3:4], user.kwargs.get("attn_mask"))
        if aten_name(user) == "scaled_dot_product_attention" and node in added:
            return "mask"
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node):
        return None
    if name == "masked_fill" and aten_name(first) in ("zeros", "zeros_like", "new_zeros"):
        return "mask"
    if name in _PIECES and first.op == "placeholder":
        table = names.by_node.get(first.name)
        shown = table.name.rpartition(".")[2] if table is not None and table.buffer else ""
        return shown if shown.isidentifier() else None
    if name == "linear" and isinstance(node.args[1], fx.Node):
        weight = names.by_node.get(node.args[1].name)
        stem = (weight.name if weight is not None else "").split(".")[-2:][0].removesuffix("_proj")
        return stem if stem in ("q", "k", "v", "query", "key", "value", "gate", "up") else None
    return None


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
POOL = ("y", "z", "u", "v", "w")


class Namer:
    """Names for one function's local variables. A name is free again when its value has been used for the last time."""

    def __init__(self, taken: Iterable[str], known: Mapping[Value, str]) -> None:
        self.taken = set(taken) | RESERVED
        self.known = known
        self.live: dict[str, Value] = {}
        self.names: dict[Value, str] = {}
        self.preferred: dict[Value, str] = {}  # before all others

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
        """Binds `v` to its name in the source, else to `reuse` (the name of what it is made from), else a new one."""
        node = v[0] if isinstance(v, tuple) else v
        operator = aten_name(node) or getattr(node.target, "__name__", "")
        wanted = [self.preferred.get(v), self.known.get(v), reuse, _BY_OPERATOR.get(operator), *POOL]
        for name in wanted:
            if name is not None and self.free(name):
                return self.bind(v, name)
        i = 1
        while not self.free(f"y{i}"):
            i += 1
        return self.bind(v, f"y{i}")

    def argument(self, v: Value, name: str) -> str:
        """Binds an argument of the function to `name`, or one like it."""
        stem, i = name, 2
        while not self.free(name):
            name, i = f"{stem}{i}", i + 1
        return self.bind(v, name)
