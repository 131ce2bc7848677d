"""Dropout on one rank. Masks are counter-based: an element's mask depends on its place in the whole value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tpcompiler import runtime
from tpcompiler.graphs import call
from tpcompiler.layout import LocalRuns
from tpcompiler.partition.builder import Builder
from tpcompiler.partition.folded import Apart, apart, together
from tpcompiler.program import Training

aten = torch.ops.aten


def dropout(b: Builder, node: fx.Node) -> fx.Node:
    """Adds the runtime's dropout. Its arguments say which global elements this rank holds and where the samples are."""
    source, p, mode = node.args[:3]
    assert isinstance(source, fx.Node)
    layout = b.dims(b.axes.values[node.name][0]) if node.name in b.axes.values else ()
    value = b.env[source]
    rows: list[tuple[int, int, LocalRuns]] = []
    undo: list[Apart] = []
    for i, dim in enumerate(layout):
        if dim.over:
            opened = apart(b.graph, value, i + len(undo), dim, whole=False)
            rows.append((opened.at, opened.dim.size, LocalRuns(opened.dim)))
            if opened.value is not value:
                undo.append(opened)
            value = opened.value
    site, b.sites = b.sites, b.sites + 1
    args = (value, p, mode if isinstance(mode, Training) else Training(mode, mode), None, site, tuple(rows))
    new = call(b.graph, runtime.dropout, args, _samples(b, node, [a.at for a in undo]))
    for opened in reversed(undo):
        new = b.describe(together(b.graph, new, opened), node, layout)
    return b.describe(new, node, layout or None)  # a constant has no layout


def _samples(b: Builder, node: fx.Node, moved: Sequence[int]) -> dict[str, Any]:
    """The arguments that say where a value has its samples. With them, the mask depends on the samples of the step and
    not on its division into micro-batches. The batch is dimension 0 of the first input. In the value it may be a factor
    of a dimension."""
    first = next(n for n in b.capture.graph.nodes if n.name == b.capture.inputs[0])
    batch = first.meta["val"].shape[0] if first.meta["val"].dim() else None
    shape = node.meta["val"].shape
    if batch is None or isinstance(batch, int):
        return {} if shape and batch == shape[0] else {"batch_dim": None}
    symbol = batch.node.expr
    for i, n in enumerate(shape):
        expr = getattr(getattr(n, "node", None), "expr", None)
        place = i + sum(at <= i for at in moved)
        where = {"batch_dim": place} if place else {}
        if expr == symbol or (expr is not None and symbol in expr.free_symbols and i in [at - 1 for at in moved]):
            return where  # the dimension is the batch, or it is (b heads) and was opened into b and heads
        if expr is not None and symbol in expr.free_symbols:
            size = b.call(aten.sym_size.int, b.env[first], 0)
            size.meta["val"] = batch
            return {**where, "samples": size}
    return {"batch_dim": None}
