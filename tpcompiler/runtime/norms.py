"""Norms over a dimension that is spread over ranks: the statistic is reduced, a few numbers a token.

Full-width query and key norms need it (the norm is taken before the heads are told apart). Forward, each statistic is
one all-reduce; backward, its gradient is another: what every rank computes with it differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompiler.runtime.groups import Group
from tpcompiler.runtime.operators import enter, reduce


def rms_norm(x: Tensor, group: Group, size: int, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """`F.rms_norm` over the last dimension, which has `size` elements; this rank holds some, and of `weight`."""
    x_wide = wide(x)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    square = _total(x_wide.square(), group, size)
    y = (x_wide * enter(torch.rsqrt(square + eps), group)).to(x.dtype)
    return y if weight is None else y * weight


def layer_norm(
    x: Tensor, group: Group, size: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm` over the last dimension, which has `size` elements; this rank holds some, and of weights."""
    x_wide = wide(x)
    centred = x_wide - enter(_total(x_wide, group, size), group)
    variance = _total(centred.square(), group, size)
    y = (centred * enter(torch.rsqrt(variance + eps), group)).to(x.dtype)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _total(x: Tensor, group: Group, size: int) -> Tensor:
    return reduce(x.sum(-1, keepdim=True), group) / size


def wide(x: Tensor) -> Tensor:
    """Half precision as float32; other dtypes as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
