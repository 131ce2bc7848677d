"""Writes repeated statements as a loop, for models that keep their layers' parameters in lists or number them, and for
calls of layers with other statements between them.

A repeat is found by the period in which kinds of statements recur, and then proved (`loop_proof`).
"""

from __future__ import annotations

from collections.abc import Hashable

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.loop_proof import Loop, LoopEnd, prove
from tpcompiler.emit.layers.statements import Operation, Statement
from tpcompiler.emit.ops.nodes import NodeResult

_LONGEST = 200  # the most statements in an iteration
_SAVED = 6  # the fewest statements that a loop must save
_TRIED = 8  # the number of candidates that are tried

# The statements of a loop's first iteration stand between a Loop and its LoopEnd.
BodyPart = Statement | Loop | LoopEnd


def with_loops(found: list[Statement], body: Frame, comparer: Comparer, outputs: list[NodeResult]) -> list[BodyPart]:
    """The statements with their longest repeats as loops."""
    kinds = [_kind(s, comparer) for s in found]
    for start, period, covered in _candidates(kinds):
        best = _best(found[start : start + covered], period, body, comparer, outputs)
        if best is not None:
            shift, loop = best
            at, end = start + shift, start + shift + period * loop.count
            first = [Operation(s.node, None) if isinstance(s, Operation) else s for s in found[at : at + period]]
            before = with_loops(found[:at], body, comparer, outputs)
            return [*before, loop, *first, LoopEnd(loop), *with_loops(found[end:], body, comparer, outputs)]
    return list(found)


def _kind(s: Statement, comparer: Comparer) -> Hashable:
    if isinstance(s, Operation):
        return s.node.target, comparer.kind(s.node)
    return s.made, len(s.frames)


def _candidates(kinds: list[Hashable]) -> list[tuple[int, int, int]]:
    """(start, period, statements covered) of the repeats among the kinds, those that save most first."""
    ids = {k: i for i, k in enumerate(dict.fromkeys(kinds))}
    row = [ids[k] for k in kinds]
    out = []
    for period in range(1, min(_LONGEST, len(row) // 2) + 1):
        i = 0
        while i + period < len(row):
            j = i
            while j + period < len(row) and row[j] == row[j + period]:
                j += 1
            if j - i >= max(period, _SAVED):
                out.append((i, period, j - i + period))
            i = max(j, i) + 1
    return sorted(out, key=lambda c: (c[1] - c[2], c[1], c[0]))[:_TRIED]


def _best(
    found: list[Statement], period: int, body: Frame, comparer: Comparer, outputs: list[NodeResult]
) -> tuple[int, Loop] | None:
    """The start of the loop that carries the fewest values, and the loop itself.

    The start is tried at every statement of the first two periods, for the first iteration may differ in what it reads.
    """
    best: tuple[int, Loop] | None = None
    for shift in range(min(2 * period, len(found))):
        most = (len(found) - shift) // period
        for n in (most, most - 1):
            if n < 2 or (n - 1) * period < _SAVED:
                continue
            rounds = [found[shift + k * period : shift + (k + 1) * period] for k in range(n)]
            loop = prove(rounds, body, comparer, outputs)
            if loop is not None:
                if best is None or len(loop.carried) < len(best[1].carried):
                    best = shift, loop
                break
        if best is not None and len(best[1].carried) <= 1:
            break
    return best
