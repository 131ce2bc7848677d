"""What FSDP2 does to a rank's slice of a parameter: it cuts it once more, over data ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from tpcompiler.errors import TpcError
from tpcompiler.runtime import Mesh
from tpcompiler.runtime.mesh import Coords, chunk
from tpcompiler.runtime.runs import Slice, cut, length
from tpcompiler.train.optim.clip import data_names
from tpcompiler.weights.on_mesh import OnMesh


@dataclass(frozen=True)
class Cuts:
    """How FSDP2 cuts a slice: (mesh dimension, ranks on it, this rank's place, dimension of the tensor)."""

    cuts: tuple[tuple[str, int, int, int], ...] = ()

    @classmethod
    def of(cls, value: Tensor) -> Cuts:
        if not isinstance(value, DTensor):
            return cls()
        mesh, names = value.device_mesh, data_names(value)
        return cls(
            tuple(
                (name, mesh.size(i), mesh.get_local_rank(i), p.dim % value.dim())
                for i, (name, p) in enumerate(zip(names, value.placements, strict=True))
                if isinstance(p, Shard)
            )
        )

    def widened(self, mesh: Mesh) -> Mesh:
        """The mesh with the dimensions that it lacks, outermost."""
        return Mesh((*((n, size) for n, size, _, _ in self.cuts if n not in mesh), *mesh.dims))

    def coords(self, coords: Coords) -> dict[str, int]:
        """A rank's coordinates on the widened mesh."""
        return {**{name: place for name, _, place, _ in self.cuts}, **coords}

    def apply(self, held: Slice, coords: Coords) -> Slice:
        """What is left of the slice at `coords`, in torch.chunk's parts."""
        out = list(held)
        for name, size, _, dim in self.cuts:
            out[dim] = cut(out[dim], *chunk(length(out[dim]), size, coords[name]))
        return tuple(out)


def check_data_mesh(name: str, value: Tensor, on_mesh: OnMesh) -> None:
    """Raises `TpcError` when FSDP2 cuts a parameter over ranks that hold different parts of it."""
    if not isinstance(value, DTensor):
        return
    mine = on_mesh.ranks.coords
    split = [n for n in on_mesh.mesh.names if any(n in d.over for dims in on_mesh.dims.values() for d in dims)]
    for i in range(value.device_mesh.ndim):
        for process in dist.get_process_group_ranks(value.device_mesh.get_group(i)):
            there = on_mesh.place(process)
            if there is not None and any(there[n] != mine[n] for n in split):
                raise TpcError(
                    f"{name}: fully_shard was given ranks that hold different parts of it; give it the data ranks "
                    f"alone, fully_shard(module, mesh=mesh['data'])"
                )
