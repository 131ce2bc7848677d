"""The result of planning: the split axes, and what follows from them for the reader."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tpcompiler.axes.infer import AxisMap, Dims
from tpcompiler.layout import Concat, Dim, Factor, Mesh, Product
from tpcompiler.plan.weighing import Facts


@dataclass(frozen=True)
class Block:
    """A split axis of one layer or of several equal layers."""

    kind: str  # attention | mlp | embedding | head | other
    name: str  # the common part of its parameters' names, with * for layer numbers
    layers: int
    axis: str  # its name for the reader
    size: int  # its elements, over all ranks
    over: tuple[str, ...]  # mesh dimensions
    local: tuple[int, ...]  # elements of each rank along `over`
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Replicated:
    """A parameter that every rank holds whole."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """Which axes are split over which mesh dimensions, and what follows from that for the reader."""

    mesh: Mesh
    split: dict[int, tuple[str, ...]]  # axis → the mesh dimensions it is split over
    names: dict[int, str]  # axis → its name for the reader
    blocks: tuple[Block, ...]
    replicated: tuple[Replicated, ...]
    facts: Facts

    @property
    def uneven(self) -> tuple[Block, ...]:
        """The blocks whose axis does not divide evenly, so that some ranks hold more of it than others."""
        return tuple(block for block in self.blocks if len(set(block.local)) > 1)

    @property
    def degree(self) -> int:
        """The number of ranks that share one copy of the model."""
        return prod(self.mesh[name] for name in self.mesh.names if name != "data")

    def dim(self, axes: AxisMap, term: int | None) -> Dim:
        """The layout of a dimension under this plan."""
        if term is None:
            return Factor(1)
        bound = axes.terms.binding(term)
        if bound is None:
            leaf = axes.terms.find(term)
            size = axes.terms.size(leaf)
            name = self.names.get(leaf, axes.dynamic.get(size, ""))
            return Factor(size, name, self.split.get(leaf, ()), size in axes.dynamic)
        parts = tuple(self.dim(axes, p) for p in bound.parts)
        return Product(parts) if bound.kind == "product" else Concat(parts)

    def dims(self, axes: AxisMap, dims: Dims) -> tuple[Dim, ...]:
        """The layout of a tensor under this plan."""
        return tuple(self.dim(axes, t) for t in dims)

    def __str__(self) -> str:
        rows = [f"mesh {self.mesh}"]
        for b in self.blocks:
            rows.append(
                f"{b.kind:10} {b.name} × {b.layers}: {b.axis} {b.size} over {'·'.join(b.over)} = {list(b.local)}"
            )
        rows += [f"replicated {r.name}: {r.reason}" for r in self.replicated]
        return "\n".join(rows)
