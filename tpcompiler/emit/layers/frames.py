"""Which module calls a program is made of, and which of them are the same layer.

A `Frame` is one call of one module: the run of nodes that its forward made, the calls inside it as children. Two
frames are alike when their nodes are, up to parameter names (relative to the module's), per-instance numbers and the
values that come in: class names and module names decide nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.hoist import Stack, hoist
from tpcompiler.emit.layers.tidy import RANDOM, aten_name
from tpcompiler.emit.names.symbols import dims_of, is_size, key
from tpcompiler.layout import Concat, Dim, Factor, LocalRuns, LocalSize, Product
from tpcompiler.program import Parameter, Training

Call = tuple[str, int]  # qualified name of a module, which call of it


@dataclass(eq=False)
class Frame:
    """A call of the module `name`; the root's name is ""."""

    name: str
    number: int
    title: str  # the module's class, for naming
    items: list[fx.Node | Frame] = field(default_factory=list)

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return [n for item in self.items for n in (item.nodes if isinstance(item, Frame) else [item])]

    @property
    def frames(self) -> list[Frame]:
        return [i for i in self.items if isinstance(i, Frame)]

    def walk(self) -> Iterator[Frame]:
        for frame in self.frames:
            yield frame
            yield from frame.walk()


def frames(graph: fx.Graph, names: Names) -> Frame:
    """The tree of module calls, from the nodes' `stack`; the nodes of a call are made one run."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and not is_size(n) and not is_item(n)]
    stacks: dict[fx.Node, Stack] = {}
    last: Stack = ()
    for n in nodes:
        last = tuple(s for s in n.meta.get("stack", last) if s[0])
        stacks[n] = last
    nodes, stacks = hoist(nodes, stacks, lambda module, parameter: names.inside(parameter, module) is not None)
    return Frame("", 0, "", _group(nodes, stacks, 0))


def is_item(node: fx.Node) -> bool:
    """One of several results of a call: written together with the call."""
    import operator

    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and not is_size(node.args[0])


def _group(nodes: list[fx.Node], stacks: Mapping[fx.Node, Any], depth: int) -> list[fx.Node | Frame]:
    out: list[fx.Node | Frame] = []
    calls = [(s[depth][0], s[depth][2]) if len(s := stacks[n]) > depth else None for n in nodes]
    i = 0
    while i < len(nodes):
        call = calls[i]
        if call is None:
            out.append(nodes[i])
            i += 1
            continue
        stop = _run_end(calls, i)
        title = stacks[nodes[i]][depth][1].rsplit(".", 1)[-1]
        before, run = _apart(nodes[i:stop], [c == call for c in calls[i:stop]])
        inside = {n: stacks[n] if calls[j] == call else stacks[n][:depth] for j, n in enumerate(nodes[i:stop], i)}
        out += before
        out.append(Frame(call[0], call[1], title, _group(run, inside, depth + 1)))
        i = stop
    return out


def _apart(nodes: list[fx.Node], own: list[bool]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The strangers in a call's run that can stand before it, and the rest."""
    before: list[fx.Node] = []
    run: dict[fx.Node, None] = {}
    for node, mine in zip(nodes, own, strict=True):
        needs = {n.args[0] if is_item(n) else n for n in node.all_input_nodes}
        if mine or aten_name(node) in RANDOM or any(n in run for n in needs):
            run[node] = None
        else:
            before.append(node)
    return before, list(run)


def _run_end(calls: list[Call | None], start: int) -> int:
    """The end of the run of `calls[start]`; strangers in it join when they are fewer than what they part."""
    stop, call = start + 1, calls[start]
    while True:
        while stop < len(calls) and calls[stop] == call:
            stop += 1
        again = next((j for j in range(stop, min(len(calls), 2 * stop - start)) if calls[j] == call), None)
        if again is None:
            return stop
        stop = again


@dataclass(frozen=True)
class Shape:
    """What makes two frames alike (`signature`), and what sets them apart: numbers, inputs."""

    signature: Hashable
    numbers: tuple[tuple[int, tuple[Any, ...], Any], ...]  # (index of the node, path into its arguments, value)
    inputs: tuple[fx.Node, ...]  # values from outside, in order of first use


