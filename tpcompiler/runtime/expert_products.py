"""Products of tokens with the matrix of their expert: one operator, for every dtype and width.

torch's own grouped product wants half precision and rows that are multiples of 16 bytes, which a rank's part of an
expert need not be. Where it can be had it is used; elsewhere the experts go one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


@torch.library.custom_op("tpcompiler::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of `x` [n, i], sorted by expert, times their expert's matrix of `weight` [experts, i, o]: [n, o].

    `ends` [experts]: where each expert's rows end. Rows past the last end give zero.
    """
    if _fast(x, weight.shape[1], weight.shape[2]):
        y = torch.nn.functional.grouped_mm(x.contiguous(), weight, offs=ends.to(torch.int32))
        return torch.where((torch.arange(len(x), device=x.device) < ends[-1])[:, None], y, 0)
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, (start, end) in enumerate(_runs(ends)):
        torch.mm(x[start:end], weight[expert], out=y[start:end])
    return y


@torch.library.custom_op("tpcompiler::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    """The weight's gradient: of each expert's rows, `x` [n, i] transposed times `y` [n, o]: [experts, i, o]."""
    if _fast(x, x.shape[1], y.shape[1]):
        return torch.nn.functional.grouped_mm(x.contiguous().t(), y.contiguous(), offs=ends.to(torch.int32))
    out = x.new_zeros(len(ends), x.shape[1], y.shape[1])
    for expert, (start, end) in enumerate(_runs(ends)):
        torch.mm(x[start:end].t(), y[start:end], out=out[expert])
    return out


def _fast(x: Tensor, *widths: int) -> bool:
    aligned = all(n and n * x.element_size() % ALIGNMENT == 0 for n in widths)
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and bool(len(x))
        and aligned
        and hasattr(torch.nn.functional, "grouped_mm")
    )


def _runs(ends: Tensor) -> list[tuple[int, int]]:
    last = ends.tolist()
    return list(zip([0, *last], last, strict=False))


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@grouped_outer.register_fake
def _(x: Tensor, y: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], y.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    wants_x, wants_weight, _ = ctx.needs_input_grad
    return (
        grouped_mm(grad, weight.mT, ends) if wants_x else None,
        grouped_outer(x, grad, ends) if wants_weight else None,
        None,
    )


grouped_mm.register_autograd(_backward, setup_context=_keep)
