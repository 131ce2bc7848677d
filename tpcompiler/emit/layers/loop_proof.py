"""Proves that iterations are equal up to what a loop can express.

Iteration k must be iteration 0 with every value made in iteration 0 replaced by its counterpart in iteration k. A value
from outside must be the same in all iterations, or be made by the iteration before. Parameters, callees and numbers may
differ if the loop's counter `i` tells them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.layers.statements import LayerCalls, Operation, Statement
from tpcompiler.emit.ops.arguments import ArgumentPath, Arguments, arguments_of, replaced
from tpcompiler.emit.ops.nodes import NodeResult, result_of, users
from tpcompiler.emit.text.expr import ATOM, TERNARY, Expr, progression


@dataclass(eq=False)
class Loop:
    """`for i in range(count):` over the statements of iteration 0."""

    count: int
    carried: list[tuple[NodeResult, NodeResult, NodeResult]]  # what iteration 0 is given, makes of it, the last result
    kept: list[NodeResult]  # values from before the loop that every iteration reads
    indexed: dict[fx.Node, Expr]  # parameters: `self.w[i]`
    numbers: dict[fx.Node, Arguments]  # the arguments of nodes with numbers in terms of `i`
    callees: dict[Frame, Expr]  # called layers: `self.norms[i]`


@dataclass(frozen=True, eq=False)
class LoopEnd:
    """The end of a loop's statements."""

    loop: Loop


class _Different(Exception):
    """Two iterations are not alike."""


def _must(holds: bool) -> None:
    if not holds:
        raise _Different


def prove(rounds: list[list[Statement]], body: Frame, comparer: Comparer, outputs: list[NodeResult]) -> Loop | None:
    """The loop over the iterations `rounds`, None if they are not alike. `outputs` leave the body."""
    try:
        return _Proof(rounds, body, comparer, outputs).loop()
    except _Different:
        return None


