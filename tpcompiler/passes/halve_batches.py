"""Marks lists of layers whose halves of a batch are computed in turn: layers(x) → join_batch(layers(cut_batch(x))).

The marked part begins where a value enters the first of the layers and ends where one leaves the last. Whether the
operations between the marks treat samples apart from each other is not asked here: the checker refuses what does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.errors import TpcError
from tpcompiler.graphs import call, copy_graph, copy_value
from tpcompiler.program import Program


def halve_batches(program: Program) -> Program:
    """Marks every list of layers that communicates. Raises `TpcError` when none can be marked, with the reason.

    A program that does not communicate stays as it is.
    """
    if not any(n.target is runtime.reduce for n in program.graph.nodes):
        return program
    graph = copy_graph(program.graph)
    reasons = []
    marked = 0
    for layers in _lists(graph):
        if not any(n.target is runtime.reduce for n in layers.nodes):
            continue
        found = _values(layers)
        if isinstance(found, str):
            reasons.append(f"{layers.name}: {found}")
            continue
        _mark(graph, layers, *found)
        marked += 1
    if not marked:
        why = "; ".join(reasons) or "the model has no list of layers that communicates"
        raise TpcError(f"overlap: halves is not possible: {why}; overlap: true would work")
    return replace(program, graph=graph)


@dataclass(frozen=True)
class _Layers:
    """A list of modules, called one after the other, each once."""

    name: str
    members: tuple[tuple[fx.Node, ...], ...]
    depth: int  # how many calls are around a member's

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for member in self.members for n in member]


def _lists(graph: fx.Graph) -> Iterator[_Layers]:
    """The outermost lists of two modules or more, in the graph's order.

    Members of `nn.ModuleList` and `nn.Sequential` are named by numbers. The emitted source calls such a list by its
    name, so nothing else can be marked.
    """
    found: dict[str, dict[int, list[fx.Node]]] = {}
    depths: dict[str, int] = {}
    for node in graph.nodes:
        for depth, (path, *_) in enumerate(node.meta.get("stack", ())):
            container, _, last = path.rpartition(".")
            if last.isdigit():
                found.setdefault(container, {}).setdefault(int(last), []).append(node)
                depths[container] = depth
                break
    for name, members in found.items():
        if len(members) > 1:
            yield _Layers(name, tuple(map(tuple, members.values())), depths[name])


def _values(layers: _Layers) -> tuple[list[fx.Node], fx.Node] | str:
    """The values with a row a sample that enter, the one that goes from layer to layer first, and the one that leaves.

    Or why the layers cannot be marked.
    """
    left = [_leaving(member) for member in layers.members]
    if any(len(values) != 1 for values in left):
        return "a layer gives more than one value to what follows"
    last = left[-1][0]
    for (made,), after in zip(left[:-1], layers.members[1:], strict=True):
        if any(u not in after for u in made.users):
            return f"the result of a layer, {made.name}, is used beyond the next layer"
    inside = set(layers.nodes)
    entering = list(dict.fromkeys(o for n in layers.nodes for o in n.all_input_nodes if o not in inside))
    batch = last.meta["val"].shape[0] if last.meta["val"].dim() else None
    if not isinstance(batch, torch.SymInt):
        return "the batch is a fixed number or not the first dimension"
    counted = [v for v in entering if isinstance(v.meta.get("val"), torch.Tensor) and _has(v.meta["val"], batch)]
    if odd := next((v for v in counted if str(v.meta["val"].shape[0]) != str(batch)), None):
        return f"{odd.name} has the batch, but not as its first dimension"
    first = set(layers.members[0])
    carried = [v for v in counted if all(u in first for u in v.users if u in inside)]
    if len(carried) != 1:
        return "more than one value changes from layer to layer"
    return [*carried, *(v for v in counted if v not in carried)], last


def _leaving(member: tuple[fx.Node, ...]) -> list[fx.Node]:
    own = set(member)
    return [n for n in member if any(u not in own for u in n.users)]


def _has(val: torch.Tensor, batch: torch.SymInt) -> bool:
    return any(isinstance(n, torch.SymInt) and batch.node.expr in n.node.expr.free_symbols for n in val.shape)


def _mark(graph: fx.Graph, layers: _Layers, entering: list[fx.Node], last: fx.Node) -> None:
    inside = set(layers.nodes)
    around = layers.members[0][0].meta["stack"][: layers.depth]
    first = next(n for n in graph.nodes if n in inside)
    for value in entering:
        with graph.inserting_before(first):
            cut = _between(call(graph, runtime.cut_batch, (value,)), value, around, "halves of the batch in turn")
        for user in [u for u in value.users if u in inside]:
            user.replace_input_with(value, cut)
    with graph.inserting_after(last):
        joined = _between(call(graph, runtime.join_batch, (last,)), last, around, "")
    for user in [u for u in last.users if u not in inside and u is not joined]:
        user.replace_input_with(last, joined)


def _between(node: fx.Node, like: fx.Node, stack: tuple[tuple[str, str, int], ...], note: str) -> fx.Node:
    """A mark stands where the list of layers is called, beside it."""
    copy_value(node, like, note)
    node.meta |= {"stack": stack, "module": stack[-1][0] if stack else ""}
    return node
