"""Axes that a view has folded into the batch: `(b heads)` is opened for work on heads and folded again after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from tpcompiler.graphs import call
from tpcompiler.layout import Dim, LocalSize, Product

aten = torch.ops.aten


class Folded(Exception):
    """Raised when a dimension mixes an axis with the batch in a way that no local shape can express."""


@dataclass(frozen=True)
class Apart:
    """A value in which the axis to work on is a dimension of its own."""

    value: fx.Node
    at: int  # that dimension
    dim: Dim  # its layout
    flat: int | None  # the first of the two dimensions that must become one again; None when nothing was opened


def apart(graph: fx.Graph, value: fx.Node, i: int, dim: Dim, *, whole: bool) -> Apart:
    """Opens dimension `i` of a value into two dimensions if it is a batch times an axis.

    `whole` says whether the value holds all of the axis or only this rank's part. Raises `Folded` when the batch stands
    between factors of the axis.
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
    """Undoes `apart` on a value that was computed from the opened one."""
    if opened.flat is None:
        return new
    return call(graph, aten.flatten.using_ints, (new, opened.flat, opened.flat + 1))
