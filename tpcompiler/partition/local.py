"""The op on this rank's parts: arguments that are sizes become this rank's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from tpcompiler.graphs import set_argument, set_arguments
from tpcompiler.layout import Dim, LocalSize, head, major, minor, size_argument
from tpcompiler.partition.builder import Builder, Op
from tpcompiler.partition.folded import Folded

aten = torch.ops.aten
Results = list[tuple[Dim, ...]]


def local(b: Builder, op: Op) -> fx.Node:
    """The node on this rank. Raises `Folded` for shapes that cannot be said before the batch is known."""
    new = b.graph.node_copy(op.node, op.inputs.__getitem__)
    b.describe(new, op.node)
    results = [b.dims(d) for d in op.relation.results]
    split = any(d.over for dims in results for d in dims) or any(b.over(o.dims or ()) for o in op.relation.operands)
    if split and op.name in _SIZED:
        _SIZED[op.name](b, op, new, results)
    return new


def _view(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    given: Any = new.args[1]
    set_argument(new, 1, _shape(b, given, results[0], op.node.meta["val"].shape))


def _unflatten(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    given: Any = new.args[2]
    at = op.args["dim"] % op.args["self"].meta["val"].dim()
    part = slice(at, at + len(op.args["sizes"]))
    set_argument(new, 2, _shape(b, given, results[0][part], op.node.meta["val"].shape[part]))


def _shape(b: Builder, given: Sequence[Any], dims: Sequence[Dim], whole: Sequence[Any]) -> list[Any]:
    """A list of sizes with this rank's in the place of those that are split; `whole` are the plain graph's."""
    sizes = [LocalSize(d) if d.over else n for n, d in zip(given, dims, strict=True)]
    dynamic = [i for i, d in enumerate(dims) if d.over and d.dynamic_size]
    for i in dynamic:  # known at run time only: the one that torch works out
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


def _split(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    i = op.args["dim"] % op.args["self"].meta["val"].dim()
    if not any(dims[i].over for dims in results):
        return
    new.target = aten.split_with_sizes.default
    set_arguments(new, new.args[0], [size_argument(dims[i]) for dims in results], op.args["dim"])
    new.kwargs = {}


def _slice(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    args = op.args
    i = args["dim"] % args["self"].meta["val"].dim()
    terms = op.relation.operands[0].dims
    assert terms is not None
    before = b.dim(terms[i])
    if not before.over:
        return
    n, m, step = before.size, results[0][i].size, args["step"] or 1
    start = args["start"] or 0
    start = max(start + n if start < 0 else start, 0)
    if step != 1 or n == m:
        end = torch.iinfo(torch.int64).max
        set_arguments(new, new.args[0], args["dim"], start if step != 1 else 0, end, step)
        return
    first, last = head(before, start), head(before, start + m)
    assert first is not None and last is not None, f"{new.name}: a slice of {before} at {start}"
    set_arguments(new, new.args[0], args["dim"], size_argument(first), size_argument(last))


def _slice_scatter(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    args = op.args
    i = args["dim"] % args["self"].meta["val"].dim()
    whole = results[0][i]
    if not whole.over:
        return
    m, start = args["src"].meta["val"].shape[i], args["start"] or 0
    start = max(start + whole.size if start < 0 else start, 0)
    first, last = head(whole, start), head(whole, start + m)
    assert first is not None and last is not None, f"{new.name}: writes into {whole} at {start}"
    set_arguments(new, *new.args[:2], args["dim"], size_argument(first), size_argument(last), args["step"])


def _convolution(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    groups = major(results[0][1], op.args["groups"]) if op.args["groups"] > 1 else None
    if groups is not None and groups.over:
        set_arguments(new, *(op.inputs.get(x, x) if isinstance(x, fx.Node) else x for x in op.args.values()))
        set_argument(new, list(op.args).index("groups"), LocalSize(groups))


def _group_norm(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    groups = major(results[0][1], op.args["num_groups"])
    if groups is not None and groups.over:
        set_argument(new, 1, LocalSize(groups))


def _repeat_interleave(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    terms = op.relation.operands[0].dims
    assert terms is not None
    i = op.args["dim"] % len(terms)
    times = minor(results[0][i], op.args["repeats"])
    assert times is not None, f"{new.name}: {op.args['repeats']} repeats in {results[0][i]}"
    set_argument(new, 1, size_argument(times))
    if op.args.get("output_size") is not None:
        size: Any = LocalSize(results[0][i])
        new.update_kwarg("output_size", size)


def _repeat(b: Builder, op: Op, new: fx.Node, results: Results) -> None:
    terms = op.relation.operands[0].dims
    assert terms is not None
    lead = len(results[0]) - len(terms)
    counts: list[Any] = []
    for i, times in enumerate(op.args["repeats"]):
        term = None if i < lead else terms[i - lead]
        copied = results[0][i] if term is None else major(results[0][i], times)
        counts.append(LocalSize(copied) if copied is not None and copied.over else times)
    set_argument(new, 1, counts)


_SIZED: dict[str, Callable[[Builder, Op, fx.Node, Results], None]] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to"), _view),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unflatten": _unflatten,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "group_norm": _group_norm,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
}
