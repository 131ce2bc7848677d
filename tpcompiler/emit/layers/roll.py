"""Repeats in a straight run of steps become a loop: for models that keep their layers' parameters in lists, or by
number, and for calls of layers with something between them.

A repeat is found by its period in the steps' kinds, then proved: iteration k must be iteration 0 with every value of an
iteration replaced by its counterpart, what comes in either the same in all iterations or made by the one before, and
parameters and numbers in a row that `i` tells.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tpcompiler.emit.layers.frames import Comparer, Frame, nameless
from tpcompiler.emit.layers.outline import count
from tpcompiler.emit.layers.steps import Apply, Op, Step, users
from tpcompiler.emit.names.fields import attribute
from tpcompiler.emit.names.names import Value, value
from tpcompiler.emit.names.symbols import is_size, key
from tpcompiler.emit.text.expr import ATOM, TERNARY, Expr
from tpcompiler.emit.write.constructor import progression
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Training

LONGEST = 200  # steps in an iteration
_SAVES = 6  # a loop must save as many steps

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(eq=False)
class Repeat:
    """`for i in range(count):` over the steps of iteration 0, which stand between this and its `RepeatEnd`."""

    count: int
    carried: list[tuple[Value, Value, Value]]  # what comes into iteration 0, what that makes of it, the last one's
    kept: list[Value]  # values from before the loop that every iteration reads
    indexed: dict[fx.Node, Expr]  # parameters: `self.w[i]`
    numbers: dict[fx.Node, Arguments]  # nodes with numbers in terms of i
    callees: dict[int, Expr]  # id of a call's frame → `self.norms[i]`


@dataclass(frozen=True, eq=False)
class RepeatEnd:
    start: Repeat


AnyStep = Step | Repeat | RepeatEnd


def roll(steps: list[Step], body: Frame, comparer: Comparer, outputs: list[Value]) -> list[AnyStep]:
    """The steps with their longest repeats as loops."""
    kinds = [_kind(s, comparer) for s in steps]
    found = _candidates(kinds)
    for start, period, covered in found:
        repeat = _best(steps, start, period, covered, body, comparer, outputs)
        if repeat is not None:
            at, n, loop = repeat
            before = roll(steps[:at], body, comparer, outputs)
            after = roll(steps[at + period * n :], body, comparer, outputs)
            inside = [Op(s.node, None) if isinstance(s, Op) else s for s in steps[at : at + period]]
            return [*before, loop, *inside, RepeatEnd(loop), *after]
    return list(steps)


def _kind(step: Step, comparer: Comparer) -> Hashable:
    if isinstance(step, Apply):
        return id(step.layer), len(step.frames)
    return step.node.target, comparer.kind(step.node)


def _candidates(kinds: list[Hashable]) -> list[tuple[int, int, int]]:
    """(start, period, steps covered) of the repeats among the kinds, those that save most first."""
    ids = {k: i for i, k in enumerate(dict.fromkeys(kinds))}
    row = [ids[k] for k in kinds]
    out = []
    for period in range(1, min(LONGEST, len(row) // 2) + 1):
        i = 0
        while i + period < len(row):
            j = i
            while j + period < len(row) and row[j] == row[j + period]:
                j += 1
            if j - i >= max(period, _SAVES):
                out.append((i, period, j - i + period))
            i = max(j, i) + 1
    return sorted(out, key=lambda c: (c[1] - c[2], c[1], c[0]))[:8]


def _best(
    steps: list[Step], start: int, period: int, covered: int, body: Frame, comparer: Comparer, outputs: list[Value]
) -> tuple[int, int, Repeat] | None:
    """The proved repeat that carries least among the rotations of a candidate: (start, iterations, loop)."""
    best: tuple[int, int, Repeat] | None = None
    for shift in range(min(2 * period, covered)):  # the first iteration may have come in otherwise
        most = (covered - shift) // period
        for n in (most, most - 1):
            if n < 2 or (n - 1) * period < _SAVES:
                continue
            at = start + shift
            rounds = [steps[at + k * period : at + (k + 1) * period] for k in range(n)]
            loop = _Proof(rounds, body, comparer, outputs).loop()
            if loop is not None:
                if best is None or len(loop.carried) < len(best[2].carried):
                    best = start + shift, n, loop
                break
        if best is not None and len(best[2].carried) <= 1:
            break
    return best


class _Different(Exception):
    """Two iterations are not alike."""


@dataclass
class _Varying:
    """An argument that differs by iteration: a parameter, or a number at a path of a node's arguments."""

    first: Any
    rest: list[Any] = field(default_factory=list)


