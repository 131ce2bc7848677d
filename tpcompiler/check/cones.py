"""A cone: a few calls from given operands to one result, as the model would compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, alone, run, substitute


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

    @classmethod
    def of(cls, call: Call, operands: int) -> Cone:
        return cls(((call, tuple(range(operands))),))

    def run(self, tensors: Sequence[Any], training: bool = False) -> Any:
        """Its result, for whole operands."""
        values: list[Any] = []
        for call, given in self.steps:
            taken = [tensors[g] if isinstance(g, int) else values[g.i] if isinstance(g, At) else g for g in given]
            values.append(run(call, taken, alone, training))
        return values[-1]

    def meta(self, operands: Sequence[Operand]) -> Any:
        """Its result without values. Raises whatever the operations do when shapes do not fit."""
        with torch.device("meta"):
            made = [torch.empty(o.shape, dtype=o.dtype, requires_grad=o.grad) for o in operands]
            steps = tuple((c, tuple(g.to("meta") if isinstance(g, Tensor) else g for g in gs)) for c, gs in self.steps)
            return Cone(tuple((_on_meta(c), gs) for c, gs in steps)).run(made)

    def substituted(self, change: dict[int, int]) -> Cone:
        return Cone(tuple((substitute(c, change), gs) for c, gs in self.steps))


def _on_meta(call: Call) -> Call:
    from tpcompiler.check.calls import make_call, makes_tensors

    if not makes_tensors(call.target):
        return call
    return make_call(call.target, call.args, (*call.kwargs, ("device", "meta")))
