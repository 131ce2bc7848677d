"""Finds the claim that holds for a result: which rows of the model's value each rank has, and what must be summed.

Hints only say what to try first: the program's own claims, the operands' claims, and parts in the order of the ranks.
Every claim is compared element by element. Where no hint fits, the rows are read off the values themselves, which
random operands make distinct.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product

import torch
from torch import Tensor

from tpcompiler.check.claims import Claim, Geometry, Over, Rows, Runs
from tpcompiler.check.compare import close
from tpcompiler.check.shrink import Shrink
from tpcompiler.layout import join
from tpcompiler.runtime.runs import length, take_rows

_TRIES = 24


@dataclass(frozen=True)
class ShrunkShape:
    """A value's dimensions as they are in the model (`old`) and in the smaller run (`new`)."""

    old: tuple[int, ...]
    new: tuple[int, ...]
    shrink: Shrink

    def cut(self, d: int, runs: Runs) -> Runs:
        """Turns rows of the model's dimension into rows of the smaller one."""
        return runs if self.old[d] == self.new[d] else self.shrink.cuts[self.old[d]].shrink(runs)

    def grow(self, d: int, runs: Runs) -> Runs:
        return runs if self.old[d] == self.new[d] else self.shrink.cuts[self.old[d]].grow(runs)


def held(whole: Tensor, claim: Claim, rank: int, sizes: ShrunkShape) -> Tensor:
    """The part of a value that a rank holds according to a claim."""
    for d, rows in enumerate(claim.rows):
        if rows is not None:
            whole = take_rows(whole, d, sizes.cut(d, rows.runs[rank]))
    return whole


@dataclass(frozen=True)
class Draw:
    """One run of a step: the model's result, and each rank's."""

    whole: Tensor
    local: Sequence[Tensor]


def find_claim(
    geometry: Geometry, draws: Sequence[Draw], sizes: ShrunkShape, hints: Sequence[Iterable[Rows]], sums: Iterable[Over]
) -> Claim | None:
    """The first claim that holds in all runs; None if none does. `hints[d]` are the rows to try for dimension `d`."""
    first = draws[0]
    for over in sums:
        summed = first.local if not over else _sums(geometry, first.local, over)
        if summed is None:
            continue
        for rows in _candidates(geometry, first.whole, summed, sizes, hints):
            claim = Claim(rows, over)
            if not set(over) & set(geometry.moving(claim)) and all(_holds(geometry, claim, d, sizes) for d in draws):
                return claim
    return None


def _holds(geometry: Geometry, claim: Claim, draw: Draw, sizes: ShrunkShape) -> bool:
    """Whether a claim is true of the ranks' values in one run."""
    summed = draw.local if not claim.partial else _sums(geometry, draw.local, claim.partial)
    if summed is None:
        return False
    done: set[tuple[int, ...]] = set()
    for r in range(geometry.size):
        key = (id(summed[r]), *(id(rows.runs[r]) for rows in claim.rows if rows is not None))
        if key not in done and not close(summed[r], held(draw.whole, claim, r, sizes)):
            return False
        done.add(key)
    return True


def _sums(geometry: Geometry, local: Sequence[Tensor], over: Over) -> list[Tensor] | None:
    if not (local[0].is_floating_point() or local[0].is_complex()):
        return None
    out: list[Tensor | None] = [None] * geometry.size
    for group in geometry.groups(over):
        if any(local[r].shape != local[group[0]].shape for r in group):
            return None
        value = torch.stack([local[r] for r in group]).sum(0)
        for r in group:
            out[r] = value
    return out  # type: ignore[return-value]


def _candidates(
    geometry: Geometry, whole: Tensor, local: Sequence[Tensor], sizes: ShrunkShape, hints: Sequence[Iterable[Rows]]
) -> Iterator[tuple[Rows | None, ...]]:
    if any(t.dim() != whole.dim() for t in local):
        return
    options: list[list[Rows | None]] = []
    for d in range(whole.dim()):
        lengths = [t.shape[d] for t in local]
        if all(n == whole.shape[d] for n in lengths):
            options.append([None])
        else:
            options.append(list(_of_lengths(geometry, d, lengths, sizes, hints[d])))
    yield from islice(product(*options), _TRIES)
    found = _read_off(geometry, whole, local, sizes)
    if found is not None:
        yield found


def _of_lengths(
    geometry: Geometry, d: int, lengths: list[int], sizes: ShrunkShape, hints: Iterable[Rows]
) -> Iterator[Rows]:
    """Possible rows of a dimension such that each rank holds the given number of them."""
    seen: set[Rows] = set()
    for rows in (*hints, *_in_order(geometry, d, lengths, sizes)):
        if rows.size == sizes.old[d] and rows not in seen:
            seen.add(rows)
            try:
                fits = all(length(sizes.cut(d, runs)) == n for runs, n in zip(rows.runs, lengths, strict=True))
            except KeyError:  # the rows begin or end inside a piece that was shrunk
                continue
            if fits:
                yield rows


def _in_order(geometry: Geometry, d: int, lengths: list[int], sizes: ShrunkShape) -> Iterator[Rows]:
    """Rows that the ranks along some mesh dimensions hold one part after the other, in their order."""
    for over in geometry.subsets[1:]:
        runs: list[Runs | None] = [None] * geometry.size
        for group in geometry.groups(over):
            start = 0
            for r in group:
                runs[r] = ((start, start + lengths[r]),) if lengths[r] else ()
                start += lengths[r]
            if start != sizes.new[d]:
                break
        else:
            try:
                rows = geometry.rows(sizes.old[d], [sizes.grow(d, r) for r in runs if r is not None])
            except KeyError:
                continue
            if rows is not None:
                yield rows


def _read_off(
    geometry: Geometry, whole: Tensor, local: Sequence[Tensor], sizes: ShrunkShape
) -> tuple[Rows | None, ...] | None:
    """Finds rows by looking up each rank's elements among those of the whole value."""
    if not whole.is_floating_point() or whole.dim() == 0 or whole.numel() == 0:
        return None
    values, order = whole.reshape(-1).sort()
    found: list[list[Runs]] = [[] for _ in range(whole.dim())]
    known: dict[int, list[Runs] | None] = {}
    for t in local:
        if id(t) not in known:
            known[id(t)] = _rows_of(whole, values, order, t)
        mine = known[id(t)]
        if mine is None:
            return None
        for d, runs in enumerate(mine):
            found[d].append(runs)
    try:
        return tuple(geometry.rows(sizes.old[d], [sizes.grow(d, r) for r in runs]) for d, runs in enumerate(found))
    except KeyError:
        return None


def _rows_of(whole: Tensor, values: Tensor, order: Tensor, t: Tensor) -> list[Runs] | None:
    if t.dim() != whole.dim() or not t.is_floating_point():
        return None
    if t.numel() == 0:
        return [((0, whole.shape[d]),) if t.shape[d] == whole.shape[d] else () for d in range(t.dim())]
    out: list[Runs] = []
    for d in range(t.dim()):
        line = t[tuple(slice(None) if i == d else 0 for i in range(t.dim()))].contiguous()
        at = torch.searchsorted(values, line - 1e-9).clamp(max=len(values) - 1)
        if not torch.allclose(values[at], line, rtol=1e-7, atol=2e-9):
            return None
        flat = order[at]
        index = torch.stack(torch.unravel_index(flat, whole.shape))[d].tolist()
        if len(set(index)) < len(index):
            return None
        out.append(join(iter([(i, i + 1) for i in index])))
    return out
