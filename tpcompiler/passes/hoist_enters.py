"""Gradients that meet again are summed once: several `enter`s of what one value was made into become one of the value.

Two cases pay. Keys and values of a subgroup are made from what enters anyway for the queries: let it enter for all, and
let the small weights that make them enter instead of the activations. And a block whose attention and feed-forward have
a norm each, side by side: let the residual stream enter once, and the norms' vectors with it.

Backward, summing over ranks is moved before what is linear in gradients; each parameter on the way then has a partial
gradient and enters itself.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.layout import Factor
from tpcompiler.passes.copy import copy_graph, erase_dead
from tpcompiler.program import Program

aten = torch.ops.aten
Over = tuple[str, ...]
LARGEST = 64  # nodes between a value and what enters: a norm, a projection with its rotation


@dataclass(frozen=True)
class Region:
    """The nodes between one value and an `enter`, used by nobody else, and the parameters that they read."""

    enter: fx.Node
    source: fx.Node
    nodes: frozenset[fx.Node]
    parameters: tuple[fx.Node, ...]


def hoist_enters(program: Program) -> Program:
    """Merge wherever it saves an all-reduce of an activation."""
    graph = copy_graph(program.graph)
    trainable = {p.node for p in program.capture.parameters if p.trainable and not p.buffer}
    _widen(graph, program, trainable)
    _meet(graph, program, trainable)
    erase_dead(graph)
    return replace(program, graph=graph)


def _widen(graph: fx.Graph, program: Program, trainable: set[str]) -> None:
    """enter(f(enter(x, a)), b), where x enters over a and b elsewhere: f(enter(x, a and b))."""
    for node in list(graph.nodes):
        if node.target is not runtime.enter or (region := _region(node, trainable)) is None:
            continue
        first = region.source
        if first.target is not runtime.enter:
            continue
        x, over = first.args[0], _ordered(program, (*first.args[1], *node.args[1]))  # type: ignore[misc]
        wide = next((u for u in x.users if u.target is runtime.enter and u.args[1] == over), None)  # type: ignore[union-attr]
        if wide is not None:
            _move_after(graph, wide, x)  # type: ignore[arg-type]
            _replace_source(region, wide)
            _enter_parameters(graph, program, region, node.args[1])  # type: ignore[arg-type]


def _meet(graph: fx.Graph, program: Program, trainable: set[str]) -> None:
    """enter(f(x)) and enter(g(x)), f and g with vectors for parameters: f and g of enter(x)."""
    found: dict[tuple[fx.Node, Over], list[Region]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is runtime.enter and (region := _region(node, trainable)) is not None:
            if all(p.meta["val"].dim() <= 1 for p in region.parameters):
                found[region.source, node.args[1]].append(region)
    for (x, over), regions in found.items():
        direct = [u for u in x.users if u.target is runtime.enter and u.args[1] == over]
        if len(regions) + len(direct) < 2 or x.target is runtime.enter:
            continue
        if direct:
            entered = direct[0]
            _move_after(graph, entered, x)
        else:
            with graph.inserting_after(x):
                entered = graph.call_function(runtime.enter, (x, over))
            first = regions[0].enter
            entered.meta = {**x.meta, "note": first.meta.get("note", ""), "because": first.meta.get("because")}
        for region in regions:
            _replace_source(region, entered)
        _enter_vectors(graph, regions, over)
        for region in regions:
            _enter_parameters(graph, program, region, over)


def _enter_vectors(graph: fx.Graph, regions: list[Region], over: Over) -> None:
    """The norms' vectors together: one small all-reduce for all of them."""
    vectors = list(dict.fromkeys(p for r in regions for p in r.parameters if not any(d.over for d in p.meta["dims"])))
    vectors = [p for p in vectors if p.meta["val"].dim() == 1 and p.meta["val"].dtype == vectors[0].meta["val"].dtype]
    if len(vectors) < 2:
        return
    inside = frozenset().union(*(r.nodes for r in regions))
    first = min(inside, key=_order(graph))
    sizes = [p.meta["val"].shape[0] for p in vectors]
    about = {key: first.meta[key] for key in ("module", "stack", "line") if key in first.meta}
    with graph.inserting_before(first):
        joined = graph.call_function(aten.cat.default, (vectors, 0))
        entered = graph.call_function(runtime.enter, (joined, over))
        parts = graph.call_function(aten.split_with_sizes.default, (entered, sizes, 0))
        pieces = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(vectors))]
    val = vectors[0].meta["val"].new_empty([sum(sizes)])
    for node in (joined, entered):
        node.meta = {**about, "val": val, "dims": (Factor(sum(sizes)),)}
    entered.meta |= {"note": "backward: all-reduce", "because": regions[0].enter.meta.get("because")}
    parts.meta = {**about, "val": [p.meta["val"] for p in vectors]}
    for piece, p in zip(pieces, vectors, strict=True):
        piece.meta = {**about, "val": p.meta["val"], "dims": p.meta["dims"]}
        for node in inside:
            node.replace_input_with(p, piece)


