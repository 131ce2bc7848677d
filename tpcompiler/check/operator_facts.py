"""Facts about the runtime's operators: what crosses ranks, in closed form for a mesh of any size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpcompiler import runtime
from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.form import Fact, Form, Held, Kind, RefutedError, Wrong, derive, normal, said
from tpcompiler.check.site import Site, numbered, plain, states
from tpcompiler.layout import LocalRuns
from tpcompiler.runtime.mesh import part


@dataclass(frozen=True)
class Crossing(Fact, ABC):
    """The fact about an operator that moves one value between ranks, whose backward is no ordinary one."""

    over: Over = ()  # the ranks among which it moves values
    exact: bool = True  # whether these hold every row once

    def kinds(self, geometry: Geometry, given: Sequence[Held], kinds: Sequence[Kind]) -> tuple[Kind, ...] | Wrong:
        (kind,) = kinds
        if kind is None or not given[0].operand.grad:
            return (None,) * len(given)
        if set(kind) & set(self.claims[0].partial):
            return Wrong(f"its gradient is {said(kind)}, and must be whole on each rank")
        found = self.backward(geometry, given[0].claim, set(kind))
        return found if isinstance(found, Wrong) else (found, *[None] * (len(given) - 1))

    @abstractmethod
    def backward(self, geometry: Geometry, claim: Claim, kind: set[str]) -> Over | Wrong:
        """The kind of the operand's gradient, given that of the result's."""


class Summed(Crossing):
    """Backward, the gradients of a group's ranks are added."""

    def backward(self, geometry: Geometry, claim: Claim, kind: set[str]) -> Over | Wrong:
        group = set(self.over)
        if not group <= kind:
            times = geometry.mesh.degree(geometry.real(group - kind))
            mine, names = said(geometry.real(kind)), "·".join(self.over)
            return Wrong(f"its gradient is {mine}, and is added over {names}: it becomes {times} times the model's")
        return normal(geometry, claim, kind - group)


class Same(Crossing):
    """Backward, each rank's gradient is the result's. It must not be partial over the group."""

    def backward(self, geometry: Geometry, claim: Claim, kind: set[str]) -> Over | Wrong:
        if kind & set(self.over):
            mine, names = said(geometry.real(kind)), "·".join(self.over)
            return Wrong(f"its gradient is {mine}, and must be whole on each rank of {names}")
        return normal(geometry, claim, kind)


class Padded(Crossing):
    """Backward, a gradient of some rows stands among zeros."""

    def backward(self, geometry: Geometry, claim: Claim, kind: set[str]) -> Over | Wrong:
        if not self.exact and not set(self.over) <= kind:
            return Wrong("the gradient has shares that overlap on several ranks")
        return normal(geometry, claim, kind | set(self.over))


def _alike(s: Site, claim: Claim, group: Over, but: int | None = None) -> None:
    """Raises where ranks of a group hold different rows, except of dimension `but`."""
    for d, rows in enumerate(claim.rows):
        moved = set(s.geometry.over(rows)) & set(group)
        if d != but and moved:
            raise RefutedError(f"ranks of {'·'.join(group)} hold different rows of dimension {d}")


def _replaced(claim: Claim, d: int, rows: Rows | None, partial: Over) -> Claim:
    return Claim((*claim.rows[:d], rows, *claim.rows[d + 1 :]), partial)


@states("runtime.enter", ranked=True)
def _(s: Site) -> Fact:
    claim, group = s.given[0].claim, s.group()
    _alike(s, claim, group)
    return Summed((claim,), ((),), over=group)


@states("runtime.reduce", ranked=True)
def _(s: Site) -> Fact:
    claim, group = s.given[0].claim, s.group()
    _alike(s, claim, group)
    extra = s.geometry.real(set(group) - set(claim.partial))
    if extra:
        raise RefutedError(
            f"it adds over {'·'.join(group)} what is {claim}: {s.geometry.mesh.degree(extra)} times the value"
        )
    return Same((Claim(claim.rows, s.geometry.real(set(claim.partial) - set(group))),), ((),), over=group)


@states("runtime.cut_batch runtime.join_batch")
def _(s: Site) -> Fact:
    return Same((s.given[0].claim,), ((),))


@states("runtime.take", ranked=True)
def _(s: Site) -> Fact:
    claim = s.given[0].claim
    shape = s.shape(s.a["x"])
    d = s.local["dim"] % len(shape)
    rows = s.rows_argument(s.local["rows"], shape[d])
    if claim.rows[d] is not None:
        raise RefutedError(f"it takes rows of dimension {d}, of which each rank has a part")
    over = s.geometry.over(rows)
    if set(over) & {*claim.partial, *(n for r in claim.rows for n in s.geometry.over(r))}:
        raise RefutedError("two of its dimensions are split over the same ranks")
    if rows is not None and not s.geometry.covers(rows):
        raise RefutedError(f"some row of dimension {d} is taken by no rank")
    exact = rows is None or s.geometry.parts(rows)
    return Padded((_replaced(claim, d, rows, claim.partial),), ((),), over=over, exact=exact)


