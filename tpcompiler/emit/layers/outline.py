"""Which module calls become classes of their own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.layers.numbers import Number, differing_numbers
from tpcompiler.emit.ops.nodes import NodeResult, items, result_of, users

_MOST_NUMBERS = 4  # Calls that differ in more numbers are written as different layers.


@dataclass(eq=False)
class Layer:
    """A class of the emitted file: the frames that are its calls, and what tells them apart."""

    title: str
    frames: list[Frame]
    numbers: list[Number]
    outputs: list[tuple[int, int | None]]  # (index of the node, item) of the values that are used outside
    inputs: dict[Frame, tuple[NodeResult, ...]]

    @property
    def first(self) -> Frame:
        return self.frames[0]

    @property
    def instances(self) -> list[str]:
        """The qualified names of the modules that are this layer."""
        return list(dict.fromkeys(f.name for f in self.frames))

    def results(self, frame: Frame) -> list[NodeResult]:
        """The outputs of one call."""
        return [frame.nodes[i] if item is None else (frame.nodes[i], item) for i, item in self.outputs]


def outline(body: Frame, comparer: Comparer, root: bool) -> list[Layer]:
    """The layers that are written apart from `body`, in the order of their first calls.

    The largest calls are chosen first, if a class for them makes the file shorter. Directly under the root, every
    member of a list of modules becomes a class unless it is only a few lines.
    """
    inside = list(body.walk())
    by_name: dict[str, set[Any]] = defaultdict(set)
    for f in inside:
        by_name[f.name].add(comparer.fingerprint(f).signature)
    left = [f for f in inside if len(by_name[f.name]) == 1]  # A module whose calls differ has no single forward.
    chosen: dict[Any, list[Frame]] = {}
    while found := _largest(left, comparer, root):
        chosen[comparer.fingerprint(found[0]).signature] = found
        left = _outside(left, found)
    if root:
        taken = {f for fs in chosen.values() for f in fs}
        for f in _members(body, taken):
            if f in left and _lines(f) >= 5:
                chosen.setdefault(comparer.fingerprint(f).signature, []).append(f)
    position = {f: i for i, f in enumerate(inside)}
    groups = sorted(chosen.values(), key=lambda fs: position[fs[0]])
    return [layer for frames in groups for layer in _layers(frames, comparer)]


def _groups(frames: list[Frame], by: Callable[[Frame], Any]) -> list[list[Frame]]:
    """The frames in groups of equal `by`."""
    groups: dict[Any, list[Frame]] = defaultdict(list)
    for f in frames:
        groups[by(f)].append(f)
    return list(groups.values())


def _largest(frames: list[Frame], comparer: Comparer, root: bool) -> list[Frame] | None:
    """The largest alike frames for which a class makes the file shorter."""

    def worth(fs: list[Frame]) -> bool:
        own, instances = len(comparer.names.under(fs[0].name)), len({f.name for f in fs})
        saved = (len(fs) - 1) * _lines(fs[0]) + (instances - 1) * own - len(fs) - 10
        return saved > 0 and (root or len(fs) > 2)

    groups = filter(worth, _groups(frames, lambda f: comparer.fingerprint(f).signature))
    return max(groups, key=lambda fs: len(fs[0].nodes), default=None)


def _lines(frame: Frame) -> float:
    """About how many statements the frame takes: one for every two nodes."""
    return len(frame.nodes) / 2


def _outside(frames: list[Frame], chosen: list[Frame]) -> list[Frame]:
    """The frames that are neither inside a chosen one nor contain one."""
    taken = {g for f in chosen for g in (f, *f.walk())}
    return [f for f in frames if f not in taken and not any(g in taken for g in f.walk())]


def _members(body: Frame, chosen: set[Frame]) -> list[Frame]:
    """The frames whose module stands in a list of modules, that is, in a container without code of its own."""
    called = {body.name, ""} | {f.name for f in body.walk()}

    def visit(frame: Frame) -> Iterator[Frame]:
        bare = frame is not body and len(frame.frames) > 1 and not any(isinstance(p, fx.Node) for p in frame.parts)
        for child in frame.frames:
            holds = any(f in chosen for f in (child, *child.walk()))
            if not holds and (bare or child.name.rpartition(".")[0] not in called):
                yield child
            elif child not in chosen:
                yield from visit(child)

    return list(visit(body))


def _layers(frames: list[Frame], comparer: Comparer) -> Iterator[Layer]:
    numbers = differing_numbers(frames, comparer)
    if len(numbers) > _MOST_NUMBERS:
        for group in _groups(frames, lambda f: repr(comparer.fingerprint(f).numbers)):
            yield _layer(group, [], comparer)
    else:
        yield _layer(frames, numbers, comparer)


def _layer(frames: list[Frame], numbers: list[Number], comparer: Comparer) -> Layer:
    outputs: dict[tuple[int, int | None], None] = {}
    for frame in frames:
        own = set(frame.nodes)
        for i, node in enumerate(frame.nodes):
            several = items(node)
            for item, picked in sorted(several.items()) if several else [(None, node)]:
                if any(u not in own for u in users(picked)):
                    outputs[i, item] = None
    order = sorted(outputs, key=lambda o: (o[0], o[1] or 0))
    inputs = {f: tuple(map(result_of, comparer.fingerprint(f).inputs)) for f in frames}
    return Layer(frames[0].title, frames, numbers, order, inputs)
