"""Which frames become classes, and what tells a class's instances apart."""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers import Comparer, Frame, is_item


@dataclass(frozen=True)
class Place:
    """A number in a frame's nodes: argument `path` of node `node`."""

    node: int
    path: tuple[Any, ...]


@dataclass
class Number:
    """A number that differs between a layer's calls. `places` take it plus an offset."""

    name: str
    places: dict[Place, int | float]  # → offset
    values: dict[int, Any]  # id of frame → value
    by_call: bool  # differs between the calls of one instance: an argument of forward, else of the constructor


@dataclass(frozen=True)
class Output:
    """A value that leaves a frame: of its node `node`, item `item` if that has several results."""

    node: int
    item: int | None


@dataclass(eq=False)
class Layer:
    """A class of the emitted file: frames that are alike."""

    title: str
    frames: list[Frame]
    numbers: list[Number]
    outputs: list[Output]
    inputs: dict[int, tuple[fx.Node, ...]]  # id of frame → its values from outside
    sizes: list[str] = field(default_factory=list)  # symbols that no tensor input tells: further arguments
    name: str = ""  # of the class
    draws: bool = False  # random numbers

    @property
    def first(self) -> Frame:
        return self.frames[0]

    @property
    def instances(self) -> list[str]:
        return list(dict.fromkeys(f.name for f in self.frames))

    def results(self, frame: Frame) -> list[fx.Node | None]:
        """The frame's values for `outputs`; None for one that nobody uses in this frame."""
        out: list[fx.Node | None] = []
        for o in self.outputs:
            node = frame.nodes[o.node]
            out.append(node if o.item is None else items(node).get(o.item))
        return out


def items(node: fx.Node) -> dict[int, fx.Node]:
    """The users that pick one of several results."""
    return {u.args[1]: u for u in node.users if is_item(u) and isinstance(u.args[1], int)}


def outline(body: Frame, comparer: Comparer, root: bool) -> list[Layer]:
    """The layers to be written apart from `body`, outermost first come.

    A frame becomes a class when that makes the file shorter; directly under the root also when it is a member of a
    list of modules (which is never called itself) and no mere line or two.
    """
    inside = list(body.walk())
    alike = Counter(comparer.shape(f).signature for f in inside)
    called = {f.name for f in inside} | {body.name, ""}
    by_name: dict[str, set[Any]] = defaultdict(set)
    for f in inside:
        by_name[f.name].add(comparer.shape(f).signature)

    def worth(frame: Frame) -> bool:
        if len(by_name[frame.name]) > 1:
            return False
        count, lines = alike[comparer.shape(frame).signature], len(frame.nodes)
        saved = (count - 1) * lines - count - 10 - len(comparer.names.under(frame.name))
        member = frame.name.rpartition(".")[0] not in called
        return saved > 0 and (root or count > 2) or root and member and lines >= 10

    chosen: dict[Any, list[Frame]] = {}

    def visit(frame: Frame) -> None:
        for child in frame.frames:
            if worth(child):
                chosen.setdefault(comparer.shape(child).signature, []).append(child)
            else:
                visit(child)

    visit(body)
    return [layer for frames in chosen.values() for layer in _layers(frames, comparer)]


_MOST_NUMBERS = 4


def _layers(frames: list[Frame], comparer: Comparer) -> Iterable[Layer]:
    numbers = _numbers(frames, comparer)
    if len(numbers) > _MOST_NUMBERS:  # too many to pass: as good as different layers
        groups: dict[Any, list[Frame]] = {}
        for f in frames:
            groups.setdefault(tuple(map(repr, comparer.shape(f).numbers)), []).append(f)
        for group in groups.values():
            yield _layer(group, [], comparer)
    else:
        yield _layer(frames, numbers, comparer)


def _layer(frames: list[Frame], numbers: list[Number], comparer: Comparer) -> Layer:
    outputs: dict[Output, None] = {}
    for frame in frames:
        own = set(frame.nodes)
        for i, node in enumerate(frame.nodes):
            several = items(node)
            if several:
                for k, item in sorted(several.items()):
                    if any(u not in own for u in item.users):
                        outputs[Output(i, k)] = None
            elif any(u not in own for u in _readers(node)):
                outputs[Output(i, None)] = None
    order = sorted(outputs, key=lambda o: (o.node, o.item or 0))
    inputs = {id(f): comparer.shape(f).inputs for f in frames}
    return Layer(frames[0].title, frames, numbers, order, inputs)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users that need the value itself: not only its sizes."""
    return [u for u in node.users if not str(u.target).startswith("aten.sym_")]


def _numbers(frames: list[Frame], comparer: Comparer) -> list[Number]:
    rows = [comparer.shape(f).numbers for f in frames]
    out: list[Number] = []
    for column in zip(*rows, strict=True):
        values = [value for _, _, value in column]
        if all(repr(v) == repr(values[0]) for v in values):
            continue
        at, path, base = column[0]
        twin = next((n for n in out if (d := _offset(n, values, frames)) is not None), None)
        if twin is not None:
            offset = _offset(twin, values, frames)
            assert offset is not None
            twin.places[Place(at, path)] = offset
            continue
        by_frame = {id(f): v for f, v in zip(frames, values, strict=True)}
        by_instance: dict[str, set[str]] = defaultdict(set)
        for f, v in zip(frames, values, strict=True):
            by_instance[f.name].add(repr(v))
        name = _argument(frames[0].nodes[at], path)
        out.append(Number(name, {Place(at, path): 0}, by_frame, any(len(s) > 1 for s in by_instance.values())))
    for i, n in enumerate(out):
        if n.name in [m.name for m in out[:i]]:
            n.name = f"{n.name}_{i + 1}"
    return out


def _offset(number: Number, values: list[Any], frames: list[Frame]) -> int | float | None:
    """By how much `values` exceed the number, if by the same in all frames."""
    if not all(isinstance(v, int) for v in (*values, *number.values.values())):
        return 0 if all(repr(v) == repr(number.values[id(f)]) for v, f in zip(values, frames, strict=True)) else None
    found = {v - number.values[id(f)] for v, f in zip(values, frames, strict=True)}
    return found.pop() if len(found) == 1 else None


def _argument(node: fx.Node, path: tuple[Any, ...]) -> str:
    """What the number is to the operator that takes it."""
    name = path[0]
    if isinstance(name, int):
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.arguments[name].name
        elif callable(node.target):
            name = list(inspect.signature(node.target).parameters)[name]
    return {"other": "factor"}.get(str(name), str(name))
