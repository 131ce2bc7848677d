"""Finds the heaviest set of candidates of which no two exclude each other."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from tpcompiler.plan.candidates import Candidate
from tpcompiler.plan.weighing import Facts

_EXACT = 40  # the heaviest set of up to so many connected candidates is found exactly, of more greedily


def choose(candidates: list[Candidate], facts: Facts) -> dict[int, tuple[str, ...]]:
    """Maps each chosen axis to the mesh dimensions that split it. Axes that the spec names outweigh all others."""
    graph = nx.Graph()
    useful = [c for c in candidates if c.split and (c.asked or c.weight > 0)]
    scale = 1000 / max((abs(c.weight) for c in useful), default=1)
    bonus = 1000 * (len(useful) + 1)
    for i, c in enumerate(useful):
        graph.add_node(i, weight=max(1, round(c.weight * scale)) + (bonus if c.asked else 0))
    for i, c in enumerate(useful):
        for j in range(i):
            if _exclude(c, useful[j], facts):
                graph.add_edge(i, j)
    split: dict[int, tuple[str, ...]] = {}
    for component in nx.connected_components(graph):
        for i in _heaviest(graph.subgraph(component)):
            split.update(dict(useful[i].split))
    return split


def _heaviest(graph: nx.Graph) -> Iterable[int]:
    if len(graph) <= _EXACT:
        other = nx.complement(graph)
        other.add_nodes_from(graph.nodes(data=True))
        return nx.max_weight_clique(other, weight="weight")[0]
    taken: set[int] = set()
    for i in sorted(graph, key=lambda n: (-graph.nodes[n]["weight"], n)):
        if taken.isdisjoint(graph[i]):
            taken.add(i)
    return taken


def _exclude(a: Candidate, b: Candidate, facts: Facts) -> bool:
    if a.leaves & b.leaves:
        return True
    return any(
        set(over) & set(other) and (min(x, y), max(x, y)) in facts.conflicts
        for x, over in a.split
        for y, other in b.split
    )
