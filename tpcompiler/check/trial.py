"""Runs a step at small sizes: each rank's call on what the rank holds, and the model's call on whole operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from tpcompiler.check.calls import Call, GroupOver, numbers, outputs, run, substitute
from tpcompiler.check.claims import Claim, Geometry, Over, Rows
from tpcompiler.check.compare import close
from tpcompiler.check.cones import Cone
from tpcompiler.check.draw import draw
from tpcompiler.check.find import ShrunkShape, held
from tpcompiler.check.form import Held, Kind
from tpcompiler.check.shrink import Shrink
from tpcompiler.execute.simulate import run_ranks
from tpcompiler.layout import LocalRuns, LocalSize
from tpcompiler.runtime import Group, Ranks, dropout, gather

_DRAWS = 2
_MOST = 16


class Trial:
    """A step at the sizes at which it is run."""

    def __init__(self, geometry: Geometry, call: Call, whole: Call, given: tuple[Held, ...], shrink: Shrink) -> None:
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
        """How many runs the step needs: more where few indices must reach the rows of many ranks."""
        indices = [prod(o.shape) for o in self.operands if not o.dtype.is_floating_point and o.dtype != torch.bool]
        if not indices or all(g.claim.whole for g in self.given):
            return _DRAWS
        return max(_DRAWS, min(_MOST, -(-2 * self.geometry.size // max(1, min(indices)))))

    def mode(self, seed: int) -> bool:
        """Whether a run is in training: always for dropout, in every other run for all else."""
        return self.call.target is dropout or (bool(seed % 2) and not self.call.random)

    def _sizes(self, i: int) -> ShrunkShape:
        return ShrunkShape(self.given[i].operand.shape, self.operands[i].shape, self.shrink)

    def take(self, i: int, whole: Tensor, r: int) -> Tensor:
        """Rank `r`'s rows of `whole`, a tensor of the shape of operand `i`."""
        return held(whole, self.given[i].claim, r, self._sizes(i))

    def _draw(self, seed: int, training: bool) -> None:
        special = numbers(self.call) | numbers(self.whole)
        self.tensors = draw(self.operands, lambda ts: self.cone.run(ts, training), special, seed)
        self._pieces = {}
        for i, g in enumerate(self.given):
            if g.claim.partial:
                self._split(i, g.claim, seed)

    def _split(self, i: int, claim: Claim, seed: int) -> None:
        """Splits a partial operand into random addends, one for each rank."""
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
        """The part of operand `i` that rank `r` holds."""
        if self.given[i].claim.whole:
            return self.tensors[i]
        if (i, r) not in self._pieces:
            self._pieces[i, r] = self.take(i, self.tensors[i], r)
        return self._pieces[i, r]

    def forward(self, seed: int, training: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Runs the step forward: the model's results, and each rank's."""
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
        self, seed: int, outs: tuple[Held | None, ...], kinds: tuple[Kind, ...]
    ) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
        """Runs the step backward: the model's gradients of the operands, and each rank's."""
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
            None if u is None else self._share(u, outs[i], kinds[i] or (), generator) for i, u in enumerate(upstream)
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

    def _share(self, gradient: Tensor, out: Held | None, over: Over, generator: torch.Generator) -> list[Tensor]:
        """Splits a result's gradient into parts, one for each rank, that sum to it over the given mesh dimensions."""
        assert out is not None
        sizes = ShrunkShape(out.operand.shape, tuple(gradient.shape), self.shrink)
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
        """Whether the ranks' gradients of operand `i`, summed over the given mesh dimensions, are the model's."""
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
            if isinstance(a, GroupOver):
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


def _add_rows(total_: Tensor, claim: Claim, r: int, sizes: ShrunkShape, part: Tensor) -> None:
    """Adds a rank's part to its rows of the total, in place."""
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


def _positions(rows: Rows | None, r: int, d: int, sizes: ShrunkShape) -> Tensor:
    assert rows is not None
    pieces = [torch.arange(a, b) for a, b in sizes.cut(d, rows.runs[r])]
    return torch.cat([torch.arange(0), *pieces])


def _vjp(made: list[Tensor], upstream: Sequence[Tensor | None], wanted: list[Tensor]) -> list[Tensor | None]:
    pairs = [(t, u) for t, u in zip(made, upstream, strict=True) if u is not None and t.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad([t for t, _ in pairs], wanted, [u for _, u in pairs], allow_unused=True))
