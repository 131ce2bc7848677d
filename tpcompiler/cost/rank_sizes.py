"""The sizes of one rank's values as numbers, for a mesh, a batch and a sequence."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import layout_of, layouts_of, tensors
from tpcompiler.layout import Dim, Mesh
from tpcompiler.program import Capture

Shape = tuple[int, ...]


class RankSizes:
    """The sizes of values on the first rank, which holds most of an uneven axis, for `batch` sequences of `sequence`
    tokens.

    The first dimension of every input is the batch, and the symbols of its other dimensions are sequences. A size that
    depends on values, such as the rows of one expert, counts as all tokens.
    """

    def __init__(self, capture: Capture, mesh: Mesh, batch: int, sequence: int) -> None:
        self.mesh, self.coords = mesh, mesh.coords(0)
        self.batch, self.sequence = batch, sequence
        self._symbols: dict[Any, int] = {}
        self._known: dict[Any, int] = {}
        nodes = {n.name: n for n in capture.graph.find_nodes(op="placeholder")}
        for name in capture.inputs:
            for i, size in enumerate(nodes[name].meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self._symbols.setdefault(size.node.expr, batch if i == 0 else sequence)

    def number(self, size: int | torch.SymInt) -> int:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self._known:
            value = expr.subs(self._symbols)
            unknown = dict.fromkeys(value.free_symbols, self.batch * self.sequence)
            self._known[expr] = int(value.subs(unknown) if unknown else value)
        return self._known[expr]

    def shape(self, value: torch.Tensor, layout: tuple[Dim, ...] | None) -> Shape:
        """A value's shape on the rank."""
        shape = [self.number(n) for n in value.shape]
        for i, dim in enumerate(layout or ()):
            if dim.over and dim.dynamic_size:
                parts = (leaf.local_size(self.mesh, self.coords) / leaf.size for leaf in dim.leaves if leaf.split)
                shape[i] = round(shape[i] * prod(parts))
            elif dim.over:
                shape[i] = dim.local_size(self.mesh, self.coords)
        return tuple(shape)

    def shapes(self, node: fx.Node) -> list[Shape]:
        """The shapes of a node's tensor results on the rank."""
        values, layouts = tensors(node.meta.get("val")), layouts_of(node)
        if len(layouts) != len(values):
            layouts = ((layout_of(node) or ()),) * len(values)
        return [self.shape(v, d or None) for v, d in zip(values, layouts, strict=True)]

    def elements(self, node: fx.Node) -> int:
        return sum(prod(shape) for shape in self.shapes(node))
