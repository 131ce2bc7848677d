"""Builds one rank's graph: keeps the local form of every plain value, and adds the nodes that any rewrite may need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from tpcompiler import runtime
from tpcompiler.axes.infer import AxisMap, Relation
from tpcompiler.errors import PlanError
from tpcompiler.graphs import ORIGIN, call, layout_of, place_node, placed
from tpcompiler.layout import Dim, Factor, LocalRuns, Over
from tpcompiler.ops.operands import bind, op_name
from tpcompiler.partition.folded import apart, together
from tpcompiler.plan import Plan
from tpcompiler.program import Capture, Cause, Placed


class CannotSplit(PlanError):
    """Raised for axes that have no form on one rank. Only a plan's layouts show this. The next plan excludes them."""

    def __init__(self, node: str, why: str, leaves: tuple[int, ...]) -> None:
        super().__init__(f"{why} (at {node})")
        self.node, self.why, self.leaves = node, why, leaves


@dataclass(frozen=True)
class Applied:
    """A node of the plain graph with the relation that its rule gave, and its operands on this rank."""

    node: fx.Node
    relation: Relation
    inputs: Mapping[fx.Node, fx.Node]  # plain value → this rank's value

    @cached_property
    def name(self) -> str:
        return op_name(self.node)

    @cached_property
    def args(self) -> dict[str, Any]:
        """The plain arguments by their schema names, defaults filled in."""
        return bind(self.node)


class Builder:
    """One rank's graph while it is built. All users of a value share its `enter` and its `take`."""

    def __init__(self, capture: Capture, axes: AxisMap, plan: Plan) -> None:
        self.capture, self.axes, self.plan = capture, axes, plan
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # plain value → this rank's value
        self.sites = 0  # calls of dropout so far
        self._entered: dict[tuple[fx.Node, Over], fx.Node] = {}
        self._taken: dict[tuple[fx.Node, int, Dim], fx.Node] = {}

    # -- what the plan says about terms -----------------------------------------------------------------------------

    def dim(self, term: int | None) -> Dim:
        return self.plan.dim(self.axes, term)

    def dims(self, terms: Sequence[int | None]) -> tuple[Dim, ...]:
        return self.plan.dims(self.axes, tuple(terms))

    def split_axes(self, terms: Sequence[int | None]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(leaf for t in terms for leaf in self.axes.leaves(t) if leaf in self.plan.split))

    def over(self, terms: Sequence[int | None]) -> Over:
        """The mesh dimensions that split any axis of these terms."""
        return self.in_order({n for leaf in self.split_axes(terms) for n in self.plan.split[leaf]})

    def in_order(self, names: set[str]) -> Over:
        return tuple(n for n in self.plan.mesh.names if n in names)

    def lacking(self, terms: Sequence[int | None], present: Over) -> Over:
        """The mesh dimensions in `present` that split none of these terms."""
        mine = self.over(terms)
        return tuple(n for n in present if n not in mine)

    def refuse(self, node: fx.Node, why: str, *terms: int | None) -> CannotSplit:
        """The error for the split axes of these terms, ready to raise."""
        return CannotSplit(node.name, why, self.split_axes(terms))

    # -- nodes ------------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Adds a call. Its node has no metadata yet."""
        return call(self.graph, target, args)

    def copy(self, node: fx.Node) -> fx.Node:
        """Adds a plain node as it is, on this rank's operands."""
        return self.describe(self.graph.node_copy(node, self.env.__getitem__), node)

    def describe(
        self,
        new: fx.Node,
        like: fx.Node,
        dims: Sequence[Dim] | None = None,
        note: str = "",
        cause: Cause | None = None,
    ) -> fx.Node:
        """Gives a new node the metadata of the plain node that it stands for, and a layout (by default the plan's)."""
        for key in ("val", *ORIGIN):
            if key in like.meta and key not in new.meta:
                new.meta[key] = like.meta[key]
        known = placed(new)
        if dims is not None:
            layouts: tuple[tuple[Dim, ...], ...] = (tuple(dims),)
        elif like.name in self.axes.cut:
            layouts = (self.dims(self.axes.relations[like.name].results[0]),)
        elif like.name in self.axes.values:
            layouts = tuple(self.dims(terms) for terms in self.axes.values[like.name])
        else:
            layouts = known.layouts
        place_node(new, Placed(layouts, note or known.note, cause or known.cause))
        return new

    def insert(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        note: str,
        dims: Sequence[Dim] | None = None,
        cause: Cause | None = None,
    ) -> fx.Node:
        """Adds a call of a runtime operator. `cause` tells the list of collectives which op and axes need it."""
        return self.describe(self.call(target, *args), like, dims, note, cause)

    def enter(self, value: fx.Node, source: fx.Node, over: Over, cause: Cause) -> fx.Node:
        """The value with a gradient that is summed over ranks: the operator *f* of Megatron-LM (arXiv 1909.08053, §3).

        `source` is the plain value.
        """
        if (value, over) not in self._entered:
            self._entered[value, over] = self.insert(
                runtime.enter, (value, over), source, "backward: all-reduce", layout_of(value), cause
            )
        return self._entered[value, over]

    def take(self, value: fx.Node, source: fx.Node, i: int, dim: Dim) -> fx.Node:
        """This rank's part, along dimension `i` with layout `dim`, of a value that it holds whole."""
        if (value, i, dim) not in self._taken:
            dims = list(layout_of(value) or [Factor(1)] * source.meta["val"].dim())
            dims[i] = dim
            opened = apart(self.graph, value, i, dim, whole=True)
            args = (opened.value, opened.at, LocalRuns(opened.dim))
            new = self.insert(runtime.take, args, source, "this rank's part", dims)
            self._taken[value, i, dim] = self.describe(together(self.graph, new, opened), source, dims)
        return self._taken[value, i, dim]
