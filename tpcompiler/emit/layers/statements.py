"""The body of a function as operations and calls of layers. Calls that feed each other are brought together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import fx

from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.outline import Layer
from tpcompiler.emit.ops.nodes import NodeResult, count, users
from tpcompiler.emit.text.lines import Section


@dataclass(frozen=True, eq=False)
class LayerClass:
    """A layer whose class has been written."""

    layer: Layer
    name: str
    sizes: tuple[str, ...]  # symbols that no tensor argument tells: further arguments of forward
    draws: bool  # Does its forward draw random numbers?


@dataclass(frozen=True, eq=False)
class Operation:
    """A node to be written as an expression, and the submodule whose code it is (None for the body's own)."""

    node: fx.Node
    section: Section | None

    @property
    def nodes(self) -> list[fx.Node]:
        return [self.node]

    @property
    def results(self) -> list[NodeResult]:
        several = count(self.node)
        return [self.node] if several is None else [(self.node, i) for i in range(several)]


@dataclass(frozen=True, eq=False)
class LayerCalls:
    """Consecutive calls of one layer, usually one.

    Input `i` of each later call is output `carried[i]` of the call before it, or else the same as in the first call.
    """

    made: LayerClass
    frames: tuple[Frame, ...]
    carried: Mapping[int, int]

    @property
    def layer(self) -> Layer:
        return self.made.layer

    @property
    def nodes(self) -> list[fx.Node]:
        return [n for f in self.frames for n in f.nodes]

    @property
    def inputs(self) -> tuple[NodeResult, ...]:
        """The inputs of the first call."""
        return self.layer.inputs[self.frames[0]]

    @property
    def results(self) -> list[NodeResult]:
        """The outputs of the last call."""
        return self.layer.results(self.frames[-1])


Statement = Operation | LayerCalls


def statements(body: Frame, classes: list[LayerClass]) -> list[Statement]:
    """The parts of the body in order. Frames of `classes` are calls, the nodes of other frames are operations."""
    owner = {f: c for c in classes for f in c.layer.frames}
    out: list[Statement] = []

    def visit(frame: Frame, section: Section | None) -> None:
        for part in frame.parts:
            if isinstance(part, fx.Node):
                out.append(Operation(part, section))
            elif part in owner:
                call = LayerCalls(owner[part], (part,), {})
                joined = _joined(out[-1], call) if out else None
                out[-1:] = [joined] if joined is not None else [*out[-1:], call]
            else:
                visit(part, section or (body.relative(part.name), part.title))

    visit(body, None)
    return out


def _joined(before: Statement, call: LayerCalls) -> LayerCalls | None:
    """The calls `before` with one more, if the additional call continues them."""
    if not isinstance(before, LayerCalls) or before.made is not call.made or not _next(before.frames, call.frames[0]):
        return None
    made, first, inputs = before.results, before.inputs, call.inputs
    carried = {i: made.index(v) for i, v in enumerate(inputs) if v in made}
    if not carried or any(v != first[i] for i, v in enumerate(inputs) if i not in carried):
        return None
    if len(before.frames) > 1 and carried != before.carried:
        return None
    # Within a loop only the next call can read a call's results.
    own = set(call.nodes)
    if any(u not in own for v in made for u in users(v)):
        return None
    return replace(before, frames=(*before.frames, *call.frames), carried=carried)


def _next(frames: tuple[Frame, ...], frame: Frame) -> bool:
    """Is `frame` another call of the same instance, or a call of the next member of a list?"""
    names = [f.name for f in frames[-2:]] + [frame.name]
    if len(set(names)) == 1:
        return True
    if len(names) == 3 and names[0] == names[1]:
        return False
    before, after = names[-2].rpartition("."), names[-1].rpartition(".")
    return before[0] == after[0] and before[2].isdigit() and after[2].isdigit() and int(after[2]) == int(before[2]) + 1
