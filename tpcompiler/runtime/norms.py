"""Norms over a dimension that is split over ranks. Only statistics are reduced, a few numbers per token.

Norms of queries and keys over all heads at once need this. Each statistic is one all-reduce in forward. Its gradient is
another in backward, because each rank computes something else with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompiler.runtime.groups import Group
from tpcompiler.runtime.operators import enter, reduce


def rms_norm(x: Tensor, group: Group, size: int, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` over the last dimension, which has `size` elements. This rank holds a part of it and of `weight`."""
    x_wide = wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    square = _total(x_wide.square(), group, size)
    y = (x_wide * enter(torch.rsqrt(square + eps), group)).to(x.dtype)
    return y if weight is None else y * weight


def layer_norm(
    x: Tensor, group: Group, size: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm` over the last dimension, which has `size` elements. This rank holds a part of it, of `weight` and
    of `bias`."""
    x_wide = wide(x)
    centred = x_wide - enter(_total(x_wide, group, size), group)
    variance = _total(centred.square(), group, size)
    y = (centred * enter(torch.rsqrt(variance + eps), group)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _total(x: Tensor, group: Group, size: int) -> Tensor:
    return reduce(x.sum(-1, keepdim=True), group) / size


def wide(x: Tensor) -> Tensor:
    """Casts half precision to float32. Other dtypes stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
