"""The numbers in which the calls of one layer differ: they become arguments of its constructor or of its call."""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tpcompiler.emit.layers.alike import Comparer
from tpcompiler.emit.layers.frames import Frame
from tpcompiler.emit.ops.arguments import ArgumentPath


@dataclass
class Number:
    """A number that differs between a layer's calls."""

    name: str
    uses: dict[tuple[int, ArgumentPath], int | float]  # (index of the node, path) → what is added to the number there
    values: dict[Frame, Any]
    by_call: bool  # It differs between calls of one instance, so it is an argument of forward, not of the constructor.

    def of(self, instance: str) -> int | float:
        """The number of the module `instance`."""
        return next(v for frame, v in self.values.items() if frame.name == instance)


def differing_numbers(frames: list[Frame], comparer: Comparer) -> list[Number]:
    """The numbers in which alike frames differ. Numbers that differ by a constant are one."""
    out: list[Number] = []
    for column in zip(*(comparer.fingerprint(f).numbers for f in frames), strict=True):
        values = [value for _, _, value in column]
        if all(repr(v) == repr(values[0]) for v in values):
            continue
        by_frame = dict(zip(frames, values, strict=True))
        at, path, _ = column[0]
        offsets = ((n, offset) for n in out if (offset := _offset(n, by_frame)) is not None)
        twin, offset = next(offsets, (None, 0))
        if twin is not None:
            twin.uses[at, path] = offset
            continue
        by_instance: dict[str, set[str]] = defaultdict(set)
        for f, v in by_frame.items():
            by_instance[f.name].add(repr(v))
        name = _argument(frames[0].nodes[at], path)
        out.append(Number(name, {(at, path): 0}, by_frame, any(len(s) > 1 for s in by_instance.values())))
    for i, n in enumerate(out):
        if n.name in [m.name for m in out[:i]]:
            n.name = f"{n.name}_{i + 1}"
    return out


def _offset(number: Number, values: dict[Frame, Any]) -> int | float | None:
    """The constant by which `values` exceed the number; None if it differs between the frames."""
    pairs = [(v, number.values[f]) for f, v in values.items()]
    if not all(isinstance(v, int) and isinstance(n, int) for v, n in pairs):
        return 0 if all(repr(v) == repr(n) for v, n in pairs) else None
    found = {v - n for v, n in pairs}
    return found.pop() if len(found) == 1 else None


def _argument(node: fx.Node, path: ArgumentPath) -> str:
    """The name of the argument at `path` in the schema of the operator."""
    name = path[0]
    if isinstance(name, int):
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target._schema.arguments[name].name
        elif callable(node.target):
            name = list(inspect.signature(node.target).parameters)[name]
    return {"other": "factor"}.get(str(name), str(name))
