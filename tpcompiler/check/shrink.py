"""Finds smaller sizes at which a step can be run without losing how the ranks' rows lie.

Most steps run at their own sizes. Only large operands (weights) are made smaller: a dimension is cut into pieces
wherever any rank's rows begin or end, and each piece becomes a few rows. Pieces of equal length stay equal.
Which dimensions must shrink together is found by trial: the operation must accept the new shapes, and every dimension
of its result must have its old size or the same smaller size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from math import prod

from torch import Tensor

from tpcompiler.check.calls import outputs
from tpcompiler.check.claims import Rows, Runs
from tpcompiler.check.cones import Cone, TensorInfo

LARGE = 1 << 16  # elements; an operand with more is made smaller
HUGE = 1 << 26  # elements; a step whose operands have more in all is not run
LONG = 64  # rows; a longer dimension is made shorter
_WIDTHS = (5, 7, 11, 13, 17, 19, 23, 29)


@dataclass(frozen=True)
class Cut:
    """How the pieces of a dimension shrink."""

    old: tuple[int, ...]  # where each piece begins, and where the last one ends
    new: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.new[-1]

    def shrink(self, runs: Runs) -> Runs:
        """Turns runs of old rows into runs of new rows. Raises KeyError for a run that ends inside a piece."""
        at = dict(zip(self.old, self.new, strict=True))
        return tuple((at[a], at[b]) for a, b in runs)

    def grow(self, runs: Runs) -> Runs:
        """The inverse of `shrink`."""
        at = dict(zip(self.new, self.old, strict=True))
        return tuple((at[a], at[b]) for a, b in runs)


@dataclass(frozen=True)
class Shrink:
    """New sizes for some dimensions of some operands."""

    cuts: dict[int, Cut] = field(default_factory=dict)  # for each old size
    places: frozenset[tuple[int, int]] = frozenset()  # which (operand, dimension) shrink
    in_arguments: bool = False  # whether integers among the arguments change as well

    def shape(self, i: int, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.cuts[n].size if (i, d) in self.places else n for d, n in enumerate(shape))

    def operands(self, given: Sequence[TensorInfo]) -> list[TensorInfo]:
        return [TensorInfo(self.shape(i, o.shape), o.dtype, o.grad) for i, o in enumerate(given)]

    @property
    def arguments(self) -> dict[int, int]:
        return {n: cut.size for n, cut in self.cuts.items()} if self.in_arguments else {}


def shrinks(cones: Sequence[Cone], given: Sequence[TensorInfo], rows: Iterable[Rows]) -> Iterator[Shrink]:
    """Ways to shrink operands that all cones accept, smallest first. The last leaves the operands as they are."""
    none = Shrink()
    if max((prod(o.shape) for o in given), default=0) > LARGE:
        marks: dict[int, set[int]] = {}
        for r in rows:
            marks.setdefault(r.size, set()).update(i for runs in r.runs for run in runs for i in run)
        before = [_shapes(c, given) for c in cones]
        for in_arguments in (False, True):
            found = _search(cones, given, before, marks, in_arguments)
            if found.places:
                yield found
    if sum(prod(o.shape) for o in given) <= HUGE:
        yield none


def _shapes(cone: Cone, given: Sequence[TensorInfo]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in outputs(cone.outline(given)) if isinstance(t, Tensor)]


def _search(
    cones: Sequence[Cone],
    given: Sequence[TensorInfo],
    before: list[list[tuple[int, ...]]],
    marks: dict[int, set[int]],
    in_arguments: bool,
) -> Shrink:
    best = Shrink(in_arguments=in_arguments)
    sizes = sorted({n for o in given for n in o.shape if n > LONG}, reverse=True)
    widths = iter(_WIDTHS)
    for n in sizes:
        cut = _cut(n, marks.get(n, set()), next(widths, 31))
        places = [(i, d) for i, o in enumerate(given) for d, m in enumerate(o.shape) if m == n]
        if cut.size >= n or len(places) > 12:
            continue
        for chosen in _subsets(places):
            tried = Shrink({**best.cuts, n: cut}, best.places | set(chosen), in_arguments)
            if _fits(cones, given, before, tried):
                best = tried
                break
    return best


def _subsets(places: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Sets of places to try: all of them, and smaller ones where the places are few."""
    for k in range(len(places), 0, -1):
        if k == len(places) or len(places) <= 5:
            yield from combinations(places, k)


def _cut(n: int, marks: set[int], width: int) -> Cut:
    old = sorted({0, n} | {m for m in marks if 0 < m < n})
    lengths = [b - a for a, b in pairwise(old)]
    if len(lengths) == 1:
        return Cut((0, n), (0, min(width, n)))
    order = {length: min(length, i + 2) for i, length in enumerate(sorted(set(lengths)))}
    new = [0]
    for length in lengths:
        new.append(new[-1] + order[length])
    return Cut(tuple(old), tuple(new))


def _fits(
    cones: Sequence[Cone], given: Sequence[TensorInfo], before: list[list[tuple[int, ...]]], tried: Shrink
) -> bool:
    operands = tried.operands(given)
    for cone, old in zip(cones, before, strict=True):
        try:
            new = _shapes(cone.substituted(tried.arguments) if tried.in_arguments else cone, operands)
        except Exception:  # the operation does not take these sizes
            return False
        if len(new) != len(old):
            return False
        for a, b in zip(old, new, strict=True):
            if len(a) != len(b):
                return False
            if any(m != n and (n not in tried.cuts or m != tried.cuts[n].size) for n, m in zip(a, b, strict=True)):
                return False
    return True
