"""The backward sweep: how each rank's gradient of every node relates to the model's, down to the parameters."""

from __future__ import annotations

from torch import fx

from tpcompiler.check.claims import Claim, Geometry
from tpcompiler.check.form import Kind, Wrong
from tpcompiler.check.forward import Held, Refused, Sweep, line_of, live_nodes
from tpcompiler.check.report import Refusal
from tpcompiler.check.steps import Steps
from tpcompiler.program import Program

NodeResult = tuple[fx.Node, int]  # a node, and which of its results


def sweep_backward(program: Program, geometry: Geometry, steps: Steps, forward: Sweep) -> None:
    """Raises `Refused` where gradients of two kinds meet, where a step's gradient is of no kind, and where a parameter
    ends with a partial gradient."""
    kinds: dict[NodeResult, tuple[Kind, str]] = {}  # a result's kind, and the name of the node that gave it

    def give(node: fx.Node, i: int, kind: Kind, by: str) -> None:
        place = _source(node, i)
        held = _held(forward, *place)
        if kind is None or held is None or not held.operand.grad:
            return
        known = kinds.setdefault(place, (kind, by))
        if known[0] != kind:
            said = f"{by} gives {_say(kind)}, {known[1]} {_say(known[0])}"
            raise Refused(Refusal(node.name, line_of(node), "a gradient of one kind", said))

    nodes = live_nodes(program.graph)
    for node in reversed(nodes):
        if node.op == "output":
            for a in node.args[0]:  # type: ignore[union-attr]
                if isinstance(a, fx.Node):
                    give(a, 0, (), "the output")
        elif node in forward.steps:
            step, operands = forward.steps[node]
            mine = tuple(kinds.get((node, i), (None, ""))[0] for i in range(len(step.outs)))
            found = steps.backward(step, mine)
            if isinstance(found, Wrong):
                given = ", ".join(_say(k) for k in mine if k is not None)
                raise Refused(
                    Refusal(node.name, line_of(node), f"its own gradient is {given}", found.true, found.example)
                )
            for operand, kind in zip(operands, found, strict=True):
                give(operand, 0, kind, node.name)
    _parameters(program, forward, kinds)


def _parameters(program: Program, forward: Sweep, kinds: dict[NodeResult, tuple[Kind, str]]) -> None:
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    for p in program.capture.parameters:
        node = nodes.get(p.node)
        kind, by = kinds.get((node, 0), (None, "")) if node is not None else (None, "")
        if kind and p.trainable:
            assert node is not None
            raise Refused(
                Refusal(
                    p.name, line_of(node), "each rank's gradient is whole for its slice", f"{by} gives {_say(kind)}"
                )
            )


def _source(node: fx.Node, i: int) -> NodeResult:
    """The node and the result that a value is. An item taken from a list is a result of the node that made the list."""
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        return node.args[0], node.args[1]  # type: ignore[return-value]
    return node, i


def _held(forward: Sweep, node: fx.Node, i: int) -> Held | None:
    found = forward.env.get(node)
    if isinstance(found, tuple):
        found = found[i]
    return found if isinstance(found, Held) else None


def _say(kind: Kind) -> str:
    return "the model's" if not kind else f"a partial sum over {'·'.join(kind)}"


__all__ = ["Claim", "Geometry", "sweep_backward"]
