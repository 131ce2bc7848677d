"""Unification of tensor dimensions: which dimensions are one axis, and which axes a dimension is made of.

A *term* is an integer handle for an unknown of a fixed size. Unification joins terms (union-find) and takes them apart:
a term may be bound to an ordered product or to a concatenation of other terms. A term that is taken apart in one place
is taken apart everywhere. When two terms cannot be reconciled, both are marked whole with the reason and never split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

PRODUCT, CONCAT = "product", "concat"
_PIECES = 64  # a shift may not take a term apart into more pieces than this


@dataclass(frozen=True)
class Mark:
    """The node and the reason why an axis must stay whole."""

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.why} (at {self.node})"


@dataclass(frozen=True)
class Binding:
    """What a term is made of."""

    kind: str  # PRODUCT or CONCAT
    parts: tuple[int, ...]


class Terms:
    """The store of terms. Only inference changes it."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._size: list[int] = []
        self._bound: dict[int, Binding] = {}
        self._marks: dict[int, dict[Mark, None]] = {}

    # -- reading ----------------------------------------------------------------------------------------------------

    def find(self, t: int) -> int:
        while self._parent[t] != t:
            self._parent[t] = self._parent[self._parent[t]]
            t = self._parent[t]
        return t

    def size(self, t: int) -> int:
        return self._size[t]

    def binding(self, t: int) -> Binding | None:
        return self._bound.get(self.find(t))

    def leaves(self, t: int) -> Iterator[int]:
        """The axes that a term is made of, major first. An axis that stands in several segments comes once for each."""
        root = self.find(t)
        bound = self._bound.get(root)
        if bound is None:
            yield root
            return
        for p in bound.parts:
            yield from self.leaves(p)

    def leaf_marks(self) -> dict[int, tuple[Mark, ...]]:
        """The marks of every axis: its own, and those of the terms that it is a part of."""
        out: dict[int, dict[Mark, None]] = {}
        for root, marks in self._marks.items():
            for leaf in self.leaves(root):
                out.setdefault(leaf, {}).update(marks)
        return {leaf: tuple(marks) for leaf, marks in out.items()}

    # -- writing ----------------------------------------------------------------------------------------------------

    def new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._size.append(size)
        return len(self._parent) - 1

    def mark(self, t: int, mark: Mark) -> None:
        self._marks.setdefault(self.find(t), {})[mark] = None

    def product(self, parts: Iterable[int], node: str) -> int:
        return self._build(PRODUCT, [p for p in parts if self._size[p] != 1], node)

    def concat(self, parts: Iterable[int], node: str) -> int:
        return self._build(CONCAT, [p for p in parts if self._size[p] != 0], node)

    def _build(self, kind: str, parts: list[int], node: str) -> int:
        if len(parts) == 1:
            return parts[0]
        t = self.new(prod(map(self.size, parts)) if kind == PRODUCT else sum(map(self.size, parts)))
        if parts:
            self._bind(t, Binding(kind, tuple(parts)), node)
        return t

    def unify(self, a: int, b: int, node: str) -> None:
        """Makes two terms of equal size one. Rules compare the sizes beforehand."""
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        assert self._size[a] == self._size[b], f"{node}: sizes {self._size[a]} and {self._size[b]}"
        binding = self._bound.pop(b, None)
        self._parent[b] = a
        for mark in self._marks.pop(b, {}):
            self.mark(a, mark)
        if binding is not None:
            self._bind(a, binding, node)

    def _bind(self, t: int, binding: Binding, node: str) -> None:
        t = self.find(t)
        mine = self._bound.get(t)
        if mine is None:
            self._bound[t] = binding
        elif mine.kind == binding.kind == PRODUCT:
            self._refine(PRODUCT, list(mine.parts), list(binding.parts), node)
        elif mine.kind == binding.kind == CONCAT:
            self._refine(CONCAT, list(mine.parts), list(binding.parts), node)
        else:
            segments, factors = (mine, binding) if mine.kind == CONCAT else (binding, mine)
            self._distribute(list(segments.parts), list(factors.parts), node)

    def _refine(self, kind: str, left: list[int], right: list[int], node: str) -> None:
        """Unifies two ways to take one term apart, piece by piece and major first, at their common refinement."""
        left.reverse()
        right.reverse()
        while left and right:
            a, b = self.find(left.pop()), self.find(right.pop())
            if self._size[a] == self._size[b]:
                self.unify(a, b, node)
                continue
            if self._size[a] < self._size[b]:
                a, b, left, right = b, a, right, left
            # a is longer: b becomes its first part
            bound = self._bound.get(a)
            if bound is not None and bound.kind == kind:
                left.extend(reversed(bound.parts))
                right.append(b)
                continue
            rest = self._size[a] // self._size[b] if kind == PRODUCT else self._size[a] - self._size[b]
            if kind == PRODUCT and self._size[a] % self._size[b]:
                self._give_up([a, b, *left, *right], node, "factors do not line up")
                return
            if kind == CONCAT and self._shifted(a, self._size[b], right):
                self._give_up([a, b, *left, *right], node, "it is laid over a shift of itself")
                return
            tail = self.new(rest)
            self._bind(a, Binding(kind, (b, tail)), node)
            left.append(tail)

    def _shifted(self, a: int, at: int, rest: list[int]) -> bool:
        """Whether term `a` is laid over a shift of itself, as by `(a | x)` and `(b | a)` with a short b.

        Unification would then take `a` apart into pieces as long as the shift, which never ends for a long sequence.
        `at` is the shift, and `rest` is what follows on the other side.
        """
        todo = list(rest)
        while todo and at * _PIECES < self._size[a]:
            t = self.find(todo.pop())
            bound = self._bound.get(t)
            if bound is not None and bound.kind == CONCAT:
                todo.extend(reversed(bound.parts))
            elif t == a:
                return True
            else:
                at += self._size[t]
        return False

    def _distribute(self, segments: list[int], factors: list[int], node: str) -> None:
        """Unifies `(s1 | s2 | …)` with `(f · m)`: every segment is `(s/m · m)`, and f is `(s1/m | s2/m | …)`."""
        minor = self._size[factors[-1]]
        if any(self._size[s] % minor for s in segments):
            self._give_up([*segments, *factors], node, "segments cut through a factor")
            return
        heads = [self.new(self._size[s] // minor) for s in segments]
        for s, head in zip(segments, heads, strict=True):
            inner = [t for t in (head, factors[-1]) if self._size[t] != 1]
            if len(inner) == 1:
                self.unify(s, inner[0], node)
            elif inner:
                self._bind(s, Binding(PRODUCT, tuple(inner)), node)
        major = self.product(factors[:-1], node)
        self.unify(major, self.concat(heads, node), node)

    def _give_up(self, terms: list[int], node: str, why: str) -> None:
        for t in terms:
            self.mark(t, Mark(node, why))
