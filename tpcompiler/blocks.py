"""What each axis is for, and what splitting it saves and costs: the facts that the plan chooses by.

Kinds are read off the graph, never off names: an axis of a product of two activations (scores, or values weighted by
them) is `attention`, one that a table is looked up by is `embedding`, one that the loss contracts or that leaves as the
output is `head`, one that stands between two weights is `mlp`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod, sqrt

from torch import fx

from tpcompiler.axes.algebra import Mark
from tpcompiler.axes.infer import AxisMap, Dims, Relation, op_name
from tpcompiler.program import Capture

ATTENTION, MLP, EMBEDDING, HEAD, OTHER = "attention", "mlp", "embedding", "head", "other"


@dataclass(frozen=True)
class AxisFacts:
    """One axis that parameters have. Costs and gains are elements per token, free of the hardware's scale."""

    leaf: int
    size: int
    dynamic: bool  # a batch or sequence
    kinds: tuple[str, ...]
    sums: int  # products that contract it, each a reduction, beyond those that make it: the residual stream has many
    batchwise: bool  # attention works on it as on a batch (heads), not through it (the width of a value head)
    parameters: tuple[str, ...]  # names of those it stands in
    signature: int  # axes of equal layers have equal signatures: one decision
    gain: float
    cost: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Facts:
    axes: dict[int, AxisFacts]
    conflicts: frozenset[tuple[int, int]]  # pairs that stand in different factors of one tensor, smaller first
    products: frozenset[tuple[int, int]]  # (major, minor) neighbours in a product

    @cached_property
    def grouped_heads(self) -> frozenset[tuple[int, int]]:
        """(kv heads, group) pairs: neighbours of which both are a batch to attention."""
        heads = {leaf for leaf, fact in self.axes.items() if fact.batchwise and not fact.marks}
        return frozenset((a, b) for a, b in self.products if a in heads and b in heads)


def gather_facts(capture: Capture, axes: AxisMap) -> Facts:
    """Facts of every axis that stands in a parameter."""
    names = {p.node: p for p in capture.parameters if not p.buffer}
    nodes = {n.name: n for n in capture.graph.nodes}
    members: dict[int, list[str]] = defaultdict(list)
    roles: dict[int, Counter[object]] = defaultdict(Counter)
    for p in names.values():
        for i, term in enumerate(axes.values[p.node][0]):
            for place, leaf in enumerate(axes.leaves(term)):
                if p.name not in members[leaf]:
                    members[leaf].append(p.name)
                roles[leaf]["parameter", p.shape, i, place] += 1
    tables = [r.operands[0].node for n, r in axes.relations.items() if op_name(nodes[n]) == "embedding"]
    largest = max((prod(axes.sizes[t][0]) for t in tables), default=0)
    tally = _Tally(axes, nodes, roles, largest)
    for name, relation in axes.relations.items():
        tally.relation(nodes[name], relation)
    for output in _outputs(capture.graph):
        if output.name in axes.live:
            for leaf in axes.axes_of(axes.values[output.name][0]):
                tally.kinds[leaf].add(HEAD)
    for leaf, kinds in tally.kinds.items():
        roles[leaf]["kinds", tuple(sorted(kinds))] += 1
    facts = {
        leaf: AxisFacts(
            leaf,
            axes.terms.size(leaf),
            axes.terms.size(leaf) in axes.dynamic,
            tally.kinds_of(leaf),
            tally.used[leaf] - tally.made[leaf],
            tally.products[leaf] > 1,
            tuple(members[leaf]),
            hash(frozenset(roles[leaf].items())),
            tally.gain[leaf],
            tally.cost(leaf),
            axes.marks.get(leaf, ()),
        )
        for leaf in members
    }
    conflicts, products = _neighbours(axes)
    return Facts(facts, conflicts, products)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (output,) = [n for n in graph.nodes if n.op == "output"]
    return list(output.all_input_nodes)


