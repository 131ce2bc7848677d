"""Finds what a graph computes from sizes alone (position ids, masks, rotary tables), and what its values prove."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler.execute.interpret import Resolver
from tpcompiler.graphs import examples, tensors
from tpcompiler.ops.operands import tensor_operands
from tpcompiler.ops.table import find
from tpcompiler.program import Parameter, Program
from tpcompiler.runtime import Ranks
from tpcompiler.runtime.private_apis import is_factory

LENGTHS = (3, 7, 12, 29, 131)  # as much as buffers hold; no window below 100 hides from the largest
LOW = -1e4  # added to a score, it leaves no weight after a softmax
_MOST = 1 << 26  # elements of a value that are worth computing
_FEWEST = 2  # lengths that must be computed for a verdict


class Positional:
    """The nodes of a graph that depend on no input along the sequence. Those that read no parameter have values."""

    def __init__(self, program: Program, rows: tuple[fx.Node, ...]) -> None:
        self.program = program
        ids = rows[0].meta["val"]
        self.batch, self.length = (n.node.expr if isinstance(n, torch.SymInt) else n for n in ids.shape[:2])
        self.example = examples(ids.shape[1])
        self.rows = frozenset(rows)
        parameters = {p.node: p for p in program.capture.parameters}
        self.buffers: dict[str, Parameter] = {n: p for n, p in parameters.items() if p.value is not None}
        self.live: set[fx.Node] = set(rows)  # depends on tokens
        self.free: set[fx.Node] = set()  # computed from sizes and buffers alone
        for node in program.graph.nodes:
            self._classify(node, parameters)
        self._values: dict[tuple[fx.Node, int, int], Tensor | None] = {}
        self._resolver = Resolver(Ranks(program.mesh, 0, _nobody), False, None)

    def _classify(self, node: fx.Node, parameters: Mapping[str, Parameter]) -> None:
        if node.op == "placeholder":
            if node.name in self.buffers:
                self.free.add(node)
            return
        if node.op != "call_function" or is_number(node):
            return
        ignored = unread(node)
        read = [n for n in node.all_input_nodes if not is_number(n) and n not in ignored]
        if not sizes_alone(node):  # what a step makes may not wait for tokens, even where it reads their dtype alone
            read += [n for n in ignored if n in self.live]
        if any(n in self.live for n in read):
            self.live.add(node)
        elif all(n in self.free for n in read) and not _random(node):
            self.free.add(node)

    def along(self, node: fx.Node) -> tuple[bool, ...]:
        """For each dimension of a node's value, whether the sequence is in it."""
        return tuple(self.has_length(n) for n in node.meta["val"].shape)

    def has_length(self, size: Any) -> bool:
        return isinstance(size, torch.SymInt) and self.length in size.node.expr.free_symbols

    # -- values -----------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node, batch: int, length: int) -> Tensor | None:
        """A node of `free` at these sizes; None when it cannot be computed there, or not to its whole length."""
        key = (node, batch, length)
        if key not in self._values:
            shape = self.shape(node, batch, length)
            made: Tensor | None = None
            if shape is not None and torch.Size(shape).numel() <= _MOST:
                try:
                    made = self._compute(node, batch, length)
                except (RuntimeError, IndexError, TypeError, ValueError):
                    made = None
            self._values[key] = made if made is not None and self._fits(node, made, shape) else None
        return self._values[key]

    def _fits(self, node: fx.Node, made: Tensor, shape: tuple[int, ...] | None) -> bool:
        return shape is not None and all(
            m == n for m, n, seq in zip(made.shape, shape, self.along(node), strict=True) if seq
        )

    def _compute(self, node: fx.Node, batch: int, length: int) -> Any:
        if node.op == "placeholder":
            return self.buffers[node.name].value
        if is_number(node):
            return self.number(node.meta["val"], batch, length)
        args, kwargs = fx.node.map_arg(self._resolver.call(node), lambda n: self._operand(node, n, batch, length))
        if is_factory(node.target) and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _operand(self, user: fx.Node, node: fx.Node, batch: int, length: int) -> Any:
        if tensors(node.meta.get("val")) and node in unread(user) and node not in self.free:
            return torch.empty(self.shape(node, batch, length) or (), dtype=node.meta["val"].dtype)
        if is_number(node):
            return self._compute(node, batch, length)
        key = (node, batch, length)
        if key not in self._values:
            self._values[key] = self._compute(node, batch, length)
        found = self._values[key]
        if found is None:
            raise ValueError("an operand cannot be computed at this length")
        return found

    def shape(self, node: fx.Node, batch: int, length: int) -> tuple[int, ...] | None:
        try:
            return tuple(self.number(n, batch, length) for n in node.meta["val"].shape)
        except TypeError:
            return None

    def number(self, size: Any, batch: int, length: int) -> Any:
        if isinstance(size, int | float):
            return size
        return int(size.node.expr.subs({self.batch: batch, self.length: length}).subs(self.example))

    def samples(self, node: fx.Node, batch: int = 2) -> list[tuple[int, Tensor]]:
        """A node's value at several lengths, those at which it can be computed; [] when they are too few."""
        found = [(s, v) for s in LENGTHS if (v := self.value(node, batch, s)) is not None]
        return found if len(found) >= _FEWEST else []

    # -- what is proven of them -------------------------------------------------------------------------------------

    def prefix_stable(self, node: fx.Node) -> bool:
        """Whether what stands at a position does not depend on how many positions there are."""
        found = self.samples(node)
        longest = found[-1][1] if found else None
        for _, value in found[:-1]:
            assert longest is not None
            part = longest[tuple(slice(0, n) for n in value.shape)]
            if not _same(part, value):
                return False
        return bool(found)

    def same_for_all(self, node: fx.Node) -> bool:
        """Whether all sequences of a batch share it, so that it can be computed for a batch of one."""
        one, many = self.value(node, 1, LENGTHS[1]), self.value(node, 3, LENGTHS[1])
        if one is None or many is None or one.dim() != many.dim():
            return False
        return all(m in (1, n) for m, n in zip(one.shape, many.shape, strict=True)) and _same(one.expand_as(many), many)

    def upper(self, node: fx.Node, row: int | None, column: int | None) -> float | None:
        """The one value at all places whose column is a later position than their row, or the largest of values that
        are all at most `LOW`. Without a row or a column: the one value at all places."""
        seen: set[float] = set()
        for _, value in self.samples(node):
            there = _later(value, row, column).flatten().to(torch.float64)
            if there.numel() == 0:
                continue
            low, high = float(there.min()), float(there.max())
            if low != high and not high <= LOW:
                return None
            seen.add(high)
        if not seen or (len(seen) > 1 and max(seen) > LOW):
            return None
        return max(seen)


