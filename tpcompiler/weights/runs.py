"""Index sets as sorted runs: what a rank holds of one dimension, and how to copy it.

A rank's slice of a tensor is a product of index sets, one a dimension. Uneven, strided and segmented slices are all
of this form: `((0, 4), (8, 12))` are the indices 0…3 and 8…11, kept in that order at local positions 0…7.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from tpcompiler.layout import join
from tpcompiler.runtime.mesh import Run

Runs = tuple[Run, ...]  # of one dimension: ascending, disjoint, not empty
Slice = tuple[Runs, ...]  # of a tensor: `Runs` per dimension

_FEW = 32  # up to here runs are copied one by one (each a block copy), beyond by an index tensor


def whole(shape: Iterable[int]) -> Slice:
    """The slice that is everything."""
    return tuple(((0, n),) if n else () for n in shape)


def length(runs: Runs) -> int:
    return sum(b - a for a, b in runs)


def shape_of(runs: Slice) -> tuple[int, ...]:
    return tuple(length(r) for r in runs)


def intersect(a: Runs, b: Runs) -> Runs:
    """The indices in both."""
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
    return join(iter(out))


def positions(part: Runs, within: Runs) -> Runs:
    """Where the indices of `part`, a subset of `within`, stand among those of `within`."""
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
    return join(iter(out))


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


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes seen as integers: copies and comparisons are then exact for every dtype, NaNs included."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def slice_of(tensor: torch.Tensor, runs: Slice) -> torch.Tensor:
    """The elements of a slice, in local order. A view of `tensor` where every dimension is one run, else a copy."""
    assert len(runs) == tensor.ndim, (runs, tensor.shape)
    out = bits(tensor)
    for d, r in enumerate(runs):  # narrow first: what is thrown away is never copied
        if r and (r[0][0], r[-1][1]) != (0, tensor.shape[d]):
            out = out.narrow(d, r[0][0], r[-1][1] - r[0][0])
    for d, r in enumerate(runs):
        if len(r) == 1:
            continue
        if not r:
            out = out.narrow(d, 0, 0)
        elif len(r) <= _FEW:
            out = torch.cat([out.narrow(d, a - r[0][0], b - a) for a, b in r], dim=d)
        else:
            out = out.index_select(d, _index(r, r[0][0], out.device))
    return out.view(tensor.dtype)


def put(target: torch.Tensor, runs: Slice, value: torch.Tensor) -> None:
    """Write `value` to a slice of `target`: the inverse of `slice_of`."""
    if value.numel() == 0:
        return
    _put(bits(target), runs, bits(value))


def _put(target: torch.Tensor, runs: Slice, value: torch.Tensor) -> None:
    for d, r in enumerate(runs):
        if len(r) == 1:
            target = target.narrow(d, r[0][0], r[0][1] - r[0][0])
    many = sorted((len(r), d) for d, r in enumerate(runs) if len(r) > 1)
    if not many:
        target.copy_(value)
        return
    count, d = many[0]  # the dimension with the fewest runs is taken apart, the last one left goes by index
    if len(many) == 1 and count > _FEW:
        target.index_copy_(d, _index(runs[d], 0, target.device), value)
        return
    rest = tuple(((0, n),) if len(r) == 1 else r for n, r in zip(value.shape, runs, strict=True))
    at = 0
    for a, b in runs[d]:
        here = (*rest[:d], ((0, b - a),), *rest[d + 1 :])
        _put(target.narrow(d, a, b - a), here, value.narrow(d, at, b - a))
        at += b - a


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def _index(runs: Sequence[Run], base: int, device: torch.device) -> torch.Tensor:
    return torch.cat([torch.arange(a - base, b - base, device=device) for a, b in runs])
