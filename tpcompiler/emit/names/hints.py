"""The names that the user's own source gives to values, and names for values whose role is plain."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.names.namer import RESERVED
from tpcompiler.emit.ops.nodes import NodeResult, aten_name, is_item, is_size, items, line_of, stack_of

_PIECES = {"slice", "select", "index_select", "index"}
_ROLES = ("q", "k", "v", "query", "key", "value", "gate", "up")


def hints(nodes: Iterable[fx.Node], names: ParameterNames) -> dict[NodeResult, str]:
    """The names of the values that an assignment in the user's source ends in, then names by role."""
    out: dict[NodeResult, str] = {}
    position = {n: i for i, n in enumerate(nodes)}
    for run in _executions(position):
        line = line_of(run[0])
        assigned = targets(line[2]) if line is not None else ()
        ends = _ends(run, position) if any(assigned) else []
        if len(ends) == len(assigned):
            out.update({v: name for v, name in zip(ends, assigned, strict=True) if name})
    for node in position:
        said = _role(node, names)
        if said is not None:
            out.setdefault(node, said)
    return {v: n for v, n in out.items() if n not in RESERVED and n.isidentifier()}


@lru_cache(maxsize=4096)
def targets(line: str) -> tuple[str, ...]:
    """The names that a line of source assigns: ("q", "k", "v") for `q, (k, v) = self.q(x), self.kv(x).chunk(2, -1)`.

    A target that is no name, such as an attribute, is "".
    """
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


def _executions(nodes: Iterable[fx.Node]) -> Iterable[list[fx.Node]]:
    """The nodes that each execution of each line of source made. A call that loops executes a line repeatedly."""
    by_call: dict[Any, list[fx.Node]] = {}
    for n in nodes:
        line = line_of(n)
        if n.op == "call_function" and not is_size(n) and not is_item(n) and line is not None and line[2]:
            by_call.setdefault((line, _caller(n)), []).append(n)
    for found in by_call.values():
        said = [(n.target, stack_of(n), _parameters(n)) for n in found]
        starts = [i for i, s in enumerate(said) if s == said[0]]
        period = next(p for p in (*starts[1:], len(said)) if all(a == b for a, b in zip(said, said[p:], strict=False)))
        period = len(said) if len(said) % period else period
        for i in range(0, len(found), period):
            yield found[i : i + period]


def _parameters(node: fx.Node) -> list[str]:
    """The parameters that a node reads, up to the numbers in their names."""
    return [re.sub(r"\d+", "", n.name) for n in node.all_input_nodes if n.op == "placeholder"]


def _caller(node: fx.Node) -> tuple[Any, ...]:
    """The module call whose own code contains the node's line: the innermost one that is not of a class of torch."""
    stack = tuple(stack_of(node) or ())
    while stack and hasattr(torch.nn, stack[-1][1]):
        stack = stack[:-1]
    return stack


def _ends(run: list[fx.Node], position: Mapping[fx.Node, int]) -> list[NodeResult]:
    """The values of an execution that the execution itself does not use, directly or through other lines."""
    inside, last = set(run), position[run[-1]]
    out: list[NodeResult] = []
    for n in run:
        results: list[tuple[NodeResult, fx.Node]] = [((n, i), picked) for i, picked in sorted(items(n).items())]
        out += [v for v, node in results or [(n, n)] if not _reaches(node, inside - {n}, position, last)]
    return out


def _reaches(node: fx.Node, goal: set[fx.Node], position: Mapping[fx.Node, int], last: int) -> bool:
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in goal:
                return True
            if user not in seen and position.get(user, last) < last:
                seen.add(user)
                todo.append(user)
    return False


def _role(node: fx.Node, names: ParameterNames) -> str | None:
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
        table = names.of(first)
        shown = table.name.rpartition(".")[2] if table is not None and table.buffer else ""
        return shown if shown.isidentifier() else None
    if name == "linear" and isinstance(node.args[1], fx.Node):
        weight = names.of(node.args[1])
        stem = (weight.name if weight is not None else "").split(".")[-2:][0].removesuffix("_proj")
        return stem if stem in _ROLES else None
    return None