def is_number(node: fx.Node) -> bool:
    """Whether a node is a size or computed from sizes, in Python."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def sizes_alone(node: fx.Node) -> bool:
    """Whether a call reads the sizes of its operand and none of its values."""
    rule = find(node.target)
    return rule is not None and rule.sizes_alone


def unread(node: fx.Node) -> frozenset[fx.Node]:
    """The operands of which a call reads the sizes or the dtype, and no values."""
    rule = find(node.target)
    if rule is None:
        return frozenset()
    operands = tensor_operands(node)
    read = {n for i, n in enumerate(operands) if i not in rule.unread and not rule.sizes_alone}
    return frozenset(n for n in operands if n is not None and n not in read)


def _random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _later(value: Tensor, row: int | None, column: int | None) -> Tensor:
    if row is None or column is None:
        return value
    moved = value.movedim((row, column), (-2, -1))
    n, m = moved.shape[-2:]
    return moved[..., torch.ones(n, m, dtype=torch.bool).triu(1)]


def _same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-12, atol=0, equal_nan=True).all()) if a.is_floating_point() else a.equal(b)


def _nobody(over: tuple[str, ...]) -> Any:
    raise AssertionError("a constant does not communicate")


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it is computed from, each once."""
    seen, todo = {node}, [node]
    while todo:
        found = todo.pop()
        yield found
        for n in found.all_input_nodes:
            if n not in seen:
                seen.add(n)
                todo.append(n)
