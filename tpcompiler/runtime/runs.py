"""Sets of indices as runs: the part of a dimension that a rank holds, arithmetic on such sets, and copies by them.

`((0, 4), (8, 12))` are the indices 0…3 and 8…11, which have the local positions 0…7 in that order. A rank's slice of a
tensor is a product of such sets, one for each dimension. Even and uneven parts, strided and segmented slices all have
this form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Run = tuple[int, int]  # [start, stop)
Runs = tuple[Run, ...]  # a set of indices; as a rank's part of a dimension: ascending, disjoint, none empty
Slice = tuple[Runs, ...]  # a part of a tensor: a set of indices for each dimension

_FEW = 32  # up to so many runs are copied one by one, as blocks; more are copied by an index tensor


def whole(shape: Iterable[int]) -> Slice:
    """The slice that covers a whole tensor of this shape."""
    return tuple(((0, n),) if n else () for n in shape)


def length(runs: Runs) -> int:
    """The number of indices in a set."""
    return sum(stop - start for start, stop in runs)


def shape_of(part: Slice) -> tuple[int, ...]:
    """The shape of a slice."""
    return tuple(map(length, part))


def join(runs: Iterable[Run]) -> Runs:
    """The same indices as maximal runs: neighbouring runs are joined, and empty ones are left out."""
    out: list[Run] = []
    for a, b in runs:
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        elif b > a:
            out.append((a, b))
    return tuple(out)


def intersect(a: Runs, b: Runs) -> Runs:
    """The indices in both sets."""
    out: list[Run] = []
    i = j = 0
    while i < len(a) and j < len(b):
        lo, hi = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if lo < hi:
            out.append((lo, hi))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return join(out)


def positions(part: Runs, within: Runs) -> Runs:
    """The positions of the indices of `part` among those of `within`, which must contain them."""
    out: list[Run] = []
    j, before = 0, 0
    for a, b in part:
        while a < b:
            lo, hi = within[j]
            if hi <= a:
                before += hi - lo
                j += 1
                continue
            assert lo <= a, f"index {a} is not in {within}"
            stop = min(b, hi)
            out.append((before + a - lo, before + stop - lo))
            a = stop
    return join(out)


def cut(runs: Runs, start: int, stop: int) -> Runs:
    """The indices at the positions `start` … `stop - 1` of `runs`: a slice of a slice, as FSDP makes them."""
    out: list[Run] = []
    before = 0
    for a, b in runs:
        lo, hi = max(start - before, 0), min(stop - before, b - a)
        if lo < hi:
            out.append((a + lo, a + hi))
        before += b - a
    return tuple(out)


def take_rows(x: Tensor, dim: int, rows: Runs) -> Tensor:
    """The elements of `x` at `rows` along `dim`, in order. It is a view if they are one run or evenly strided."""
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
    if len(rows) > _FEW:
        return x.index_select(dim, _index(rows, x.device))
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in rows], dim)


def _stride(rows: Runs) -> int | None:
    """The distance between runs, if all have the same length and distance, are ascending and do not touch."""
    stride, width = rows[1][0] - rows[0][0], rows[0][1] - rows[0][0]
    even = all(b - a == width and a == rows[0][0] + i * stride for i, (a, b) in enumerate(rows))
    return stride if even and stride >= width else None


def _index(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(a, b, device=device) for a, b in runs])


def put_rows(x: Tensor, dim: int, rows: Sequence[Runs]) -> Tensor:
    """Puts gathered rows in order. Along `dim`, `x` holds the rows of each rank, one rank after the other.

    Rows that several ranks hold are taken from the first of them.
    """
    pieces: list[tuple[int, int, int]] = []  # global start, global stop, position in x
    position = 0
    for start, stop in (run for runs in rows for run in runs):
        pieces.append((start, stop, position))
        position += stop - start
    pieces.sort(key=lambda p: (p[0], -p[1]))
    kept: list[list[int]] = []  # position in x, length
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
    if kept == [[0, position]] or not kept:
        return x
    return torch.cat([x.narrow(dim, at, n) for at, n in kept], dim)


def local_ids(ids: Tensor, rows: Runs) -> tuple[Tensor, Tensor]:
    """The positions of the global `ids` among `rows` (0 for ids that are not in them), and which ids are in them."""
    if len(rows) == 1:
        start, stop = rows[0]
        held = (ids >= start) & (ids < stop)
        return torch.where(held, ids - start, 0), held
    local = torch.full_like(ids, -1)
    position = 0
    for start, stop in rows:
        local = torch.where((ids >= start) & (ids < stop), ids - (start - position), local)
        position += stop - start
    return local.clamp(min=0), local >= 0


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers, so that copies and comparisons are exact for every dtype and for NaNs."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and the same bytes."""
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def slice_of(tensor: Tensor, part: Slice) -> Tensor:
    """The elements of a slice, in local order, bit for bit. It is a view if every dimension is one run."""
    assert len(part) == tensor.ndim, (part, tensor.shape)
    out = bits(tensor)
    for d in sorted(range(tensor.ndim), key=lambda d: len(part[d])):  # what is thrown away is never copied
        if part[d] != ((0, tensor.shape[d]),):
            out = take_rows(out, d, part[d])
    return out.view(tensor.dtype)


def put(target: Tensor, part: Slice, value: Tensor) -> None:
    """Writes `value` to a slice of `target`: the inverse of `slice_of`."""
    if value.numel():
        _put(bits(target), part, bits(value))


def _put(target: Tensor, part: Slice, value: Tensor) -> None:
    for d, runs in enumerate(part):
        if len(runs) == 1:
            target = target.narrow(d, runs[0][0], runs[0][1] - runs[0][0])
    many = sorted((len(runs), d) for d, runs in enumerate(part) if len(runs) > 1)
    if not many:
        target.copy_(value)
        return
    count, d = many[0]  # the dimension with the fewest runs is taken apart, the last one left goes by index
    if len(many) == 1 and count > _FEW:
        target.index_copy_(d, _index(part[d], target.device), value)
        return
    rest = tuple(((0, n),) if len(runs) == 1 else runs for n, runs in zip(value.shape, part, strict=True))
    at = 0
    for a, b in part[d]:
        here = (*rest[:d], ((0, b - a),), *rest[d + 1 :])
        _put(target.narrow(d, a, b - a), here, value.narrow(d, at, b - a))
        at += b - a
