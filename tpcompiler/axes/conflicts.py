"""Conflicts: an axis that stands twice in one tensor cannot be split there."""

from __future__ import annotations

from collections.abc import Iterable

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.axes.map import Dims


def mark_conflicts(terms: Terms, seen: Iterable[tuple[Dims, str]]) -> None:
    """`seen`: the dimensions of every tensor, as it stands and as ops see it, and a node that has it."""
    for dims, name in sorted(set(seen), key=lambda x: x[1]):
        for leaf in _twice(terms, dims):
            terms.mark(leaf, Mark(name, "stands twice in one tensor"))


def _twice(terms: Terms, dims: Dims) -> set[int]:
    """Axes that stand in two factors of one tensor. Several segments of one concatenation are no conflict."""

    def of(t: int) -> tuple[set[int], set[int]]:
        bound = terms.binding(t)
        if bound is None:
            return {terms.find(t)}, set()
        parts = [of(p) for p in bound.parts]
        bad = set().union(*(b for _, b in parts))
        if bound.kind == "product":
            bad |= _repeated([s for s, _ in parts])
        return set().union(*(s for s, _ in parts)), bad

    parts = [of(t) for t in dims if t is not None]
    return set().union(*(b for _, b in parts), _repeated([s for s, _ in parts])) if parts else set()


def _repeated(sets: list[set[int]]) -> set[int]:
    seen: set[int] = set()
    out: set[int] = set()
    for s in sets:
        out |= seen & s
        seen |= s
    return out
