"""The forward sweep: establishes a claim for every node of the program, which relates it to a value of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, NoReturn

import torch
from torch import fx

from tpcompiler.check.calls import Call, globalise, read_call, replaced
from tpcompiler.check.claims import Claim, Geometry, Rows
from tpcompiler.check.facts import not_linear
from tpcompiler.check.form import Held, Wrong
from tpcompiler.check.meanings import draws
from tpcompiler.check.report import Refusal
from tpcompiler.check.steps import Step, Steps
from tpcompiler.check.values import ModelValues
from tpcompiler.layout import Dim
from tpcompiler.program import Program
from tpcompiler.runtime import dropout

aten = torch.ops.aten
DATA = "data"  # the mesh dimension along which ranks have different samples, for which they draw different numbers


@dataclass
class Sweep:
    """Claims of the program's nodes, and the steps that establish them."""

    env: dict[fx.Node, Any] = field(default_factory=dict)  # each node's Held, a tuple of Held, or a number
    steps: dict[fx.Node, tuple[Step, tuple[fx.Node, ...]]] = field(default_factory=dict)


class Refused(Exception):
    """Ends a comparison with its first refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def sweep_forward(program: Program, table: ModelValues, geometry: Geometry, steps: Steps) -> Sweep:
    """Claims for every node that the outputs need. Raises `Refused` at the first step that does not hold."""
    return _Forward(program, table, geometry, steps).run()


class _Forward:
    def __init__(self, program: Program, table: ModelValues, geometry: Geometry, steps: Steps) -> None:
        self.program = program
        self.table = table
        self.geometry = geometry
        self.steps = steps
        self.parameters = {p.node: p for p in program.capture.parameters}
        self.out = Sweep()

    def run(self) -> Sweep:
        for node in live_nodes(self.program.graph):
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "output":
                self.output(node)
            elif node.op == "call_function":
                self.call(node)
            else:
                self.refuse(node, "a call of a function", f"a node of the kind {node.op}")
        return self.out

    # -- kinds of nodes ---------------------------------------------------------------------------------------------

    def placeholder(self, node: fx.Node) -> None:
        out = self.table.operands.get(node.name)
        if out is None:
            self.refuse(node, "a parameter, buffer or input of the model", "the model has none of that name")
        dims = None
        if node.name in self.parameters:
            dims = self.program.dims.get(self.parameters[node.name].name)
        rows = (None,) * len(out.shape) if dims is None else tuple(map(self.geometry.of_dim, dims))
        if dims is not None and tuple(d.size for d in dims) != out.shape:
            self.refuse(node, f"the layout of {[d.size for d in dims]}", f"the shape is {list(out.shape)}")
        self.out.env[node] = Held(out, Claim(rows))

    def call(self, node: fx.Node) -> None:
        env = self.out.env
        if node.target is getitem:
            source, i = node.args
            env[node] = env[source][i]  # type: ignore[index]
            return
        call, operands = read_call(node, env)
        if not operands and not isinstance(node.target, torch._ops.OpOverload):
            env[node] = call.target(*call.args)  # a size computed from sizes
            return
        held = [env[o] for o in operands]
        if any(isinstance(h, tuple) for h in held):
            self.refuse(node, "tensors for operands", "a list of tensors")
        if node.target is aten.sym_size.int:
            self.size(node, held[0], call)
            return
        if call.target is dropout:
            self.samples(node, call, held)
        self.linear(node, call, held)
        step = self.establish(node, call, held)
        self.out.steps[node] = step, operands
        found = step.outs
        env[node] = found if step.many else found[0]
        if draws(call.target, call.args, dict(call.kwargs)):
            self.drawn(node, found)

    def linear(self, node: fx.Node, call: Call, held: Sequence[Held]) -> None:
        """Refuses a partial operand where summing after the operation would differ from summing before it."""
        partial = {i for i, h in enumerate(held) if h.claim.partial}
        if len({held[i].claim.partial for i in partial}) > 1:
            self.refuse(node, "partial sums over the same ranks", "partial sums over different ranks")
        if partial and (why := not_linear(call, partial)) is not None:
            self.refuse(node, "a partial sum where the operation is linear", why)

    def drawn(self, node: fx.Node, found: Sequence[Held | None]) -> None:
        """Refuses a call that draws from torch's generator for a value that several ranks hold: each draws its own."""
        for h in found:
            common = () if h is None else tuple(n for n in self.geometry.shared(h.claim) if n != DATA)
            if common:
                what = f"each rank of {'·'.join(common)} draws numbers of its own for a value that they share"
                self.refuse(node, "the same random numbers on all ranks", what)

    def size(self, node: fx.Node, held: Held, call: Call) -> None:
        d = call.args[1]
        if held.claim.rows[d] is not None:
            self.refuse(node, "a size that is equal on all ranks", f"the operand has {held.claim}")
        self.out.env[node] = held.operand.shape[d]

    def samples(self, node: fx.Node, call: Call, held: Sequence[Held]) -> None:
        """Refuses a dropout whose mask would not depend on which samples of the step these are.

        Either the rows of one dimension are the samples, or an argument says how many samples there are.
        """
        given = dict(call.kwargs)
        d = given.get("batch_dim", 0)
        if d is None and self.table.batched.get(given["site"], False):
            self.refuse(node, "different masks for different samples", "one mask for all samples")
        if d is not None:
            counted = given.get("samples", held[given["x"].i].operand.shape[d])
            if counted != self.table.samples:
                self.refuse(node, f"dimension {d} has {self.table.samples} samples", f"the mask is drawn for {counted}")

    def establish(self, node: fx.Node, call: Call, given: Sequence[Held]) -> Step:
        if call.target is dropout:  # the site does not change how masks lie on ranks, so equal layers stay equal
            call = replaced(call, "site", 0)
        step = self.steps.forward(call, globalise(call), tuple(given), self.hints(node))
        if isinstance(step, Wrong):
            self.refuse(node, self.claimed(node), step.true, step.example)
        assert isinstance(step, Step)
        return step

    # -- the end ----------------------------------------------------------------------------------------------------

    def output(self, node: fx.Node) -> None:
        mine: Any = node.args[0]
        for i, got in enumerate(mine):
            held = self.out.env[got] if isinstance(got, fx.Node) else None
            if isinstance(held, Held) and (
                held.claim.partial or not (held.claim.whole or i in self.program.left_sharded)
            ):
                self.refuse(got, f"output {i} is equal on all ranks", str(held.claim))

    # -- saying so --------------------------------------------------------------------------------------------------

    def hints(self, node: fx.Node) -> tuple[tuple[Rows | None, ...] | None, ...]:
        """The program's own claims about the results' rows. They say what to try first and are never believed."""
        return tuple(self.rows(d) for d in _layouts(node))

    def rows(self, dims: Sequence[Dim]) -> tuple[Rows | None, ...]:
        return tuple(None if d.over and d.dynamic_size else self.geometry.of_dim(d) for d in dims)

    def claimed(self, node: fx.Node) -> str:
        """What the program claims about a node, in words."""
        layouts, note = _layouts(node), getattr(node.meta.get("placed"), "note", "")
        said = f"[{', '.join(map(str, layouts[0]))}]" if len(layouts) == 1 else "the model's value, or rows of it"
        return f"{said}, {note}" if note else said

    def refuse(self, node: fx.Node, claimed: str, true: str, example: str = "") -> NoReturn:
        raise Refused(Refusal(node.name, line_of(node), claimed, true, example))


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the outputs need, in order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.add(node)
            needed.update(node.all_input_nodes)
    return [n for n in graph.nodes if n in needed]


def line_of(node: fx.Node) -> str:
    """The line of the model's source that a node comes from."""
    line = node.meta.get("line")
    return f"{line[0]}:{line[1]}: {str(line[2]).strip()}" if line else ""


def _layouts(node: fx.Node) -> tuple[tuple[Dim, ...], ...]:
    """The layouts of the results, according to the program."""
    return getattr(node.meta.get("placed"), "layouts", ())
