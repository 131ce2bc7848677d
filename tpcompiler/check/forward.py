"""The forward sweep: every node of the program as a value of the model and a claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, NoReturn

import torch
from torch import fx

from tpcompiler.check.calls import Call, globalise, read_call, replaced
from tpcompiler.check.claims import Claim, Geometry, Rows
from tpcompiler.check.cones import Operand
from tpcompiler.check.equal import Equal
from tpcompiler.check.report import Refusal
from tpcompiler.check.steps import Step, Steps, Wrong
from tpcompiler.check.trial import Given
from tpcompiler.check.values import Table, Value, own_values
from tpcompiler.layout import Dim
from tpcompiler.program import Program
from tpcompiler.runtime import dropout

aten = torch.ops.aten


@dataclass(frozen=True)
class Held:
    """What a node of the program is."""

    value: Value
    claim: Claim
    operand: Operand  # of the model's value; whether it needs a gradient is the program's

    @property
    def given(self) -> Given:
        return Given(self.operand, self.claim)


@dataclass
class Sweep:
    """Nodes of the program as values, and the steps that made them."""

    env: dict[fx.Node, Any] = field(default_factory=dict)  # Held, a tuple of them, or a number
    steps: dict[fx.Node, tuple[Step, tuple[fx.Node, ...]]] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    strangers: dict[fx.Node, Value] = field(default_factory=dict)  # nodes that are no value of the model


class Refused(Exception):
    """Ends a sweep."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def sweep_forward(program: Program, table: Table, geometry: Geometry, steps: Steps) -> Sweep:
    """Claims for every node that the outputs need. Raises `Refused` at the first step that does not hold."""
    return _Forward(program, table, geometry, steps).run()


