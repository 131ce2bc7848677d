"""Infers the axes of a captured graph: the rule of each node unifies dimensions (docs/architecture.md).

Only *live* values take part: those that depend on a parameter. Masks, positions and rotary tables do not. Any rank can
slice a constant at no cost, so constants must not join the axes of different layers.
"""

from __future__ import annotations

import operator

from torch import fx

from tpcompiler.axes.algebra import Mark, Terms
from tpcompiler.axes.conflicts import find_conflicts
from tpcompiler.axes.fit import Fit
from tpcompiler.axes.gradients import carriers, passes, reached
from tpcompiler.axes.map import AxisMap, Dims, Operand, Relation
from tpcompiler.axes.primes import Primes
from tpcompiler.errors import RuleError
from tpcompiler.graphs import tensors
from tpcompiler.ops.notation import LetterGroup, parse
from tpcompiler.ops.operands import bind, op_name, tensor_operands
from tpcompiler.ops.record import OpCall, OpRule
from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.ops.views import Shape
from tpcompiler.program import Capture

__all__ = ["AxisMap", "Dims", "Operand", "Relation", "bind", "infer_axes", "op_name"]


def infer_axes(capture: Capture, cut: frozenset[str] = frozenset()) -> AxisMap:
    """Applies the rule of every live node. The capture is not changed. Raises `RuleError` for a rule that does not fit.

    `cut` names nodes that merge copies with what was copied (heads = kv heads · group). The axes of their results are
    then not tied to those of their operands: every rank runs the node whole and takes its slice of the result.
    """
    return _Inference(capture, cut).run()


class _Inference:
    def __init__(self, capture: Capture, cut: frozenset[str]) -> None:
        self.capture = capture
        self.cut = cut
        self.copies: set[int] = set()  # axes along which values were copied
        self.copied: dict[str, tuple[int, ...]] = {}
        self.terms = Terms()
        self.size = Primes()
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
        conflicts, products = find_conflicts(self.terms, seen)
        return AxisMap(
            terms=self.terms,
            values=self.values,
            relations=self.relations,
            sizes=self.sizes,
            live=frozenset(self.live),
            grads=reached(self.capture.graph)
            & (self.grads | carriers(self.capture.graph, self.capture.differentiable)),
            dynamic=self.size.dynamic,
            marks=self.terms.leaf_marks(),
            conflicts=conflicts,
            products=products,
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
        rule = find(node.target) or UNKNOWN
        given = [n for i, n in enumerate(operands) if n is not None and i not in rule.unread]
        if not any(n.name in self.live for n in given) or not self.sizes[node.name] or rule.constant:
            return
        self.live.add(node.name)
        self.relations[node.name] = relation = self.relate(node, operands, rule)
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

    def relate(self, node: fx.Node, operands: list[fx.Node | None], rule: OpRule) -> Relation:
        if rule is UNKNOWN:
            return self.opaque(node, operands, f"{op_name(node)} has no rule")
        shapes = tuple(None if n is None else self.sizes[n.name][0] for n in operands)
        floating = tuple(n is not None and n.meta["val"].dtype.is_floating_point for n in operands)
        call = OpCall(shapes, self.sizes[node.name], bind(node), floating)
        line = rule.pattern(call)
        if line is None or any(0 in s for s in (*call.results, *shapes) if s):
            return self.opaque(node, operands, f"{op_name(node)} with these arguments has no rule")
        try:
            fit = Fit(self.terms, node, parse(line[0]), line[1], call, self.size.dynamic)
        except RuleError:
            if not any(n in self.size.dynamic for s in (*call.results, *shapes) for n in s or ()):
                raise
            return self.opaque(node, operands, f"{op_name(node)} relates sizes that are equal at run time only")
        return self.fitted(node, fit, [n for n in operands if n is not None], rule, call)

    def opaque(self, node: fx.Node, operands: list[fx.Node | None], why: str) -> Relation:
        """The relation of a node without a rule: all its operands and results stay whole, for the reason `why`."""
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
        return Relation(UNKNOWN, "?", tuple(seen), results, (), ())

    def fitted(self, node: fx.Node, fit: Fit, given: list[fx.Node], rule: OpRule, call: OpCall) -> Relation:
        """The relation of a node with a rule. Dimensions that share a letter of the pattern are unified. Live operands
        come first, so that letters get their terms."""
        seen: dict[int, Operand] = {}
        for i in sorted(range(len(given)), key=lambda i: given[i].name not in self.live):
            name, side = given[i].name, fit.operands[i]
            live = name in self.live
            dims = None if side is None else fit.operand(side, self.values[name][0] if live else None)
            seen[i] = Operand(name, dims, live)
        results = tuple(fit.result(side) for side in fit.results)
        self.note_copies(node, fit, results)
        contracted, special = fit.terms_of(fit.contracted), fit.terms_of(fit.pattern.marked("special"))
        self.mark(node, fit.terms_of(fit.whole), "needs it whole")
        if not rule.adds_up(call.args):
            self.mark(node, contracted, "has no form for a part of it")
        elif rule.average and any(self.terms.size(t) in self.size.dynamic for t in contracted):
            self.mark(node, contracted, "counts what is known at run time only")
        if not rule.form:
            self.mark(node, special, "has no form for a part of it")
        bound = rule.bound(call.args).items()
        sizes = tuple((*place, fit.letter_terms[letter]) for letter, place in bound if letter in fit.letter_terms)
        operands = tuple(seen[i] for i in range(len(given)))
        return Relation(rule, fit.pattern.text, operands, results, contracted, special, sizes)

    def mark(self, node: fx.Node, terms: tuple[int, ...], why: str) -> None:
        for t in terms:
            self.terms.mark(t, Mark(node.name, f"{op_name(node)} {why}"))

    # -- copies -----------------------------------------------------------------------------------------------------

    def note_copies(self, node: fx.Node, fit: Fit, results: tuple[Dims, ...]) -> None:
        """Notes the axes along which an op makes copies, and the nodes that merge such an axis with the copied one."""
        self.copies.update(fit.terms_of(fit.copies))
        roots = {self.terms.find(t) for t in self.copies}
        found: list[int] = []
        for side, dims in zip(fit.results, results, strict=True):
            for (item, _), term in zip(side, dims, strict=True):
                product = item.parts if isinstance(item, LetterGroup) and item.kind == "product" else ()
                parts = [p for p in product if fit.size(p) != 1]
                if term is not None and len(parts) > 1 and any(self.terms.find(fit.term(p)) in roots for p in parts):
                    found.append(term)
        if found:
            self.copied[node.name] = tuple(found)

    def severed(self, node: fx.Node, relation: Relation) -> tuple[Dims, ...]:
        """The results' dimensions, with a new axis in place of one that copies were merged into."""
        merged = set(self.copied[node.name])
        return tuple(
            tuple(self.terms.new(self.terms.size(t)) if t is not None and t in merged else t for t in dims)
            for dims in relation.results
        )
