"""Establishing steps by running them: forward, and through their vector-Jacobian products.

A step is one call as each rank makes it, the same call as the model would make it on whole operands, and what is
claimed of the operands. Its result's claim is found by running both; claims of gradients likewise. Everything is
remembered, so that equal layers cost nothing.

The kind of a gradient is a set of mesh dimensions: the ranks' gradients, summed over those, are the model's, for the
rows that they hold. The empty set: each rank's is the model's already. Along mesh dimensions where ranks hold nothing
in common both say the same, and the set leaves them out. None: no gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, dims_of, moves, numbers, outputs, run, substitute
from tpcompiler.check.calls import Over as GroupOf
from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.compare import close, difference, factor
from tpcompiler.check.cones import Cone, Operand
from tpcompiler.check.draw import draw
from tpcompiler.check.find import Draw, Sizes, find_claim, held
from tpcompiler.check.shrink import Shrink, shrinks
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.runtime import Group, Ranks, dropout, gather
from tpcompiler.simulate import run_ranks

Kind = Over | None
Hints = tuple[tuple[Rows | None, ...] | None, ...]  # for each result, rows to try first

_DRAWS = 2
_MOST = 16
_NEITHER = "neither the model's value, nor rows of it, nor a sum that gives it"


@dataclass(frozen=True)
class Given:
    """An operand of a step: what it is of the model, and how the ranks hold it."""

    operand: Operand
    claim: Claim


@dataclass(frozen=True)
class Out:
    """A tensor that a step makes."""

    operand: Operand  # shape, dtype and need of a gradient, of the model's value
    claim: Claim


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
    outs: tuple[Out | None, ...]  # None: not a tensor
    many: bool  # the result is a list
    identity: bool  # the model's call returns its only operand
    shrink: Shrink | None  # how it was run; None: equal operands make equal results
    kinds: dict[tuple[Kind, ...], tuple[Kind, ...] | Wrong] = field(default_factory=dict)


class Steps:
    """All steps established so far, on one mesh."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.known: dict[Any, Step | Wrong] = {}
        self.shapes: dict[Any, Any] = {}

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, call: Call, whole: Call, given: tuple[Given, ...], hints: Hints) -> Step | Wrong:
        """What the call makes of the operands. `hints`: the program's own claims of the results' rows."""
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
            failure = self._run(_Trial(self.geometry, call, whole, given, shrink), made, many, hints)
            if isinstance(failure, Step):
                return failure
        return failure or Wrong(f"its operands are too large to be run: {[list(o.shape) for o in operands]}")

    def describe(self, cone: Cone, operands: Sequence[Operand]) -> tuple[tuple[Operand | None, ...], bool]:
        """Shapes and dtypes of the model's results, and whether they need gradients; and whether they are a list."""
        key = (tuple((c.key, gs) for c, gs in cone.steps), tuple(operands))
        if key not in self.shapes:
            result = cone.outline(operands)
            many = not isinstance(result, Tensor)
            made = tuple(
                Operand(tuple(t.shape), t.dtype, t.requires_grad) if isinstance(t, Tensor) else None
                for t in outputs(result)
            )
            self.shapes[key] = made, many
        return self.shapes[key]

    def _rows(self, call: Call, given: Sequence[Given], hints: Hints) -> list[Rows]:
        found = [r for g in given for r in g.claim.rows] + [r for h in hints if h is not None for r in h]
        found += [self.geometry.of_dim(d) for d in dims_of(call)]
        return list(dict.fromkeys(r for r in found if r is not None))

    def _run(self, trial: _Trial, made: tuple[Operand | None, ...], many: bool, hints: Hints) -> Step | Wrong:
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
            sizes = Sizes(m.shape, tuple(draws[i][0].whole.shape), trial.shrink)
            claim = find_claim(self.geometry, draws[i], sizes, self._tries(trial, m, hint), self._sums(trial))
            if claim is None:
                return self._explain(trial, m, draws[i], sizes, hint)
            outs.append(Out(m, claim))
        return Step(trial.call, trial.whole, trial.given, tuple(outs), many, identity, trial.shrink)

    def _tries(self, trial: _Trial, m: Operand, hint: tuple[Rows | None, ...] | None) -> list[list[Rows]]:
        """For each dimension, rows to try: the program's own claim, the operands', those its arguments speak of."""
        dims = [self.geometry.of_dim(d) for d in dims_of(trial.call)]
        everywhere = [*(r for g in trial.given for r in g.claim.rows), *dims]
        out: list[list[Rows]] = []
        for d in range(len(m.shape)):
            own = [hint[d]] if hint is not None and d < len(hint) else []
            here = [g.claim.rows[d] for g in trial.given if d < len(g.claim.rows)]
            out.append([r for r in (*own, *here, *everywhere) if r is not None])
        return out

    def _sums(self, trial: _Trial) -> list[Over]:
        """Mesh dimensions over which the result may be a partial sum: those that tell operands apart."""
        names = {n for g in trial.given for n in (*g.claim.partial, *self.geometry.moving(g.claim))}
        names |= set(trial.call.over or ())
        names |= {n for d in dims_of(trial.call) for n in d.over}
        return [s for s in self.geometry.subsets if set(s) <= names]

    def _explain(
        self, trial: _Trial, m: Operand, draws: list[Draw], sizes: Sizes, hint: tuple[Rows | None, ...] | None
    ) -> Wrong:
        """The first difference from what was claimed."""
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
        trial = _Trial(self.geometry, step.call, step.whole, step.given, step.shrink or Shrink())
        found: list[Kind] | None = None
        if step.shrink is None:
            distinct = {k for k in kinds if k is not None}
            if len(distinct) == 1:  # the product is linear in the gradient, and the same on all ranks
                (kind,) = distinct
                return tuple(kind if g.operand.grad else None for g in step.given)
        for seed in range(trial.draws):
            whole, local = trial.backward(seed, step, kinds)
            for i, g in enumerate(step.given):
                if not g.operand.grad:
                    continue
                seen = self._kind(trial, i, whole[i], [x[i] for x in local])
                if isinstance(seen, Wrong):
                    return seen
                if found is None:
                    found = [None] * len(step.given)
                if seed and found[i] is not None and seen is not None and found[i] != seen:
                    return Wrong("its gradient is of no one kind")
                found[i] = seen if seen is not None else found[i]
        return tuple(found) if found is not None else (None,) * len(step.given)

    def _kind(self, trial: _Trial, i: int, whole: Tensor | None, local: list[Tensor | None]) -> Kind | Wrong:
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

    def _gradient_wrong(self, trial: _Trial, i: int, whole: Tensor, mine: list[Tensor]) -> Wrong:
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


