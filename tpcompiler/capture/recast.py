"""The fake values of a graph in another dtype. Making a tensor of symbolic sizes is slow, so values that are laid out
alike share one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Recast:
    """Maps fake values, and lists of them, to the dtype that `dtype_of` gives for theirs."""

    def __init__(self, dtype_of: Callable[[torch.dtype], torch.dtype]) -> None:
        self._dtype_of = dtype_of
        self._made: dict[Any, Tensor] = {}

    def __call__(self, val: Any) -> Any:
        if isinstance(val, (list, tuple)):
            return type(val)(map(self, val))
        if not isinstance(val, Tensor) or (dtype := self._dtype_of(val.dtype)) == val.dtype:
            return val
        sizes = (n if isinstance(n, int) else n.node.expr for n in (*val.shape, *val.stride()))
        key = (dtype, val.requires_grad, *sizes)
        if key not in self._made:
            self._made[key] = val.to(dtype)
        return self._made[key]
