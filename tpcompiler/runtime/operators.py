"""The operators that stand between local computations: what crosses ranks, forward and backward.

| operator           | forward                      | backward                     |
|--------------------|------------------------------|------------------------------|
| `enter`            | identity                     | all-reduce                   |
| `reduce`           | all-reduce                   | identity                     |
| `gather`           | all-gather                   | this rank's rows             |
| `take`             | this rank's rows             | their gradient among zeros   |
| `lookup`           | rows held here, else zero    | their gradient               |
| `gather_sequence`  | all-gather                   | reduce-scatter               |
| `scatter_sequence` | reduce-scatter               | all-gather                   |

`enter` and `reduce` are Megatron's f and g (arXiv 1909.08053, §3), the last two those of sequence parallelism
(arXiv 2205.05198, §4). The collectives' own autograd formulas are not these (an all-reduce's backward there is another
all-reduce), hence the `autograd.Function`s. A group of one rank makes every operator the plain one.
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
    """`x`, the same on all ranks, on its way to operations whose results differ by rank: its gradient is summed."""
    return x if group.size == 1 else _Enter.apply(x, group)


def reduce(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' partial `x`, on all of them; each rank's gradient is the sum's."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def gather(x: Tensor, group: Group, dim: int, rows: Sequence[Runs]) -> Tensor:
    """The whole value, on all ranks, of which each holds the rows `rows[index]` along `dim`.

    `rows` are runs of global indices for each rank of the group in order; uneven, strided and shared ones are allowed.
    """
    return take_whole(x, dim, rows[0]) if group.size == 1 else _Gather.apply(x, group, dim % x.dim(), rows)


def take_whole(x: Tensor, dim: int, rows: Runs) -> Tensor:
    """A gather among one rank: its rows, put in order."""
    return put_rows(x, dim, (rows,))


def take(x: Tensor, dim: int, rows: Runs) -> Tensor:
    """The running rank's rows of a replicated value, along `dim`."""
    return take_rows(x, dim, rows)


def lookup(weight: Tensor, ids: Tensor, rows: Runs, padding_idx: int | None = None) -> Tensor:
    """`F.embedding` of the rows held here, zero for ids held elsewhere: a partial value, `[*ids, width]`.

    `rows` are the global ids of `weight`'s rows; further rows of `weight` are padding. As in `F.embedding`, the row of
    `padding_idx` (global) gets no gradient.
    """
    if length(rows) == 0:
        weight, rows = F.pad(weight, (0, 0, 0, 1)), ((-1, 0),)  # no id is negative; the gradient still reaches weight
    local, held = local_ids(ids, rows)
    padding = None
    if padding_idx is not None:
        padding = _place(padding_idx, rows)
    found = F.embedding(local, weight, padding)
    return found.masked_fill(~held.unsqueeze(-1), 0)


def _place(index: int, rows: Runs) -> int | None:
    place = 0
    for start, stop in rows:
        if start <= index < stop:
            return place + index - start
        place += stop - start
    return None


def gather_sequence(x: Tensor, group: Group, dim: int, size: int | None = None) -> Tensor:
    """The whole value, about to be used differently by each rank: all-gather forward, reduce-scatter backward.

    `size` is the whole length along `dim` where it may not divide by the degree; the parts are then `group.part`'s.
    """
    return x if group.size == 1 else _GatherSequence.apply(x, group, dim, _sizes(group, size))


def scatter_sequence(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of partial values: reduce-scatter forward, all-gather backward."""
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
