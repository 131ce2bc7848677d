"""A cone: a few calls from given operands to one result, as the model would compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, alone, run, substitute

_SMALL = 1 << 18  # elements that are sooner computed than reasoned about


@dataclass(frozen=True)
class Operand:
    """A tensor given to a cone: what of it matters."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool  # needs a gradient


@dataclass(frozen=True)
class At:
    """The result of the cone's i-th step."""

    i: int


@dataclass(frozen=True, eq=False)
class Cone:
    """Steps in order; a step's operands are operands of the cone (ints), earlier steps (`At`) or constants."""

    steps: tuple[tuple[Call, tuple[int | At | Tensor, ...]], ...]
    result: int | At  # an operand, or a step's

    @classmethod
    def of(cls, call: Call, operands: int) -> Cone:
        """One call."""
        return cls(((call, tuple(range(operands))),), At(0))

    def run(self, tensors: Sequence[Any], training: bool = False, *, wide: bool = True, device: str = "cpu") -> Any:
        """Its result, for whole operands. What draws from torch's own generator is left off in training too."""
        values: list[Any] = []
        for call, given in self.steps:
            taken = [
                tensors[g] if isinstance(g, int) else values[g.i] if isinstance(g, At) else g.to(device) for g in given
            ]
            values.append(run(call, taken, alone, training and not call.random, wide=wide, device=device))
        return tensors[self.result] if isinstance(self.result, int) else values[self.result.i]

    def outline(self, operands: Sequence[Operand]) -> Any:
        """Its result in the dtypes it has, without meaning. Raises what the operations do when shapes do not fit."""
        device = "cpu" if sum(prod(o.shape) for o in operands) <= _SMALL else "meta"
        made = [torch.zeros(o.shape, dtype=o.dtype, device=device, requires_grad=o.grad) for o in operands]
        return self.run(made, wide=False, device=device)

    def substituted(self, change: dict[int, int]) -> Cone:
        return Cone(tuple((substitute(c, change), gs) for c, gs in self.steps), self.result)
