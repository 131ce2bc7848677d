"""A function's body as steps: operators to write out, and calls of layers, runs of equal calls being one loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.outline import Layer
from tpcompiler.emit.names.names import Value, value

Section = tuple[str, str]  # name relative to the body's module, class


@dataclass(frozen=True, eq=False)
class Op:
    """A node to write out; `section` is the submodule that runs it, if it is not the body's own code."""

    node: fx.Node
    section: Section | None


@dataclass(frozen=True, eq=False)
class Apply:
    """Calls of one layer, each fed by the one before.

    Input `i` of a later call is output `carried[i]` of the call before it, or what it was in the first call.
    """

    layer: Layer
    frames: tuple[Frame, ...]
    carried: Mapping[int, int]

    def inputs(self, call: int = 0) -> list[Value]:
        return [value(n) for n in self.layer.inputs[id(self.frames[call])]]

    def outputs(self, call: int = -1) -> list[Value]:
        nodes = self.frames[call].nodes
        return [nodes[o.node] if o.item is None else (nodes[o.node], o.item) for o in self.layer.outputs]


Step = Op | Apply


def steps(body: Frame, layers: list[Layer]) -> list[Step]:
    """The body's items in order, the frames of `layers` as calls, other frames opened up."""
    owner = {id(f): layer for layer in layers for f in layer.frames}
    out: list[Step] = []
    lead = len(body.name) + 1 if body.name else 0

    def visit(frame: Frame, section: Section | None) -> None:
        for item in frame.items:
            if isinstance(item, fx.Node):
                out.append(Op(item, section))
            elif id(item) in owner:
                out.append(Apply(owner[id(item)], (item,), {}))
            else:
                visit(item, section or (item.name[lead:], item.title))

    visit(body, None)
    return _loops(out)


def _loops(flat: list[Step]) -> list[Step]:
    out: list[Step] = []
    for step in flat:
        last = out[-1] if out else None
        joined = _join(last, step, flat) if isinstance(last, Apply) and isinstance(step, Apply) else None
        if joined is not None:
            out[-1] = joined
        else:
            out.append(step)
    return out


def _join(run: Apply, step: Apply, flat: list[Step]) -> Apply | None:
    """`run` with one more call, if that continues it."""
    if run.layer is not step.layer or not _next(run.frames, step.frames[0]):
        return None
    before = run.outputs()
    first, inputs = run.inputs(), step.inputs()
    carried = {i: before.index(v) for i, v in enumerate(inputs) if v in before}
    if not carried or any(v != first[i] for i, v in enumerate(inputs) if i not in carried):
        return None
    if len(run.frames) > 1 and carried != run.carried:
        return None
    # The results of a call inside a loop are gone after the next: nobody else may want them.
    own = set(step.frames[0].nodes)
    for v in before:
        if any(u not in own for u in users(v)):
            return None
    return Apply(run.layer, (*run.frames, step.frames[0]), carried)


def users(v: Value) -> list[fx.Node]:
    """The nodes that read a value."""
    if isinstance(v, fx.Node):
        return list(v.users)
    node, item = v
    return [u for picked in node.users if picked.args[1:] == (item,) for u in picked.users]


def _next(frames: tuple[Frame, ...], frame: Frame) -> bool:
    """Is `frame` the same instance again, or the next of a list?"""
    names = [f.name for f in frames[-2:]] + [frame.name]
    if len(set(names)) == 1:
        return True
    if len(names) == 3 and names[0] == names[1]:
        return False
    before, after = names[-2].rpartition("."), names[-1].rpartition(".")
    return before[0] == after[0] and before[2].isdigit() and after[2].isdigit() and int(after[2]) == int(before[2]) + 1
