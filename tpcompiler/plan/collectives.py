"""Reads a program's collectives off its graph. `tpc shard` lists them; `tpc verify` checks a run against the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.gradients import carriers
from tpcompiler.graphs import cause_of, example_size, layout_of, operand, over
from tpcompiler.layout import Mesh
from tpcompiler.plan import Plan, common_name
from tpcompiler.program import Cause, Collective, Program
from tpcompiler.runtime.head import CHUNK

FORWARD, BACKWARD = "forward", "backward"


def list_collectives(program: Program, plan: Plan) -> tuple[Collective, ...]:
    """All collectives of one forward and backward in the graph's order, with rank 0's bytes at the example's sizes."""
    reader = CollectiveReader(program, plan)
    return tuple(c for node in program.graph.nodes if node.op == "call_function" for c in reader.of(node))


def folded(collectives: tuple[Collective, ...], plan: Plan) -> tuple[Collective, ...]:
    """The collectives, with those of equal layers listed once. The entry has their count and the first one's node."""
    out: dict[tuple[Any, ...], Collective] = {}
    for c in collectives:
        name, _, kind = c.block.partition(" · ")
        block = f"{_plan_name(plan, kind, name)} · {kind}"
        key = (c.kind, c.direction, c.over, c.shape, c.dtype, c.bytes, block, c.reason)
        out[key] = replace(out[key], count=out[key].count + 1) if key in out else replace(c, block=block)
    return tuple(out.values())


def _plan_name(plan: Plan, kind: str, name: str) -> str:
    """The name of the plan's block that a layer's block belongs to: h.3.mlp → h.*.mlp. Without one, its own name."""
    for b in plan.blocks:
        if b.kind == kind and any(p == name or p.startswith(name + ".") for p in b.parameters):
            return b.name
    return name


