"""How libraries that split whole modules would do what a plan does: a style for each module, or why there is none.

Such libraries know `nn.Linear` and `nn.Embedding` and run the model's own code on what a rank holds. An axis is theirs
when every parameter that has it belongs to such a module, every rank holds one even piece, nothing else sums over it,
and no line of the model writes its size down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.api import Sharded
from tpcompiler.axes.map import Relation
from tpcompiler.graphs import cause_of
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.plan.weighing import AxisFacts
from tpcompiler.program import Parameter
from tpcompiler.runtime.mesh import chunk

Style = Literal["column", "row", "table", "head", "shared"]  # "head": column-parallel, its output gathered;
# "shared": every rank holds it whole, and its gradient is the sum over the ranks


@dataclass(frozen=True)
class Unsaid:
    """An axis that other libraries have no words for."""

    axis: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.axis} of {self.where} stays whole: {self.why}"


@dataclass(frozen=True)
class ModuleStyles:
    degree: int
    data: int
    styles: dict[str, Style]  # by the module's name
    unsaid: tuple[Unsaid, ...]
    kinds: frozenset[str]  # of the blocks that are split: attention, mlp, embedding, head


def module_styles(sharded: Sharded, *, shared: bool) -> ModuleStyles:
    """`shared`: whether the library sums the gradient of a parameter that all ranks hold whole and use in parts."""
    reader = _Reader(sharded)
    styles: dict[str, Style] = {}
    kinds: set[str] = set()
    unsaid: dict[tuple[str, ...], Unsaid] = {}
    for leaf in sharded.plan.split:
        fact = sharded.plan.facts.axes[leaf]
        try:
            found = dict(reader.styles(leaf, fact))
            if not shared and "shared" in found.values():
                name = next(n for n, style in found.items() if style == "shared")
                raise _Unsaid(f"{name} is whole on every rank, and its gradient is a sum that only the ranks know")
        except _Unsaid as e:
            name = sharded.plan.names[leaf]
            block = next((b.name for b in sharded.plan.blocks if fact.parameters[0] in b.parameters), "the model")
            unsaid.setdefault((name, block), Unsaid(name, block, str(e)))
        else:
            styles |= found
            kinds |= set(fact.kinds)
    return ModuleStyles(
        sharded.spec.mesh.tensor, sharded.spec.mesh.data, styles, tuple(unsaid.values()), frozenset(kinds)
    )


class _Unsaid(Exception):
    """Why an axis cannot be said; the message is for the user."""


class _Reader:
    def __init__(self, sharded: Sharded) -> None:
        self.sharded = sharded
        self.axes, self.plan = sharded.axes, sharded.plan
        self.nodes: dict[str, fx.Node] = {n.name: n for n in sharded.capture.graph.nodes}
        self.parameters = {p.name: p for p in sharded.capture.parameters}

    @cached_property
    def relations(self) -> dict[int, list[tuple[str, Relation]]]:
        """The ops that say anything about each axis."""
        found: dict[int, list[tuple[str, Relation]]] = defaultdict(list)
        for name, relation in self.axes.relations.items():
            terms = [t for dims in relation.results for t in dims] + [*relation.contracted, *relation.special]
            terms += [t for o in relation.operands for t in o.dims or ()]
            for leaf in {leaf for t in terms for leaf in self.axes.leaves(t)}:
                found[leaf].append((name, relation))
        return found

    @cached_property
    def partial(self) -> dict[int, list[str]]:
        """Parameters that enter a split region whole, by the axis of the region: their gradients are partial."""
        whole = {p.node: p.name for p in self.parameters.values()}
        found: dict[int, list[str]] = defaultdict(list)
        for node in self.sharded.program.graph.nodes:
            if node.target is runtime.enter and node.args[0].name in whole:
                cause = cause_of(node)
                for leaf in cause.axes if cause else ():
                    found[leaf].append(whole[node.args[0].name])
        return found

    def styles(self, leaf: int, fact: AxisFacts) -> Iterator[tuple[str, Style]]:
        """The modules that have the axis, with their styles."""
        if len(self.plan.split[leaf]) != 1 or self.plan.split[leaf][0] != "tensor":
            raise _Unsaid(f"it is split over {'·'.join(self.plan.split[leaf])}, a part of the tensor ranks")
        if len([n for n in self.plan.mesh.names if n != "data"]) > 1:
            raise _Unsaid("kv heads are fewer than the ranks, which hold some of them together")
        head = "head" in fact.kinds
        if head and "embedding" in fact.kinds:
            raise _Unsaid("the embedding and the output layer are one weight, and belong to two modules")
        self._ops(leaf, head)
        for name in fact.parameters:
            yield self._module(self.parameters[name], leaf, head)
        for name in self.partial[leaf]:
            yield name.rpartition(".")[0], "shared"

    def _ops(self, leaf: int, head: bool) -> None:
        """Raises when an op needs more than the modules' own collectives, or a line writes the size down."""
        for name, relation in self.relations[leaf]:
            node = self.nodes[name]
            special = {x for t in relation.special for x in self.axes.leaves(t)}
            summed = {x for t in relation.contracted for x in self.axes.leaves(t)}
            form = relation.rule.form
            if leaf in special and form not in ("lookup", "loss"):
                raise _Unsaid(f"{op_name(node)}{_line(node)} needs sums over all ranks")
            own = form == "lookup" or (form == "loss" and head)  # what the styles "table" and "head" do
            if leaf in summed and not own and node.target != torch.ops.aten.linear.default:
                raise _Unsaid(f"{op_name(node)}{_line(node)} sums over it, outside of a linear layer")
            if not head:
                self._sizes(node, relation, leaf)

    def _sizes(self, node: fx.Node, relation: Relation, leaf: int) -> None:
        for argument, place, term in relation.sizes:
            if leaf not in self.axes.leaves(term):
                continue
            given = bind(node)[argument]
            size = given[place] if place is not None and isinstance(given, (list, tuple)) else given
            if isinstance(size, int) and size != -1:
                raise _Unsaid(f"{op_name(node)}{_line(node)} writes its size, {size}, where a rank has fewer")

    def _module(self, p: Parameter, leaf: int, head: bool) -> tuple[str, Style]:
        module, _, kind = p.name.rpartition(".")
        if p.aliases:
            raise _Unsaid(f"{p.name} is also {p.aliases[0]}")
        dims, mesh = self.sharded.program.dims[p.name], self.plan.mesh
        for dim in dims:
            for rank in range(mesh.size) if dim.over else ():
                coords = mesh.coords(rank)
                start, stop = chunk(dim.size, mesh["tensor"], coords["tensor"])
                if dim.runs(mesh, coords) != (((start, stop),) if stop > start else ()):
                    raise _Unsaid(f"{p.name} is {dim}: a rank does not hold one even piece of it")
        uses = [n for n in self.nodes[p.node].users if n.op == "call_function"]
        at = [i for i, dim in enumerate(dims) if dim.over]
        if len(at) != 1 or not uses:
            raise _Unsaid(f"{p.name} is split along {len(at)} dimensions")
        for use in uses:
            stack = use.meta.get("stack") or (("", "", 0),)
            inside, cls, _ = stack[-1]
            # these libraries look at classes themselves, and refuse all others
            wanted = {"Linear": torch.ops.aten.linear.default, "Embedding": torch.ops.aten.embedding.default}.get(cls)
            if inside != module or use.target != wanted:
                raise _Unsaid(f"{p.name} is used by {op_name(use)}{_line(use)}, not by an nn.Linear or nn.Embedding")
        if uses[0].target == torch.ops.aten.embedding.default:
            if at != [0]:
                raise _Unsaid(f"{p.name} is split along its width")
            return module, "table"
        if kind == "bias" or at == [0]:
            return module, "head" if head else "column"
        return module, "row"


def _line(node: fx.Node) -> str:
    line = node.meta.get("line")
    return "" if line is None else f" ({line[0]}:{line[1]})"
