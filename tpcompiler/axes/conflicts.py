"""Finds axes that stand in different factors of one tensor. Such axes cannot both be split over the same ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.axes.map import Dims

Pairs = frozenset[tuple[int, int]]


def find_conflicts(terms: Terms, seen: Iterable[tuple[Dims, str]]) -> tuple[Pairs, Pairs]:
    """The pairs of axes that stand in different factors of one tensor (smaller first), and the pairs (major, minor) of
    neighbours in a product. Segments of one concatenation do not conflict. Marks an axis that stands twice in one
    tensor.

    `seen` holds the dimensions of every tensor, as it is and as ops see it, each with a node that has such a tensor.
    """
    walk = _Walk(terms)
    for dims, name in sorted(set(seen), key=lambda x: x[1]):
        for leaf in walk.tensor(dims):
            terms.mark(leaf, Mark(name, "stands twice in one tensor"))
    return frozenset(walk.conflicts), frozenset(walk.products)


class _Walk:
    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.conflicts: set[tuple[int, int]] = set()
        self.products: set[tuple[int, int]] = set()
        self._tensors: dict[Dims, set[int]] = {}
        self._terms: dict[int, tuple[frozenset[int], set[int]]] = {}

    def tensor(self, dims: Dims) -> set[int]:
        """The axes that stand twice in a tensor. Records the conflicts within it."""
        if dims not in self._tensors:
            parts = [self.term(t) for t in dims if t is not None]
            self._tensors[dims] = set().union(*(b for _, b in parts), self.cross([a for a, _ in parts]))
        return self._tensors[dims]

    def term(self, t: int) -> tuple[frozenset[int], set[int]]:
        """The axes of a term, and those that stand twice in it. Records conflicts and neighbours within the term."""
        root = self.terms.find(t)
        if root not in self._terms:
            bound = self.terms.binding(root)
            if bound is None:
                return frozenset({root}), set()
            parts = [self.term(p) for p in bound.parts]
            twice: set[int] = set().union(*(b for _, b in parts))
            if bound.kind == "product":
                twice |= self.cross([a for a, _ in parts])
                self.products.update((x, y) for (a, _), (b, _) in pairwise(parts) for x in a for y in b)
            self._terms[root] = frozenset().union(*(a for a, _ in parts)), twice
        return self._terms[root]

    def cross(self, sets: Sequence[frozenset[int]]) -> set[int]:
        """Records pairs of axes from different sets, and returns the axes that stand in two sets."""
        pairs = {(min(x, y), max(x, y)) for a, b in combinations(sets, 2) for x in a for y in b}
        self.conflicts |= pairs
        return {x for x, y in pairs if x == y}
