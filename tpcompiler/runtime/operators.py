"""The operators between local computations: how they communicate, forward and backward.

| operator           | forward                      | backward                     |
|--------------------|------------------------------|------------------------------|
| `enter`            | identity                     | all-reduce                   |
| `reduce`           | all-reduce                   | identity                     |
| `gather`           | all-gather                   | this rank's rows             |
| `take`             | this rank's rows             | their gradient among zeros   |
| `lookup`           | rows held here, else zero    | their gradient               |
| `gather_sequence`  | all-gather                   | reduce-scatter               |
| `scatter_sequence` | reduce-scatter               | all-gather                   |

`enter` and `reduce` are Megatron's f and g (arXiv 1909.08053, §3). The last two are those of sequence parallelism
(arXiv 2205.05198, §4). They are `autograd.Function`s, because torch's own collectives have other gradients: there, the
backward of an all-reduce is another all-reduce. In a group of one rank, no operator communicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.runtime.groups import BACKWARD, FORWARD, Group
from tpcompiler.runtime.runs import Runs, length, local_ids, put_rows, take_rows


def enter(x: Tensor, group: Group) -> Tensor:
    """Returns `x`, which is the same on all ranks, for operations that differ by rank. Its gradient is all-reduced."""
    return x if group.size == 1 else _Enter.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' partial `x`, on every rank. Each `x` gets the gradient of the sum."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def gather(x: Tensor, group: Group, dim: int, rows: Sequence[Runs]) -> Tensor:
    """The whole value, on every rank. The i-th rank of the group holds its rows `rows[i]` along `dim`.

    `rows` are runs of global indices. They may be uneven or strided, and several ranks may hold the same rows.
    """
    return take_whole(x, dim, rows[0]) if group.size == 1 else _Gather.apply(x, group, dim % x.dim(), rows)


def take_whole(x: Tensor, dim: int, rows: Runs) -> Tensor:
    """`gather` in a group of one rank: puts its rows in order."""
    return put_rows(x, dim, (rows,))


def take(x: Tensor, dim: int, rows: Runs) -> Tensor:
    """This rank's rows, along `dim`, of a value that every rank holds whole."""
    return take_rows(x, dim, rows)


def lookup(weight: Tensor, ids: Tensor, rows: Runs, padding_idx: int | None = None, size: int | None = None) -> Tensor:
    """`F.embedding` with this rank's rows, and zero for ids of other ranks: a partial `[*ids, *weight.shape[1:]]`.

    `rows` are the global ids of the rows of `weight`; further rows of `weight` are padding. As in `F.embedding`, the
    row of `padding_idx` (a global id) gets no gradient. With `size`, the number of all rows, it is `weight[ids]`: ids
    below zero count from the end.
    """
    if size is not None:
        ids = torch.where(ids < 0, ids + size, ids)
    if length(rows) == 0:  # no id is negative now; the gradient still reaches weight
        weight, rows = F.pad(weight, (0, 0) * (weight.dim() - 1) + (0, 1)), ((-1, 0),)
    local, held = local_ids(ids, rows)
    if weight.dim() == 2:
        found = F.embedding(local, weight, None if padding_idx is None else _place(padding_idx, rows))
    else:
        found = weight[local]
    return found.masked_fill(~held.view(held.shape + (1,) * (weight.dim() - 1)), 0)


def _place(index: int, rows: Runs) -> int | None:
    place = 0
    for start, stop in rows:
        if start <= index < stop:
            return place + index - start
        place += stop - start
    return None


def gather_sequence(x: Tensor, group: Group, dim: int, size: int | None = None) -> Tensor:
    """The whole value, for operations that differ by rank: an all-gather in forward, a reduce-scatter in backward.

    `size` is the whole length along `dim`. It is needed if it may not divide by the degree; ranks then hold the parts
    of `group.part`.
    """
    return x if group.size == 1 else _GatherSequence.apply(x, group, dim, _sizes(group, size))


def scatter_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part, along `dim`, of the sum of partial values: reduce-scatter forward, all-gather backward."""
    return x if group.size == 1 else _ScatterSequence.apply(x, group, dim, _sizes(group, x.shape[dim]))


def _sizes(group: Group, size: int | None) -> tuple[int, ...] | None:
    return None if size is None or size % group.size == 0 else group.sizes(size)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.group.all_reduce(grad, direction=BACKWARD), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x, direction=FORWARD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, rows: Sequence[Runs]) -> Tensor:
        ctx.dim, ctx.rows = dim, rows[group.index]
        sizes = tuple(length(r) for r in rows)
        return put_rows(group.all_gather(x, dim, sizes, direction=FORWARD), dim, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return take_rows(grad, ctx.dim, ctx.rows), None, None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: tuple[int, ...] | None) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return group.all_gather(x, dim, sizes, direction=FORWARD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.group.reduce_scatter(grad, ctx.dim, ctx.sizes, direction=BACKWARD), None, None, None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sizes: tuple[int, ...] | None) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        return group.reduce_scatter(x, dim, sizes, direction=FORWARD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.group.all_gather(grad, ctx.dim, ctx.sizes, direction=BACKWARD), None, None, None