class _Proof:
    def __init__(
        self, rounds: list[list[Statement]], body: Frame, comparer: Comparer, outputs: list[NodeResult]
    ) -> None:
        self.rounds, self.body, self.comparer, self.outputs = rounds, body, comparer, outputs
        self.position = [{v: (j, o) for j, s in enumerate(r) for o, v in enumerate(s.results)} for r in rounds]
        self.parameters: dict[fx.Node, list[fx.Node]] = {}  # of iteration 0 → of all iterations
        self.numbers: dict[tuple[fx.Node, ArgumentPath], list[int]] = {}
        self.callees: dict[Frame, list[str]] = {}
        self.carried: dict[NodeResult, tuple[int, int]] = {}
        self.kept: dict[NodeResult, None] = {}

    def loop(self) -> Loop:
        for k in range(1, len(self.rounds)):
            for first, other in zip(self.rounds[0], self.rounds[k], strict=True):
                self._statement(first, other, k)
        _must(not (self.carried.keys() & self.kept.keys()) and bool(self.carried))
        ends = set(self.carried.values())
        _must(len(ends) == len(self.carried))
        names, body = self.comparer.names, self.body
        indexed = {
            node: _indexed(names, body.name, [names.inside(n, body.name) for n in row])
            for node, row in self.parameters.items()
            if any(n is not node for n in row)
        }
        callees = {
            frame: _indexed(names, body.name, [body.relative(n) for n in row]) for frame, row in self.callees.items()
        }
        self._private(ends)
        at, final = ({j: v for v, j in self.position[k].items()} for k in (0, -1))
        carried = [(v, at[end], final[end]) for v, end in self.carried.items()]
        return Loop(len(self.rounds), carried, list(self.kept), indexed, self._numbers(), callees)

    # --- iteration k is iteration 0 -----------------------------------------------------------------------------------

    def _statement(self, first: Statement, other: Statement, k: int) -> None:
        if isinstance(first, LayerCalls):
            assert isinstance(other, LayerCalls)
            _must(len(first.frames) == 1 and not any(n.by_call for n in first.layer.numbers))
            frame = first.frames[0]
            self.callees.setdefault(frame, [frame.name]).append(other.frames[0].name)
            for x, y in zip(first.inputs, other.inputs, strict=True):
                self._value(x, y, k)
            return
        assert isinstance(other, Operation)
        one, two = self.comparer.dissect(first.node), self.comparer.dissect(other.node)
        _must(one.form == two.form)
        for a, b in zip(one.operands, two.operands, strict=True):
            self._value(result_of(a), result_of(b), k)
        for (path, m), (_, n) in zip(one.numbers, two.numbers, strict=True):
            if isinstance(m, int) and isinstance(n, int):
                self.numbers.setdefault((first.node, path), [m]).append(n)
            else:
                _must(repr(m) == repr(n))

    def _value(self, a: NodeResult, b: NodeResult, k: int) -> None:
        """Value `b` of iteration k must be the counterpart of value `a` of iteration 0."""
        inside = self.position[0].get(a)
        if inside is not None:
            return _must(self.position[k].get(b) == inside)
        names = self.comparer.names
        before = self.position[k - 1].get(b)
        if before is not None:  # Iteration k - 1 made the value, and the one given to iteration 0 is carried.
            _must(isinstance(a, tuple) or a.name not in names.by_node)
            return _must(self.carried.setdefault(a, before) == before)
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and names.of(a) is not None and names.of(b) is not None:
            _must(self.comparer.kind(a) == self.comparer.kind(b))
            row = self.parameters.setdefault(a, [a])
            if len(row) == k:
                row.append(b)
            return _must(len(row) == k + 1 and row[k] is b)
        _must(a == b)
        self.kept[a] = None
        return None

    # --- what the loop needs ------------------------------------------------------------------------------------------

    def _private(self, ends: set[tuple[int, int]]) -> None:
        """Only carried values may leave an iteration, and only the loop may read what is carried into it."""
        nodes = [{n for s in r for n in s.nodes} for r in self.rounds]
        for v in self.carried:
            _must(v not in self.outputs and all(u in nodes[0] for u in users(v)))
        for k, made in enumerate(self.position):
            for v, at in made.items():
                if v not in self.outputs and all(u in nodes[k] for u in users(v)):
                    continue
                _must(at in ends)
                if k + 1 < len(self.rounds):
                    _must(v not in self.outputs and all(u in nodes[k] or u in nodes[k + 1] for u in users(v)))

    def _numbers(self) -> dict[fx.Node, Arguments]:
        """The arguments of iteration 0's nodes, with the numbers that differ in terms of `i`."""
        out: dict[fx.Node, Arguments] = {}
        for (node, path), row in self.numbers.items():
            if len(set(row)) > 1:
                said = progression(row, 0)
                _must(said is not None)
                text = Expr(str(said), TERNARY if " " in str(said) else ATOM)
                out[node] = replaced(out.get(node) or arguments_of(node), path, text)
        return out


def _indexed(names: ParameterNames, module: str, paths: list[str | None]) -> Expr:
    """`self.w[i]` for w.0, w.1, …; `getattr(self, f"w{i}")` for w0, w1, … The paths are relative to `module`."""
    said = [n for n in paths if n is not None]
    _must(len(said) == len(paths))
    if len(set(said)) == 1:
        return names.attribute(module, said[0])
    split = [re.split(r"(\d+)", n) for n in said]
    _must(len({len(s) for s in split}) == 1)
    varying = 0
    parts: list[str] = []
    for column in zip(*split, strict=True):
        if len(set(column)) == 1:
            parts.append(column[0])
            continue
        row = progression([int(c) for c in column], 0) if all(c.isdigit() for c in column) else None
        _must(row is not None)
        varying += 1
        parts.append("{" + str(row) + "}")
    _must(varying == 1)
    return names.attribute(module, said[0], "".join(parts).split("."))
