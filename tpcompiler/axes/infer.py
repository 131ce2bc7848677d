"""Axes of a captured graph: every rule applied once, dimensions unified (docs/architecture.md).

Only values that depend on a parameter take part (*live* values). Masks, positions and rotary tables do not: any rank
can slice a constant for nothing, so they must not glue the axes of different layers together.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.axes.conflicts import mark_conflicts
from tpcompiler.axes.fit import Fit
from tpcompiler.axes.gradients import passes, reached
from tpcompiler.axes.map import AxisMap, Dims, Operand, Relation
from tpcompiler.axes.primes import Sizes
from tpcompiler.errors import RuleError
from tpcompiler.graphs import tensors
from tpcompiler.ops.call import Call
from tpcompiler.ops.notation import Group, parse
from tpcompiler.ops.operands import bind, op_name, tensor_operands
from tpcompiler.ops.table import SUMS, find, line_of
from tpcompiler.ops.views import Shape
from tpcompiler.program import Capture

__all__ = ["AxisMap", "Dims", "Operand", "Relation", "bind", "infer_axes", "op_name"]

# Ops whose result has the operand's dimensions but not its gradient.
_NO_GRADIENT = {"detach", "zeros_like", "ones_like", "full_like", "empty_like"}
# Ops that look at no value, only at sizes that are given: constants, which any rank can make and slice.
_FROM_SIZES = {"new_empty", "new_zeros", "new_ones", "new_full"}
_BROADCASTS = {"expand", "expand_as", "broadcast_to", "repeat_interleave", "repeat"}


def infer_axes(capture: Capture, cut: frozenset[str] = frozenset()) -> AxisMap:
    """Apply the rule of every live node. Pure: the capture is not changed.

    `cut` names nodes that merge copies with what was copied (heads = kv heads · group): their result's axes are then
    not tied to their operand's. The node runs whole on every rank, and each takes its slice of what it made.
    """
    return _Inference(capture, cut).run()


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
            if node.name in parameters:
                self.live.add(node.name)
                if parameters[node.name].trainable:
                    self.grads.add(node.name)
                self.values[node.name] = (self.fresh(self.sizes[node.name][0]),)
            elif node.op == "call_function":
                self.call(node)
        seen = [(dims, name) for name, results in self.values.items() for dims in results]
        for name, relation in self.relations.items():
            seen += [(o.dims, name) for o in relation.operands if o.dims is not None]
        mark_conflicts(self.terms, seen)
        return AxisMap(
            terms=self.terms,
            values=self.values,
            relations=self.relations,
            sizes=self.sizes,
            live=frozenset(self.live),
            grads=reached(self.capture.graph) & self.grads,
            dynamic=self.size.dynamic,
            marks=self.terms.leaf_marks(),
            copied=self.copied,
            cut=self.cut,
        )

    def fresh(self, shape: Shape) -> Dims:
        return tuple(None if n == 1 else self.terms.new(n) for n in shape)

    def call(self, node: fx.Node) -> None:
        if node.target is operator.getitem:
            self.getitem(node)
            return
        operands = tensor_operands(node)
        given = [n for n in operands if n is not None]
        if not any(n.name in self.live for n in given) or not self.sizes[node.name] or op_name(node) in _FROM_SIZES:
            return
        self.live.add(node.name)
        self.relations[node.name] = relation = self.relate(node, operands)
        self.values[node.name] = self.severed(node, relation) if node.name in self.cut else relation.results
        if passes(node) and any(n.name in self.grads for n in given):
            self.grads.add(node.name)

    def getitem(self, node: fx.Node) -> None:
        source, i = node.args
        assert isinstance(source, fx.Node) and isinstance(i, int)
        if source.name in self.live:
            self.values[node.name] = (self.values[source.name][i],)
            self.live.add(node.name)
            if source.name in self.grads and self.sizes[node.name]:
                self.grads.add(node.name)

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
            fit = Fit(self.terms, node, parse(line[0]), line[1], call, self.size.dynamic)
        except RuleError:
            if not any(n in self.size.dynamic for s in (*call.results, *shapes) for n in s or ()):
                raise
            return self.opaque(node, operands, f"{op_name(node)} relates sizes that are equal at run time only")
        return self.fitted(node, fit, [n for n in operands if n is not None])

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

    def fitted(self, node: fx.Node, fit: Fit, given: list[fx.Node]) -> Relation:
        """Unify what the pattern says is one. Live operands come first: letters then are their axes."""
        seen: dict[int, Operand] = {}
        for i in sorted(range(len(given)), key=lambda i: given[i].name not in self.live):
            name, side = given[i].name, fit.operands[i]
            live = name in self.live
            dims = None if side is None else fit.operand(side, self.values[name][0] if live else None)
            seen[i] = Operand(name, dims, live)
        results = tuple(fit.result(side) for side in fit.results)
        self.note_copies(node, fit, results)
        short = op_name(node)
        for name in fit.whole:
            if name in fit.atoms:
                self.terms.mark(fit.atoms[name], Mark(node.name, f"{short} needs it whole"))
        contracted, special = fit.contracted, fit.terms_of(fit.pattern.marked("special"))
        if short not in SUMS:
            for t in contracted:
                self.terms.mark(t, Mark(node.name, f"{short} has no form for a part of it"))
        return Relation(fit.pattern.text, tuple(seen[i] for i in range(len(given))), results, contracted, special)

    # -- copies -----------------------------------------------------------------------------------------------------

    def note_copies(self, node: fx.Node, fit: Fit, results: tuple[Dims, ...]) -> None:
        """Remember what a broadcast makes, and where it is merged with what it copies."""
        if op_name(node) in _BROADCASTS:
            self.copies.update(fit.made)
        roots = {self.terms.find(t) for t in self.copies}
        found: list[int] = []
        for side, dims in zip(fit.results, results, strict=True):
            for (item, _), term in zip(side, dims, strict=True):
                parts = item.parts if isinstance(item, Group) and item.kind == "product" else ()
                if term is not None and any(self.terms.find(fit.term(p)) in roots for p in parts):
                    found.append(term)
        if found:
            self.copied[node.name] = tuple(found)

    def severed(self, node: fx.Node, relation: Relation) -> tuple[Dims, ...]:
        """The result's dimensions, the one that copies were merged into as an axis of its own."""
        merged = set(self.copied[node.name])
        return tuple(
            tuple(self.terms.new(self.terms.size(t)) if t is not None and t in merged else t for t in dims)
            for dims in relation.results
        )