class _Proof:
    """That the iterations in `rounds` are alike; `loop` is what follows."""

    def __init__(self, rounds: list[list[Step]], body: Frame, comparer: Comparer, outputs: list[Value]) -> None:
        self.rounds = rounds
        self.body, self.comparer, self.outputs = body, comparer, outputs
        self.place = [{v: (j, o) for j, s in enumerate(r) for o, v in enumerate(made(s))} for r in self.rounds]
        self.owner = {n for r in self.rounds for s in r for n in _nodes(s)}
        self.parameters: dict[fx.Node, _Varying] = {}
        self.numbers: dict[tuple[int, tuple[Any, ...]], _Varying] = {}
        self.callees: dict[int, _Varying] = {}
        self.carried: dict[Value, tuple[int, int]] = {}
        self.kept: dict[Value, None] = {}

    def loop(self) -> Repeat | None:
        try:
            for k in range(1, len(self.rounds)):
                for j, (first, other) in enumerate(zip(self.rounds[0], self.rounds[k], strict=True)):
                    self._step(j, first, other, k)
            return self._repeat()
        except _Different:
            return None

    # --- iteration k is iteration 0 -----------------------------------------------------------------------------------

    def _step(self, j: int, first: Step, other: Step, k: int) -> None:
        if isinstance(first, Apply):
            assert isinstance(other, Apply)
            _must(len(first.frames) == 1 and not any(n.by_call for n in first.layer.numbers))
            self.callees.setdefault(j, _Varying(first.frames[0].name)).rest.append(other.frames[0].name)
            for x, y in zip(first.inputs(), other.inputs(), strict=True):
                self._value(x, y, k)
            return
        assert isinstance(first, Op) and isinstance(other, Op)
        _must(len(first.node.args) == len(other.node.args) and first.node.kwargs.keys() == other.node.kwargs.keys())
        for i, (a, b) in enumerate(zip(first.node.args, other.node.args, strict=True)):
            self._argument(a, b, k, (j, (i,)))
        for name in first.node.kwargs:
            self._argument(first.node.kwargs[name], other.node.kwargs[name], k, (j, (name,)))

    def _argument(self, a: Any, b: Any, k: int, at: tuple[int, tuple[Any, ...]]) -> None:
        _must(type(a) is type(b))
        if isinstance(a, fx.Node):
            if is_size(a) or is_size(b):
                _must(is_size(a) and is_size(b) and key(a.meta["val"]) == key(b.meta["val"]))
            else:
                self._value(value(a), value(b), k)
        elif isinstance(a, (list, tuple)):
            _must(len(a) == len(b))
            for i, (x, y) in enumerate(zip(a, b, strict=True)):
                self._argument(x, y, k, (at[0], (*at[1], i)))
        elif isinstance(a, int) and not isinstance(a, bool):
            self.numbers.setdefault(at, _Varying(a)).rest.append(b)
        elif isinstance(a, (LocalSize, LocalRuns)):
            _must(nameless(a.dim) == nameless(b.dim))
        elif isinstance(a, Training):
            _must((repr(a.on), repr(a.off)) == (repr(b.on), repr(b.off)))
        else:
            _must(repr(a) == repr(b))

    def _value(self, a: Value, b: Value, k: int) -> None:
        inside = self.place[0].get(a)
        if inside is not None:
            return _must(self.place[k].get(b) == inside)
        before = self.place[k - 1].get(b)
        if before is not None:  # made by the iteration before: what came into the first is carried
            _must(isinstance(a, tuple) or a.name not in self.comparer.names.by_node)
            return _must(self.carried.setdefault(a, before) == before)
        if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a.op == b.op == "placeholder":
            own = self.comparer.names.by_node
            if a.name in own and b.name in own:
                _must(self.comparer.kind(a) == self.comparer.kind(b))
                row = self.parameters.setdefault(a, _Varying(a))
                if len(row.rest) == k - 1:
                    row.rest.append(b)
                return _must(len(row.rest) == k and row.rest[k - 1] is b)
        _must(a == b)
        self.kept[a] = None
        return None

    # --- the loop -----------------------------------------------------------------------------------------------------

    def _repeat(self) -> Repeat:
        _must(not (self.carried.keys() & self.kept.keys()) and bool(self.carried))
        ends = set(self.carried.values())
        _must(len(ends) == len(self.carried))
        names = self.comparer.names
        indexed = {}
        for node, row in self.parameters.items():
            if any(n is not node for n in row.rest):
                said = [names.inside(n, self.body.name) for n in (node, *row.rest)]
                indexed[node] = _indexed(said)
        callees = {}
        lead = len(self.body.name) + 1 if self.body.name else 0
        for j, row in self.callees.items():
            step = self.rounds[0][j]
            assert isinstance(step, Apply)
            callees[id(step.frames[0])] = _indexed([n[lead:] for n in (row.first, *row.rest)])
        self._private(ends)
        at = {place: v for v, place in self.place[0].items()}
        final = {place: v for v, place in self.place[-1].items()}
        carried = [(v, at[place], final[place]) for v, place in self.carried.items()]
        return Repeat(len(self.rounds), carried, list(self.kept), indexed, self._rows(), callees)

    def _private(self, ends: set[tuple[int, int]]) -> None:
        """Nothing but the carried values leaves an iteration, and what is carried in has no other use."""
        for v in self.carried:
            first = {n for s in self.rounds[0] for n in _nodes(s)}
            _must(v not in self.outputs and all(u in first for u in users(v)))
        for k, found in enumerate(self.place):
            mine = {n for s in self.rounds[k] for n in _nodes(s)}
            following = {n for s in self.rounds[k + 1] for n in _nodes(s)} if k + 1 < len(self.rounds) else None
            for v, place in found.items():
                out = v in self.outputs or any(u not in mine for u in users(v))
                if not out:
                    continue
                _must(place in ends)
                if following is not None:
                    _must(v not in self.outputs and all(u in mine or u in following for u in users(v)))

    def _rows(self) -> dict[fx.Node, Arguments]:
        """Iteration 0's nodes with the numbers that differ said in terms of i."""
        out: dict[fx.Node, Arguments] = {}
        for (j, path), row in self.numbers.items():
            if all(n == row.first for n in row.rest):
                continue
            said = progression([row.first, *row.rest], 0)
            _must(said is not None)
            step = self.rounds[0][j]
            assert isinstance(step, Op)
            args, kwargs = out.get(step.node, (tuple(step.node.args), dict(step.node.kwargs)))
            text = Expr(str(said), TERNARY if " " in str(said) else ATOM)
            if isinstance(path[0], int):
                args = put(args, path, text)
            else:
                kwargs = {**kwargs, path[0]: put(kwargs[path[0]], path[1:], text)}
            out[step.node] = (args, kwargs)
        return out


