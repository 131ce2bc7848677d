"""One rank's program as terms. Collectives are opaque, and rows are those of all ranks with the same sizes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tpcompiler import runtime
from tpcompiler.check.calls import runtime_signature
from tpcompiler.check.claims import Geometry
from tpcompiler.check.forward import live_nodes
from tpcompiler.check.meanings import packet
from tpcompiler.check.normal_form import Forms
from tpcompiler.check.sizes import ENDLESS, Sizes
from tpcompiler.check.terms import Term
from tpcompiler.check.translate import Translator, described_value
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.program import Program, Training
from tpcompiler.runtime import Group
from tpcompiler.runtime.runs import length

_ALIKE = (  # of the shape and dtype of their operand
    *(runtime.enter, runtime.reduce, runtime.dropout, runtime.rms_norm, runtime.layer_norm),
    *(runtime.cut_batch, runtime.join_batch),
)


_CUTTING = ("slice", "select", "narrow")


@dataclass(frozen=True)
class RankRows:
    """The rows that each rank of a class holds. No program can look into it: its numbers are another rank's too."""

    of_class: tuple[Any, ...]


@dataclass(frozen=True)
class RankClass:
    """Ranks whose local sizes are all equal. The source makes the same calls on them and differs only in the rows."""

    ranks: tuple[int, ...]

    @property
    def first(self) -> int:
        return self.ranks[0]


class OneRank(Translator):
    """Turns one rank's calls into terms, and records what the rank sends, in order."""

    def __init__(self, forms: Forms, geometry: Geometry, ranks: RankClass) -> None:
        super().__init__(forms)
        self.geometry = geometry
        self.ranks = ranks
        self.sent: list[Term] = []
        self.cuts: set[int] = set()  # the numbers at which values are sliced
        self._rows_known: dict[Any, int] = {}
        self._resolved: dict[Any, Any] = {}

    def restart(self) -> None:
        super().restart()
        self.sent, self.cuts = [], set()

    def aten(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Any = None) -> Any:
        if packet(target) in _CUTTING:
            numbers = (a for a in args[2:] if isinstance(a, int))
            self.cuts.update(abs(n) for n in numbers if abs(n) < ENDLESS)
        return super().aten(target, args, kwargs, known)

    def rows(self, rows: Any) -> tuple[str, int]:
        """A name for the rows that the ranks of the class hold; equal rows have one name."""
        if isinstance(rows, RankRows):
            key: Any = rows.of_class
        elif isinstance(rows, LocalRuns):
            if rows not in self._resolved:
                mesh, coords = self.geometry.mesh, self.geometry.coords
                self._resolved[rows] = tuple(rows.resolve(mesh, coords[r]) for r in self.ranks.ranks)
            key = self._resolved[rows]
        else:
            key = (_tuples(rows),) * len(self.ranks.ranks)
        return ("rows", self._rows_known.setdefault(key, len(self._rows_known)))

    def groups_rows(self, rows: Any, over: tuple[str, ...]) -> tuple[str, int]:
        """A name for the rows of all members of the groups over `over` that the ranks of the class belong to."""
        if isinstance(rows, LocalRuns):
            if (rows, over) not in self._resolved:
                mesh, coords = self.geometry.mesh, self.geometry.coords
                where = {r: g for g in self.geometry.groups(over) for r in g}
                made = {g: tuple(rows.resolve(mesh, coords[q]) for q in g) for g in set(where.values())}
                self._resolved[rows, over] = tuple(made[where[r]] for r in self.ranks.ranks)
            key = self._resolved[rows, over]
        else:
            key = (_tuples(rows),) * len(self.ranks.ranks)
        return ("groups", self._rows_known.setdefault(key, len(self._rows_known)))

    def mine(self, rows: Any) -> Any:
        """The rows of the class's first rank."""
        if isinstance(rows, LocalRuns):
            return rows.resolve(self.geometry.mesh, self.geometry.coords[self.ranks.first])
        return rows.of_class[0] if isinstance(rows, RankRows) else rows

    def runtime(self, target: Any, a: dict[str, Any], known: Any) -> Any:
        signature = runtime_signature(target)
        assert signature is not None
        given = {n: p.default for n, p in signature.parameters.items() if p.default is not p.empty} | a
        over: tuple[str, ...] = ()
        if given.get("group") is not None:
            group = given["group"]
            over = given["group"] = group.over if isinstance(group, Group) else tuple(group)
        described = self._described(target, given, over)
        given.pop("rng", None)
        if target is runtime.gather:
            given["rows"] = self.groups_rows(given["rows"], over)
        elif target is runtime.dropout:
            given["rows"] = tuple((d, n, self.rows(r)) for d, n, r in given["rows"])
        elif given.get("rows") is not None:
            given["rows"] = self.rows(given["rows"])
        name, arguments = f"runtime.{target.__name__}", tuple(sorted(given.items()))
        several = isinstance(described, list)
        numbered = enumerate(described if several else [described])
        terms = tuple(self.forms.make(name, (i, *arguments) if several else arguments, *one) for i, one in numbered)
        if over:
            self.sent.append(terms[0])
        return terms if several else terms[0]

    def _described(self, target: Any, a: dict[str, Any], over: tuple[str, ...]) -> Any:
        x: Any = a.get("x", a.get("logits"))
        degree = self.geometry.mesh.degree(over)
        if target is runtime.lookup:
            return (*a["ids"].shape, *a["weight"].shape[1:]), a["weight"].dtype
        if target is runtime.entered_linear:
            return [((*x.shape[:-1], w.shape[0]), x.dtype) for w in a["weights"]]
        if target is runtime.linear_cross_entropy:
            return (), a["dtype"] or x.dtype
        if target is runtime.cross_entropy:
            return (a["target"].shape if a["reduction"] == "none" else ()), x.dtype
        if target in (runtime.take, runtime.gather, runtime.gather_sequence, runtime.scatter_sequence):
            d, n = a["dim"] % x.rank, x.shape[a["dim"]]
            if target is runtime.take:
                n = length(self.mine(a["rows"]))
            elif target is runtime.gather:
                rows = a["rows"].dim.size if isinstance(a["rows"], LocalRuns) else None
                n = rows if rows is not None else max(stop for r in a["rows"] for _, stop in r)
            elif target is runtime.gather_sequence:
                n = a["size"] or n * degree
            else:
                place = self.geometry.mesh.index(over, self.geometry.coords[self.ranks.first])
                n = Group(degree, place, over).sizes(n)[place]
            return (*x.shape[:d], n, *x.shape[d + 1 :]), x.dtype
        if target in _ALIKE:
            return x.shape, x.dtype
        described = self.infer(target, (), a)
        assert not isinstance(described, list)
        return described


