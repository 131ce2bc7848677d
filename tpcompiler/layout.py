"""How a tensor lies on the mesh: dimensions as products and concatenations of axes, some of them split.

All stages after the plan describe values by layouts. Nothing here knows about graphs.

A dimension is one of
    Factor(n, name, split)    an axis that is not taken apart; `split` = the mesh dimensions it is split over
    Product(parts)            an ordered product, major first
    Concat(parts)             segments one after the other
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

from tpcompiler.runtime.mesh import Coords, Mesh, part
from tpcompiler.runtime.runs import Run, Runs, Slice, join

Over = tuple[str, ...]  # mesh dimensions, in the mesh's order


@dataclass(frozen=True)
class Dim(ABC):
    """A dimension of a tensor. Base of `Factor`, `Product` and `Concat`."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Elements, over all ranks."""

    @property
    @abstractmethod
    def leaves(self) -> Iterator[Factor]:
        """The axes it is made of, major first."""

    @abstractmethod
    def local_size(self, mesh: Mesh, coords: Coords) -> int:
        """Elements that a rank holds."""

    @abstractmethod
    def runs(self, mesh: Mesh, coords: Coords) -> Runs:
        """The global indices that a rank holds, as maximal ascending runs. Their lengths sum to `local_size`."""

    @property
    def over(self) -> Over:
        """The mesh dimensions that split this dimension, in order, each once."""
        return tuple(dict.fromkeys(name for leaf in self.leaves for name in leaf.split))

    @property
    def dynamic_size(self) -> bool:
        """Whether its size is known at run time only."""
        return any(leaf.dynamic for leaf in self.leaves)


@dataclass(frozen=True)
class Factor(Dim):
    """An axis. `split`: the mesh dimensions that it is split over, the first one major."""

    n: int
    name: str = ""
    split: Over = ()
    dynamic: bool = False  # whether it is a batch or a sequence: `n` then stands for a size known at run time only

    @property
    def size(self) -> int:
        return self.n

    @property
    def leaves(self) -> Iterator[Factor]:
        yield self

    def part(self, mesh: Mesh, coords: Coords) -> Run:
        assert not self.dynamic, f"the size of {self.name} is known at run time only"
        return part(self.n, mesh.degree(self.split), mesh.index(self.split, coords))

    def local_size(self, mesh: Mesh, coords: Coords) -> int:
        start, stop = self.part(mesh, coords)
        return stop - start

    def runs(self, mesh: Mesh, coords: Coords) -> Runs:
        start, stop = self.part(mesh, coords)
        return ((start, stop),) if stop > start else ()

    def __str__(self) -> str:
        return (self.name or str(self.n)) + (f"/{'·'.join(self.split)}" if self.split else "")


@dataclass(frozen=True)
class Compound(Dim):
    """A dimension made of other dimensions. Base of `Product` and `Concat`."""

    parts: tuple[Dim, ...]

    @property
    def leaves(self) -> Iterator[Factor]:
        for p in self.parts:
            yield from p.leaves


@dataclass(frozen=True)
class Product(Compound):
    """An ordered product of dimensions. Its first part is the major one."""

    @property
    def size(self) -> int:
        return prod(p.size for p in self.parts)

    def local_size(self, mesh: Mesh, coords: Coords) -> int:
        return prod(p.local_size(mesh, coords) for p in self.parts)

    def runs(self, mesh: Mesh, coords: Coords) -> Runs:
        inner: Runs = ((0, 1),)
        width = 1
        for p in reversed(self.parts):
            outer = p.runs(mesh, coords)
            if inner == ((0, width),):  # every minor part is whole, so that runs only grow longer
                inner = tuple((a * width, b * width) for a, b in outer)
            else:
                inner = join(
                    (i * width + a, i * width + b) for lo, hi in outer for i in range(lo, hi) for a, b in inner
                )
            width *= p.size
        return inner

    def __str__(self) -> str:
        return "(" + " ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Concat(Compound):
    """Segments that follow one another along a dimension."""

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)

    def local_size(self, mesh: Mesh, coords: Coords) -> int:
        return sum(p.local_size(mesh, coords) for p in self.parts)

    def runs(self, mesh: Mesh, coords: Coords) -> Runs:
        def shifted() -> Iterator[Run]:
            offset = 0
            for p in self.parts:
                for a, b in p.runs(mesh, coords):
                    yield a + offset, b + offset
                offset += p.size

        return join(shifted())

    def __str__(self) -> str:
        return "(" + " | ".join(map(str, self.parts)) + ")"


def slice_on(dims: Iterable[Dim], mesh: Mesh, coords: Coords) -> Slice:
    """The part of a tensor that the rank at `coords` holds."""
    return tuple(d.runs(mesh, coords) for d in dims)


@dataclass(frozen=True)
class LocalSize:
    """Stands in a program's arguments for the number of elements of `dim` that the running rank holds."""

    dim: Dim

    def resolve(self, mesh: Mesh, coords: Coords) -> int:
        return self.dim.local_size(mesh, coords)

    def __str__(self) -> str:
        return str(self.dim)


@dataclass(frozen=True)
class LocalRuns:
    """Stands in a program's arguments for the global indices of `dim` that the running rank holds."""

    dim: Dim

    def resolve(self, mesh: Mesh, coords: Coords) -> Runs:
        return self.dim.runs(mesh, coords)

    def __str__(self) -> str:
        return f"rows of {self.dim}"


def size_argument(dim: Dim) -> LocalSize | int:
    """The size of a dimension as a program's argument."""
    return LocalSize(dim) if dim.over else dim.size


def unsplit(dim: Dim) -> Dim:
    """The same dimension, whole on every rank."""
    if isinstance(dim, Factor):
        return replace(dim, split=())
    assert isinstance(dim, Compound)
    return type(dim)(tuple(map(unsplit, dim.parts)))


def head(dim: Dim, n: int) -> Dim | None:
    """The dimension of the first `n` elements of `dim`; None when the cut goes through an axis that is split."""
    if n == dim.size:
        return dim
    if n == 0:
        return Factor(0)
    if isinstance(dim, Concat):
        taken: list[Dim] = []
        for part_ in dim.parts:
            piece = head(part_, min(n, part_.size))
            if piece is None:
                return None
            taken.append(piece)
            n -= piece.size
            if n == 0:
                return taken[0] if len(taken) == 1 else Concat(tuple(taken))
    if not dim.over:
        return Factor(n)
    if isinstance(dim, Product):
        below = Product(dim.parts[1:]).size
        if n % below == 0:
            major = head(dim.parts[0], n // below)
            return None if major is None else Product((major, *dim.parts[1:]))
    return None


def major(dim: Dim, n: int) -> Dim | None:
    """The major factors of a dimension whose sizes multiply to `n`; None when no factors do."""
    return _factors(dim, n, [dim.parts[:k] for k in range(len(dim.parts), 0, -1)] if isinstance(dim, Product) else [])


def minor(dim: Dim, n: int) -> Dim | None:
    """The minor factors of a dimension whose sizes multiply to `n`; None when no factors do."""
    return _factors(dim, n, [dim.parts[k:] for k in range(1, len(dim.parts))] if isinstance(dim, Product) else [])


def _factors(dim: Dim, n: int, cuts: Iterable[tuple[Dim, ...]]) -> Dim | None:
    if dim.size == n:
        return dim
    for parts in cuts:
        if Product(parts).size == n:
            return parts[0] if len(parts) == 1 else Product(parts)
    return None
