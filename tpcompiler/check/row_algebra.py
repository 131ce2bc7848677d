"""Exact arithmetic with the rows of all ranks: products of dimensions, their factors, slices and concatenations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from tpcompiler.check.claims import Geometry, Rows, Runs
from tpcompiler.layout import join
from tpcompiler.runtime.runs import Run, intersect, length

_MOST = 1 << 17  # pieces; rows that consist of more are not taken apart


class UnknownRowsError(Exception):
    """Raised where rows have no form that this arithmetic knows."""


def runs_of(rows: Rows | None, size: int, rank: int) -> Runs:
    """A rank's rows of a dimension. None is the whole dimension."""
    return rows.runs[rank] if rows is not None else (((0, size),) if size else ())


def each(geometry: Geometry, size: int, make: Callable[[int], Runs], key: Callable[[int], object]) -> Rows | None:
    """Rows that `make` gives for each rank. Ranks of equal `key` have the same, so that it is asked once for them."""
    known: dict[object, Runs] = {}
    found: list[Runs] = []
    for r in range(geometry.size):
        k = key(r)
        if k not in known:
            known[k] = make(r)
        found.append(known[k])
    return geometry.rows(size, found)


def product(geometry: Geometry, parts: Sequence[tuple[Rows | None, int]]) -> Rows | None:
    """The rows of a dimension that is a product of others, major first, of which the ranks hold the given rows."""
    if all(r is None for r, _ in parts):
        return None
    if len(parts) == 1:
        return parts[0][0]

    def make(rank: int) -> Runs:
        made: Runs = ((0, 1),)
        width = 1
        for rows, n in reversed(parts):
            made = _times(runs_of(rows, n, rank), made, width)
            width *= n
        return made

    return each(geometry, prod(n for _, n in parts), make, lambda r: tuple(runs_of(p, n, r) for p, n in parts))


def _times(major: Runs, minor: Runs, width: int) -> Runs:
    if minor == ((0, width),):
        return tuple((a * width, b * width) for a, b in major)
    if length(major) * len(minor) > _MOST:
        raise UnknownRowsError("rows of very many pieces")
    return join((i * width + a, i * width + b) for lo, hi in major for i in range(lo, hi) for a, b in minor)


def factors(
    geometry: Geometry, rows: Rows | None, sizes: Sequence[int], hints: Sequence[Rows | None] | None = None
) -> list[Rows | None] | None:
    """Takes the rows of a product apart into the rows of its factors; None where they are no product of such rows.

    A rank without any row has no rows of one factor. Which one, `hints` decide where they fit.
    """
    if rows is None or len(sizes) == 1:
        return [rows] if len(sizes) == 1 else [None] * len(sizes)
    if (
        hints is not None
        and len(hints) == len(sizes)
        and product(geometry, list(zip(hints, sizes, strict=True))) is rows
    ):
        return list(hints)
    known: dict[Runs, list[Runs] | None] = {}
    for runs in set(rows.runs):
        known[runs] = _taken_apart(runs, sizes) if runs else []
        if known[runs] is None:
            return None
    whole = [((0, n),) for n in sizes]
    split = [i for i in range(len(sizes)) if any(f and f[i] != whole[i] for f in known.values())]
    empty = [() if i == (split[0] if split else 0) else whole[i] for i in range(len(sizes))]
    out: list[Rows | None] = []
    for i, n in enumerate(sizes):
        out.append(geometry.rows(n, [(known[runs] or empty)[i] for runs in rows.runs]))
    return out


def _taken_apart(runs: Runs, sizes: Sequence[int]) -> list[Runs] | None:
    out: list[Runs] = []
    for i in range(len(sizes) - 1):
        width = prod(sizes[i + 1 :])
        found = _divided(runs, width)
        if found is None:
            return None
        major, runs = found
        out.append(major)
    return [*out, runs]


def _divided(runs: Runs, width: int) -> tuple[Runs, Runs] | None:
    """(major, minor) rows whose product the runs are, the minor dimension having `width` elements."""
    if all(a % width == 0 and b % width == 0 for a, b in runs):
        return tuple((a // width, b // width) for a, b in runs), ((0, width),)
    blocks: list[tuple[int, list[tuple[int, int]]]] = []
    for a, b in runs:
        if b - a > 2 * width:
            return None  # it holds a whole block, and of others a part
        while a < b:
            i = a // width
            stop = min(b, (i + 1) * width)
            piece = (a - i * width, stop - i * width)
            if blocks and blocks[-1][0] == i:
                blocks[-1][1].append(piece)
            else:
                blocks.append((i, [piece]))
            if len(blocks) > _MOST:
                return None
            a = stop
    if any(pieces != blocks[0][1] for _, pieces in blocks):
        return None
    return join((i, i + 1) for i, _ in blocks), tuple(blocks[0][1])


def sliced(geometry: Geometry, rows: Rows | None, size: int, start: int, stop: int) -> Rows | None:
    """The rows of the slice `start` … `stop - 1` of a dimension that each rank has."""
    if rows is None:
        return None
    made = {runs: _shifted(intersect(runs, ((start, stop),)), -start) for runs in set(rows.runs)}
    return geometry.rows(stop - start, [made[runs] for runs in rows.runs])


def before(rows: Rows, rank: int, at: int) -> int:
    """How many of a rank's rows lie before row `at`."""
    return sum(min(b, at) - a for a, b in rows.runs[rank] if a < at)


def joined(geometry: Geometry, parts: Sequence[tuple[Rows | None, int]]) -> Rows | None:
    """The rows of a concatenation of dimensions, of which the ranks hold the given rows."""
    if all(r is None for r, _ in parts):
        return None

    def make(rank: int) -> Runs:
        at = 0
        out: list[Run] = []
        for rows, n in parts:
            out += _shifted(runs_of(rows, n, rank), at)
            at += n
        return join(out)

    return each(geometry, sum(n for _, n in parts), make, lambda r: tuple(runs_of(p, n, r) for p, n in parts))


def _shifted(runs: Runs, by: int) -> Runs:
    return tuple((a + by, b + by) for a, b in runs)


def lengths(rows: Rows) -> list[int]:
    """How many rows each rank holds."""
    known = {runs: length(runs) for runs in set(rows.runs)}
    return [known[runs] for runs in rows.runs]
