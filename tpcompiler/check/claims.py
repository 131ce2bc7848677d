"""How the ranks' values relate to one value of the model: they are equal to it, slices of it, or addends of it.

A claim says for each dimension which rows each rank holds, and over which mesh dimensions the ranks' values must be
added to give those rows. Every value of a program carries a claim, and the rest of the checker establishes claims.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise

from tpcompiler.layout import Dim, Mesh
from tpcompiler.runtime.runs import Run

Runs = tuple[Run, ...]
Over = tuple[str, ...]


class Rows:
    """The rows of a dimension that each rank holds, in local order. `Geometry` makes equal ones the same object."""

    __slots__ = ("runs", "size")

    def __init__(self, size: int, runs: tuple[Runs, ...]) -> None:
        self.size = size
        self.runs = runs

    def __repr__(self) -> str:
        def one(runs: Runs) -> str:
            shown = "+".join(f"{a}:{b}" for a, b in runs[:3]) or "none"
            return shown + ("+…" if len(runs) > 3 else "")

        more = " | …" if len(self.runs) > 3 else ""
        return " | ".join(one(r) for r in self.runs[:3]) + more


@dataclass(frozen=True)
class Claim:
    """The claim of one tensor. `rows[i]` is None where every rank holds the whole dimension `i`."""

    rows: tuple[Rows | None, ...]
    partial: Over = ()

    @cached_property
    def whole(self) -> bool:
        """Whether every rank's value is the model's."""
        return not self.partial and all(r is None for r in self.rows)

    def __str__(self) -> str:
        if self.whole:
            return "equal on all ranks"
        out = [f"rows {r} of dimension {i}" for i, r in enumerate(self.rows) if r is not None]
        if self.partial:
            out.append(f"a partial sum over {'·'.join(self.partial)}")
        return ", ".join(out)


class Geometry:
    """The mesh, and a memory of what the checker asks about it again and again."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.size = mesh.size
        self.coords = [mesh.coords(r) for r in range(mesh.size)]
        self.names = tuple(n for n, d in mesh.dims if d > 1)
        self._rows: dict[tuple[int, tuple[Runs, ...]], Rows] = {}
        self._dims: dict[Dim, Rows | None] = {}
        self._groups: dict[Over, tuple[tuple[int, ...], ...]] = {}
        self._disjoint: dict[tuple[Rows, str], bool] = {}
        self._varies: dict[tuple[Rows, str], bool] = {}
        self._parts: dict[Rows, bool] = {}
        self.subsets: list[Over] = [c for k in range(len(self.names) + 1) for c in combinations(self.names, k)]

    def rows(self, size: int, runs: Sequence[Runs]) -> Rows | None:
        """The ranks' runs as `Rows`; None when every rank holds the whole dimension, in order."""
        whole = ((0, size),) if size else ()
        if all(r == whole for r in runs):
            return None
        key = (size, tuple(runs))
        found = self._rows.get(key)
        if found is None:
            found = self._rows[key] = Rows(*key)
        return found

    def of_dim(self, dim: Dim) -> Rows | None:
        """A dimension's layout as rows."""
        if dim not in self._dims:
            if not dim.over:
                self._dims[dim] = None
            else:
                self._dims[dim] = self.rows(dim.size, [dim.runs(self.mesh, c) for c in self.coords])
        return self._dims[dim]

    def groups(self, over: Over) -> tuple[tuple[int, ...], ...]:
        """The groups of ranks that differ only on `over`, each in the order of its communication group."""
        if over not in self._groups:
            found: dict[tuple[int, ...], list[int]] = {}
            for r, c in enumerate(self.coords):
                found.setdefault(tuple(i for n, i in c.items() if n not in over), []).append(r)
            order = [sorted(g, key=lambda r: self.mesh.index(over, self.coords[r])) for g in found.values()]
            self._groups[over] = tuple(map(tuple, order))
        return self._groups[over]

    def varies(self, rows: Rows, name: str) -> bool:
        """Whether ranks that differ only on mesh dimension `name` hold different rows."""
        if (rows, name) not in self._varies:
            groups = self.groups((name,))
            self._varies[rows, name] = any(rows.runs[r] != rows.runs[g[0]] for g in groups for r in g)
        return self._varies[rows, name]

    def over(self, rows: Rows | None) -> Over:
        """The mesh dimensions along which ranks hold different rows of a dimension."""
        return () if rows is None else tuple(n for n in self.names if self.varies(rows, n))

    def parts(self, rows: Rows) -> bool:
        """Whether the ranks that differ only on `over(rows)` hold every row of the dimension, each row once."""
        if rows not in self._parts:
            groups = self.groups(self.over(rows))
            self._parts[rows] = all(_exactly([rows.runs[r] for r in g], rows.size) for g in groups)
        return self._parts[rows]

    def covers(self, rows: Rows) -> bool:
        """Whether the ranks that differ only on `over(rows)` hold every row of the dimension."""
        return all(_cover([rows.runs[r] for r in g], rows.size) for g in self.groups(self.over(rows)))

    def real(self, over: Iterable[str]) -> Over:
        """Mesh dimensions in the mesh's order, without those of one rank."""
        return tuple(n for n in self.names if n in over)

    def disjoint(self, claim: Claim, name: str) -> bool:
        """Whether ranks that differ only on mesh dimension `name` have no element in common."""
        return any(r is not None and self._rows_disjoint(r, name) for r in claim.rows)

    def _rows_disjoint(self, rows: Rows, name: str) -> bool:
        if (rows, name) not in self._disjoint:
            self._disjoint[rows, name] = all(_apart([rows.runs[r] for r in g]) for g in self.groups((name,)))
        return self._disjoint[rows, name]

    def shared(self, claim: Claim) -> Over:
        """The mesh dimensions along which ranks hold some of the same elements."""
        return tuple(n for n in self.names if not self.disjoint(claim, n))

    def moving(self, claim: Claim) -> Over:
        """The mesh dimensions along which ranks hold different rows."""
        return tuple(n for n in self.names if any(r is not None and self.varies(r, n) for r in claim.rows))


def _exactly(held: Sequence[Runs], size: int) -> bool:
    at = 0
    for a, b in sorted(run for runs in held for run in runs):
        if a != at:
            return False
        at = b
    return at == size


def _cover(held: Sequence[Runs], size: int) -> bool:
    at = 0
    for a, b in sorted(run for runs in held for run in runs):
        if a > at:
            return False
        at = max(at, b)
    return at == size


def _apart(held: Sequence[Runs]) -> bool:
    runs = sorted(run for runs in held for run in runs)
    return all(a[1] <= b[0] for a, b in pairwise(runs))
