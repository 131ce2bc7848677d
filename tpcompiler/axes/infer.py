"""Axes of a captured graph: every rule applied once, dimensions unified (design: axes).

Only values that depend on a parameter take part (*live* values). Masks, positions and rotary tables do not: any rank
can slice a constant for nothing, so they must not glue the axes of different layers together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._sympy import functions as symbolic

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.axes.notation import ELLIPSIS, Group, Item, Letter, Pattern, parse
from tpcompiler.axes.operands import bind, op_name, tensor_operands
from tpcompiler.axes.rules import SUMS, Call, find, line_of
from tpcompiler.axes.views import Shape
from tpcompiler.errors import RuleError
from tpcompiler.graphs import tensors
from tpcompiler.program import Capture

Dims = tuple[int | None, ...]  # a term per dimension; None = one element, nothing to split


@dataclass(frozen=True)
class Operand:
    node: str
    dims: Dims | None  # as the op sees them; None: its values do not matter to the op
    live: bool


@dataclass(frozen=True)
class Relation:
    """A rule applied to a node: what the op says of its operands and results."""

    pattern: str
    operands: tuple[Operand, ...]
    results: tuple[Dims, ...]
    contracted: tuple[int, ...]
    special: tuple[int, ...]


@dataclass(frozen=True)
class AxisMap:
    """What every live value's dimensions are made of. Terms that are not taken apart (`leaves`) are the axes."""

    terms: Terms
    values: dict[str, tuple[Dims, ...]]  # node → a tuple of dims per result
    relations: dict[str, Relation]
    sizes: dict[str, tuple[Shape, ...]]  # node → shapes, symbolic sizes at distinct primes
    live: frozenset[str]
    grads: frozenset[str]  # nodes whose value needs a gradient
    dynamic: dict[int, str]  # sizes that stand for a batch, a sequence, or a product of such
    marks: dict[int, tuple[Mark, ...]] = field(default_factory=dict)  # axis → why it must stay whole
    copied: dict[str, tuple[int, ...]] = field(
        default_factory=dict
    )  # node that merges copies into a dimension → its term
    cut: frozenset[str] = frozenset()  # of those, the ones whose value is not what the node makes, but slices of it

    def leaves(self, term: int | None) -> tuple[int, ...]:
        return () if term is None else tuple(dict.fromkeys(self.terms.leaves(term)))

    def axes_of(self, dims: Dims) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf for t in dims for leaf in self.leaves(t)))


def infer_axes(capture: Capture, cut: frozenset[str] = frozenset()) -> AxisMap:
    """Apply the rule of every live node. Pure: the capture is not changed.

    `cut` names nodes that merge copies with what was copied (heads = kv heads · group): their result's axes are then
    not tied to their operand's. The node runs whole on every rank, and each takes its slice of what it made.
    """
    return _Inference(capture, cut).run()


