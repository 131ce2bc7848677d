"""The result of inference: every live value's dimensions as terms, and what each op says about them."""

from __future__ import annotations

from dataclasses import dataclass

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.ops.record import OpRule
from tpcompiler.ops.views import Shape

Dims = tuple[int | None, ...]  # a term per dimension; None = one element, nothing to split


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
