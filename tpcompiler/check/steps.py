"""Establishes steps by running them: forward, and backward through their vector-Jacobian products.

A step consists of one call as each rank makes it, the same call as the model would make it on whole operands, and the
claims of the operands. Running both gives the claim of the result; running both backward gives the kinds of the
gradients. Everything is remembered, so that equal layers cost nothing.

The kind of a gradient is a set of mesh dimensions: summed over these, the ranks' gradients are the model's gradient of
the rows that they hold. With the empty set, each rank's gradient is the model's already. Mesh dimensions along which
ranks hold nothing in common make no difference and are left out of the set. None means that there is no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, dims_of, moves, outputs
from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.compare import close, difference, factor
from tpcompiler.check.cones import Cone, TensorInfo
from tpcompiler.check.find import Draw, ShrunkShape, find_claim, held
from tpcompiler.check.shrink import Shrink, shrinks
from tpcompiler.check.trial import Given, Kind, Out, Trial

Hints = tuple[tuple[Rows | None, ...] | None, ...]  # the rows to try first, for each result

_NEITHER = "neither the model's value, nor rows of it, nor a sum that gives it"


@dataclass(frozen=True)
class Wrong:
    """Why a step does not hold."""

    true: str
    example: str = ""


@dataclass(eq=False)
class Step:
    """A step that holds forward."""

    call: Call
    whole: Call
    given: tuple[Given, ...]
    outs: tuple[Out | None, ...]  # None for a result that is no tensor
    many: bool  # whether the results are a list
    identity: bool  # whether the model's call returns its only operand
    shrink: Shrink | None  # the sizes it was run at; None where it was not, because all ranks make the model's call
    kinds: dict[tuple[Kind, ...], tuple[Kind, ...] | Wrong] = field(default_factory=dict)


class Steps:
    """All steps established so far, on one mesh."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.known: dict[Any, Step | Wrong] = {}
        self.shapes: dict[Any, Any] = {}

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, call: Call, whole: Call, given: tuple[Given, ...], hints: Hints) -> Step | Wrong:
        """The step that the call makes on these operands. `hints` are the program's own claims about the results."""
        key = (call.key, whole.key, given, hints)
        if key not in self.known:
            try:
                self.known[key] = self._forward(call, whole, given, hints)
            except Exception as e:
                self.known[key] = Wrong(f"it cannot be run: {_one_line(e)}")
        return self.known[key]

    def _forward(self, call: Call, whole: Call, given: tuple[Given, ...], hints: Hints) -> Step | Wrong:
        operands = [g.operand for g in given]
        made, many = self.describe(Cone.of(whole, len(given)), operands)
        if not call.by_rank and call.over is None and all(g.claim.whole for g in given):
            outs = tuple(None if m is None else Out(m, Claim((None,) * len(m.shape))) for m in made)
            return Step(call, whole, given, outs, many, False, None)
        failure: Step | Wrong | None = None
        rows = self._rows(call, given, hints)
        for shrink in shrinks([Cone.of(whole, len(given))], operands, rows):
            failure = self._run(Trial(self.geometry, call, whole, given, shrink), made, many, hints)
            if isinstance(failure, Step):
                return failure
        return failure or Wrong(f"its operands are too large to be run: {[list(o.shape) for o in operands]}")

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

    def _rows(self, call: Call, given: Sequence[Given], hints: Hints) -> list[Rows]:
        found = [r for g in given for r in g.claim.rows] + [r for h in hints if h is not None for r in h]
        found += [self.geometry.of_dim(d) for d in dims_of(call)]
        return list(dict.fromkeys(r for r in found if r is not None))

    def _run(self, trial: Trial, made: tuple[TensorInfo | None, ...], many: bool, hints: Hints) -> Step | Wrong:
        identity = len(trial.given) == 1 and not many and moves(trial.call)
        draws: list[list[Draw]] = [[] for _ in made]
        for seed in range(trial.draws):
            whole, local = trial.forward(seed, trial.mode(seed))
            identity = identity and close(whole[0], trial.tensors[0])
            for i, m in enumerate(made):
                if m is not None:
                    draws[i].append(Draw(whole[i], [x[i] for x in local]))
        outs: list[Out | None] = []
        for i, m in enumerate(made):
            if m is None:
                outs.append(None)
                continue
            hint = hints[i] if i < len(hints) else None
            sizes = ShrunkShape(m.shape, tuple(draws[i][0].whole.shape), trial.shrink)
            claim = find_claim(self.geometry, draws[i], sizes, self._tries(trial, m, hint), self._sums(trial))
            if claim is None:
                return self._explain(trial, m, draws[i], sizes, hint)
            outs.append(Out(m, claim))
        return Step(trial.call, trial.whole, trial.given, tuple(outs), many, identity, trial.shrink)

    def _tries(self, trial: Trial, m: TensorInfo, hint: tuple[Rows | None, ...] | None) -> list[list[Rows]]:
        """Rows to try for each dimension: the program's own claim, the operands' rows, and rows among the arguments."""
        dims = [self.geometry.of_dim(d) for d in dims_of(trial.call)]
        everywhere = [*(r for g in trial.given for r in g.claim.rows), *dims]
        out: list[list[Rows]] = []
        for d in range(len(m.shape)):
            own = [hint[d]] if hint is not None and d < len(hint) else []
            here = [g.claim.rows[d] for g in trial.given if d < len(g.claim.rows)]
            out.append([r for r in (*own, *here, *everywhere) if r is not None])
        return out

    def _sums(self, trial: Trial) -> list[Over]:
        """The sets of mesh dimensions over which the result may be partial: those along which anything differs."""
        names = {n for g in trial.given for n in (*g.claim.partial, *self.geometry.moving(g.claim))}
        names |= set(trial.call.over or ())
        names |= {n for d in dims_of(trial.call) for n in d.over}
        return [s for s in self.geometry.subsets if set(s) <= names]

    def _explain(
        self, trial: Trial, m: TensorInfo, draws: list[Draw], sizes: ShrunkShape, hint: tuple[Rows | None, ...] | None
    ) -> Wrong:
        """Shows the first difference between the ranks' results and the program's claim."""
        claim = Claim(hint if hint is not None and len(hint) == len(m.shape) else (None,) * len(m.shape))
        operands = ", ".join(str(list(t.shape)) for t in trial.tensors)
        for drawn in draws:
            for r in range(self.geometry.size):
                try:
                    expected = held(drawn.whole, claim, r, sizes)
                except (KeyError, RuntimeError):
                    break
                text = difference(drawn.local[r], expected)
                if text:
                    k = factor(drawn.local[r], expected)
                    return Wrong(
                        _NEITHER if k is None else f"{k:.4g} times that", f"rank {r}, operands {operands}: {text}"
                    )
        return Wrong(_NEITHER, f"operands {operands}")

    # -- backward ---------------------------------------------------------------------------------------------------

    def backward(self, step: Step, kinds: tuple[Kind, ...]) -> tuple[Kind, ...] | Wrong:
        """The kind of the gradient that each operand gets, given those of the results."""
        if kinds not in step.kinds:
            try:
                step.kinds[kinds] = self._backward(step, kinds)
            except Exception as e:
                step.kinds[kinds] = Wrong(f"its gradient cannot be run: {_one_line(e)}")
        return step.kinds[kinds]

    def _backward(self, step: Step, kinds: tuple[Kind, ...]) -> tuple[Kind, ...] | Wrong:
        if all(k is None for k in kinds):
            return (None,) * len(step.given)
        trial = Trial(self.geometry, step.call, step.whole, step.given, step.shrink or Shrink())
        found: list[Kind] | None = None
        if step.shrink is None:
            distinct = {k for k in kinds if k is not None}
            if len(distinct) == 1:  # all ranks compute the same vector-Jacobian product, and it is linear
                (kind,) = distinct
                return tuple(kind if g.operand.grad else None for g in step.given)
        for seed in range(trial.draws):
            whole, local = trial.backward(seed, step.outs, kinds)
            for i, g in enumerate(step.given):
                if not g.operand.grad:
                    continue
                seen = self._kind(trial, i, whole[i], [x[i] for x in local])
                if isinstance(seen, Wrong):
                    return seen
                if found is None:
                    found = [None] * len(step.given)
                if seed and found[i] is not None and seen is not None and found[i] != seen:
                    return Wrong("its gradient is of different kinds in different runs")
                found[i] = seen if seen is not None else found[i]
        return tuple(found) if found is not None else (None,) * len(step.given)

    def _kind(self, trial: Trial, i: int, whole: Tensor | None, local: list[Tensor | None]) -> Kind | Wrong:
        tensor, claim = trial.tensors[i], trial.given[i].claim
        if whole is None and all(t is None for t in local):
            return None
        if whole is None:
            whole = torch.zeros_like(tensor)
        mine = [torch.zeros_like(trial.held(i, r)) if t is None else t for r, t in enumerate(local)]
        if not bool(whole.any()) and not any(bool(t.any()) for t in mine):
            return None
        shared = [n for n in self.geometry.shared(claim) if n not in claim.partial]
        for over in self.geometry.subsets:
            if set(over) <= set(shared) and trial.gradient_holds(i, whole, mine, over):
                return over
        return self._gradient_wrong(trial, i, whole, mine)

    def _gradient_wrong(self, trial: Trial, i: int, whole: Tensor, mine: list[Tensor]) -> Wrong:
        shape = list(whole.shape)
        for r in range(self.geometry.size):
            expected = trial.take(i, whole, r)
            k = factor(mine[r], expected)
            if k is not None and abs(k - 1) > 1e-6:
                return Wrong(
                    f"the gradient of operand {i} is {k:.4g} times the model's",
                    f"rank {r}, operand {shape}: " + difference(mine[r], expected),
                )
            text = difference(mine[r], expected)
            if text:
                return Wrong(
                    f"the gradient of operand {i} is neither the model's on each rank nor a sum that gives it",
                    f"rank {r}, operand {shape}: {text}",
                )
        return Wrong(f"the gradient of operand {i} is wrong")


def _one_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