class _Trial:
    """A step, at the sizes at which it is run."""

    def __init__(self, geometry: Geometry, call: Call, whole: Call, given: tuple[Given, ...], shrink: Shrink) -> None:
        self.geometry = geometry
        self.call = call
        self.whole = whole
        self.given = given
        self.shrink = shrink
        change = shrink.arguments
        self.rank_call = substitute(call, change) if change else call
        self.cone = Cone.of(substitute(whole, change) if change else whole, len(given))
        self.operands = shrink.operands([g.operand for g in given])
        self.tensors: list[Tensor] = []
        self._pieces: dict[tuple[int, int], Tensor] = {}

    @property
    def draws(self) -> int:
        """How many runs it takes: more where few indices must reach the rows of many ranks."""
        indices = [prod(o.shape) for o in self.operands if not o.dtype.is_floating_point and o.dtype != torch.bool]
        if not indices or all(g.claim.whole for g in self.given):
            return _DRAWS
        return max(_DRAWS, min(_MOST, -(-2 * self.geometry.size // max(1, min(indices)))))

    def mode(self, seed: int) -> bool:
        """Whether to run in training: dropout always, what else depends on the mode in turn."""
        return self.call.target is dropout or (bool(seed % 2) and not self.call.random)

    def _sizes(self, i: int) -> Sizes:
        return Sizes(self.given[i].operand.shape, self.operands[i].shape, self.shrink)

    def take(self, i: int, whole: Tensor, r: int) -> Tensor:
        """A rank's rows of something shaped like the whole operand."""
        return held(whole, self.given[i].claim, r, self._sizes(i))

    def _draw(self, seed: int, training: bool) -> None:
        special = numbers(self.call) | numbers(self.whole)
        self.tensors = draw(self.operands, lambda ts: self.cone.run(ts, training), special, seed)
        self._pieces = {}
        for i, g in enumerate(self.given):
            if g.claim.partial:
                self._split(i, g.claim, seed)

    def _split(self, i: int, claim: Claim, seed: int) -> None:
        """Random parts that sum to the operand."""
        generator = torch.Generator().manual_seed(1000 + seed)
        for group in self.geometry.groups(claim.partial):
            value = self.take(i, self.tensors[i], group[0])
            left = value
            for r in group[1:]:
                part = torch.randn(value.shape, generator=generator, dtype=value.dtype) * float(
                    value.abs().mean() if value.numel() else 1
                )
                self._pieces[i, r] = part
                left = left - part
            self._pieces[i, group[0]] = left

    def held(self, i: int, r: int) -> Tensor:
        """What rank `r` holds of operand `i`."""
        if self.given[i].claim.whole:
            return self.tensors[i]
        if (i, r) not in self._pieces:
            self._pieces[i, r] = self.take(i, self.tensors[i], r)
        return self._pieces[i, r]

    def forward(self, seed: int, training: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
        """The model's results, and each rank's."""
        self._draw(seed, training)
        with torch.no_grad():
            whole = outputs(self.cone.run(self.tensors, training))
            local = self._on_ranks(
                lambda r, ranks: outputs(
                    run(
                        self.rank_call,
                        [self.held(i, r) for i in range(len(self.given))],
                        self._resolver(r, ranks),
                        training,
                    )
                )
            )
        return whole, local

    def backward(
        self, seed: int, step: Step, kinds: tuple[Kind, ...]
    ) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
        """The gradients of the operands: the model's, and each rank's."""
        training = self.mode(seed)
        self._draw(seed, training)
        leaves = [
            t.clone().requires_grad_() if g.operand.grad else t for t, g in zip(self.tensors, self.given, strict=True)
        ]
        wanted = [t for t, g in zip(leaves, self.given, strict=True) if g.operand.grad]
        results = outputs(self.cone.run(leaves, training))
        generator = torch.Generator().manual_seed(2000 + seed)
        upstream = [
            torch.randn(t.shape, generator=generator, dtype=t.dtype) if k is not None else None
            for t, k in zip(results, kinds, strict=True)
        ]
        whole = _vjp(results, upstream, wanted)
        shares = [
            None if u is None else self._share(u, step.outs[i], kinds[i] or (), generator)
            for i, u in enumerate(upstream)
        ]

        def one(r: int, ranks: Ranks | None) -> list[Tensor | None]:
            mine = [self.held(i, r).detach().clone() for i in range(len(self.given))]
            for t, g in zip(mine, self.given, strict=True):
                t.requires_grad_(g.operand.grad)
            made = outputs(run(self.rank_call, mine, self._resolver(r, ranks), training))
            return _vjp(made, [None if s is None else s[r] for s in shares], [t for t in mine if t.requires_grad])

        local = self._on_ranks(one)
        return self._spread(whole), [self._spread(x) for x in local]

    def _spread(self, found: list[Tensor | None]) -> list[Tensor | None]:
        rest = iter(found)
        return [next(rest) if g.operand.grad else None for g in self.given]

    def _share(self, gradient: Tensor, out: Out | None, over: Over, generator: torch.Generator) -> list[Tensor]:
        """Ranks' gradients of a result that, summed over mesh dimensions, give the whole one."""
        assert out is not None
        sizes = Sizes(out.operand.shape, tuple(gradient.shape), self.shrink)
        claim = Claim(out.claim.rows)
        mine = [held(gradient, claim, r, sizes) for r in range(self.geometry.size)]
        if not over:
            return mine
        weights = [torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5 for t in mine]
        for group in self.geometry.groups(over):
            sum_ = torch.zeros(gradient.shape, dtype=torch.float64)
            for r in group:
                _add_rows(sum_, claim, r, sizes, weights[r])
            for r in group:
                mine[r] = mine[r] * weights[r] / held(sum_, claim, r, sizes)
        return mine

    def gradient_holds(self, i: int, whole: Tensor, mine: list[Tensor], over: Over) -> bool:
        """Whether the ranks' gradients of an operand, summed over mesh dimensions, are the model's."""
        claim, sizes = Claim(self.given[i].claim.rows), self._sizes(i)
        if not over:
            return all(close(mine[r], held(whole, claim, r, sizes)) for r in range(self.geometry.size))
        for group in self.geometry.groups(over):
            sum_ = torch.zeros_like(whole)
            for r in group:
                _add_rows(sum_, claim, r, sizes, mine[r])
            if not all(close(held(sum_, claim, r, sizes), held(whole, claim, r, sizes)) for r in group):
                return False
        return True

    def _on_ranks(self, fn: Callable[[int, Ranks | None], Any]) -> list[Any]:
        if self.call.over is not None and self.geometry.mesh.degree(self.call.over) > 1:
            return run_ranks(self.geometry.mesh, lambda ranks: fn(ranks.rank, ranks))
        return [fn(r, None) for r in range(self.geometry.size)]

    def _resolver(self, r: int, ranks: Ranks | None) -> Callable[[Any], Any]:
        mesh, coords = self.geometry.mesh, self.geometry.coords

        def rows(dim: Any, rank: int) -> Any:
            runs = dim.runs(mesh, coords[rank])
            return self.shrink.cuts[dim.size].shrink(runs) if dim.size in self.shrink.cuts else runs

        def resolve(a: Any) -> Any:
            if isinstance(a, GroupOf):
                return Group(over=a.names) if ranks is None else ranks.group(a.names)
            if isinstance(a, LocalSize):
                if a.dim.size in self.shrink.cuts:
                    return sum(stop - start for start, stop in rows(a.dim, r))
                return a.resolve(mesh, coords[r])
            assert isinstance(a, LocalRuns)
            if self.call.target is gather:
                assert self.call.over is not None
                group = next(g for g in self.geometry.groups(self.call.over) if r in g)
                return tuple(rows(a.dim, member) for member in group)
            return rows(a.dim, r)

        return resolve


def _add_rows(total_: Tensor, claim: Claim, r: int, sizes: Sizes, part: Tensor) -> None:
    """Add a rank's rows to the whole, in place."""
    split = [d for d, rows in enumerate(claim.rows) if rows is not None]
    if not split:
        total_ += part
        return
    if len(split) == 1:
        (d,) = split
        at = _positions(claim.rows[d], r, d, sizes)
        total_.index_add_(d, at, part)
        return
    grid = torch.meshgrid(
        *[
            _positions(rows, r, d, sizes) if rows is not None else torch.arange(total_.shape[d])
            for d, rows in enumerate(claim.rows)
        ],
        indexing="ij",
    )
    total_.index_put_(tuple(grid), part, accumulate=True)


def _positions(rows: Rows | None, r: int, d: int, sizes: Sizes) -> Tensor:
    assert rows is not None
    pieces = [torch.arange(a, b) for a, b in sizes.cut(d, rows.runs[r])]
    return torch.cat([torch.arange(0), *pieces])


def _vjp(made: list[Tensor], upstream: Sequence[Tensor | None], wanted: list[Tensor]) -> list[Tensor | None]:
    pairs = [(t, u) for t, u in zip(made, upstream, strict=True) if u is not None and t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad([t for t, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True))


def _one_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
