"""The arithmetic of a mesh of ranks: which rank holds what. It needs no process groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from tpcompiler.runtime.runs import Run

Coords = Mapping[str, int]  # mesh dimension → this rank's place on it


def part(size: int, degree: int, index: int) -> Run:
    """The `index`-th of `degree` contiguous parts of `range(size)`. Longer parts come first.

    25 elements over 8 ranks are 4, 3, 3, 3, 3, 3, 3, 3.
    """
    q, r = size // degree, size % degree  # divmod would not do for torch.compile's symbolic sizes
    start = index * q + min(index, r)
    return start, start + q + (1 if index < r else 0)


def chunk(size: int, degree: int, index: int) -> Run:
    """The `index`-th part as `torch.chunk` and FSDP2 divide: ceil(size / degree) elements each, until none are left."""
    longest = -(-size // degree)
    return min(index * longest, size), min((index + 1) * longest, size)


@dataclass(frozen=True)
class Mesh:
    """Named dimensions of ranks. The last dimension varies fastest: rank = ((c0 · d1) + c1) · d2 + …"""

    dims: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, dims: Mapping[str, int]) -> Mesh:
        return cls(tuple(dims.items()))

    def __getitem__(self, name: str) -> int:
        return dict(self.dims)[name]

    def __contains__(self, name: object) -> bool:
        return any(name == n for n, _ in self.dims)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(n for n, _ in self.dims)

    @property
    def size(self) -> int:
        return prod(d for _, d in self.dims)

    def degree(self, over: tuple[str, ...]) -> int:
        return prod(self[name] for name in over)

    def coords(self, rank: int) -> dict[str, int]:
        out: dict[str, int] = {}
        for name, degree in reversed(self.dims):
            rank, out[name] = divmod(rank, degree)
        return {name: out[name] for name in self.names}

    def rank(self, coords: Coords) -> int:
        r = 0
        for name, degree in self.dims:
            r = r * degree + coords[name]
        return r

    def index(self, over: tuple[str, ...], coords: Coords) -> int:
        """A rank's index among the `degree(over)` ranks that differ only on `over`. The first name is major."""
        i = 0
        for name in over:
            i = i * self[name] + coords[name]
        return i

    def group(self, over: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` only on `over`, in the order of `index`."""
        mine = self.coords(rank)
        places = product(*(range(self[name]) for name in over))
        return tuple(self.rank({**mine, **dict(zip(over, place, strict=True))}) for place in places)

    def __str__(self) -> str:
        return " × ".join(f"{n} {d}" for n, d in self.dims) or "one rank"
