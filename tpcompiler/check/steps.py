"""Establishes steps: what a call on the ranks' operands makes of them, forward and backward.

A step consists of one call as each rank makes it, the same call as the model would make it on whole operands, and the
claims of the operands. Facts about the operation give the claims of the results and the kinds of the gradients
(`certified.py`). A user's own operation, of which there are none, is run instead. Everything is remembered, so that
equal layers cost nothing.

The kind of a gradient is a set of mesh dimensions: summed over these, the ranks' gradients are the model's gradient of
the rows that they hold. With the empty set, each rank's gradient is the model's already. Mesh dimensions along which
ranks hold nothing in common make no difference and are left out of the set. None means that there is no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tpcompiler.check.calls import Call, outputs
from tpcompiler.check.certified import certified
from tpcompiler.check.claims import Geometry
from tpcompiler.check.cones import Cone, TensorInfo
from tpcompiler.check.form import Fact, Held, Kind, Wrong
from tpcompiler.check.sampled import Hints, Sampler
from tpcompiler.check.shrink import Shrink


@dataclass(eq=False)
class Step:
    """A step that holds forward."""

    call: Call
    whole: Call
    given: tuple[Held, ...]
    outs: tuple[Held | None, ...]  # None for a result that is no tensor
    many: bool  # whether the results are a list
    fact: Fact | Shrink  # what establishes it: a fact, or runs at these sizes
    kinds: dict[tuple[Kind, ...], tuple[Kind, ...] | Wrong] = field(default_factory=dict)


class Steps:
    """All steps established so far, on one mesh."""

    def __init__(self, geometry: Geometry, taught: Collection[str] = ()) -> None:
        self.geometry = geometry
        self.taught = taught  # operations of a user's rule: their steps are run where no fact speaks of them
        self.ran: set[str] = set()  # those of which a step was run
        self.known: dict[Any, Step | Wrong] = {}
        self.shapes: dict[Any, Any] = {}
        self.sampler = Sampler(geometry)

    def forward(self, call: Call, whole: Call, given: tuple[Held, ...], hints: Hints) -> Step | Wrong:
        """The step that the call makes on these operands. `hints` are the program's own claims about the results."""
        key = (call.key, whole.key, given, hints)
        if key not in self.known:
            try:
                self.known[key] = self._forward(call, whole, given, hints)
            except Exception as e:
                self.known[key] = Wrong(f"it cannot be run: {_one_line(e)}")
        return self.known[key]

    def _forward(self, call: Call, whole: Call, given: tuple[Held, ...], hints: Hints) -> Step | Wrong:
        made, many = self.describe(Cone.of(whole, len(given)), [g.operand for g in given])
        fact = certified(self.geometry, call, whole, given, made)
        if isinstance(fact, Fact):
            outs = tuple(None if m is None else Held(m, c) for m, c in zip(made, fact.claims, strict=True))
            return Step(call, whole, given, outs, many, fact)
        if str(call.target) not in self.taught:
            return fact
        self.ran.add(str(call.target))
        ran = self.sampler.forward(call, whole, given, made, hints)
        return ran if isinstance(ran, Wrong) else Step(call, whole, given, ran[0], many, ran[1])

    def describe(self, cone: Cone, operands: Sequence[TensorInfo]) -> tuple[tuple[TensorInfo | None, ...], bool]:
        """The model's results as operands (shape, dtype, need of a gradient), and whether they are a list."""
        key = (tuple((c.key, gs) for c, gs in cone.steps), tuple(operands))
        if key not in self.shapes:
            result = cone.outline(operands)
            many = not isinstance(result, Tensor)
            made = tuple(
                TensorInfo(tuple(t.shape), t.dtype, t.requires_grad) if isinstance(t, Tensor) else None
                for t in outputs(result)
            )
            self.shapes[key] = made, many
        return self.shapes[key]

    def backward(self, step: Step, kinds: tuple[Kind, ...]) -> tuple[Kind, ...] | Wrong:
        """The kind of the gradient that each operand gets, given those of the results."""
        if kinds not in step.kinds:
            try:
                step.kinds[kinds] = self._backward(step, kinds)
            except Exception as e:
                step.kinds[kinds] = Wrong(f"its gradient cannot be run: {_one_line(e)}")
        return step.kinds[kinds]

    def _backward(self, step: Step, kinds: tuple[Kind, ...]) -> tuple[Kind, ...] | Wrong:
        if isinstance(step.fact, Fact):
            return step.fact.kinds(self.geometry, step.given, kinds)
        return self.sampler.backward(step.call, step.whole, step.given, step.outs, step.fact, kinds)


def _one_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