class OneGraph:
    """The terms of the program's graph for one class of ranks, in one mode."""

    def __init__(self, program: Program, translator: OneRank, sizes: Sizes, training: bool) -> None:
        self.program = program
        self.translator = translator
        self.sizes = sizes
        self.training = training
        self.leaves: dict[str, Term] = {}
        self.outputs: list[Any] = []
        self.sent: list[Term] = []
        self.drawn: list[Term] = []
        self.cuts: set[int] = set()
        self.run()

    def run(self) -> None:
        env: dict[fx.Node, Any] = {}
        self.translator.restart()
        stored = {p.node: p for p in self.program.capture.parameters}
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta["val"], Tensor):
                env[node] = self.leaf(node, stored.get(node.name))
        for node in live_nodes(self.program.graph):
            if node.op == "output":
                self.outputs = [env[a] if isinstance(a, fx.Node) else a for a in node.args[0]]  # type: ignore[union-attr]
            elif node.op == "call_function":
                args, kwargs = self.arguments(node, env)
                env[node] = self.translator.call(node.target, args, kwargs)
                _name(env[node], node.name)
        self.sent, self.drawn, self.cuts = self.translator.sent, self.translator.drawn, self.translator.cuts

    def leaf(self, node: fx.Node, parameter: Any) -> Term:
        geometry, val = self.translator.geometry, node.meta["val"]
        shape = self.sizes.shape(val.shape)
        if parameter is not None and parameter.name in self.program.dims:
            coords = geometry.coords[self.translator.ranks.first]
            shape = tuple(d.local_size(geometry.mesh, coords) for d in self.program.dims[parameter.name])
        term = self.translator.forms.make("leaf", (node.name,), shape, val.dtype)
        term.name = node.name
        self.leaves[node.name] = term
        return term

    def arguments(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> tuple[Any, dict[str, Any]]:
        geometry = self.translator.geometry

        def read(a: Any) -> Any:
            if isinstance(a, fx.Node):
                return env[a]
            if isinstance(a, LocalSize):
                return a.resolve(geometry.mesh, geometry.coords[self.translator.ranks.first])
            if isinstance(a, Training):
                return read(a.on if self.training else a.off)
            if isinstance(a, (tuple, list)):
                return tuple(map(read, a))
            return slice(read(a.start), read(a.stop), read(a.step)) if isinstance(a, slice) else a

        return read(tuple(node.args)), {k: read(v) for k, v in node.kwargs.items()}


def _name(value: Any, name: str) -> None:
    for term in value if isinstance(value, tuple) else (value,):
        if isinstance(term, Term) and not term.name:
            term.name = name


def _tuples(a: Any) -> Any:
    return tuple(map(_tuples, a)) if isinstance(a, (tuple, list)) else a


def rank_classes(program: Program, geometry: Geometry, said: Sequence[Any]) -> list[RankClass]:
    """Groups the ranks by their local sizes and by `said`, the numbers that the source keeps for each rank."""
    dims = {d for dims in program.dims.values() for d in dims if d.over}

    def visit(a: Any) -> Any:
        if isinstance(a, LocalSize):
            dims.add(a.dim)
        return a

    for node in program.graph.nodes:
        torch.fx.node.map_aggregate(node.args, visit)
        torch.fx.node.map_aggregate(dict(node.kwargs), visit)
    found: dict[Any, list[int]] = {}
    for r, coords in enumerate(geometry.coords):
        held = tuple(d.local_size(geometry.mesh, coords) for d in dims if not d.dynamic_size)
        found.setdefault((held, said[r]), []).append(r)
    return [RankClass(tuple(ranks)) for ranks in found.values()]


__all__ = ["OneGraph", "OneRank", "RankClass", "RankRows", "described_value", "rank_classes"]
