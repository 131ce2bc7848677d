"""Gathers the facts that the plan chooses by: the purpose of each axis, and what splitting it saves and costs.

The kind of an axis comes from the graph, never from names. An axis of a product of two activations (scores, or values
weighted by them) is `attention`. An axis that indexes a table is `embedding`. An axis that the loss contracts or that
the model returns is `head`. An axis between two weights is `mlp`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import fx

from tpcompiler.axes.algebra import Mark
from tpcompiler.axes.map import AxisMap
from tpcompiler.plan.tally import HEAD, Tally
from tpcompiler.program import Capture


@dataclass(frozen=True)
class AxisFacts:
    """What is known of one axis of parameters. Gain and cost are in elements per token, whatever the hardware."""

    leaf: int  # its term
    size: int
    dynamic: bool  # a batch or sequence
    kinds: tuple[str, ...]
    sums: int  # how many more products contract it than have it in their result: large for the residual stream
    batchwise: bool  # attention treats it as a batch (heads), unlike the width of a value head
    parameters: tuple[str, ...]  # names of the parameters that have it
    signature: int  # axes of equal layers have equal signatures and are one decision
    gain: float
    cost: float
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Facts:
    """The facts of every axis, and which axes exclude each other or are neighbours."""

    axes: dict[int, AxisFacts]
    conflicts: frozenset[tuple[int, int]]  # pairs that stand in different factors of one tensor, smaller first
    products: frozenset[tuple[int, int]]  # (major, minor) neighbours in a product

    @cached_property
    def grouped_heads(self) -> frozenset[tuple[int, int]]:
        """The (kv heads, group) pairs: neighbours in a product that attention treats as a batch, both of them."""
        heads = {leaf for leaf, fact in self.axes.items() if fact.batchwise and not fact.marks}
        return frozenset((a, b) for a, b in self.products if a in heads and b in heads)


def gather_facts(capture: Capture, axes: AxisMap) -> Facts:
    """The facts of every axis that a parameter has."""
    nodes = {n.name: n for n in capture.graph.nodes}
    members: dict[int, list[str]] = defaultdict(list)
    roles: dict[int, Counter[object]] = defaultdict(Counter)
    for p in capture.parameters:
        for i, term in enumerate(() if p.buffer else axes.values[p.node][0]):
            for place, leaf in enumerate(axes.leaves(term)):
                if p.name not in members[leaf]:
                    members[leaf].append(p.name)
                roles[leaf]["parameter", p.shape, i, place] += 1
    lookups = [r.operands[0].node for r in axes.relations.values() if r.rule.form == "lookup" and r.special]
    tables = [t for t in lookups if axes.dynamic.keys().isdisjoint(axes.sizes[t][0])]
    tally = Tally(axes, nodes, roles, max((prod(axes.sizes[t][0]) for t in tables), default=0))
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
            leaf=leaf,
            size=axes.terms.size(leaf),
            dynamic=axes.terms.size(leaf) in axes.dynamic,
            kinds=tally.kinds_of(leaf),
            sums=tally.used[leaf] - tally.made[leaf],
            batchwise=tally.products[leaf] > 1,
            parameters=tuple(names),
            signature=hash(frozenset(roles[leaf].items())),
            gain=tally.gain[leaf],
            cost=tally.cost(leaf),
            marks=axes.marks.get(leaf, ()),
        )
        for leaf, names in members.items()
    }
    return Facts(facts, axes.conflicts, axes.products)


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    (output,) = [n for n in graph.nodes if n.op == "output"]
    return list(output.all_input_nodes)
