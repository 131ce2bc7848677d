"""Runs an op on this rank's parts. The op's record says which arguments are sizes or positions; they become local."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import set_argument, set_arguments
from tpcompiler.layout import Dim, LocalSize, head, size_argument
from tpcompiler.ops.operands import argument_place
from tpcompiler.partition.builder import Applied, Builder
from tpcompiler.partition.folded import Folded

aten = torch.ops.aten
Results = list[tuple[Dim, ...]]


def local(b: Builder, op: Applied) -> fx.Node:
    """The node on this rank. Raises `Folded` for shapes that cannot be written before the batch is known."""
    new = b.graph.node_copy(op.node, op.inputs.__getitem__)
    b.describe(new, op.node)
    results = [b.dims(d) for d in op.relation.results]
    if not any(d.over for dims in results for d in dims) and not any(
        b.over(o.dims or ()) for o in op.relation.operands
    ):
        return new
    rule = op.relation.rule
    _sizes(b, op, new)
    if rule.shape and op.args[rule.shape] is not None:
        _shape(b, op, new, rule.shape, results[0])
    if rule.part == "segments":
        _segments(op, new, results)
    if rule.part == "span":
        _span(b, op, new, results)
    return new


def _set(new: fx.Node, name: str, value: Any) -> None:
    """Replaces an argument of the call by its schema name."""
    i = argument_place(new, name)
    if i < len(new.args):
        set_argument(new, i, value)
    else:
        new.update_kwarg(name, value)


def _sizes(b: Builder, op: Applied, new: fx.Node) -> None:
    """Replaces arguments that are the size of a letter by this rank's size."""
    for name, place, term in op.relation.sizes:
        if not b.over([term]):
            continue
        size = LocalSize(b.dim(term))
        if place is None:
            _set(new, name, size)
        else:
            i = argument_place(new, name)
            given: Any = new.args[i] if i < len(new.args) else new.kwargs[name]
            _set(new, name, [size if k == place else n for k, n in enumerate(given)])


def _shape(b: Builder, op: Applied, new: fx.Node, name: str, dims: Sequence[Dim]) -> None:
    """Replaces the argument that lists sizes: those of the result, or of the dimensions that replace `dim`."""
    given, whole = op.args[name], op.node.meta["val"].shape
    sizes = given if isinstance(given, list | tuple) else [given]
    at = op.args["dim"] % op.args["self"].meta["val"].dim() if "dim" in op.args else 0
    mine = slice(at, at + len(sizes))
    placed = _local_sizes(b, [b.env.get(n, n) for n in sizes], dims[mine], whole[mine])
    _set(new, name, placed if given is sizes else placed[0])


def _local_sizes(b: Builder, given: Sequence[Any], dims: Sequence[Dim], whole: Sequence[Any]) -> list[Any]:
    """`given` with this rank's sizes for the split dimensions. `whole` lists the plain graph's sizes."""
    sizes = [LocalSize(d) if d.over else n for n, d in zip(given, dims, strict=True)]
    dynamic = [i for i, d in enumerate(dims) if d.over and d.dynamic_size]
    for i in dynamic:  # a size known at run time only becomes -1, which one size of a shape may be
        open_ = [j for j, n in enumerate(given) if j != i and isinstance(n, int) and n == -1 and not dims[j].over]
        found = [_known(b, whole[j]) for j in open_]
        if len(dynamic) > 1 or None in found:
            raise Folded(f"a shape folds it into the batch as {dims[i]}")
        for j, n in zip(open_, found, strict=True):
            sizes[j] = n
        sizes[i] = -1
    return sizes


def _known(b: Builder, size: Any) -> fx.Node | int | None:
    """A size of the plain graph as a number or as the node that computes it; None when no node does."""
    if isinstance(size, int):
        return size
    for node, new in b.env.items():
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr == size.node.expr:
            return new
    return None


def _segments(op: Applied, new: fx.Node, results: Results) -> None:
    """Turns an op whose results are segments of dimension `dim` into `split_with_sizes` with this rank's sizes."""
    i = op.args["dim"] % op.args["self"].meta["val"].dim()
    if any(dims[i].over for dims in results):
        new.target = aten.split_with_sizes.default
        set_arguments(new, new.args[0], [size_argument(dims[i]) for dims in results], op.args["dim"])
        new.kwargs = {}


def _span(b: Builder, op: Applied, new: fx.Node, results: Results) -> None:
    """Replaces the positions `start` and `end` along dimension `dim` by this rank's."""
    terms = op.relation.operands[0].dims
    assert terms is not None
    i, step = op.args["dim"] % len(terms), op.args.get("step") or 1
    before = b.dim(terms[i])
    if not before.over:
        return
    part = op.relation.operands[1].node if len(op.relation.operands) > 1 else op.node.name
    n, m, start = before.size, b.axes.sizes[part][0][i], op.args["start"] or 0
    start = max(start + n if start < 0 else start, 0)
    tensors = new.args[: len(op.relation.operands)]
    if step != 1 or n == m:
        end = torch.iinfo(torch.int64).max
        set_arguments(new, *tensors, op.args["dim"], start if step != 1 else 0, end, step)
        return
    first, last = head(before, start), head(before, start + m)
    assert first is not None and last is not None, f"{new.name}: a part of {before} at {start}"
    set_arguments(new, *tensors, op.args["dim"], size_argument(first), size_argument(last))