def _region(enter: fx.Node, trainable: set[str]) -> Region | None:
    """What lies between `enter` and the one activation that it was made from."""
    start = enter.args[0]
    if not isinstance(start, fx.Node) or set(start.users) != {enter}:
        return None
    nodes: set[fx.Node] = {start}
    while True:
        inputs = {n for node in nodes for n in node.all_input_nodes} - nodes
        frontier = [n for n in inputs if _carries(n, trainable)]
        growing = [
            n for n in frontier if n.op == "call_function" and n.target is not runtime.enter and set(n.users) <= nodes
        ]
        if not growing or len(nodes) > LARGEST:
            break
        nodes.update(growing)
    if any(n.target in (runtime.reduce, runtime.gather, runtime.cross_entropy, runtime.lookup) for n in nodes):
        return None
    sources = [n for n in frontier if n.op == "call_function"]
    parameters = tuple(n for n in frontier if n.op == "placeholder")
    if len(sources) != 1 or start.op != "call_function" or not isinstance(sources[0].meta.get("val"), torch.Tensor):
        return None
    if any(set(d.over) & set(enter.args[1]) for d in sources[0].meta.get("dims", ())):  # type: ignore[arg-type]
        return None  # segments of it are split: ranks hold different ones, which cannot be summed
    return Region(enter, sources[0], frozenset(nodes), parameters)


def _carries(node: fx.Node, trainable: set[str]) -> bool:
    """Whether a trainable parameter stands behind a value."""
    key = "carries"
    if key not in node.meta:
        if node.op == "placeholder":
            node.meta[key] = node.name in trainable
        else:
            node.meta[key] = any(_carries(n, trainable) for n in node.all_input_nodes)
    return bool(node.meta[key])


def _replace_source(region: Region, entered: fx.Node) -> None:
    for node in region.nodes:
        node.replace_input_with(region.source, entered)
    region.enter.replace_all_uses_with(region.enter.args[0])  # type: ignore[arg-type]


def _enter_parameters(graph: fx.Graph, program: Program, region: Region, over: Over) -> None:
    for p in region.parameters:
        if not any(p in node.all_input_nodes for node in region.nodes):
            continue  # entered together with others
        split = {n for d in p.meta.get("dims", ()) for n in d.over}
        lacking = tuple(n for n in over if n not in split)
        if not lacking:
            continue
        entered = next((u for u in p.users if u.target is runtime.enter and u.args[1] == lacking), None)
        if entered is None:
            first = min(region.nodes, key=_order(graph))
            with graph.inserting_before(first):
                entered = graph.call_function(runtime.enter, (p, lacking))
            entered.meta = {**p.meta, "note": "backward: all-reduce", "because": region.enter.meta.get("because")}
            for key in ("module", "stack", "line"):
                if key in first.meta:
                    entered.meta[key] = first.meta[key]
        for node in region.nodes:
            node.replace_input_with(p, entered)


def _order(graph: fx.Graph):  # type: ignore[no-untyped-def]
    place = {n: i for i, n in enumerate(graph.nodes)}
    return place.__getitem__


def _move_after(graph: fx.Graph, node: fx.Node, x: fx.Node) -> None:
    x.append(node)


def _ordered(program: Program, names: Iterable[str]) -> Over:
    wanted = set(names)
    return tuple(n for n in program.mesh.names if n in wanted)