class _Forward:
    def __init__(self, program: Program, table: Table, geometry: Geometry, steps: Steps) -> None:
        self.program = program
        self.table = table
        self.geometry = geometry
        self.steps = steps
        self.equal = Equal(steps, table, table.sizes.numbers.values())
        self.parameters = {p.node: p for p in program.capture.parameters}
        self.same: dict[Value, Value | None] = {}
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
        value = self.table.by_name.get(node.name)
        if value is None or value.out is None:
            self.refuse(node, "a parameter, buffer or input of the model", "the model has none of that name")
            return
        dims = None
        if node.name in self.parameters:
            dims = self.program.dims.get(self.parameters[node.name].name)
        rows = (None,) * len(value.out.shape) if dims is None else tuple(map(self.geometry.of_dim, dims))
        if dims is not None and tuple(d.size for d in dims) != value.out.shape:
            self.refuse(node, f"the layout of {[d.size for d in dims]}", f"the shape is {list(value.out.shape)}")
        self.out.env[node] = Held(value, Claim(rows), value.out)

    def call(self, node: fx.Node) -> None:
        env = self.out.env
        if node.target is getitem:
            source, i = node.args
            env[node] = env[source][i]  # type: ignore[index]
            return
        call, operands = read_call(node, env)
        if not operands and not isinstance(node.target, torch._ops.OpOverload):
            env[node] = call.target(*call.args)  # sizes from sizes
            return
        held = [env[o] for o in operands]
        if any(isinstance(h, tuple) for h in held):
            self.refuse(node, "tensors for operands", "a list of tensors")
        if node.target is aten.sym_size.int:
            self.size(node, held[0], call)
            return
        if call.target is dropout:
            self.samples(node, call, held)
        step = self.establish(node, call, [h.given for h in held])
        self.out.steps[node] = step, operands
        values = self.values(node, call, step, tuple(h.value for h in held))
        found = [Held(v, o.claim, o.operand) if o is not None else None for v, o in zip(values, step.outs, strict=True)]
        env[node] = tuple(found) if step.many else found[0]

    def size(self, node: fx.Node, held: Held, call: Call) -> None:
        d = call.args[1]
        if held.claim.rows[d] is not None:
            self.refuse(node, "one size on all ranks", f"the operand has {held.claim}")
        self.out.env[node] = held.operand.shape[d]

    def samples(self, node: fx.Node, call: Call, held: Sequence[Held]) -> None:
        """A mask depends on which samples of the step these are: its rows are samples, or it knows how many are."""
        given = dict(call.kwargs)
        d = given.get("batch_dim", 0)
        if d is None and self.table.batched.get(given["site"], False):
            self.refuse(node, "other masks for other samples", "one mask for all samples")
        if d is not None:
            counted = given.get("samples", held[given["x"].i].operand.shape[d])
            if counted != self.table.samples:
                self.refuse(node, f"dimension {d} is of {self.table.samples} samples", f"it counts {counted}")

    def establish(self, node: fx.Node, call: Call, given: Sequence[Given]) -> Step:
        if call.target is dropout:  # which site draws makes no difference to what is drawn where
            call = replaced(call, "site", 0)
        step = self.steps.forward(call, globalise(call), tuple(given), self.hints(node))
        if isinstance(step, Wrong):
            self.refuse(node, self.claimed(node), step.true, step.example)
        assert isinstance(step, Step)
        return step

    # -- which value of the model -----------------------------------------------------------------------------------

    def values(self, node: fx.Node, call: Call, step: Step, operands: tuple[Value, ...]) -> list[Value]:
        if step.identity:
            return [operands[0]]
        out = None if step.many else step.outs[0].operand if step.outs[0] is not None else None
        found = self.original(self.table.find(globalise(call), operands, out))
        if not step.many:
            values = [found]
        else:
            items = [self.table.item(found, i, o.operand) if o is not None else found for i, o in enumerate(step.outs)]
            values = items if found.original else [self.original(v) if v is not found else v for v in items]
        if not all(v.original for v in values):
            self.out.strangers[node] = found
        return values

    def original(self, value: Value) -> Value:
        """The model's value that this one is, or itself when it is none."""
        if value.original:
            return value
        if value not in self.same:
            self.same[value] = self.equal.original(value)
        return self.same[value] or value

    # -- the end ----------------------------------------------------------------------------------------------------

    def output(self, node: fx.Node) -> None:
        mine = node.args[0]
        assert isinstance(mine, (tuple, list))
        if len(mine) != len(self.table.outputs):
            self.refuse(node, f"{len(self.table.outputs)} outputs", f"{len(mine)}")
        for i, (got, expected) in enumerate(zip(mine, self.table.outputs, strict=True)):
            if not isinstance(got, fx.Node) or not isinstance(expected, Value):
                value = self.out.env[got] if isinstance(got, fx.Node) else got
                if value != expected:
                    self.refuse(node, f"output {i} is {expected}", f"{value}")
                continue
            self.one_output(got, i, expected, i in self.program.left_sharded)

    def one_output(self, node: fx.Node, i: int, expected: Value, sharded: bool) -> None:
        held = self.out.env[node]
        if not isinstance(held, Held):
            self.refuse(node, f"output {i}, the model's {expected}", "no tensor")
        if held.value is not expected and not self.equal.same(held.value, expected):
            needed = own_values(held.value)
            stranger, value = next(((n, v) for n, v in self.out.strangers.items() if v in needed), (node, held.value))
            example = f"output {i} should be {expected}, and is computed from {value}"
            self.refuse(stranger, self.claimed(stranger), "no value of the model", example)
        if held.claim.partial or (not held.claim.whole and not sharded):
            self.refuse(node, f"output {i} is equal on all ranks", str(held.claim))

    # -- saying so --------------------------------------------------------------------------------------------------

    def hints(self, node: fx.Node) -> tuple[tuple[Rows | None, ...] | None, ...]:
        """The program's own claims of the results' rows: what to try first, never believed."""
        if "dims" in node.meta:
            return (self.rows(node.meta["dims"]),)
        return tuple(self.rows(d) for d in node.meta.get("dims_of", ()))

    def rows(self, dims: Sequence[Dim]) -> tuple[Rows | None, ...]:
        return tuple(None if d.over and d.dynamic_size else self.geometry.of_dim(d) for d in dims)

    def claimed(self, node: fx.Node) -> str:
        """What the program says of a node."""
        dims, note = node.meta.get("dims"), node.meta.get("note")
        said = f"[{', '.join(map(str, dims))}]" if dims is not None else "the model's value, or rows of it"
        return f"{said}, {note}" if note else said

    def refuse(self, node: fx.Node, claimed: str, true: str, example: str = "") -> NoReturn:
        raise Refused(Refusal(node.name, line_of(node), claimed, true, example))


def sites(program: Program) -> dict[int, tuple[tuple[str, Any], ...]]:
    """How each dropout site of the program counts samples: part of what its mask is."""
    found: dict[int, tuple[tuple[str, Any], ...]] = {}
    for node in program.graph.nodes:
        if node.target is dropout:
            call, _ = read_call(node, Anything())
            given = dict(call.kwargs)
            counted = tuple((k, given[k]) for k in ("batch_dim", "samples") if k in given)
            found.setdefault(given["site"], counted)
    return found


class Anything(dict[fx.Node, None]):
    """Knows every node, and nothing of it."""

    def __missing__(self, node: fx.Node) -> None:
        return None


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
