"""Axes that a view has folded into the batch: `(b heads)` is opened, worked on, and folded again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tpcompiler.graphs import call
from tpcompiler.layout import Dim, LocalSize, Product

aten = torch.ops.aten


class Folded(Exception):
    """An axis lies in a dimension together with a batch in a way that a local shape cannot say."""


@dataclass(frozen=True)
class Apart:
    """A value of which the axis to work on is a dimension of its own."""

    value: fx.Node
    at: int
    dim: Dim
    flat: int | None  # where the two dimensions must become one again


def apart(graph: fx.Graph, value: fx.Node, i: int, dim: Dim, *, whole: bool) -> Apart:
    """Where dimension `i` is a batch times an axis: the value seen with the two as dimensions.

    `whole`: the value has all of the axis, and not this rank's part. Raises `Folded` when the batch stands between
    factors of the axis.
    """
    if not dim.dynamic_size:
        return Apart(value, i, dim, None)
    parts = dim.parts if isinstance(dim, Product) else ()
    static = [p for p in parts if not p.dynamic_size]
    first = bool(parts) and not parts[0].dynamic_size
    rest = parts[len(static) :] if first else parts[: len(parts) - len(static)]
    if not static or any(not p.dynamic_size for p in rest):
        raise Folded(f"a dimension folds it into the batch as {dim}")
    inner: Dim = static[0] if len(static) == 1 else Product(tuple(static))
    size = inner.size if whole or not inner.over else LocalSize(inner)
    sizes = [size, -1] if first else [-1, size]
    new = call(graph, aten.unflatten.int, (value, i, sizes))
    return Apart(new, i if first else i + 1, inner, i)


def together(graph: fx.Graph, new: fx.Node, opened: Apart) -> fx.Node:
    """The inverse of `apart`, of what was made of its value."""
    if opened.flat is None:
        return new
    return call(graph, aten.flatten.using_ints, (new, opened.flat, opened.flat + 1))
