"""The output layer and its loss as one operator, so that the logits of a batch never exist in 32 bits.

The tokens are computed in chunks. While one chunk is multiplied by the weight, an all-gather exchanges three numbers
per token of the chunk before. When it is done, that chunk's logits are overwritten by their gradient. Backward
multiplies the gradient by the weight, starts the all-reduce of that product, and then multiplies the gradient by the
input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.runtime.groups import BACKWARD, FORWARD, Group
from tpcompiler.runtime.runs import Runs, length, local_ids

CHUNK = 2048  # tokens; the same on all ranks, which communicate once for each chunk


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Group | None = None,
    rows: Runs | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """`F.cross_entropy(F.linear(enter(x, group), weight, bias).flatten(0, -2), target)`, the "mean" or the "sum".

    `x` is `[..., width]`. `target` has a global class for each token. Both are the same on all ranks. This rank holds
    the classes `rows`, or all classes without a group. `weight` is `[classes, width]` and may have padding after the
    classes. The loss is computed in `dtype`, by default that of the logits, and for half precision in float32. A target
    that is not a class gives nan, so that it is noticed.
    """
    assert reduction in ("mean", "sum"), reduction
    group = Group() if group is None else group
    rows = ((0, weight.shape[0]),) if rows is None else rows
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    if autocast:
        low = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(low), weight.to(low), None if bias is None else bias.to(low)
    half = x.dtype in (torch.float16, torch.bfloat16)
    result = torch.float32 if half and autocast else dtype or x.dtype
    computed = torch.float32 if half and dtype is None else dtype or x.dtype
    if weight.shape[0] != length(rows):
        weight = weight.narrow(0, 0, length(rows))
        bias = None if bias is None else bias.narrow(0, 0, length(rows))
    trained = any(t is not None and t.requires_grad for t in (x, weight, bias)) and torch.is_grad_enabled()
    how = (group, rows, computed, reduction == "mean", ignore_index, chunk_numbers, chunk_losses, trained)
    loss: Tensor = _Loss.apply(x, weight, bias, target, *how)
    return loss.to(result)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        group: Group,
        rows: Runs,
        dtype: torch.dtype,
        mean: bool,
        ignore_index: int,
        begin: Callable[..., Tensor],
        end: Callable[..., tuple[Tensor, Tensor | None]],
        trained: bool,
    ) -> Tensor:
        flat, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
        one = torch.compiler.is_compiling()  # fuses what is element by element; a loop would only be unrolled
        kept = flat.new_empty(flat.shape[0], weight.shape[0]) if trained and not one else None
        spans = [(0, flat.shape[0])] if one else _spans(flat.shape[0])
        total = torch.zeros((), dtype=dtype, device=x.device)
        gradient: Tensor | None = None
        under_way: tuple[Any, ...] = ()

        def finish(crossing: Tensor, logits: Tensor, a: int, b: int) -> tuple[Tensor, Tensor | None]:
            numbers = group.finish(crossing)
            return end(logits, numbers, labels[a:b], rows, ignore_index, trained, None if kept is None else logits)

        for a, b in spans:
            logits = _product(flat[a:b], weight, bias, None if kept is None else kept[a:b])
            crossing = group.begin_all_gather(begin(logits, labels[a:b], rows, dtype), FORWARD)
            if under_way:
                total = total + finish(*under_way)[0]
            under_way = (crossing, logits, a, b)
        if under_way:
            last, gradient = finish(*under_way)
            total = total + last
        count = (labels != ignore_index).sum()
        ctx.group, ctx.mean, ctx.biased = group, mean, bias is not None
        if trained:
            ctx.save_for_backward(flat, weight, gradient if kept is None else kept, count)
            ctx.shape = x.shape
        return total / count if mean else total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        flat, weight, gradient, count = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        scale = (grad / count).masked_fill(count == 0, 0) if ctx.mean else grad
        crossing = of_weight = of_bias = of_x = None
        if wanted[0]:
            crossing = ctx.group.begin_all_reduce((gradient.mm(weight) * scale).view(ctx.shape), BACKWARD)
        if wanted[1]:
            of_weight = gradient.t().mm(flat) * scale
        if ctx.biased and wanted[2]:
            of_bias = gradient.sum(0) * scale
        if crossing is not None:
            of_x = ctx.group.finish(crossing)
        return of_x, of_weight, of_bias, *(None,) * 9


def chunk_numbers(logits: Tensor, labels: Tensor, rows: Runs, dtype: torch.dtype) -> Tensor:
    """The numbers `[1, 3, tokens]` of a chunk that the other ranks need.

    They are, for each token: log Σ exp over this rank's logits; the target's logit, or 0 if another rank holds it; and
    whether this rank holds it.
    """
    local, held = local_ids(labels, rows)
    if logits.shape[1] == 0:
        log_sum = torch.full(labels.shape, float("-inf"), dtype=dtype, device=logits.device)
        picked = torch.zeros_like(log_sum)
    else:
        x = logits.to(dtype)
        top = x.amax(1, keepdim=True)
        log_sum = ((x - top).exp().sum(1, keepdim=True).log() + top).squeeze(1)
        top = top.squeeze(1)
        log_sum = torch.where(top == float("-inf"), top, log_sum)
        # Not out of x: torch.compile would have to write x to memory.
        picked = logits.gather(1, local.unsqueeze(1)).squeeze(1).to(dtype).masked_fill(~held, 0)
    return torch.stack([log_sum, picked, held.to(dtype)]).unsqueeze(0)


def chunk_losses(
    logits: Tensor,
    numbers: Tensor,
    labels: Tensor,
    rows: Runs,
    ignore_index: int,
    trained: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The sum of a chunk's losses, and its gradient with respect to this rank's logits, which may be written to `out`.

    `numbers` are the `chunk_numbers` of all ranks. The gradient is p_c − [c = y] for class c, and 0 for ignored tokens.
    """
    local, held = local_ids(labels, rows)
    counted = labels != ignore_index
    log_sum, picked, found = torch.logsumexp(numbers[:, 0], 0), numbers[:, 1].sum(0), numbers[:, 2].sum(0)
    losses = (log_sum - picked).masked_fill(~counted, 0).masked_fill(counted & (found == 0), float("nan"))
    total = losses.sum()
    if not trained:
        return total, None
    p = (logits.to(numbers.dtype) - log_sum.unsqueeze(1)).exp() * counted.unsqueeze(1)
    held = held & counted
    if torch.compiler.is_compiling():  # fuses with what comes before and after, where a scatter cannot
        here = (torch.arange(p.shape[1], device=p.device) == local.unsqueeze(1)) & held.unsqueeze(1)
        p = torch.where(here, p - 1, p)
    elif p.shape[1]:
        p.scatter_add_(1, local.unsqueeze(1), -held.unsqueeze(1).to(p.dtype))
    return total, p.to(logits.dtype) if out is None else out.copy_(p)


def _spans(tokens: int) -> list[tuple[int, int]]:
    return [(a, min(a + CHUNK, tokens)) for a in range(0, tokens, CHUNK)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