class Sizes:
    """Symbolic sizes as numbers: every distinct example size stands at a prime of its own, so that nothing fits by
    accident. Symbols of one example size (the batch of ids and of labels) are one size to the model."""

    def __init__(self) -> None:
        self._primes = _primes_above(2**31)
        self._symbols: dict[Any, int] = {}
        self._cache: dict[Any, int] = {}
        self.dynamic: dict[int, str] = {}  # numbers that stand for sizes known at run time only, with their expressions

    def __call__(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._cache:
            env = size.node.shape_env
            examples = getattr(env, "backed_var_to_val", None) or env.var_to_val  # the name changed with torch 2.13
            settled = _settled(expr, examples)
            values = {symbol: self._prime(examples.get(symbol, symbol)) for symbol in settled.free_symbols}
            self._cache[expr] = int(settled.subs(values))
            if values:
                self.dynamic[self._cache[expr]] = str(expr)
        return self._cache[expr]

    def _prime(self, example: Any) -> int:
        if example not in self._symbols:
            self._symbols[example] = next(self._primes)
            self.dynamic[self._symbols[example]] = f"s{len(self._symbols)}"
        return self._symbols[example]

    def shape(self, value: Any) -> Shape:
        return tuple(self(n) for n in value.shape)


def _settled(expr: Any, examples: Mapping[Any, Any]) -> Any:
    """`64 - Max(0, 64 - s)` is `s` for the sizes that were traced: of a maximum or minimum the term that won there.
    At a prime another one would win."""

    def winner(*terms: Any, greatest: bool) -> Any:
        return (max if greatest else min)(terms, key=lambda t: int(t.subs(examples)))

    for kind in (symbolic.Max, symbolic.Min):
        expr = expr.replace(kind, partial(winner, greatest=kind is symbolic.Max))
    return expr


def _primes_above(n: int) -> Iterator[int]:
    while True:
        n += 1
        if all(n % k for k in range(2, int(n**0.5) + 1)):
            yield n


# Ops whose result has the operand's dimensions but not its gradient.
_NO_GRADIENT = {"aten::detach", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like"}


_BROADCASTS = {"expand", "expand_as", "broadcast_to", "repeat_interleave", "repeat"}


class _Inference:
    def __init__(self, capture: Capture, cut: frozenset[str]) -> None:
        self.capture = capture
        self.cut = cut
        self.copies: set[int] = set()  # factors that a broadcast made
        self.copied: dict[str, tuple[int, ...]] = {}
        self.terms = Terms()
        self.size = Sizes()
        self.values: dict[str, tuple[Dims, ...]] = {}
        self.relations: dict[str, Relation] = {}
        self.sizes: dict[str, tuple[Shape, ...]] = {}
        self.live: set[str] = set()
        self.grads: set[str] = set()

    def run(self) -> AxisMap:
        parameters = {p.node: p for p in self.capture.parameters if not p.buffer}
        for node in self.capture.graph.nodes:
            self.sizes[node.name] = tuple(self.size.shape(v) for v in tensors(node.meta.get("val")))
            if node.op == "placeholder":
                if node.name in parameters:
                    self.live.add(node.name)
                    if parameters[node.name].trainable:
                        self.grads.add(node.name)
                    self.values[node.name] = (self.fresh(self.sizes[node.name][0]),)
            elif node.op == "call_function":
                self.call(node)
        return AxisMap(
            self.terms,
            self.values,
            self.relations,
            self.sizes,
            frozenset(self.live),
            frozenset(self.grads),
            self.size.dynamic,
            self.marks(),
            self.copied,
            self.cut,
        )

    def fresh(self, shape: Shape) -> Dims:
        return tuple(None if n == 1 else self.terms.new(n) for n in shape)

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            source, i = node.args
            assert isinstance(source, fx.Node) and isinstance(i, int)
            if source.name in self.live:
                self.values[node.name] = (self.values[source.name][i],)
                self.live.add(node.name)
                if source.name in self.grads and self.sizes[node.name]:
                    self.grads.add(node.name)
            return
        operands = tensor_operands(node)
        given = [n for n in operands if n is not None]
        if not any(n.name in self.live for n in given) or not self.sizes[node.name]:
            return
        self.live.add(node.name)
        self.relations[node.name] = relation = self.relate(node, operands)
        self.values[node.name] = self.severed(node, relation) if node.name in self.cut else relation.results
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        floating = any(v.dtype.is_floating_point for v in tensors(node.meta["val"]))
        if floating and name not in _NO_GRADIENT and any(n.name in self.grads for n in given):
            self.grads.add(node.name)

    def severed(self, node: fx.Node, relation: Relation) -> tuple[Dims, ...]:
        """The result's dimensions, the one that copies were merged into as an axis of its own."""
        merged = set(self.copied[node.name])
        return tuple(
            tuple(self.terms.new(self.terms.size(t)) if t is not None and t in merged else t for t in dims)
            for dims in relation.results
        )

    def note_copies(self, node: fx.Node, ins: list[Any], outs: list[Any], results: tuple[Dims, ...], fit: _Fit) -> None:
        """Remember what a broadcast makes, and where it is merged with what it copies."""
        if op_name(node) in _BROADCASTS:
            self.copies |= {fit.atoms[name] for name in _names(outs) - _names(ins) if name in fit.atoms}
        roots = {self.terms.find(t) for t in self.copies}
        found = []
        for items, dims in zip(outs, results, strict=True):
            for (item, _), term in zip(items, dims, strict=True):
                if isinstance(item, Group) and item.kind == "product" and term is not None:
                    if any(self.terms.find(fit.term(p)) in roots for p in item.parts):
                        found.append(term)
        if found:
            self.copied[node.name] = tuple(found)

    def relate(self, node: fx.Node, operands: list[fx.Node | None]) -> Relation:
        shapes = tuple(None if n is None else self.sizes[n.name][0] for n in operands)
        found = find(node.target) if isinstance(node.target, torch._ops.OpOverload) else None
        if found is None:
            return self.opaque(node, operands, f"{op_name(node)} has no rule")
        floating = tuple(n is not None and n.meta["val"].dtype.is_floating_point for n in operands)
        call = Call(shapes, self.sizes[node.name], bind(node), floating)
        line = line_of(found, call)
        if line is None or any(0 in s for s in (*call.results, *shapes) if s):
            return self.opaque(node, operands, f"{op_name(node)} with these arguments has no rule")
        try:
            return self.apply(node, parse(line[0]), dict(line[1]), operands, call)
        except RuleError:
            if not any(n in self.size.dynamic for s in (*call.results, *shapes) for n in s or ()):
                raise
            return self.opaque(node, operands, f"{op_name(node)} relates sizes that are equal at run time only")

    def opaque(self, node: fx.Node, operands: list[fx.Node | None], why: str) -> Relation:
        """No rule: everything that goes in or comes out stays whole. Costs parallelism, never correctness."""
        mark = Mark(node.name, why)
        seen = []
        for n in operands:
            if n is not None:
                dims = self.values[n.name][0] if n.name in self.live else (None,) * len(self.sizes[n.name][0])
                seen.append(Operand(n.name, dims, n.name in self.live))
        results = tuple(self.fresh(s) for s in self.sizes[node.name])
        for dims in (*(o.dims or () for o in seen), *results):
            for t in dims:
                if t is not None:
                    self.terms.mark(t, mark)
        return Relation("?", tuple(seen), results, (), ())

    def apply(
        self, node: fx.Node, pattern: Pattern, sizes: dict[str, int], operands: list[fx.Node | None], call: Call
    ) -> Relation:
        given = [n for n in operands if n is not None]
        shapes = [s for s in call.operands if s is not None]
        wanted = (
            pattern.operands if len(pattern.operands) == len(operands) == len(given) else _present(pattern, operands)
        )
        if len(wanted) != len(given) or len(pattern.results) != len(call.results):
            raise RuleError(f"{op_name(node)} at {node.name}: {pattern.text!r} does not fit operands {shapes}")
        ins = [
            None if items is None else expand_ellipsis(items, s, node, pattern)
            for items, s in zip(wanted, shapes, strict=True)
        ]
        outs = [
            expand_ellipsis(items, s, node, pattern) for items, s in zip(pattern.results, call.results, strict=True)
        ]
        fit = _Fit(self.terms, node, pattern, sizes, [x for x in ins if x is not None] + outs)
        seen: list[Operand | None] = [None] * len(given)
        for pass_live in (True, False):
            for i, (n, items) in enumerate(zip(given, ins, strict=True)):
                live = n.name in self.live
                if live is pass_live:
                    dims = None if items is None else fit.operand(items, self.values[n.name][0] if live else None)
                    seen[i] = Operand(n.name, dims, live)
        results = tuple(fit.result(items) for items in outs)
        self.note_copies(node, ins, outs, results, fit)
        short = op_name(node)
        for name in pattern.marked("whole"):
            if name in fit.atoms:
                self.terms.mark(fit.atoms[name], Mark(node.name, f"{short} needs it whole"))
        contracted = fit.terms_of(_names(ins) - _names(outs) - pattern.marked("whole") - pattern.dropped)
        special = fit.terms_of(pattern.marked("special"))
        if short not in SUMS:
            for t in contracted:
                self.terms.mark(t, Mark(node.name, f"{short} has no form for a part of it"))
        return Relation(pattern.text, tuple(o for o in seen if o is not None), results, contracted, special)

    def marks(self) -> dict[int, tuple[Mark, ...]]:
        """Marks of every axis, and the conflicts: an axis that stands twice in one tensor cannot be split there."""
        seen: set[tuple[Dims, str]] = set()
        for name, results in self.values.items():
            for dims in results:
                seen.add((dims, name))
        for name, relation in self.relations.items():
            for operand in relation.operands:
                if operand.dims is not None:
                    seen.add((operand.dims, name))
        for dims, name in sorted(seen, key=lambda x: x[1]):
            for leaf in twice(self.terms, dims):
                self.terms.mark(leaf, Mark(name, "stands twice in one tensor"))
        return self.terms.leaf_marks()


def twice(terms: Terms, dims: Dims) -> set[int]:
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


class _Fit:
    """A pattern fitted to one call: letters' sizes first, then their terms."""

    def __init__(
        self, terms: Terms, node: fx.Node, pattern: Pattern, sizes: dict[str, int], sides: list[list[tuple[Item, int]]]
    ):
        self.terms, self.node, self.pattern = terms, node, pattern
        self.sizes = dict(sizes)
        self.atoms: dict[str, int] = {}
        for items in sides:
            for item, n in items:
                if isinstance(item, Letter) and n != 1 and self.sizes.setdefault(item.name, n) != n:
                    raise self.misfit(f"{item.name} is {self.sizes[item.name]} and {n}")
        for items in sides:
            for item, n in items:
                if isinstance(item, Group) and n != 1:
                    self.solve(item, n)

    def misfit(self, why: str) -> RuleError:
        return RuleError(f"{op_name(self.node)} at {self.node.name}: {self.pattern.text!r}: {why}")

    def solve(self, group: Group, n: int) -> None:
        """Deduce the one size that a group of known size leaves open, and check the rest."""
        unknown = [x.name for x in group.letters() if x.name not in self.sizes]
        if len(unknown) > 1:
            raise self.misfit(f"sizes of {' and '.join(unknown)} are open")
        for name in unknown:
            self.sizes[name] = 1
            base = self.measure(group)
            self.sizes[name] = n // base if group.kind == "product" else n - base + 1
        if self.measure(group) != n:
            raise self.misfit(f"{self.measure(group)} elements for a dimension of {n}")

    def measure(self, item: Letter | Group) -> int:
        if isinstance(item, Letter):
            return self.sizes[item.name]
        sizes = [self.measure(p) for p in item.parts]
        return prod(sizes) if item.kind == "product" else sum(sizes)

    def term(self, item: Letter | Group) -> int:
        if isinstance(item, Letter):
            if item.name not in self.atoms:
                self.atoms[item.name] = self.terms.new(self.sizes.get(item.name, 1))
            return self.atoms[item.name]
        parts = [self.term(p) for p in item.parts]
        build = self.terms.product if item.kind == "product" else self.terms.concat
        return build(parts, self.node.name)

    def operand(self, items: list[tuple[Item, int]], mine: Dims | None) -> Dims:
        out: list[int | None] = []
        for i, (item, n) in enumerate(items):
            if n == 1 or isinstance(item, str):
                out.append(None)
                continue
            if mine is not None and isinstance(item, Letter) and item.name not in self.atoms:
                t = mine[i]
                assert t is not None
                self.atoms[item.name] = t
            term = self.term(item)
            if mine is not None and mine[i] is not None:
                self.terms.unify(mine[i], term, self.node.name)  # type: ignore[arg-type]
            out.append(term)
        return tuple(out)

    def result(self, items: list[tuple[Item, int]]) -> Dims:
        return tuple(None if n == 1 or isinstance(item, str) else self.term(item) for item, n in items)

    def terms_of(self, names: set[str]) -> tuple[int, ...]:
        return tuple(self.atoms[x] for x in sorted(names) if x in self.atoms)


def _names(sides: list[Any]) -> set[str]:
    out: set[str] = set()
    for items in sides:
        for item, _ in items or ():
            out |= (
                {item.name}
                if isinstance(item, Letter)
                else {x.name for x in item.letters()}
                if isinstance(item, Group)
                else set()
            )
    return out


def _present(pattern: Pattern, operands: list[fx.Node | None]) -> tuple[tuple[Item, ...] | None, ...]:
    """A pattern's operands without those that the call leaves out (a missing bias or mask)."""
    if len(pattern.operands) == sum(n is not None for n in operands):
        return pattern.operands
    return tuple(items for items, n in zip(pattern.operands, operands, strict=False) if n is not None)


def expand_ellipsis(items: tuple[Item, ...], shape: Shape, node: fx.Node, pattern: Pattern) -> list[tuple[Item, int]]:
    """(item, size) per dimension; what `...` covers becomes letters numbered from the right."""
    dots = sum(item == ELLIPSIS for item in items)
    extra = len(shape) - len(items) + dots
    if extra < 0 or (not dots and extra):
        raise RuleError(f"{op_name(node)} at {node.name}: {pattern.text!r} does not fit shape {list(shape)}")
    flat: list[Item] = []
    for item in items:
        flat.extend([Letter(f"~{k}") for k in range(extra - 1, -1, -1)] if item == ELLIPSIS else [item])
    return list(zip(flat, shape, strict=True))
