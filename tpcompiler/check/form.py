"""From facts about an operation to claims: how its dimensions correspond says how ranks hold its result and gradients.

A `Form` gives every dimension of operands and results as a product of labelled indices. It says that the operation is

    result[indices of the result] = Σ over all other indices of some function of the operands at these indices,

where an index without a label is part of what that function takes or gives as a whole. All that follows is arithmetic
with the ranks' rows: a label that is split in an operand is split alike in the result; one that is summed leaves
partial sums; and an operand without a label that is split gets a gradient to be added over those ranks.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import prod

from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.cones import TensorInfo
from tpcompiler.check.row_algebra import UnknownRowsError, factors, product

Index = tuple[Hashable, int]  # a label (None: the dimension is taken as a whole) and a size
Dims = tuple[tuple[Index, ...], ...]  # for each dimension of a tensor, the indices it is a product of
Kind = Over | None  # the kind of a gradient, which `steps` explains


@dataclass(frozen=True)
class Held:
    """A value of the model (its shape, dtype, and whether a gradient is asked of it), and how the ranks hold it."""

    operand: TensorInfo
    claim: Claim


@dataclass(frozen=True)
class Wrong:
    """Why a step does not hold."""

    true: str
    example: str = ""


class RefutedError(Exception):
    """Raised where a fact contradicts a step."""


@dataclass
class Form:
    """How the dimensions of an operation's operands and results correspond."""

    operands: list[tuple[int, Dims]]  # (operand, its dimensions); an operand that stands twice is listed twice
    results: list[Dims]
    sums: frozenset[Hashable] = frozenset()  # labels over which it only sums
    ignored: frozenset[int] = frozenset()  # operands of which only the dtype is read
    shapes: frozenset[int] = frozenset()  # operands of which only the shape is read
    rows: dict[Hashable, Rows | None] = field(default_factory=dict)  # of labels that arguments speak of
    together: dict[Hashable, Over] = field(default_factory=dict)  # labels that ranks of a group compute together
    flat: bool = False  # its derivative is zero


@dataclass(frozen=True)
class Fact:
    """What a fact says of a step."""

    claims: tuple[Claim, ...]
    adds: tuple[Over | None, ...]  # for each operand, over what its gradient must be added besides its result's kind
    partial: Over = ()  # of the operands that are partial sums
    reached: tuple[bool, ...] | None = None  # the operands that a gradient reaches; None: all
    whole_over: Over = ()  # over these, its own gradient must not be partial

    def kinds(self, geometry: Geometry, given: Sequence[Held], kinds: Sequence[Kind]) -> tuple[Kind, ...] | Wrong:
        """The kind of each operand's gradient, given those of the results."""
        over = {n for k in kinds if k is not None for n in k}
        for k, claim in zip(kinds, self.claims, strict=True):
            if k is None:
                continue
            if set(k) & {*claim.partial, *self.whole_over}:
                return Wrong(f"its gradient is {said(k)}, and must be whole on each rank")
            if any(not geometry.disjoint(claim, n) for n in over - set(k)):
                return Wrong("gradients of different kinds meet in one operand")
        out: list[Kind] = []
        for i, g in enumerate(given):
            adds = self.adds[i]
            if not g.operand.grad or all(k is None for k in kinds) or (self.reached and not self.reached[i]):
                out.append(None)
                continue
            if adds is None:
                return Wrong(f"the gradient of operand {i} has shares that overlap on several ranks")
            if self.partial and not g.claim.partial and over:
                return Wrong(f"the gradient of operand {i} is the product of two partial sums")
            out.append(normal(geometry, g.claim, {*over, *adds}))
        return tuple(out)


def normal(geometry: Geometry, claim: Claim, over: set[str]) -> Over:
    """A kind without the mesh dimensions along which ranks hold nothing in common."""
    return tuple(n for n in geometry.names if n in over and n not in claim.partial and not geometry.disjoint(claim, n))


def said(kind: Kind) -> str:
    """A gradient's kind in words."""
    return "the model's" if not kind else f"a partial sum over {'·'.join(kind)}"