class _Tally:
    def __init__(
        self, axes: AxisMap, nodes: dict[str, fx.Node], roles: dict[int, Counter[object]], largest_table: int
    ) -> None:
        # Looking up saves memory and no time: a table that is small beside the largest (positions) stays whole.
        self.largest_table = largest_table
        self.axes, self.nodes, self.roles = axes, nodes, roles
        self.kinds: dict[int, set[str]] = defaultdict(set)
        self.products: Counter[int] = Counter()  # of activations, in whose result the axis stands
        self.made: Counter[int] = Counter()  # weights whose product makes the axis
        self.used: Counter[int] = Counter()  # weights whose product contracts it
        self.gain: dict[int, float] = defaultdict(float)
        self.forward: dict[int, float] = defaultdict(float)
        self.entering: dict[int, set[str]] = defaultdict(set)

    def static(self, name: str) -> tuple[int, bool]:
        """Elements of a value per token, and whether it has no batch or sequence. A third such dimension is a second
        sequence (scores): it counts as long."""
        val = self.nodes[name].meta["val"]
        fixed = [n for n in val.shape if isinstance(n, int)]
        dynamic = len(val.shape) - len(fixed)
        return prod(fixed) * 1024 ** max(0, dynamic - 2), dynamic == 0

    def relation(self, node: fx.Node, relation: Relation) -> None:
        axes = self.axes
        op = op_name(node)
        contracted = {leaf for t in relation.contracted for leaf in axes.leaves(t)}
        special = {leaf for t in relation.special for leaf in axes.leaves(t)}
        inside = {leaf for dims in relation.results for leaf in axes.axes_of(dims)} | contracted
        for leaf in inside:
            self.roles[leaf][op, relation.pattern, leaf in contracted] += 1
        if op == "scaled_dot_product_attention" or relation.contracted:
            self.attention(relation, inside, fused=not relation.contracted)
        for leaf in special:
            if op == "embedding":
                self.kinds[leaf].add(EMBEDDING)
            elif op == "cross_entropy_loss":
                self.kinds[leaf].add(HEAD)
            else:
                self.forward[leaf] += self.static(node.name)[0] / axes.terms.size(leaf)  # a norm: a few numbers a token
        for leaf in contracted:
            self.forward[leaf] += 1 if op == "cross_entropy_loss" else self.static(node.name)[0]
        for operand in relation.operands:
            if not operand.live or operand.dims is None:
                continue
            mine = set(axes.axes_of(operand.dims))
            elements, fixed = self.static(operand.node)
            if fixed and len(operand.dims) > 1 and relation.contracted:
                rows = self.rows(node, relation, elements)
                for leaf in mine & inside:
                    if not special:
                        self.gain[leaf] += 4 * sqrt(elements) * rows
                    elif elements * 8 > self.largest_table:
                        self.gain[leaf] += sqrt(elements) * rows
                self.used.update(mine & contracted - special)
                self.made.update((mine - contracted) if not special else ())
            if operand.node in axes.grads:
                for leaf in inside - mine:
                    self.entering[leaf].add(operand.node)

    def rows(self, node: fx.Node, relation: Relation, elements: int) -> float:
        """Rows that a weight of so many elements is multiplied with, per token: an image has a fixed number of patches."""
        made = elements / prod(self.axes.terms.size(t) for t in relation.contracted)
        return max(1.0, self.static(node.name)[0] / made)

    def attention(self, relation: Relation, inside: set[int], *, fused: bool) -> None:
        """Products of activations. What stands in the results of both of attention's products is a batch to it (heads);
        a fused attention is both at once, and the last dimension of its result comes from the values alone."""
        acting = [o for o in relation.operands if o.live and o.dims is not None and not self.static(o.node)[1]]
        if len(acting) < 2:
            return
        for leaf in inside:
            self.kinds[leaf].add(ATTENTION)
        for dims in relation.results:
            for leaf in self.axes.axes_of(dims[:-1] if fused else dims):
                self.products[leaf] += 2 if fused else 1

    def cost(self, leaf: int) -> float:
        backward = 0.0
        for name in self.entering[leaf]:
            elements, fixed = self.static(name)
            backward += elements / 1000 if fixed else elements  # a parameter's: once a step, not once a token
        return self.forward[leaf] + backward

    def kinds_of(self, leaf: int) -> tuple[str, ...]:
        kinds = self.kinds[leaf]
        if not kinds:
            kinds = {MLP} if self.made[leaf] and self.used[leaf] else {OTHER}
        return tuple(k for k in (ATTENTION, MLP, EMBEDDING, HEAD, OTHER) if k in kinds)


def _neighbours(axes: AxisMap) -> tuple[frozenset[tuple[int, int]], frozenset[tuple[int, int]]]:
    conflicts: set[tuple[int, int]] = set()
    products: set[tuple[int, int]] = set()

    def cross(sets: list[frozenset[int]]) -> None:
        for a, b in combinations(sets, 2):
            conflicts.update((min(x, y), max(x, y)) for x in a for y in b)

    def walk(term: int) -> frozenset[int]:
        bound = axes.terms.binding(term)
        if bound is None:
            return frozenset({axes.terms.find(term)})
        parts = [walk(p) for p in bound.parts]
        if bound.kind == "product":
            cross(parts)
            products.update((x, y) for a, b in zip(parts, parts[1:], strict=False) for x in a for y in b)
        return frozenset().union(*parts)

    seen: set[Dims] = set()
    for results in axes.values.values():
        seen.update(results)
    for relation in axes.relations.values():
        seen.update(o.dims for o in relation.operands if o.dims is not None)
    known: set[tuple[frozenset[int], ...]] = set()
    for dims in seen:
        sets = tuple(walk(t) for t in dims if t is not None)
        if sets not in known:
            known.add(sets)
            cross(list(sets))
    return frozenset(conflicts), frozenset(products)
