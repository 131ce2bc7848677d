"""Which rows of a dimension a rank holds: taking them, and putting all ranks' rows together again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompiler.runtime.mesh import Run

Rows = Sequence[Run]


def length(rows: Rows) -> int:
    """How many rows the runs hold together."""
    return sum(stop - start for start, stop in rows)


def take_rows(x: Tensor, dim: int, rows: Rows) -> Tensor:
    """The rows of `x` along `dim`, in the order of the runs: a view when they are one run or evenly strided."""
    if len(rows) == 0:
        return x.narrow(dim, 0, 0)
    if len(rows) == 1:
        start, stop = rows[0]
        return x.narrow(dim, start, stop - start)
    dim %= x.dim()
    stride = _stride(rows)
    if stride is not None:
        (start, stop), n = rows[0], len(rows)
        lead = min(start, stride - (stop - start))  # of the period that lies before its run
        if start - lead + n * stride <= x.shape[dim]:
            periods = x.narrow(dim, start - lead, n * stride).unflatten(dim, (n, stride))
            return periods.narrow(dim + 1, lead, stop - start).flatten(dim, dim + 1)
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in rows], dim)


def _stride(rows: Rows) -> int | None:
    """The distance between runs when all are alike and evenly spaced, in order and apart."""
    stride, width = rows[1][0] - rows[0][0], rows[0][1] - rows[0][0]
    even = all(b - a == width and a == rows[0][0] + i * stride for i, (a, b) in enumerate(rows))
    return stride if even and stride >= width else None


def put_rows(x: Tensor, dim: int, rows: Sequence[Rows]) -> Tensor:
    """The inverse of a gather: `x` holds, along `dim`, each rank's rows one after the other; the result, all in order.

    Rows that several ranks hold are taken from the first.
    """
    pieces: list[tuple[int, int, int]] = []  # global start, global stop, place in x
    place = 0
    for start, stop in (run for runs in rows for run in runs):
        pieces.append((start, stop, place))
        place += stop - start
    pieces.sort(key=lambda p: (p[0], -p[1]))
    kept: list[list[int]] = []  # place in x, length
    end = 0
    for start, stop, at in pieces:
        assert start <= end, f"rows {end} to {start} are held by no rank"
        if stop <= end:
            continue
        at, start = at + end - start, end
        if kept and sum(kept[-1]) == at:
            kept[-1][1] += stop - start
        else:
            kept.append([at, stop - start])
        end = stop
    if kept == [[0, place]] or not kept:
        return x
    return torch.cat([x.narrow(dim, at, n) for at, n in kept], dim)


def local_ids(ids: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Where among the rows the global `ids` stand (0 for those not among them), and which are among them."""
    if len(rows) == 1:
        start, stop = rows[0]
        held = (ids >= start) & (ids < stop)
        return torch.where(held, ids - start, 0), held
    local = torch.full_like(ids, -1)
    place = 0
    for start, stop in rows:
        local = torch.where((ids >= start) & (ids < stop), ids - (start - place), local)
        place += stop - start
    return local.clamp(min=0), local >= 0
