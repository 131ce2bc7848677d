"""Reads a rank's program as kernels, once. They are then priced at many sizes.

A matrix product, an attention, a lookup and a loss are kernels of their own. Inside a layer, the ops between them are
fused as torch.compile fuses them. Outside of layers, every op is a kernel. Equal kernels are listed once, with their
count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import networkx as nx
import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.gradients import carriers
from tpcompiler.cost.equal_layers import Signatures, layers
from tpcompiler.graphs import tensors
from tpcompiler.ops.operands import tensor_operands
from tpcompiler.ops.table import UNKNOWN, find
from tpcompiler.program import Program

Kind = Literal["product", "attention", "lookup", "head", "loss", "collective", "fused", "view"]
_RUNTIME: dict[Any, Kind] = {
    runtime.entered_linear: "product",
    runtime.lookup: "lookup",
    runtime.linear_cross_entropy: "head",
    runtime.cross_entropy: "loss",
    runtime.reduce: "collective",
    runtime.gather: "collective",
    runtime.enter: "view",
}


@dataclass(frozen=True)
class Kernel:
    """A kernel in forward. Its backward follows from `kind` and from `wanted`."""

    kind: Kind
    node: fx.Node  # the op, or the first of several fused ones
    reads: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...]
    wanted: tuple[fx.Node, ...]  # those of `reads` that get a gradient
    layered: bool  # whether it is in a layer
    again: bool  # whether recomputation runs it again, because backward of its layer needs it
    count: int = 1  # how many equal kernels there are


@dataclass(frozen=True)
class Kept:
    """A value that is kept from forward to backward."""

    node: fx.Node
    layered: bool  # whether it is made in a layer
    product: bool  # whether a matrix product or a collective made it, which selective recomputation keeps
    border: bool  # whether another layer reads it, so that every kind of recomputation keeps it
    count: int = 1  # how many equal values there are


@dataclass(frozen=True)
class Work:
    """What a rank computes and keeps in a forward and backward."""

    kernels: tuple[Kernel, ...]
    kept: tuple[Kept, ...]
    layers: int  # how many layers the program has


def kind_of(node: fx.Node) -> Kind:
    if node.target in _RUNTIME:
        return _RUNTIME[node.target]
    if not isinstance(node.target, torch._ops.OpOverload):
        return "fused" if node.target in (runtime.dropout, runtime.layer_norm, runtime.rms_norm) else "view"
    rule = find(node.target) or UNKNOWN
    if len(rule.products) > 1:
        return "attention"
    if rule.form in ("lookup", "loss"):
        return "lookup" if rule.form == "lookup" else "loss"
    schema = node.target._schema
    if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
        return "view"
    multiplies = rule.product is not None or rule.products or (rule.sums and len(_values(node)) > 1)
    return "product" if multiplies else "fused"


def _values(node: fx.Node) -> list[fx.Node]:
    return [n for n in tensor_operands(node) if n is not None]


class WorkReader:
    """Reads a program's graph. `work` returns the result."""

    def __init__(self, program: Program) -> None:
        graph = program.graph
        self.nodes = [n for n in graph.nodes if n.op == "call_function" and tensors(n.meta.get("val"))]
        self.kinds = {n: kind_of(n) for n in self.nodes}
        self.live = carriers(graph, program.capture.asked)
        self.parameters = {p.node for p in program.capture.parameters}
        self.signatures = Signatures()
        self.layer = layers(self.nodes, self.signatures)
        self.roots: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            if self.kinds[node] == "view" and node.all_input_nodes:
                self.roots[node] = self.root(node.all_input_nodes[0])
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.groups = self._groups()
        self.kept = self._kept()
        self.again = self._again(self.kept)

    def root(self, node: fx.Node) -> fx.Node:
        """The value whose memory a view shares; any other node itself."""
        return self.roots.get(node, node)

    def work(self) -> Work:
        kernels = self._folded_kernels(map(self.kernel, self.groups))
        return Work(kernels, self._folded_kept(self.kept), len({frame for frame in self.layer.values() if frame}))

    def _groups(self) -> list[list[fx.Node]]:
        """The nodes of each kernel: a single node, or neighbours in a layer that no other kind of kernel separates."""
        level: dict[fx.Node, int] = defaultdict(int)
        graph: nx.Graph[Any] = nx.Graph()
        for node in self.nodes:
            kind = self.kinds[node]
            if kind == "view":
                continue
            inputs = [self.root(n) for n in node.all_input_nodes]
            apart = kind != "fused"
            level[node] = max((level[n] + (apart or self.kinds.get(n, "fused") != "fused") for n in inputs), default=0)
            graph.add_node(node)
            if apart or not self.layer.get(node):
                continue
            for other in inputs:
                near = other in graph and level[other] == level[node] and self.layer.get(other) == self.layer[node]
                if near and self.kinds[other] == "fused":
                    graph.add_edge(node, other)
        groups = [sorted(group, key=self.order.__getitem__) for group in nx.connected_components(graph)]
        return sorted(groups, key=lambda g: self.order[g[0]])

    def _reads(self, group: Sequence[fx.Node]) -> list[fx.Node]:
        inside = set(group)
        found = (self.root(n) for node in group for n in node.all_input_nodes if tensors(n.meta.get("val")))
        return [n for n in dict.fromkeys(found) if n not in inside]

    def _writes(self, group: Sequence[fx.Node]) -> list[fx.Node]:
        inside = set(group)
        return [n for n in group if any(user not in inside for user in self._users(n))]

    def _users(self, node: fx.Node) -> Iterable[fx.Node]:
        for user in node.users:
            if self.kinds.get(user) == "view":
                yield from self._users(user)
            else:
                yield user

    def _kept(self) -> list[fx.Node]:
        """The values that backward reads: the operands of products and attention, and for a fused kernel values from
        which the others can be computed again."""
        kept: dict[fx.Node, None] = {}
        for group in self.groups:
            kind = self.kinds[group[0]]
            if kind == "fused":
                self._keep_fused(group, kept)
            elif kind in ("product", "head", "attention") and group[0].name in self.live:
                kept.update(dict.fromkeys(filter(self._computed, self._reads(group))))
                if kind == "attention":
                    kept[group[0]] = None
        return list(kept)

    def _keep_fused(self, group: Sequence[fx.Node], kept: dict[fx.Node, None]) -> None:
        inside = set(group)

        def derivable(node: fx.Node) -> bool:
            return node in kept or (
                node in inside and all(derivable(n) for n in map(self.root, node.all_input_nodes) if self._computed(n))
            )

        for node in group:
            rule = find(node.target) or UNKNOWN
            if node.name not in self.live or rule.forgets or node.target is runtime.dropout:
                continue
            for read in map(self.root, node.all_input_nodes):
                if self._computed(read) and not derivable(read):
                    kept[read] = None

    def _computed(self, node: fx.Node) -> bool:
        """Whether the program computes a value from parameters, so that it is neither a parameter nor a constant."""
        return node.name in self.live and node.name not in self.parameters and node.op == "call_function"

    def _again(self, kept: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes that recomputation runs again: those that a kept value depends on which their own layer reads. A
        value that only later layers read is kept anyway."""
        out: set[fx.Node] = set()
        wanted = {n for n in kept if any(self.layer.get(u) == self.layer.get(n) for u in self._users(n))}
        for node in reversed(self.nodes):
            layer = self.layer.get(node)
            if layer and (node in wanted or any(u in out and self.layer.get(u) == layer for u in node.users)):
                out.add(node)
        return out

    def kernel(self, group: Sequence[fx.Node]) -> Kernel:
        """The nodes of one kernel as what they read, compute and write."""
        reads, writes = self._reads(group), self._writes(group)
        alive = any(n.name in self.live for n in group)
        wanted = tuple(n for n in reads if alive and n.name in self.live)
        layered = bool(self.layer.get(group[0]))
        return Kernel(
            self.kinds[group[0]],
            group[0],
            tuple(reads),
            tuple(writes),
            wanted,
            layered,
            any(n in self.again for n in group),
        )

    def _folded_kernels(self, kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
        out: dict[Any, Kernel] = {}
        for k in kernels:
            said = (tuple(map(self.signatures, nodes)) for nodes in ((k.node,), k.reads, k.writes, k.wanted))
            key = (k.kind, k.layered, k.again, *said)
            out[key] = replace(out[key], count=out[key].count + 1) if key in out else k
        return tuple(out.values())

    def _folded_kept(self, kept: Iterable[fx.Node]) -> tuple[Kept, ...]:
        out: dict[Any, Kept] = {}
        for node in kept:
            layer = self.layer.get(node)
            border = any(layer != (there := self.layer.get(u)) and there for u in self._users(node))
            product = self.kinds.get(node) in ("product", "collective")
            k = Kept(node, bool(layer), product, border)
            key = (self.signatures(node), k.layered, product, border)
            out[key] = replace(out[key], count=out[key].count + 1) if key in out else k
        return tuple(out.values())
