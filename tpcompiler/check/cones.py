"""A cone: a few calls from given operands to one result, as the model would compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, alone, run, substitute

_SMALL = 1 << 18  # elements up to which computing is faster than shape inference on meta


@dataclass(frozen=True)
class TensorInfo:
    """What matters of a tensor that a cone is given."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # needs a gradient


@dataclass(frozen=True)
class At:
    """The result of the cone's i-th call."""

    i: int


@dataclass(frozen=True, eq=False)
class Cone:
    """Calls in order. A call's operands are the cone's operands (int), results of earlier calls (`At`) or constants."""

    steps: tuple[tuple[Call, tuple[int | At | Tensor, ...]], ...]
    result: int | At  # an operand of the cone, or the result of a call

    @classmethod
    def of(cls, call: Call, operands: int) -> Cone:
        """A cone of one call."""
        return cls(((call, tuple(range(operands))),), At(0))

    def run(self, tensors: Sequence[Any], training: bool = False, *, wide: bool = True, device: str = "cpu") -> Any:
        """The cone's result on whole operands. Calls that draw from torch's generator always run as in evaluation."""
        values: list[Any] = []
        for call, given in self.steps:
            taken = [
                tensors[g] if isinstance(g, int) else values[g.i] if isinstance(g, At) else g.to(device) for g in given
            ]
            values.append(run(call, taken, alone, training and not call.random, wide=wide, device=device))
        return tensors[self.result] if isinstance(self.result, int) else values[self.result.i]

    def outline(self, operands: Sequence[TensorInfo]) -> Any:
        """A result of the right shapes and dtypes with meaningless values. Raises the operations' errors for shapes
        that do not fit."""
        device = "cpu" if sum(prod(o.shape) for o in operands) <= _SMALL else "meta"
        made = [torch.zeros(o.shape, dtype=o.dtype, device=device, requires_grad=o.grad) for o in operands]
        return self.run(made, wide=False, device=device)

    def substituted(self, change: dict[int, int]) -> Cone:
        return Cone(tuple((substitute(c, change), gs) for c, gs in self.steps), self.result)