def derive(geometry: Geometry, form: Form, given: Sequence[Held], made: Sequence[TensorInfo | None]) -> Fact:
    """What a form says of a step. Raises `RefutedError` where the step does not hold."""
    rows = label_rows(geometry, form, given)
    over = {label: geometry.over(r) for label, r in rows.items() if r is not None}
    _apart(over)
    kept = {label for dims in form.results for dim in dims for label, _ in dim}
    partial = _partial_operands(given)
    summed: set[str] = set()
    for label, names in over.items():
        group = form.together.get(label)
        if group is not None and set(group) != set(names):
            raise RefutedError(f"ranks of {_names(group)} compute together what is split over {_names(names)}")
        if label in kept:
            continue
        if group is None and label not in form.sums:
            raise RefutedError("a dimension is split that it needs whole")
        if not geometry.parts(rows[label]):  # type: ignore[arg-type]
            raise RefutedError("it sums rows that several ranks hold")
        summed.update(() if group is not None else names)
    for label, group in form.together.items():
        if label not in over and group:
            raise RefutedError(f"ranks of {_names(group)} compute together what each of them has whole")
    if partial & {n for names in over.values() for n in names}:
        raise RefutedError("a partial sum meets rows that differ between its ranks")
    total = geometry.real(partial | summed)
    claims = []
    for dims, m in zip(form.results, made, strict=True):
        assert m is not None
        if tuple(prod(n for _, n in dim) for dim in dims) != m.shape:
            raise RefutedError(f"the fact gives another shape than {list(m.shape)}")
        split = tuple(
            product(geometry, [(rows.get(label) if label is not None else None, n) for label, n in dim]) for dim in dims
        )
        claims.append(Claim(split, total))
    apart = {n for label, g in form.together.items() if label in over and label not in kept for n in g}
    reached = tuple(
        any(i == j for j, _ in form.operands) and i not in form.shapes and not form.flat for i in range(len(given))
    )
    return Fact(
        tuple(claims),
        tuple(_adds(geometry, form, given, i, rows, over, partial) for i in range(len(given))),
        geometry.real(partial),
        reached,
        geometry.real(apart),
    )


def label_rows(geometry: Geometry, form: Form, given: Sequence[Held]) -> dict[Hashable, Rows | None]:
    """The rows that the operands' claims give to each label. Raises `RefutedError` where two operands disagree."""
    rows: dict[Hashable, Rows | None] = dict(form.rows)
    listed = {i for i, _ in form.operands} | form.ignored
    if listed != set(range(len(given))):
        raise RefutedError("the fact does not speak of all operands")
    for i, dims in form.operands:
        claim = given[i].claim
        for d, (dim, held) in enumerate(zip(dims, claim.rows, strict=True)):
            if prod(n for _, n in dim) != given[i].operand.shape[d]:
                raise RefutedError(f"the fact gives another shape than {list(given[i].operand.shape)}")
            hints = [rows.get(label) for label, _ in dim]
            parts = factors(geometry, held, [n for _, n in dim], hints)
            if parts is None:
                raise RefutedError(f"rows {held} of dimension {d} of operand {i} are no product")
            for (label, _), part in zip(dim, parts, strict=True):
                if label is None:
                    if part is not None:
                        raise RefutedError(f"it needs dimension {d} of operand {i} whole, which has rows {part}")
                elif rows.setdefault(label, part) is not part:
                    raise RefutedError(
                        f"dimension {d} of operand {i} has {_rows(part)}, which goes with {_rows(rows[label])}"
                    )
    return rows


def _partial_operands(given: Sequence[Held]) -> set[str]:
    return {n for g in given for n in g.claim.partial}


def _apart(over: dict[Hashable, Over]) -> None:
    """Two dimensions may not be split over the same ranks: their product would have holes."""
    seen: set[str] = set()
    for names in over.values():
        if seen & set(names):
            raise RefutedError(f"two of its dimensions are split over {_names(tuple(n for n in names if n in seen))}")
        seen.update(names)


def _adds(
    geometry: Geometry,
    form: Form,
    given: Sequence[Held],
    i: int,
    rows: dict[Hashable, Rows | None],
    over: dict[Hashable, Over],
    partial: set[str],
) -> Over | None:
    found: set[Over | None] = set()
    for j, dims in form.operands:
        if i != j:
            continue
        own = {label for dim in dims for label, _ in dim}
        missing = [label for label in over if label not in own]
        if any(not geometry.parts(rows[label]) for label in missing):  # type: ignore[arg-type]
            found.add(None)
        names = {n for label in missing for n in over[label]}
        found.add(geometry.real(names | (partial if not given[i].claim.partial else set())))
    return found.pop() if len(found) == 1 else None if found else ()


def _names(over: Over) -> str:
    return "·".join(over) or "one rank"


def _rows(rows: Rows | None) -> str:
    return "all rows" if rows is None else f"rows {rows}"


__all__ = [
    "Fact",
    "Form",
    "Held",
    "Kind",
    "RefutedError",
    "UnknownRowsError",
    "Wrong",
    "derive",
    "normal",
    "said",
]