def made(step: Step) -> list[Value]:
    """The values that a step makes."""
    if isinstance(step, Apply):
        return step.outputs()
    several = count(step.node)
    return [step.node] if several is None else [(step.node, i) for i in range(several)]


def _nodes(step: Step) -> list[fx.Node]:
    return [step.node] if isinstance(step, Op) else [n for f in step.frames for n in f.nodes]


def _must(holds: bool) -> None:
    if not holds:
        raise _Different


def _indexed(names: list[str | None]) -> Expr:
    """`self.w[i]` for w.0, w.1, …; `getattr(self, f"w{i}")` for w0, w1, …"""
    _must(None not in names)
    said = [n for n in names if n is not None]
    if len(set(said)) == 1:
        return attribute("self", said[0])
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
    text = "self"
    for pending in re.split(r"\.(?![^{]*\})", "".join(parts)):
        whole = re.fullmatch(r"\{(.+)\}", pending)
        if whole:
            text += f"[{whole[1]}]"
        elif "{" in pending:
            text = f'getattr({text}, f"{pending}")'
        else:
            text = attribute(text, pending).text
    return Expr(text)


def put(container: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The nested tuples, lists or slice with the item at `path` replaced."""
    if not path:
        return new
    if isinstance(container, slice):
        parts = [container.start, container.stop, container.step]
        parts[path[0]] = new
        return slice(*parts)
    items = list(container)
    items[path[0]] = put(items[path[0]], path[1:], new)
    return tuple(items) if isinstance(container, tuple) else items
