"""The collectives of a program, read off its graph: what `tpc shard` lists, and what a run must be seen to execute."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.plan import Block, Plan, common_name
from tpcompiler.program import Collective, Program

FORWARD, BACKWARD = "forward", "backward"


def list_collectives(program: Program, plan: Plan) -> tuple[Collective, ...]:
    """Every collective of one forward and backward, in the graph's order; bytes at the example's sizes, on rank 0."""
    reader = _Reader(program, plan)
    return tuple(c for node in program.graph.nodes if node.op == "call_function" for c in reader.of(node))


def folded(collectives: tuple[Collective, ...], plan: Plan) -> tuple[Collective, ...]:
    """Those of equal layers as one, with their count; the first one's node stands for all."""
    names = {(b.kind, p): b.name for b in plan.blocks for p in b.parameters}
    out: dict[tuple[Any, ...], Collective] = {}
    for c in collectives:
        name, _, kind = c.block.partition(" · ")
        whole = names.get((kind, name), name)
        block = f"{plan_name(plan, kind, name) or whole} · {kind}"
        key = (c.kind, c.direction, c.over, c.shape, c.dtype, c.bytes, block, c.reason)
        out[key] = replace(out[key], count=out[key].count + 1) if key in out else replace(c, block=block)
    return tuple(out.values())


def plan_name(plan: Plan, kind: str, name: str) -> str | None:
    """The block of the plan that a layer's block belongs to: h.3.mlp → h.*.mlp."""
    for b in plan.blocks:
        if b.kind == kind and any(p == name or p.startswith(name + ".") for p in b.parameters):
            return b.name
    return None


class _Reader:
    def __init__(self, program: Program, plan: Plan) -> None:
        self.program, self.plan = program, plan
        self.coords = program.mesh.coords(0)
        self.rules: dict[Any, Callable[[fx.Node], Iterator[Collective]]] = {
            runtime.reduce: self.reduce,
            runtime.enter: self.enter,
            runtime.gather: self.gather,
            runtime.cross_entropy: self.cross_entropy,
            runtime.rms_norm: self.norm,
            runtime.layer_norm: self.norm,
        }

    def of(self, node: fx.Node) -> Iterator[Collective]:
        rule = self.rules.get(node.target)
        return iter(()) if rule is None else rule(node)

    def make(
        self,
        node: fx.Node,
        kind: str,
        direction: str,
        over: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        reason: str,
    ) -> Collective:
        return Collective(
            kind,
            direction,
            tuple(over),
            shape,
            dtype,
            node.name,
            self.block(node),
            reason,
            dtype.itemsize * prod(shape),
        )

    def axes(self, node: fx.Node) -> tuple[int, ...]:
        return node.meta.get("because", ("", ()))[1]

    def axis_names(self, node: fx.Node) -> str:
        return " and ".join(dict.fromkeys(self.plan.names[a] for a in self.axes(node)))

    def block(self, node: fx.Node) -> str:
        """`h.3.mlp · mlp`: the block whose axis is the reason."""
        op, axes = node.meta.get("because", ("", ()))
        if not axes:
            return "model · other"
        fact = self.plan.facts.axes[axes[0]]
        kind = fact.kinds[0]
        if len(fact.kinds) > 1:  # a tied vocabulary is looked up at one end and contracted at the other
            kind = "embedding" if op == "embedding" else "head" if "head" in fact.kinds else kind
        own: Block | None = next(
            (b for b in self.plan.blocks if b.kind == kind and fact.parameters[0] in b.parameters), None
        )
        return f"{common_name(fact.parameters)} · {kind if own is not None else fact.kinds[0]}"

    def local(self, node: fx.Node) -> tuple[int, ...]:
        """A value's shape on rank 0 at the example's sizes."""
        dims = node.meta.get("dims") or ()
        shape = [example_size(n) for n in node.meta["val"].shape]
        for i, dim in enumerate(dims):
            if dim.over:
                static = prod(
                    leaf.local_size(self.program.mesh, self.coords) / leaf.size for leaf in dim.leaves if leaf.split
                )
                shape[i] = (
                    round(shape[i] * static) if dim.dynamic_size else dim.local_size(self.program.mesh, self.coords)
                )
        return tuple(shape)

    def reduce(self, node: fx.Node) -> Iterator[Collective]:
        op = node.meta.get("because", ("", ()))[0]
        what = "looks up" if op == "embedding" else "contracts"
        yield self.make(
            node,
            "all_reduce",
            FORWARD,
            node.args[1],
            self.local(node),
            node.meta["val"].dtype,
            f"{op} {what} {self.axis_names(node)}",
        )

    def enter(self, node: fx.Node) -> Iterator[Collective]:
        shape, dtype = self.local(node), node.meta["val"].dtype
        yield self.make(
            node, "all_reduce", BACKWARD, node.args[1], shape, dtype, f"gradient of what enters {self.axis_names(node)}"
        )

    def gather(self, node: fx.Node) -> Iterator[Collective]:
        shape = self.local(node)
        yield self.make(
            node,
            "all_gather",
            FORWARD,
            node.args[1],
            shape,
            node.meta["val"].dtype,
            f"{self.axis_names(node)} leaves whole",
        )

    def norm(self, node: fx.Node) -> Iterator[Collective]:
        shape = (*self.local(node)[:-1], 1)
        dtype = node.meta["val"].dtype
        dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        for what in ("mean", "variance") if node.target is runtime.layer_norm else ("mean square",):
            yield self.make(
                node, "all_reduce", FORWARD, node.args[1], shape, dtype, f"{what} over {self.axis_names(node)}"
            )
            yield self.make(
                node,
                "all_reduce",
                BACKWARD,
                node.args[1],
                shape,
                dtype,
                f"gradient of the {what} over {self.axis_names(node)}",
            )

    def cross_entropy(self, node: fx.Node) -> Iterator[Collective]:
        logits, target = node.args[0], node.args[1]
        assert isinstance(logits, fx.Node) and isinstance(target, fx.Node)
        tokens = prod(example_size(n) for n in target.meta["val"].shape)
        dtype = logits.meta["val"].dtype
        dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        weighted, smooth = node.kwargs.get("weight") is not None, bool(node.kwargs.get("label_smoothing"))
        yield self.make(
            node, "all_reduce", FORWARD, node.args[2], (tokens,), dtype, "maximum of the logits, a number a token"
        )
        rows = 2 + weighted + smooth
        yield self.make(
            node,
            "all_reduce",
            FORWARD,
            node.args[2],
            (rows * tokens + 1 + weighted,),
            dtype,
            f"sums of the loss, {rows} numbers a token",
        )


def example_size(n: int | torch.SymInt) -> int:
    """A size at the example inputs."""
    if isinstance(n, int):
        return n
    env = n.node.shape_env
    examples = getattr(env, "backed_var_to_val", None) or env.var_to_val
    return int(n.node.expr.subs(examples))