class CollectiveReader:
    """Reads the collectives of single nodes, with shapes and bytes on rank 0.

    `number` gives a symbolic size its value, by default the example's. `mesh` is by default the program's. `live` are
    the nodes that gradients flow through, by default at the example's inputs.
    """

    KINDS = (
        runtime.reduce,
        runtime.enter,
        runtime.entered_linear,
        runtime.gather,
        runtime.cross_entropy,
        runtime.linear_cross_entropy,
        runtime.rms_norm,
        runtime.layer_norm,
    )

    def __init__(
        self,
        program: Program,
        plan: Plan,
        number: Callable[[Any], int] = example_size,
        mesh: Mesh | None = None,
        live: frozenset[str] | None = None,
    ) -> None:
        self.program, self.plan, self.number = program, plan, number
        self.mesh = mesh or program.mesh
        self.coords = self.mesh.coords(0)
        self.carriers = carriers(program.graph, program.capture.asked) if live is None else live
        self.halved = _halved(program.graph)
        methods = (
            self.reduce,
            self.enter,
            self.entered_linear,
            self.gather,
            self.cross_entropy,
            self.linear_cross_entropy,
            self.norm,
            self.norm,
        )
        self.rules: dict[Any, Callable[[fx.Node], Iterator[Collective]]] = dict(zip(self.KINDS, methods, strict=True))

    def of(self, node: fx.Node) -> Iterator[Collective]:
        """The collectives of one node, forward before backward."""
        rule = self.rules.get(node.target)
        return iter(()) if rule is None else rule(node)

    # -- by operator ------------------------------------------------------------------------------------------------

    def reduce(self, node: fx.Node) -> Iterator[Collective]:
        cause = self.cause(node)
        what = "looks up" if cause.form == "lookup" else "contracts"
        yield self.of_value(node, "all_reduce", FORWARD, f"{cause.op} {what} {self.axis_names(node)}")

    def enter(self, node: fx.Node) -> Iterator[Collective]:
        if operand(node).name not in self.carriers:
            return  # an input whose gradient the example does not ask for
        yield self.of_value(node, "all_reduce", BACKWARD, f"gradient of what enters {self.axis_names(node)}")

    def entered_linear(self, node: fx.Node) -> Iterator[Collective]:
        x, reason = operand(node), f"gradient of what enters {self.axis_names(node)}, beside the weights'"
        dtype = x.meta["val"].dtype
        yield self.make(node, "all_reduce", BACKWARD, over(node), self.local(x), dtype, reason)

    def gather(self, node: fx.Node) -> Iterator[Collective]:
        yield self.of_value(node, "all_gather", FORWARD, f"{self.axis_names(node)} leaves whole")

    def norm(self, node: fx.Node) -> Iterator[Collective]:
        shape, dtype = (*self.local(node)[:-1], 1), _accumulated(node.meta["val"].dtype)
        names = self.axis_names(node)
        for what in ("mean", "variance") if node.target is runtime.layer_norm else ("mean square",):
            yield self.make(node, "all_reduce", FORWARD, over(node), shape, dtype, f"{what} over {names}")
            if operand(node).name in self.carriers:  # else an input whose gradient the example does not ask for
                reason = f"gradient of the {what} over {names}"
                yield self.make(node, "all_reduce", BACKWARD, over(node), shape, dtype, reason)

    def cross_entropy(self, node: fx.Node) -> Iterator[Collective]:
        tokens = prod(self.number(n) for n in operand(node, 1).meta["val"].shape)
        dtype = _accumulated(operand(node).meta["val"].dtype)
        names: Any = node.args[2]
        weighted, smooth = node.kwargs.get("weight") is not None, bool(node.kwargs.get("label_smoothing"))
        rows = 2 + weighted + smooth
        reason = "maximum of the logits, a number a token"
        yield self.make(node, "all_reduce", FORWARD, names, (tokens,), dtype, reason)
        reason = f"sums of the loss, {rows} numbers a token"
        yield self.make(node, "all_reduce", FORWARD, names, (rows * tokens + 1 + weighted,), dtype, reason)

    def linear_cross_entropy(self, node: fx.Node) -> Iterator[Collective]:
        if len(node.args) < 4:
            return  # every rank has all classes
        x, names = operand(node), over(node, 3)
        tokens = prod(self.number(n) for n in operand(node, 2).meta["val"].shape)
        dtype = _accumulated(node.kwargs.get("dtype") or x.meta["val"].dtype)  # type: ignore[arg-type]
        for done in range(0, tokens, CHUNK):
            shape = (self.mesh.degree(names), 3, min(CHUNK, tokens - done))
            yield self.make(node, "all_gather", FORWARD, names, shape, dtype, "sums of the loss, 3 numbers a token")
        if x.name in self.carriers:
            reason = f"gradient of what enters {self.axis_names(node)}, beside the weight's"
            yield self.make(node, "all_reduce", BACKWARD, names, self.local(x), x.meta["val"].dtype, reason)

    # -- of a node --------------------------------------------------------------------------------------------------

    def of_value(self, node: fx.Node, kind: str, direction: str, reason: str) -> Collective:
        """A collective that communicates the node's own value."""
        return self.make(node, kind, direction, over(node), self.local(node), node.meta["val"].dtype, reason)

    def make(
        self,
        node: fx.Node,
        kind: str,
        direction: str,
        names: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        reason: str,
    ) -> Collective:
        size, halved = dtype.itemsize * prod(shape), node in self.halved
        reason += ", in two halves" if halved else ""
        return Collective(
            kind, direction, tuple(names), shape, dtype, node.name, self.block(node), reason, size, halved=halved
        )

    def cause(self, node: fx.Node) -> Cause:
        """The op and the split axes that need the collective."""
        return cause_of(node) or Cause("", ())

    def axis_names(self, node: fx.Node) -> str:
        return " and ".join(dict.fromkeys(self.plan.names[a] for a in self.cause(node).axes))

    def block(self, node: fx.Node) -> str:
        """The block whose axis needs the collective: `h.3.mlp · mlp`."""
        cause = self.cause(node)
        if not cause.axes:
            return "model · other"
        fact = self.plan.facts.axes[cause.axes[0]]
        kind = fact.kinds[0]
        if len(fact.kinds) > 1:  # a tied vocabulary: the embedding looks it up, the output layer contracts it
            kind = "embedding" if cause.form == "lookup" else "head" if "head" in fact.kinds else kind
        split = any(b.kind == kind and fact.parameters[0] in b.parameters for b in self.plan.blocks)
        return f"{common_name(fact.parameters)} · {kind if split else fact.kinds[0]}"

    def local(self, node: fx.Node) -> tuple[int, ...]:
        """A value's shape on rank 0 at the example's sizes."""
        mesh = self.mesh
        shape = [self.number(n) for n in node.meta["val"].shape]
        for i, dim in enumerate(layout_of(node) or ()):
            if not dim.over:
                continue
            if dim.dynamic_size:
                static = (leaf.local_size(mesh, self.coords) / leaf.size for leaf in dim.leaves if leaf.split)
                shape[i] = round(shape[i] * prod(static))
            else:
                shape[i] = dim.local_size(mesh, self.coords)
        return tuple(shape)


def _halved(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of layers between `cut_batch` and `join_batch`: they run once for each half of a batch."""
    found: set[fx.Node] = set()
    around: int | None = None
    for node in graph.nodes:
        if node.target in (runtime.cut_batch, runtime.join_batch):
            around = len(node.meta["stack"]) if node.target is runtime.cut_batch else None
        elif around is not None and len(node.meta.get("stack", ())) > around:
            found.add(node)
    return found


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the runtime sums the statistics of a value."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