class Names:
    """Parameters by placeholder, and how a module says them."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.all = parameters
        self.by_node = {p.node: p for p in parameters}
        self._under: dict[str, list[tuple[str, Parameter]]] = {}
        for p in parameters:
            for name in p.names:
                parts = name.split(".")
                for i in range(len(parts)):
                    self._under.setdefault(".".join(parts[:i]), []).append((".".join(parts[i:]), p))

    def inside(self, node: fx.Node, prefix: str) -> str | None:
        """The parameter's name relative to the module `prefix`; None when it is not the module's, or no parameter."""
        parameter = self.by_node.get(node.name) if node.op == "placeholder" else None
        if parameter is None:
            return None
        lead = prefix + "." if prefix else ""
        return next((n[len(lead) :] for n in parameter.names if n.startswith(lead)), None)

    def under(self, prefix: str) -> list[tuple[str, Parameter]]:
        """All parameters of the module, by relative name, in the model's order."""
        return self._under.get(prefix, [])


class Comparer:
    """Computes frames' `Shape`s, each once."""

    def __init__(self, names: Names, dims: Mapping[str, tuple[Dim, ...]]) -> None:
        self.names, self.dims = names, dims
        self._seen: dict[int, Shape] = {}
        self._kinds: dict[fx.Node, Hashable] = {}

    def shape(self, frame: Frame) -> Shape:
        if id(frame) not in self._seen:
            self._seen[id(frame)] = self._shape(frame)
        return self._seen[id(frame)]

    def kind(self, node: fx.Node) -> Hashable:
        if node not in self._kinds:
            self._kinds[node] = _kind(node)
        return self._kinds[node]

    def _shape(self, frame: Frame) -> Shape:
        place = {n: i for i, n in enumerate(frame.nodes)}
        inputs: dict[fx.Node, int] = {}
        numbers: list[tuple[int, tuple[Any, ...], Any]] = []

        def encode(value: Any, at: int, path: tuple[Any, ...]) -> Hashable:
            if isinstance(value, fx.Node):
                if value in place:
                    return ("node", place[value])
                if is_item(value) and value.args[0] in place:
                    return ("item", encode(value.args[0], at, path), value.args[1])
                if is_size(value):
                    return ("size", key(value.meta["val"]))
                name = self.names.inside(value, frame.name)
                if name is not None:
                    return ("own", name)
                return ("input", inputs.setdefault(value, len(inputs)), self.kind(value))
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers.append((at, path, value))
                return type(value).__name__
            if isinstance(value, (list, tuple)):
                return tuple(encode(v, at, (*path, i)) for i, v in enumerate(value))
            if isinstance(value, Training):
                return ("training", repr(value.on), repr(value.off))
            if isinstance(value, (LocalSize, LocalRuns)):
                return (type(value).__name__, nameless(value.dim))
            if isinstance(value, slice):
                bounds = (value.start, value.stop, value.step)
                return ("slice", *(encode(v, at, (*path, k)) for k, v in enumerate(bounds)))
            return repr(value)

        body = []
        for i, node in enumerate(frame.nodes):
            arguments = [encode(a, i, (k,)) for k, a in enumerate(node.args)]
            keywords = [(k, encode(v, i, (k,))) for k, v in sorted(node.kwargs.items())]
            body.append((str(node.target), tuple(arguments), tuple(keywords), self.kind(node)))
        own = tuple((name, self._own(p)) for name, p in self.names.under(frame.name))
        return Shape((tuple(body), own), tuple(numbers), tuple(inputs))

    def _own(self, p: Parameter) -> Hashable:
        """What two layers' parameters must share."""
        dims = tuple(map(nameless, self.dims.get(p.name, ())))
        return p.shape, str(p.dtype), p.trainable, p.buffer, p.persistent, dims


def _kind(node: fx.Node) -> Hashable:
    """Shape, type and layout of a value."""
    val = node.meta.get("val")
    values = val if isinstance(val, (list, tuple)) else [val]
    kinds = tuple(
        (tuple(map(key, v.shape)), str(v.dtype)) if isinstance(v, torch.Tensor) else type(v).__name__ for v in values
    )
    return kinds, tuple(map(nameless, dims_of(node) or ()))


def nameless(dim: Dim) -> Hashable:
    """A layout without its axes' names, which differ from layer to layer."""
    if isinstance(dim, Factor):
        return dim.n, dim.split
    assert isinstance(dim, (Product, Concat))
    return type(dim).__name__, tuple(map(nameless, dim.parts))
