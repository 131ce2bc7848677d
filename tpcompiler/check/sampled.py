"""Steps established by running them: for a user's own operation, of which no fact is known, and to test facts.

A step is run as each rank makes it and as the model would, on random operands, forward and backward. Running both gives
the claims of the results and the kinds of the gradients. What a run shows is tested, and not proven.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, dims_of
from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.compare import difference, factor
from tpcompiler.check.cones import Cone, TensorInfo
from tpcompiler.check.find import Draw, ShrunkShape, find_claim, held
from tpcompiler.check.form import Held, Kind, Wrong
from tpcompiler.check.shrink import Shrink, shrinks
from tpcompiler.check.trial import Trial

Hints = tuple[tuple[Rows | None, ...] | None, ...]  # the rows to try first, for each result
Made = tuple[TensorInfo | None, ...]
Outs = tuple[Held | None, ...]

_NEITHER = "neither the model's value, nor rows of it, nor a sum that gives it"


class Sampler:
    """Runs steps on one mesh."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def forward(
        self, call: Call, whole: Call, given: Sequence[Held], made: Made, hints: Hints
    ) -> tuple[Outs, Shrink] | Wrong:
        """The claims that the results have in every run, and the sizes of the runs."""
        operands = [g.operand for g in given]
        failure: tuple[Outs, Shrink] | Wrong | None = None
        for shrink in shrinks([Cone.of(whole, len(given))], operands, self._rows(call, given, hints)):
            failure = self._run(Trial(self.geometry, call, whole, tuple(given), shrink), made, hints)
            if not isinstance(failure, Wrong):
                return failure
        return failure or Wrong(f"its operands are too large to be run: {[list(o.shape) for o in operands]}")

    def _rows(self, call: Call, given: Sequence[Held], hints: Hints) -> list[Rows]:
        found = [r for g in given for r in g.claim.rows] + [r for h in hints if h is not None for r in h]
        found += [self.geometry.of_dim(d) for d in dims_of(call)]
        return list(dict.fromkeys(r for r in found if r is not None))

    def _run(self, trial: Trial, made: Made, hints: Hints) -> tuple[Outs, Shrink] | Wrong:
        draws: list[list[Draw]] = [[] for _ in made]
        for seed in range(trial.draws):
            whole, local = trial.forward(seed, trial.mode(seed))
            for i, m in enumerate(made):
                if m is not None:
                    draws[i].append(Draw(whole[i], [x[i] for x in local]))
        outs: list[Held | None] = []
        for i, m in enumerate(made):
            if m is None:
                outs.append(None)
                continue
            hint = hints[i] if i < len(hints) else None
            sizes = ShrunkShape(m.shape, tuple(draws[i][0].whole.shape), trial.shrink)
            claim = find_claim(self.geometry, draws[i], sizes, self._tries(trial, m, hint), self._sums(trial))
            if claim is None:
                return self._explain(trial, m, draws[i], sizes, hint)
            outs.append(Held(m, claim))
        return tuple(outs), trial.shrink

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

    def backward(
        self, call: Call, whole: Call, given: tuple[Held, ...], outs: Outs, shrink: Shrink, kinds: tuple[Kind, ...]
    ) -> tuple[Kind, ...] | Wrong:
        """The kinds that the operands' gradients have in every run, given those of the results."""
        if all(k is None for k in kinds):
            return (None,) * len(given)
        trial = Trial(self.geometry, call, whole, given, shrink)
        found: list[Kind] | None = None
        for seed in range(trial.draws):
            of_whole, local = trial.backward(seed, outs, kinds)
            for i, g in enumerate(given):
                if not g.operand.grad:
                    continue
                seen = self._kind(trial, i, of_whole[i], [x[i] for x in local])
                if isinstance(seen, Wrong):
                    return seen
                if found is None:
                    found = [None] * len(given)
                if seed and found[i] is not None and seen is not None and found[i] != seen:
                    return Wrong("its gradient is of different kinds in different runs")
                found[i] = seen if seen is not None else found[i]
        return tuple(found) if found is not None else (None,) * len(given)

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
