"""Which frames become classes, and what tells a class's instances apart."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.frames import Comparer, Frame, is_item


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


def count(node: fx.Node) -> int | None:
    """How many results a call has, None when its result is one value."""
    val = node.meta.get("val")
    if isinstance(val, (list, tuple)):
        return len(val)
    picked = items(node)
    if not picked:
        return None
    sizes = node.args[1] if len(node.args) > 1 else None
    return len(sizes) if isinstance(sizes, (list, tuple)) else max(picked) + 1


def outline(body: Frame, comparer: Comparer, root: bool) -> list[Layer]:
    """The layers to be written apart from `body`, in order of first call.

    A frame becomes a class when that makes the file shorter, the largest first; directly under the root also when it is
    a member of a list of modules and no mere line or two, alike or not.
    """
    inside = list(body.walk())
    by_name: dict[str, set[Any]] = defaultdict(set)
    for f in inside:
        by_name[f.name].add(comparer.shape(f).signature)
    open_ = [f for f in inside if len(by_name[f.name]) == 1]  # one instance, one forward
    chosen: dict[Any, list[Frame]] = {}
    while found := _most(open_, comparer, root):
        chosen[comparer.shape(found[0]).signature] = found
        open_ = _outside(open_, found)
    if root:
        taken = {id(f) for fs in chosen.values() for f in fs}
        for f in (f for f in _members(body, taken) if f in open_ and _lines(f) >= 5):
            chosen.setdefault(comparer.shape(f).signature, []).append(f)
    position = {id(f): i for i, f in enumerate(inside)}
    groups = sorted(chosen.values(), key=lambda fs: position[id(fs[0])])
    return [layer for frames in groups for layer in _layers(frames, comparer)]


def _most(frames: list[Frame], comparer: Comparer, root: bool) -> list[Frame] | None:
    """The largest frames that are worth a class."""
    alike: dict[Any, list[Frame]] = {}
    for f in frames:
        alike.setdefault(comparer.shape(f).signature, []).append(f)

    def worth(fs: list[Frame]) -> bool:
        own, instances = len(comparer.names.under(fs[0].name)), len({f.name for f in fs})
        saved = (len(fs) - 1) * _lines(fs[0]) + (instances - 1) * own - len(fs) - 10
        return saved > 0 and (root or len(fs) > 2)

    return max((fs for fs in alike.values() if worth(fs)), key=lambda fs: len(fs[0].nodes), default=None)


def _lines(frame: Frame) -> float:
    return len(frame.nodes) / 2  # statements, about: two calls stand in one


def _outside(frames: list[Frame], chosen: list[Frame]) -> list[Frame]:
    """The frames that neither are, nor are in, nor hold a chosen one."""
    taken = {id(g) for f in chosen for g in (f, *f.walk())}
    return [f for f in frames if id(f) not in taken and not any(id(g) in taken for g in f.walk())]


def _members(body: Frame, chosen: set[int]) -> list[Frame]:
    """The frames whose module stands in a list of modules: in a container that has no code of its own."""
    called = {body.name, ""} | {f.name for f in body.walk()}
    out: list[Frame] = []

    def visit(frame: Frame) -> None:
        bare = frame is not body and len(frame.frames) > 1 and not any(isinstance(i, fx.Node) for i in frame.items)
        for child in frame.frames:
            holds = any(id(f) in chosen for f in (child, *child.walk()))
            if not holds and (bare or child.name.rpartition(".")[0] not in called):
                out.append(child)
            elif id(child) not in chosen:
                visit(child)

    visit(body)
    return out


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
        at, path, _ = column[0]
        twins = ((n, _offset(n, values, frames)) for n in out)
        twin, offset = next(((n, o) for n, o in twins if o is not None), (None, None))
        if twin is not None and offset is not None:
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
