"""Replaces several enters downstream of x by one enter on x, so that one all-reduce sums its gradient.

Two cases pay. Keys and values of a subgroup are computed from a value that enters for the queries anyway. That value
then enters for all of them, and the small weights of keys and values enter instead of the activations. The other case
is a block that applies two norms side by side, for attention and feed-forward. The residual stream then enters once,
together with the vectors of the norms.

In backward this moves the sum over ranks across operations that are linear in gradients. Each parameter on the way then
has a partial gradient and enters itself.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import (
    cause_of,
    copy_graph,
    copy_value,
    erase_dead,
    layout_of,
    note_of,
    operand,
    origin,
    over,
    place_node,
)
from tpcompiler.layout import Dim, Factor, Over
from tpcompiler.passes.trained import trained_values
from tpcompiler.program import Placed, Program

aten = torch.ops.aten
LARGEST = 64  # nodes between the value and the enter: a norm, or a projection with its rotation


@dataclass(frozen=True)
class Region:
    """The nodes between one value and an `enter` that nothing else uses, and the parameters that they read."""

    enter: fx.Node
    source: fx.Node
    nodes: frozenset[fx.Node]
    parameters: tuple[fx.Node, ...]


def hoist_enters(program: Program) -> Program:
    """Merges enters wherever that saves an all-reduce of an activation."""
    graph = copy_graph(program.graph)
    _widen(graph, program, trained_values(program, graph))
    _meet(graph, trained_values(program, graph))
    erase_dead(graph)
    return replace(program, graph=graph)


def _widen(graph: fx.Graph, program: Program, carriers: set[fx.Node]) -> None:
    """Replaces enter(f(enter(x, a)), b) by f(enter(x, a and b)) where x enters over a and b anyway."""
    for node in list(graph.nodes):
        if node.target is not runtime.enter or (region := _region(node, carriers)) is None:
            continue
        first = region.source
        if first.target is not runtime.enter:
            continue
        x, both = operand(first), _ordered(program, (*over(first), *over(node)))
        wide = _entered(x, both)
        if wide is not None:
            x.append(wide)
            _replace_source(region, wide)
            carriers.update(_enter_parameters(graph, region, over(node)))


def _meet(graph: fx.Graph, carriers: set[fx.Node]) -> None:
    """Replaces enter(f(x)) and enter(g(x)) by f and g of enter(x) where all parameters of f and g are vectors."""
    found: dict[tuple[fx.Node, Over], list[Region]] = defaultdict(list)
    for node in graph.nodes:
        region = _region(node, carriers) if node.target is runtime.enter else None
        if region is not None and all(p.meta["val"].dim() <= 1 for p in region.parameters):
            found[region.source, over(node)].append(region)
    for (x, names), regions in found.items():
        entered = _entered(x, names)
        if len(regions) + (entered is not None) < 2 or x.target is runtime.enter:
            continue
        if entered is None:
            with graph.inserting_after(x):
                entered = graph.call_function(runtime.enter, (x, names))
            first = regions[0].enter
            copy_value(entered, x, note_of(first), cause_of(first))
        else:
            x.append(entered)
        for region in regions:
            _replace_source(region, entered)
        _enter_vectors(graph, regions, names)
        for region in regions:
            _enter_parameters(graph, region, names)


def _entered(x: fx.Node, names: Over) -> fx.Node | None:
    """The enter of a value over these mesh dimensions, if there is one."""
    return next((u for u in x.users if u.target is runtime.enter and over(u) == names), None)


def _region(enter: fx.Node, carriers: set[fx.Node]) -> Region | None:
    """The region between `enter` and the one activation that its value is computed from."""
    start = operand(enter)
    if set(start.users) != {enter}:
        return None
    nodes: set[fx.Node] = {start}
    while True:
        inputs = {n for node in nodes for n in node.all_input_nodes} - nodes
        frontier = [n for n in inputs if n in carriers]
        growing = [
            n for n in frontier if n.op == "call_function" and n.target is not runtime.enter and set(n.users) <= nodes
        ]
        if not growing or len(nodes) > LARGEST:
            break
        nodes.update(growing)
    if any(n.target in (runtime.reduce, runtime.gather, runtime.cross_entropy, runtime.lookup) for n in nodes):
        return None
    sources = [n for n in frontier if n.op == "call_function"]
    parameters = tuple(sorted(n for n in frontier if n.op == "placeholder"))  # sorted, so that all ranks have one order
    if len(sources) != 1 or start.op != "call_function" or not isinstance(sources[0].meta.get("val"), torch.Tensor):
        return None
    if any(set(d.over) & set(over(enter)) for d in layout_of(sources[0]) or ()):
        return None  # ranks hold different segments of it, which cannot be summed
    return Region(enter, sources[0], frozenset(nodes), parameters)


def _replace_source(region: Region, entered: fx.Node) -> None:
    for node in region.nodes:
        node.replace_input_with(region.source, entered)
    region.enter.replace_all_uses_with(operand(region.enter))


def _enter_vectors(graph: fx.Graph, regions: list[Region], names: Over) -> None:
    """Lets the vectors of the norms enter together, which takes one small all-reduce."""
    known = dict.fromkeys(p for r in regions for p in r.parameters if layout_of(p) is not None)
    vectors = [p for p in known if not any(d.over for d in _layout(p))]
    vectors = [p for p in vectors if p.meta["val"].dim() == 1 and p.meta["val"].dtype == vectors[0].meta["val"].dtype]
    if len(vectors) < 2:
        return
    inside = frozenset().union(*(r.nodes for r in regions))
    first = min(inside)
    sizes = [p.meta["val"].shape[0] for p in vectors]
    with graph.inserting_before(first):
        joined = graph.call_function(aten.cat.default, (vectors, 0))
        entered = graph.call_function(runtime.enter, (joined, names))
        parts = graph.call_function(aten.split_with_sizes.default, (entered, sizes, 0))
        pieces = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(vectors))]
    val = vectors[0].meta["val"].new_empty([sum(sizes)])
    for node in (joined, entered, parts, *pieces):
        node.meta = {**origin(first), "val": val}
    parts.meta["val"] = [p.meta["val"] for p in vectors]
    whole = ((Factor(sum(sizes)),),)
    place_node(joined, Placed(whole))
    place_node(entered, Placed(whole, "backward: all-reduce", cause_of(regions[0].enter)))
    for piece, p in zip(pieces, vectors, strict=True):
        piece.meta["val"] = p.meta["val"]
        place_node(piece, Placed((_layout(p),)))
        for node in inside:
            node.replace_input_with(p, piece)


def _enter_parameters(graph: fx.Graph, region: Region, names: Over) -> list[fx.Node]:
    """Lets every parameter that a region reads enter, because its gradient there is now a sum over ranks."""
    out = []
    for p in region.parameters:
        if not any(p in node.all_input_nodes for node in region.nodes):
            continue  # it entered together with others
        split = {n for d in _layout(p) for n in d.over}
        lacking = tuple(n for n in names if n not in split)
        if not lacking:
            continue
        entered, first = _entered(p, lacking), min(region.nodes)
        if entered is not None and first < entered:
            first.prepend(entered)
        if entered is None:
            with graph.inserting_before(first):
                entered = graph.call_function(runtime.enter, (p, lacking))
            copy_value(entered, p, "backward: all-reduce", cause_of(region.enter))
            entered.meta.update(origin(first))
        out.append(entered)
        for node in region.nodes:
            node.replace_input_with(p, entered)
    return out


def _layout(node: fx.Node) -> tuple[Dim, ...]:
    return layout_of(node) or ()


def _ordered(program: Program, names: Iterable[str]) -> Over:
    wanted = set(names)
    return tuple(n for n in program.mesh.names if n in wanted)
