"""The timeline of one layer on one rank: what is computed, what crosses ranks, in order, and what of it is hidden."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from tpcompiler.cost.equal_layers import Frame
from tpcompiler.cost.predict import OVERLAPPED, CostModel, ParallelLayout, collective_bytes, recomputed
from tpcompiler.cost.rank_sizes import RankSizes
from tpcompiler.cost.rates import Price, Rates
from tpcompiler.ops.operands import op_name
from tpcompiler.plan.collectives import FORWARD, CollectiveReader
from tpcompiler.program import Collective
from tpcompiler.spec.machine import Hardware

Phase = Literal["forward", "again", "backward"]


@dataclass(frozen=True)
class Event:
    """A kernel or a collective; times are seconds from the beginning of the layer."""

    name: str
    phase: Phase
    crosses: bool  # a collective, beside which the device may compute
    start: float
    seconds: float
    hidden: float = 0.0  # of a collective: what the layer is not longer by
    bytes: int = 0  # of a collective

    @property
    def exposed(self) -> float:
        return self.seconds - self.hidden


@dataclass(frozen=True)
class Timeline:
    layer: str  # the module, "h.1"
    layers: int  # how many there are like it
    events: tuple[Event, ...]

    def total(self, crosses: bool) -> float:
        """Seconds of all kernels, or of all collectives that are not hidden."""
        return sum(e.exposed for e in self.events if e.crosses == crosses)

    @property
    def seconds(self) -> float:
        return self.total(False) + self.total(True)


def layer_timeline(
    model: CostModel, layout: ParallelLayout, hardware: Hardware, sequence: int, width: int = 2
) -> Timeline | None:
    """One micro-batch through one layer, forward and backward; None for a program without equal layers.

    The seconds are those that `CostModel.predict` adds up. Backward kernels are in the reverse order of forward; a
    collective that overlaps begins when the gradient that it sends is computed.
    """
    reader = model.reader
    frames = Counter(frame for frame in reader.layer.values() if frame)
    if not frames:
        return None
    frame = max(frames, key=lambda f: (frames[f], -list(frames).index(f)))
    mesh = model.mesh(layout.tensor, layout.data)
    writer = _Writer(
        model, layout, Rates(hardware, RankSizes(model.program.capture, mesh, layout.micro, sequence), width)
    )
    return Timeline(frame[0], len(frames), tuple(writer.events(frame)))


class _Writer:
    """Puts the work of one layer one after the other."""

    def __init__(self, model: CostModel, layout: ParallelLayout, rates: Rates) -> None:
        self.model, self.layout, self.rates = model, layout, rates
        mesh = model.mesh(layout.tensor, layout.data)
        live = model.reader.live
        self.collectives = CollectiveReader(model.program, model.plan, rates.sizes.number, mesh, live)
        self.mesh, self.now = mesh, 0.0

    def events(self, frame: Frame) -> Iterator[Event]:
        reader = self.model.reader
        inside = [n for n in reader.nodes if reader.layer.get(n) == frame]
        groups = {group[0]: group for group in reader.groups if reader.layer.get(group[0]) == frame}
        for node in inside:
            yield from self._forward(node, groups, "forward")
        for node in inside:
            yield from self._forward(node, groups, "again")
        for node in reversed(inside):
            yield from self._backward(node, groups)

    def _price(self, node: fx.Node, groups: dict[fx.Node, list[fx.Node]]) -> tuple[Price, bool] | None:
        """A kernel's price, if one begins at the node, and whether it is computed again."""
        kernel = self.model.reader.kernel(groups[node]) if node in groups else None
        if kernel is None or kernel.kind in ("view", "collective"):
            return None
        return self.rates.price(kernel), recomputed(kernel, self.layout.recompute)

    def _forward(self, node: fx.Node, groups: dict[fx.Node, list[fx.Node]], phase: Phase) -> Iterator[Event]:
        priced = self._price(node, groups)
        if priced is not None and (phase == "forward" or priced[1]):
            yield self._compute(node, phase, priced[0].forward)
        if phase == "again" and not (self.layout.recompute == "layer" and node in self.model.reader.again):
            return
        for c in self.collectives.of(node):
            if c.direction == FORWARD:
                yield from self._crossing(node, phase, c, 0.0)

    def _backward(self, node: fx.Node, groups: dict[fx.Node, list[fx.Node]]) -> Iterator[Event]:
        price = (self._price(node, groups) or (Price(0.0), False))[0]
        beside = price.weights if self.layout.overlap and node.target in OVERLAPPED else 0.0
        if price.backward > beside:
            yield self._compute(node, "backward", price.backward - beside)
        start = self.now
        for c in self.collectives.of(node):
            if c.direction != FORWARD:
                yield from self._crossing(node, "backward", c, beside)
        if beside:
            self.now += beside
            yield Event(f"{_name(node)}, weights", "backward", False, start, beside)

    def _compute(self, node: fx.Node, phase: Phase, seconds: float) -> Event:
        self.now += seconds
        return Event(_name(node), phase, False, self.now - seconds, seconds)

    def _crossing(self, node: fx.Node, phase: Phase, c: Collective, beside: float) -> Iterator[Event]:
        size = collective_bytes(c, node, self.rates.width, self.layout.overlap)
        seconds = self.rates.collective(c.kind, size, self.mesh.degree(c.over), 1)
        hidden = min(seconds, beside) * self.rates.machine.hidden
        start = self.now
        self.now += seconds - hidden
        if seconds:
            yield Event(f"{c.kind.replace('_', '-')}: {c.reason}", phase, True, start, seconds, hidden, size)


def _name(node: fx.Node) -> str:
    return op_name(node).removeprefix("_")
