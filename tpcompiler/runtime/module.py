"""A namespace of parameters, for emitted programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn


class Parameters(nn.Module):
    """Empty parameters of the given shapes: `Parameters(weight=(3072,), bias=(3072,))`.

    They take the default dtype and the device of the surrounding `torch.device` context, as `torch.empty` does. Other
    modules, among them `Parameters`, and further attributes can be assigned to it, so that names nest.
    """

    if TYPE_CHECKING:  # an attribute is whatever was assigned

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False))
