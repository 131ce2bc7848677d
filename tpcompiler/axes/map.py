"""The result of inference: the dimensions of every live value as terms, and what each op says about them."""

from __future__ import annotations

from dataclasses import dataclass

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.ops.record import OpRule
from tpcompiler.ops.views import Shape

Dims = tuple[int | None, ...]  # a term for each dimension; None for a dimension of one element, which is never split
_SHOWN = 4  # dimensions of an axis that are printed


@dataclass(frozen=True)
class Operand:
    """An operand of an op, by the name of its node."""

    node: str
    dims: Dims | None  # as the op sees them; None when the op does not read the values
    live: bool  # whether it depends on a parameter


@dataclass(frozen=True)
class Relation:
    """A rule applied to a node: what the op says about its operands and results."""

    rule: OpRule
    pattern: str  # the rule's line for this call
    operands: tuple[Operand, ...]
    results: tuple[Dims, ...]
    contracted: tuple[int, ...]  # terms that are summed
    special: tuple[int, ...]  # terms that are split by a form of the op made for it
    sizes: tuple[tuple[str, int | None, int], ...] = ()  # (argument, index if it is a list, the term whose size it is)


@dataclass(frozen=True)
class AxisMap:
    """What every live value's dimensions are made of. The axes are the terms that are not taken apart (`leaves`)."""

    terms: Terms
    values: dict[str, tuple[Dims, ...]]  # node → the dims of each of its results
    relations: dict[str, Relation]
    sizes: dict[str, tuple[Shape, ...]]  # node → the shapes of its results; a prime stands for each symbolic size
    live: frozenset[str]
    grads: frozenset[str]  # nodes whose value needs a gradient
    dynamic: dict[int, str]  # size that stands for a batch, a sequence or a product of these → its expression
    marks: dict[int, tuple[Mark, ...]]  # axis → why it must stay whole
    conflicts: frozenset[tuple[int, int]]  # pairs that stand in different factors of one tensor, smaller first
    products: frozenset[tuple[int, int]]  # (major, minor) neighbours in a product
    copied: dict[str, tuple[int, ...]]  # node that merges copies into dimensions → the terms of these dimensions
    cut: frozenset[str]  # the nodes of `copied` that every rank runs whole before it takes its slice of the result

    def leaves(self, term: int | None) -> tuple[int, ...]:
        """The axes that a term is made of, major first, each once."""
        return () if term is None else tuple(dict.fromkeys(self.terms.leaves(term)))

    def axes_of(self, dims: Dims) -> tuple[int, ...]:
        """The axes that these dimensions are made of, each once."""
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