@states("runtime.gather", ranked=True)
def _(s: Site) -> Fact:
    claim, group = s.given[0].claim, s.group()
    size = s.result()[s.local["dim"] % len(s.result())]
    d = s.local["dim"] % len(s.result())
    held = claim.rows[d]
    if claim.partial:
        raise RefutedError("it gathers a partial sum")
    if s.rows_argument(s.local["rows"], size) is not held:
        raise RefutedError(f"it puts together other rows of dimension {d} than the ranks hold")
    if held is None:
        if not group:
            return Same((claim,), ((),))
        raise RefutedError(f"it puts together what each rank of {'·'.join(group)} has whole")
    _alike(s, claim, group, d)
    if not set(s.geometry.over(held)) <= set(group) or not s.geometry.covers(held):
        raise RefutedError(f"some row of dimension {d} is held by no rank of {'·'.join(group)}")
    return Same((_replaced(claim, d, None, ()),), ((),), over=s.geometry.over(held))


@states("runtime.gather_sequence", ranked=True)
def _(s: Site) -> Fact:
    claim, group = s.given[0].claim, s.group()
    d = s.local["dim"] % len(s.result())
    if claim.partial or claim.rows[d] is not _even(s, s.result()[d], group):
        raise RefutedError(f"it puts together the parts of dimension {d}, and the ranks hold {claim}")
    _alike(s, claim, group, d)
    return Summed((_replaced(claim, d, None, ()),), ((),), over=group)


@states("runtime.scatter_sequence", ranked=True)
def _(s: Site) -> Fact:
    claim, group = s.given[0].claim, s.group()
    d = s.local["dim"] % len(s.result())
    if claim.rows[d] is not None or not set(group) <= set(claim.partial):
        raise RefutedError(f"it adds over {'·'.join(group)} what is {claim}")
    _alike(s, claim, group)
    rows = _even(s, s.result()[d], group)
    return Same((_replaced(claim, d, rows, s.geometry.real(set(claim.partial) - set(group))),), ((),), over=group)


def _even(s: Site, size: int, group: Over) -> Rows | None:
    """The parts of a dimension that the ranks of a group hold in order."""
    mesh = s.geometry.mesh
    places = [mesh.index(group, c) for c in s.geometry.coords]
    ends = [part(size, mesh.degree(group), i) for i in places]
    return s.geometry.rows(size, [((a, b),) if b > a else () for a, b in ends])


@states("runtime.lookup", ranked=True)
def _(s: Site) -> Form:
    weight, ids = s.a["weight"], s.a["ids"]
    shape, table = s.shape(ids), s.shape(weight)
    rows = s.rows_argument(s.local["rows"], table[0])
    if s.local.get("size") not in (None, table[0]):
        raise RefutedError(f"it counts ids from the end of {s.local['size']} rows, and there are {table[0]}")
    width = [f"h{i}" for i in range(1, len(table))]
    return Form(
        [(ids.i, numbered(shape)), (weight.i, plain(table, ["v", *width]))],
        [(*numbered(shape), *(((h, n),) for h, n in zip(width, table[1:], strict=True)))],
        frozenset({"v"}),
        rows={"v": rows},
    )


@states("runtime.rms_norm runtime.layer_norm", ranked=True)
def _(s: Site) -> Form:
    shape = s.shape(s.a["x"])
    last = len(shape) - 1
    if s.local["size"] != shape[-1]:
        raise RefutedError(f"it divides by {s.local['size']}, and there are {shape[-1]} elements")
    operands = [(s.a["x"].i, numbered(shape))]
    operands += [(s.a[n].i, plain(s.shape(s.a[n]), [last])) for n in ("weight", "bias") if s.a.get(n) is not None]
    return Form(operands, [numbered(shape)], together={last: s.group()})


@states("runtime.cross_entropy", ranked=True)
def _(s: Site) -> Form:
    logits, target, weight = s.a["logits"], s.a["target"], s.a.get("weight")
    shape = s.shape(logits)
    at = 1 if len(shape) > 1 else 0
    if s.given[target.i].operand.dtype.is_floating_point:
        raise RefutedError("no fact speaks of class probabilities")
    several = s.a.get("reduction", "mean") == "none"
    labels: list[Any] = [d if several else None for d in range(len(shape))]
    labels[at] = "c"
    left = [label for label in labels if label != "c"]
    operands = [(logits.i, plain(shape, labels)), (target.i, plain(s.shape(target), left))]
    if weight is not None:
        operands.append((weight.i, plain(s.shape(weight), ["c"])))
    rows = s.rows_argument(s.local["rows"], shape[at])
    shapes = frozenset() if weight is None else frozenset({weight.i})  # its weight gets no gradient
    made = [plain(s.result(), left if several else [])]
    return Form(operands, made, rows={"c": rows}, together={"c": s.group()}, shapes=shapes)


