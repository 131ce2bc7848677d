"""Which rank holds which elements of a tensor: layouts as runs of indices, and the cells that they cut it into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Dim
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Run, Runs, Slice, join, length

_KEPT = 4096  # how many layouts are remembered, since a model's layouts repeat from layer to layer


@dataclass(frozen=True)
class RankRuns:
    """One dimension of a tensor: the runs of indices that each rank holds.

    `runs` lists the distinct sets of runs, and `rank[r]` is the index of the set that rank r holds. `tree` is the
    layout that they come from; None when they have another origin, such as FSDP's chunks of a slice.
    """

    size: int
    runs: tuple[Runs, ...]
    rank: tuple[int, ...]
    tree: Dim | None = None

    @staticmethod
    @lru_cache(_KEPT)
    def of(dim: Dim, mesh: Mesh) -> RankRuns:
        """The runs of each rank of a mesh under a layout."""
        known: dict[int, Runs] = {}
        mine: list[Runs] = []
        for r in range(mesh.size):
            coords = mesh.coords(r)
            index = mesh.index(dim.over, coords)
            if index not in known:
                known[index] = dim.runs(mesh, coords)
            mine.append(known[index])
        return RankRuns.of_runs(dim.size, mine, dim)

    @classmethod
    def of_runs(cls, size: int, per_rank: Sequence[Runs], tree: Dim | None = None) -> RankRuns:
        """The dimension, from the runs of each rank."""
        maximal = [join(runs) for runs in per_rank]
        distinct = {runs: i for i, runs in enumerate(dict.fromkeys(maximal))}
        return cls(size, tuple(distinct), tuple(distinct[runs] for runs in maximal), tree)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The number of indices in each of `runs`."""
        return tuple(map(length, self.runs))

    @cached_property
    def is_whole(self) -> bool:
        return all(runs == (((0, self.size),) if self.size else ()) for runs in self.runs)

    @cached_property
    def classes(self) -> tuple[tuple[int, Runs], ...]:
        """The indices grouped by the ranks that hold them: pairs of a bit mask of ranks, and the runs that exactly
        these ranks hold."""
        masks = [0] * len(self.runs)
        for r, i in enumerate(self.rank):
            masks[i] |= 1 << r
        turns: dict[int, list[int]] = defaultdict(list)  # index → the sets of runs of which one begins or ends there
        for i, runs in enumerate(self.runs):
            for bound in (bound for run in runs for bound in run):
                turns[bound].append(i)
        out: dict[int, list[Run]] = defaultdict(list)
        active: set[int] = set()
        at = 0
        for bound in [*sorted(turns), self.size]:
            if bound > at:
                out[sum(masks[i] for i in active)].append((at, bound))
            active.symmetric_difference_update(turns.get(bound, ()))
            at = bound
        return tuple((mask, join(runs)) for mask, runs in out.items())


@dataclass(frozen=True)
class Cell:
    """A part of a tensor that each of `ranks` holds whole, and no other rank holds."""

    ranks: tuple[int, ...]
    runs: Slice


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on `ranks` ranks: a `RankRuns` for each dimension."""

    dims: tuple[RankRuns, ...]
    ranks: int

    @classmethod
    def of(cls, dims: Sequence[Dim], mesh: Mesh) -> Layout:
        return cls(tuple(RankRuns.of(d, mesh) for d in dims), mesh.size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(d.size for d in self.dims)

    @cached_property
    def is_whole(self) -> bool:
        """Whether every rank holds the whole tensor."""
        return all(d.is_whole for d in self.dims)

    def runs(self, rank: int) -> Slice:
        """The global indices that a rank holds."""
        return tuple(d.runs[d.rank[rank]] for d in self.dims)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return tuple(d.lengths[d.rank[rank]] for d in self.dims)

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The tensor as disjoint cells that cover it, one for each set of ranks that hold the same elements."""
        return tuple(Cell(tuple(_members(mask)), runs) for mask, runs in self._masked())

    def _masked(self) -> Iterator[tuple[int, Slice]]:
        """The cells, each with a bit mask of the ranks that hold it."""
        for combination in product(*(d.classes for d in self.dims)):
            mask = (1 << self.ranks) - 1
            for holders, _ in combination:
                mask &= holders
            yield mask, tuple(runs for _, runs in combination)

    def check(self, name: str) -> None:
        """Raises `WeightsError` when no rank holds some element."""
        hole = _hole(self)
        if hole is not None:
            raise WeightsError(f"{name} {list(self.shape)}: no rank holds element {hole}: the layout has a hole")


@lru_cache(_KEPT)
def _hole(layout: Layout) -> list[int] | None:
    """The first element that no rank holds."""
    return next(([r[0][0] for r in runs] for mask, runs in layout._masked() if not mask), None)


def _members(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest
