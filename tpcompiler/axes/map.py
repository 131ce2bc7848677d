"""The result of inference: every live value's dimensions as terms, and what each op says about them."""

from __future__ import annotations

from dataclasses import dataclass

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.ops.record import OpRule
from tpcompiler.ops.views import Shape

Dims = tuple[int | None, ...]  # a term per dimension; None = one element, nothing to split
_SHOWN = 4  # dimensions of an axis that are printed


@dataclass(frozen=True)
class Operand:
    node: str
    dims: Dims | None  # as the op sees them; None: the op does not read the values
    live: bool


@dataclass(frozen=True)
class Relation:
    """A rule applied to a node: what the op says about its operands and results."""

    rule: OpRule
    pattern: str
    operands: tuple[Operand, ...]
    results: tuple[Dims, ...]
    contracted: tuple[int, ...]
    special: tuple[int, ...]
    sizes: tuple[tuple[str, int | None, int], ...] = ()  # argument, place in it when it is a list, the term of its size


@dataclass(frozen=True)
class AxisMap:
    """What every live value's dimensions are made of. The axes are the terms that are not taken apart (`leaves`)."""

    terms: Terms
    values: dict[str, tuple[Dims, ...]]  # node → a tuple of dims per result
    relations: dict[str, Relation]
    sizes: dict[str, tuple[Shape, ...]]  # node → shapes, symbolic sizes at distinct primes
    live: frozenset[str]
    grads: frozenset[str]  # nodes whose value needs a gradient
    dynamic: dict[int, str]  # sizes that stand for a batch, a sequence, or a product of such
    marks: dict[int, tuple[Mark, ...]]  # axis → why it must stay whole
    conflicts: frozenset[tuple[int, int]]  # pairs that stand in different factors of one tensor, smaller first
    products: frozenset[tuple[int, int]]  # (major, minor) neighbours in a product
    copied: dict[str, tuple[int, ...]]  # node that merges copies into a dimension → its term
    cut: frozenset[str]  # the nodes of `copied` that every rank runs whole before it takes its slice of the result

    def leaves(self, term: int | None) -> tuple[int, ...]:
        return () if term is None else tuple(dict.fromkeys(self.terms.leaves(term)))

    def axes_of(self, dims: Dims) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf for t in dims for leaf in self.leaves(t)))

    def __str__(self) -> str:
        """A line for each axis: its number, its size, the dimensions that it is, and why it must stay whole."""
        places: dict[int, list[str]] = {}
        for name, results in self.values.items():
            for dims in results:
                for i, term in enumerate(dims):
                    for leaf in self.leaves(term):
                        places.setdefault(leaf, []).append(f"{name}.{i}")
        return "\n".join(self._line(axis, found) for axis, found in sorted(places.items()))

    def _line(self, axis: int, places: list[str]) -> str:
        more = f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        size = self.dynamic.get(self.terms.size(axis), self.terms.size(axis))
        whole = f"; whole, since {self.marks[axis][0]}" if self.marks.get(axis) else ""
        return f"axis {axis} ({size}): {', '.join(places[:_SHOWN])}{more}{whole}"
