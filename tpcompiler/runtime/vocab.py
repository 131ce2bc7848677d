"""Cross-entropy over classes that are split over ranks, without gathering the logits (arXiv 1909.08053, §3).

Forward has two all-reduces of a few numbers per token: first the maximum; then the sum of exponentials, the target's
logit, and what class weights and label smoothing need. Backward has none. It keeps the logits, which exist anyway, and
a few numbers per token. It computes the probabilities again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tpcompiler.runtime.groups import FORWARD, Group
from tpcompiler.runtime.norms import wide
from tpcompiler.runtime.runs import Runs, length, local_ids


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group,
    rows: Runs,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`F.cross_entropy` of class indices, the same on all ranks. This rank holds the logits of the classes `rows`.

    `logits` are [N, C, …] or [C], where C counts this rank's classes and perhaps padding after them. `target` is
    [N, …] or [], with global classes. `weight` is [C]. Half precision is computed in float32. The gradient of the
    logits is this rank's own. A target that is not a class gives nan, so that it is noticed.
    """
    assert reduction in ("mean", "sum", "none"), reduction
    dim = 1 if logits.dim() > 1 else 0
    n = length(rows)
    if logits.shape[dim] != n:
        logits = logits.narrow(dim, 0, n)
    if weight is not None:
        weight = weight.detach().narrow(0, 0, n)
    half = logits.dtype in (torch.float16, torch.bfloat16)
    result = torch.float32 if half and torch.is_autocast_enabled(logits.device.type) else logits.dtype
    losses, share = _Losses.apply(logits, target, weight, group, rows, ignore_index, float(label_smoothing))
    if reduction == "none":
        return losses.to(result)
    if reduction == "sum":
        return losses.sum().to(result)
    return (losses.sum() / share.sum()).to(result)


class _Losses(torch.autograd.Function):
    """The loss of a token, (1 − ε) · w_y · (lse − x_y) + ε/C · Σ_c w_c (lse − x_c), and its weight w_y in the mean.

    Both are 0 if the target is ignored. All sums are over the global classes. The gradient for class c is
    (1 − ε) · w_y · (p_c − [c = y]) + ε/C · (W p_c − w_c), where W is the sum of the weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        group: Group,
        rows: Runs,
        ignore_index: int,
        smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        dim = 1 if logits.dim() > 1 else 0
        top = group.all_reduce(wide(_max(logits, dim)), "max", FORWARD)
        local, held = local_ids(target, rows)
        sums = _global_sums(logits, top, weight, local, held, dim, group, smoothing)
        exp_sum, picked, w_picked, x_sum, classes, w_sum = sums
        log_sum = exp_sum.log()
        counted = target != ignore_index
        stray = counted & ((target < 0) | (target >= classes))
        share = w_picked.masked_fill(~counted, 0)
        losses = share * (log_sum - picked)
        if smoothing:
            losses = (1 - smoothing) * losses + (smoothing / classes) * (w_sum * log_sum - x_sum)
        losses = losses.masked_fill(~counted, 0).masked_fill(stray, float("nan"))
        ctx.save_for_backward(logits, weight, local, held, counted, top + log_sum, share, classes, w_sum)
        ctx.dim, ctx.smoothing = dim, smoothing
        ctx.mark_non_differentiable(share)
        return losses, share

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        logits, weight, local, held, counted, lse, share, classes, w_sum = ctx.saved_tensors
        dim, smoothing = ctx.dim, ctx.smoothing
        grad = grad.masked_fill(~counted, 0)
        hard = grad * share * (1 - smoothing)
        soft = grad * (smoothing / classes)
        out = (logits - lse.unsqueeze(dim)).exp_().mul_((hard + soft * w_sum).unsqueeze(dim))
        if smoothing:
            out.sub_(soft.unsqueeze(dim) * (1 if weight is None else _along(weight, out, dim)))
        out = _subtract_at(out, dim, local, hard * held)
        return out.to(logits.dtype), None, None, None, None, None, None


def _global_sums(
    logits: Tensor,
    top: Tensor,
    weight: Tensor | None,
    local: Tensor,
    held: Tensor,
    dim: int,
    group: Group,
    smoothing: float,
) -> tuple[Tensor, ...]:
    """The sums over all classes, by one all-reduce, for x = logits − top: Σ exp x, x_y, w_y and Σ w x of each token,
    and C and Σ w."""
    n = logits.shape[dim]
    x = logits - top.unsqueeze(dim)  # float32 for half precision; from here in place
    picked, w = torch.zeros_like(top), None if weight is None else weight.to(top.dtype)
    if n:
        # Not out of x: torch.compile would have to write x to memory.
        picked = (logits.gather(dim, local.unsqueeze(dim)).squeeze(dim) - top).masked_fill(~held, 0)
    x_sum = (x if w is None else x * _along(w, x, dim)).sum(dim) if smoothing else None
    tokens, scalars = [x.exp_().sum(dim), picked], [top.new_full((1,), n)]
    if w is not None:
        tokens.append(w[local].masked_fill(~held, 0) if n else torch.zeros_like(top))
        scalars.append(w.sum().view(1))
    if x_sum is not None:
        tokens.append(x_sum)
    flat = group.all_reduce(torch.cat([t.flatten() for t in tokens] + scalars), "sum", FORWARD)
    size = local.numel()
    sums = [flat[i * size : (i + 1) * size].view(local.shape) for i in range(len(tokens))]
    classes = flat[len(tokens) * size]
    w_picked = torch.ones_like(picked) if w is None else sums[2]
    return sums[0], sums[1], w_picked, sums[-1], classes, classes if w is None else flat[-1]


def _subtract_at(x: Tensor, dim: int, index: Tensor, amount: Tensor) -> Tensor:
    """`x` minus `amount` at `index` along `dim`. It may change `x`."""
    n = x.shape[dim]
    if n == 0:
        return x
    if torch.compiler.is_compiling():  # fuses with what comes before and after, where a scatter cannot
        here = _along(torch.arange(n, device=x.device), x, dim) == index.unsqueeze(dim)
        return torch.where(here, x - amount.unsqueeze(dim), x)
    return x.scatter_add_(dim, index.unsqueeze(dim), -amount.unsqueeze(dim))


def _along(w: Tensor, x: Tensor, dim: int) -> Tensor:
    """Reshapes `w` [C], one number per class, so that it broadcasts with `x`."""
    return w.view([w.shape[0] if d == dim else 1 for d in range(x.dim())])


def _max(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim]:
        return x.amax(dim)
    return x.new_full([n for d, n in enumerate(x.shape) if d != dim], float("-inf"))
