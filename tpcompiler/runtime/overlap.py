"""Products whose communication overlaps with computation.

`entered_linear` is `enter` followed by products with several weights. Backward computes the gradient of the input,
starts its all-reduce, computes the gradients of the weights, and then waits. Megatron-LM's
`LinearWithAsyncCommunication` does the same for one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.runtime.groups import BACKWARD, Group


def entered_linear(
    x: Tensor, group: Group, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """`F.linear(enter(x, group), weights[i], biases[i])` for every i. Values and gradients are equal bit for bit.

    `x` is `[..., width]` and the same on all ranks. A weight is `[rows, width]`. Under autocast, operands are cast as
    by `F.linear`, and the gradient that is reduced has 16 bits.
    """
    if group.size == 1:
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x = x.to(dtype)
        weights = [w.to(dtype) for w in weights]
        biases = [None if b is None else b.to(dtype) for b in biases]
    made: tuple[Tensor, ...] = _EnteredLinear.apply(x, group, len(weights), *weights, *biases)
    return made


class _EnteredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, count: int, *operands: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = operands[:count], operands[count:]
        ctx.group, ctx.count = group, count
        ctx.biased = tuple(b is not None for b in biases)
        ctx.save_for_backward(x, *weights)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        count, group = ctx.count, ctx.group
        wanted = ctx.needs_input_grad
        rows = [g.reshape(-1, g.shape[-1]) for g in grads]
        crossing = None
        if wanted[0]:
            total = rows[-1].mm(weights[-1])
            for i in range(count - 2, -1, -1):  # in the order in which autograd adds them
                total = total + rows[i].mm(weights[i])
            crossing = group.begin_all_reduce(total.view(x.shape), direction=BACKWARD)
        flat = x.reshape(-1, x.shape[-1])
        of_weights = [rows[i].t().mm(flat) if wanted[3 + i] else None for i in range(count)]
        of_biases = [rows[i].sum(0) if b and wanted[3 + count + i] else None for i, b in enumerate(ctx.biased)]
        of_x = None if crossing is None else group.finish(crossing)
        return of_x, None, None, *of_weights, *of_biases
