"""Finds which nodes of a program are equal, and which module calls are its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from torch import fx

from tpcompiler.graphs import layouts_of, tensors

Frame = tuple[str, str, int]


class Signatures:
    """Numbers the nodes of a graph. Nodes have the same number if op, shape and layout are the same."""

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}
        self._of: dict[fx.Node, int] = {}

    def __call__(self, node: fx.Node) -> int:
        if node not in self._of:
            shapes = tuple(tuple(map(str, v.shape)) for v in tensors(node.meta.get("val")))
            target = node.target if node.op == "call_function" else node.op
            key = (target, shapes, layouts_of(node))
            self._of[node] = self._known.setdefault(key, len(self._known))
        return self._of[node]


def layers(nodes: Sequence[fx.Node], signatures: Signatures) -> dict[fx.Node, Frame | None]:
    """Maps each node to its layer, or to None. Layers are the outermost module calls of which several are equal."""
    depth = 0
    while True:
        members: dict[tuple[Frame, ...], list[fx.Node]] = defaultdict(list)
        for node in nodes:
            stack = tuple(node.meta.get("stack") or ())
            if len(stack) > depth:
                members[stack[: depth + 1]].append(node)
        if not members:
            return dict.fromkeys(nodes)
        alike: dict[Hashable, list[tuple[Frame, ...]]] = defaultdict(list)
        for path, inside in members.items():
            if len(inside) > 1:
                alike[path[:-1], tuple(map(signatures, inside))].append(path)
        found = {path for paths in alike.values() if len(paths) > 1 for path in paths}
        if found:
            return {n: p[-1] if (p := tuple(n.meta.get("stack") or ())[: depth + 1]) in found else None for n in nodes}
        depth += 1
