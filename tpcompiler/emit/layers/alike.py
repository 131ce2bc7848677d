"""Which calls are equal up to what an argument can express.

Two nodes, module calls or iterations are alike when they run the same operators on values of the same shapes and
layouts, up to the numbers among their arguments, the names of their parameters and the values that they are given. The
names of classes and modules decide nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.members import ParameterNames
from tpcompiler.emit.ops.arguments import ArgumentPath
from tpcompiler.emit.ops.nodes import is_size, key, result_of, val_of
from tpcompiler.graphs import layout_of
from tpcompiler.layout import Concat, Dim, Factor, LocalRuns, LocalSize, Product
from tpcompiler.program import Parameter, Training


@dataclass(frozen=True)
class Dissection:
    """A node's arguments, taken apart into what alike nodes share and what they may differ in."""

    form: Hashable  # shared: the operator and its arguments, without the values and numbers below
    operands: tuple[fx.Node, ...]  # the tensors, in order
    numbers: tuple[tuple[ArgumentPath, int | float], ...]


@dataclass(frozen=True)
class Fingerprint:
    """A module call: alike calls have the same `signature` and differ in `numbers` and `inputs`."""

    signature: Hashable
    numbers: tuple[tuple[int, ArgumentPath, int | float], ...]  # (index of the node, path, number)
    inputs: tuple[fx.Node, ...]  # the values from outside, in order of first use


class Comparer:
    """Takes nodes apart and computes the fingerprints of module calls, each once."""

    def __init__(self, names: ParameterNames, dims: Mapping[str, tuple[Dim, ...]]) -> None:
        self.names, self.dims = names, dims
        self._fingerprints: dict[Frame, Fingerprint] = {}
        self._kinds: dict[fx.Node, Hashable] = {}
        self._dissections: dict[fx.Node, Dissection] = {}

    def fingerprint(self, frame: Frame) -> Fingerprint:
        if frame not in self._fingerprints:
            self._fingerprints[frame] = self._fingerprint(frame)
        return self._fingerprints[frame]

    def kind(self, node: fx.Node) -> Hashable:
        """The shape, type and layout of a node's value."""
        if node not in self._kinds:
            self._kinds[node] = _kind(node)
        return self._kinds[node]

    def dissect(self, node: fx.Node) -> Dissection:
        if node not in self._dissections:
            self._dissections[node] = _dissect(node)
        return self._dissections[node]

    def _fingerprint(self, frame: Frame) -> Fingerprint:
        index = {n: i for i, n in enumerate(frame.nodes)}
        inputs: dict[fx.Node, int] = {}

        def operand(node: fx.Node) -> Hashable:
            source, item = result if isinstance(result := result_of(node), tuple) else (node, None)
            if source in index:
                return "inside", index[source], item
            name = self.names.inside(node, frame.name)
            if name is not None:
                return "own", name
            return "input", inputs.setdefault(node, len(inputs)), self.kind(node)

        found = [self.dissect(n) for n in frame.nodes]
        body = tuple(
            (d.form, tuple(map(operand, d.operands)), self.kind(n)) for n, d in zip(frame.nodes, found, strict=True)
        )
        numbers = tuple((i, path, number) for i, d in enumerate(found) for path, number in d.numbers)
        own = tuple((name, self._own(p)) for name, p in self.names.under(frame.name))
        return Fingerprint((body, own), numbers, tuple(inputs))

    def _own(self, p: Parameter) -> Hashable:
        """What corresponding parameters of alike layers share."""
        dims = tuple(map(nameless, self.dims.get(p.name, ())))
        return p.shape, str(p.dtype), p.trainable, p.buffer, p.persistent, dims


def _dissect(node: fx.Node) -> Dissection:
    operands: list[fx.Node] = []
    numbers: list[tuple[ArgumentPath, int | float]] = []

    def form(value: Any, path: ArgumentPath) -> Hashable:
        if isinstance(value, fx.Node):
            if is_size(value):
                return "size", key(val_of(value))
            operands.append(value)
            return "operand"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers.append((path, value))
            return type(value).__name__
        if isinstance(value, (list, tuple)):
            return tuple(form(v, (*path, i)) for i, v in enumerate(value))
        if isinstance(value, slice):
            return "slice", form((value.start, value.stop, value.step), path)
        if isinstance(value, Training):
            return "training", repr(value.on), repr(value.off)
        if isinstance(value, (LocalSize, LocalRuns)):
            return type(value), nameless(value.dim)
        return repr(value)

    positional = tuple(form(a, (i,)) for i, a in enumerate(node.args))
    keywords = tuple((k, form(v, (k,))) for k, v in sorted(node.kwargs.items()))
    return Dissection((str(node.target), positional, keywords), tuple(operands), tuple(numbers))


def _kind(node: fx.Node) -> Hashable:
    val = val_of(node)
    values = val if isinstance(val, (list, tuple)) else [val]
    kinds = tuple(
        (tuple(map(key, v.shape)), str(v.dtype)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in values
    )
    layout = [nameless(d) if d.over else None for d in layout_of(node) or ()]
    return kinds, tuple(layout) if any(layout) else ()  # A layout that splits nothing says no more than the shape.


def nameless(dim: Dim) -> Hashable:
    """A layout without the names of its axes, which differ from layer to layer."""
    if isinstance(dim, Factor):
        return dim.n, dim.split
    assert isinstance(dim, (Product, Concat))
    return type(dim).__name__, tuple(map(nameless, dim.parts))
