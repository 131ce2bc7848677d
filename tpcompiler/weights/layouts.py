"""Which rank holds which elements of a tensor: layouts resolved to runs, and the cells they cut a tensor into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from tpcompiler.errors import WeightsError
from tpcompiler.layout import Dim
from tpcompiler.runtime.mesh import Mesh
from tpcompiler.runtime.runs import Run, Runs, Slice, join, shape_of


@dataclass(frozen=True)
class RankRuns:
    """One dimension of a tensor: the runs that each rank holds.

    `runs` are the distinct slices and `rank[r]` says which of them rank r has. `tree` is the layout they come from;
    None when they come from elsewhere (FSDP's chunks of a slice).
    """

    size: int
    runs: tuple[Runs, ...]
    rank: tuple[int, ...]
    tree: Dim | None = None

    @classmethod
    def of(cls, dim: Dim, mesh: Mesh) -> RankRuns:
        """A layout on a mesh, written out."""
        places: dict[tuple[int, ...], Runs] = {}
        mine: list[Runs] = []
        for r in range(mesh.size):
            coords = mesh.coords(r)
            place = tuple(coords[name] for name in dim.over)
            if place not in places:
                places[place] = dim.runs(mesh, coords)
            mine.append(places[place])
        return cls.of_runs(dim.size, mine, dim)

    @classmethod
    def of_runs(cls, size: int, per_rank: Sequence[Runs], tree: Dim | None = None) -> RankRuns:
        """Runs per rank, whatever they come from."""
        maximal = [join(runs) for runs in per_rank]
        distinct = {runs: i for i, runs in enumerate(dict.fromkeys(maximal))}
        return cls(size, tuple(distinct), tuple(distinct[runs] for runs in maximal), tree)

    @cached_property
    def is_whole(self) -> bool:
        return all(runs == (((0, self.size),) if self.size else ()) for runs in self.runs)

    @cached_property
    def classes(self) -> tuple[tuple[int, Runs], ...]:
        """`range(size)` parted by who holds it: (bit mask of ranks, the indices that exactly these hold)."""
        masks = [0] * len(self.runs)
        for r, i in enumerate(self.rank):
            masks[i] |= 1 << r
        turns: dict[int, list[int]] = defaultdict(list)  # index → the slices that begin or end there
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
    """A part of a tensor that the same ranks hold, all of them the whole of it."""

    ranks: tuple[int, ...]
    runs: Slice


@dataclass(frozen=True)
class Layout:
    """A whole tensor: `RankRuns` per dimension, over `ranks` ranks."""

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
        """Every rank holds everything."""
        return all(d.is_whole for d in self.dims)

    def runs(self, rank: int) -> Slice:
        """The global indices that a rank holds."""
        return tuple(d.runs[d.rank[rank]] for d in self.dims)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        return shape_of(self.runs(rank))

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The tensor parted by who holds it. They do not overlap, and together they are the tensor."""
        out = []
        for combination in product(*(d.classes for d in self.dims)):
            mask = (1 << self.ranks) - 1
            for held, _ in combination:
                mask &= held
            out.append(Cell(tuple(_members(mask)), tuple(runs for _, runs in combination)))
        return tuple(out)

    def check(self, name: str) -> None:
        """Raises `WeightsError` when some element is held by no rank."""
        for cell in self.cells:
            if not cell.ranks:
                first = [r[0][0] for r in cell.runs]
                raise WeightsError(f"{name} {list(self.shape)}: no rank holds element {first}: the layout has a hole")


def _members(mask: int) -> Iterator[int]:
    r = 0
    while mask:
        if mask & 1:
            yield r
        mask >>= 1
        r += 1
