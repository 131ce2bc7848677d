"""The precision of a whole model."""

from __future__ import annotations

import torch
from torch import nn


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """`module.to(dtype)` in place, except for complex tensors, which would lose their imaginary part."""
    return module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
