"""One call as facts see it: its arguments by name, as each rank makes it and as the model would, and its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch

from tpcompiler.check.calls import Call, GroupOver, Slot
from tpcompiler.check.claims import Geometry, Over, Rows
from tpcompiler.check.cones import TensorInfo
from tpcompiler.check.facts import named
from tpcompiler.check.form import Dims, Fact, Form, Held, RefutedError
from tpcompiler.check.meanings import packet
from tpcompiler.check.row_algebra import lengths
from tpcompiler.layout import LocalRuns, LocalSize

Shape = tuple[int, ...]


class Site:
    """A call, and what is asked of it."""

    def __init__(
        self, geometry: Geometry, call: Call, whole: Call, given: Sequence[Held], made: Sequence[TensorInfo | None]
    ) -> None:
        self.geometry = geometry
        self.call = call
        self.given = given
        self.made = made
        self.a = named(whole)  # arguments as the model would give them
        self.local = named(call)  # as each rank gives them
        self.name = packet(call.target) if isinstance(call.target, torch._ops.OpOverload) else ""

    def shape(self, a: Any) -> Shape:
        """The model's shape of an operand."""
        assert isinstance(a, Slot)
        return self.given[a.i].operand.shape

    def rank(self, a: Any) -> int:
        return len(self.shape(a))

    def rows(self, a: Any, d: int) -> Rows | None:
        """How ranks hold dimension `d` of an operand."""
        return self.given[a.i].claim.rows[d]

    def result(self, j: int = 0) -> Shape:
        found = self.made[j]
        assert found is not None
        return found.shape

    def dim(self, name: str, rank: int, default: int | None = None) -> int:
        """The argument that names a dimension, counted from the first."""
        d = self.a.get(name, default)
        if type(d) is not int:
            raise RefutedError(f"no fact speaks of {name}={d}")
        return d % max(rank, 1)

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """The argument that lists dimensions; all where it is None or empty."""
        d = self.a.get(name)
        if d is None or d == ():
            return tuple(range(rank))
        return tuple(i % max(rank, 1) for i in (d if isinstance(d, tuple) else (d,)))

    def group(self) -> Over:
        """The mesh dimensions over which the call communicates, without those of one rank."""
        found = self.local.get("group")
        assert isinstance(found, GroupOver)
        return self.geometry.real(found.names)

    def rows_argument(self, a: Any, size: int) -> Rows | None:
        """The rows that an argument names, of a dimension of that size."""
        if not isinstance(a, LocalRuns) or a.dim.size != size:
            raise RefutedError(f"the rows in its arguments are not those of a dimension of {size}")
        return self.geometry.of_dim(a.dim)

    def agrees(self, said: Any, rows: Rows | None, size: int) -> bool:
        """Whether a size among each rank's arguments is the number of rows that the rank holds."""
        if isinstance(said, LocalSize):
            if self.geometry.of_dim(said.dim) is rows and said.dim.size == size:
                return True
            mesh = self.geometry.mesh
            mine = [said.dim.local_size(mesh, c) for c in self.geometry.coords]
        else:
            mine = [said] * self.geometry.size
        return mine == (lengths(rows) if rows is not None else [size] * self.geometry.size)


Maker = Callable[[Site], "Form | Fact"]
FORMS: dict[str, Maker] = {}  # of ATen's operations by name, and of the runtime's operators by `runtime.name`
RANKED: set[str] = set()  # those whose facts read the arguments that depend on the rank


def states(names: str, *, ranked: bool = False) -> Callable[[Maker], Maker]:
    """Registers a function as the fact about the named operations."""

    def register(make: Maker) -> Maker:
        for name in names.split():
            assert name not in FORMS, name
            FORMS[name] = make
            if ranked:
                RANKED.add(name)
        return make

    return register


def plain(shape: Shape, labels: Sequence[Any]) -> Dims:
    """Dimensions of one index each."""
    assert len(shape) == len(labels)
    return tuple(((label, n),) for label, n in zip(labels, shape, strict=True))


def numbered(shape: Shape, *, whole: Sequence[int] = ()) -> Dims:
    """Dimensions labelled by their place, except those needed whole."""
    return plain(shape, [None if d in whole else d for d in range(len(shape))])


def aligned(shape: Shape, result: Shape) -> Dims:
    """Dimensions that broadcast to a result labelled by place. A size of one that is repeated has no label."""
    lead = len(result) - len(shape)
    return tuple(((None if n != result[lead + d] else lead + d, n),) for d, n in enumerate(shape))


def count(shape: Sequence[int]) -> int:
    return prod(shape)