@states("runtime.dropout", ranked=True)
def _(s: Site) -> Form:
    shape = s.shape(s.a["x"])
    claim = s.given[s.a["x"].i].claim
    named: dict[int, Rows | None] = {}
    for d, size, rows in s.local.get("rows", ()):
        if size != shape[d] or not isinstance(rows, LocalRuns):
            raise RefutedError(f"its mask has {size} rows, and dimension {d} has {shape[d]}")
        named[d % len(shape)] = s.rows_argument(rows, size)
    for d, rows in enumerate(claim.rows):
        if named.get(d) is not rows:
            raise RefutedError(f"its mask is not that of the rows of dimension {d} that each rank holds")
    site = s.a.get("site")
    if type(site) is not int:
        raise RefutedError("no fact speaks of a site that is not a number")
    return Form([(s.a["x"].i, numbered(shape))], [numbered(shape)])


@dataclass(frozen=True)
class Entered(Fact):
    """`enter` and products of what entered: the gradient of the value that enters is added over the group."""

    group: Over = ()
    products: tuple[tuple[Fact, tuple[int, ...]], ...] = ()

    def kinds(self, geometry: Geometry, given: Sequence[Held], kinds: Sequence[Kind]) -> tuple[Kind, ...] | Wrong:
        out: list[Kind] = [None] * len(given)
        entering: Kind = None
        for (fact, operands), kind in zip(self.products, kinds, strict=True):
            found = fact.kinds(geometry, [given[i] for i in operands], (kind,))
            if isinstance(found, Wrong):
                return found
            first, *rest = found
            if first is not None and entering not in (None, first):
                return Wrong("gradients of different kinds meet in the value that enters")
            entering = first if first is not None else entering
            for i, k in zip(operands[1:], rest, strict=True):
                if k is not None and out[i] not in (None, k):
                    return Wrong("gradients of different kinds meet in one weight")
                out[i] = k if k is not None else out[i]
        if entering is not None:
            x = operands[0]
            summed = Summed((given[x].claim,), ((),), over=self.group)
            back = summed.kinds(geometry, [given[x]], (entering,))
            if isinstance(back, Wrong):
                return back
            out[x] = back[0]
        return tuple(out)


@states("runtime.entered_linear", ranked=True)
def _(s: Site) -> Fact:
    x = s.a["x"]
    _alike(s, s.given[x.i].claim, s.group())
    shape = s.shape(x)
    lead = list(range(len(shape) - 1))
    products = []
    for m, w, bias in zip(s.made, s.a["weights"], s.a["biases"], strict=True):
        assert m is not None
        used = [x, w] if bias is None else [x, w, bias]
        operands = [(0, plain(shape, [*lead, None])), (1, plain(s.shape(w), ["o", None]))]
        if bias is not None:
            operands.append((2, plain(s.shape(bias), ["o"])))
        form = Form(operands, [plain(m.shape, [*lead, "o"])])
        products.append((derive(s.geometry, form, [s.given[u.i] for u in used], [m]), tuple(u.i for u in used)))
    claims = tuple(f.claims[0] for f, _ in products)
    return Entered(claims, ((),) * len(s.given), group=s.group(), products=tuple(products))


@states("runtime.linear_cross_entropy", ranked=True)
def _(s: Site) -> Fact:
    """A loss of classes that ranks compute together, from a value that enters: its gradient is added over the group."""
    used = [s.a[n] for n in ("x", "weight", "target", "bias") if s.a.get(n) is not None]
    x, weight, target = used[:3]
    group = () if s.local.get("group") is None else s.group()
    _alike(s, s.given[x.i].claim, group)
    if s.given[target.i].operand.dtype.is_floating_point:
        raise RefutedError("no fact speaks of class probabilities")
    shape = s.shape(weight)
    operands = [(0, plain(s.shape(x), [None] * s.rank(x))), (1, plain(shape, ["c", None]))]
    operands.append((2, plain(s.shape(target), [None] * s.rank(target))))
    if len(used) > 3:
        operands.append((3, plain(s.shape(used[3]), ["c"])))
    form = Form(operands, [()], together={"c": group})
    if group:
        form.rows["c"] = s.rows_argument(s.local["rows"], shape[0])
    fact = derive(s.geometry, form, [s.given[u.i] for u in used], s.made)
    return Entered(fact.claims, ((),) * len(s.given), group=group, products=((fact, tuple(u.i for u in used)),))


_OPERATORS = """enter reduce cut_batch join_batch take gather gather_sequence scatter_sequence lookup rms_norm
layer_norm cross_entropy linear_cross_entropy dropout entered_linear"""
NAMES = {getattr(runtime, name): f"runtime.{name}" for name in _OPERATORS.split()}
