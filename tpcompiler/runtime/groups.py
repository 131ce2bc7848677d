"""Groups of ranks that communicate, and a rank's place among them.

Operators and emitted programs talk to a `Group`. This file holds the base class, which is also the group of one rank,
and the group that a `torch.distributed` process group stands behind. `tpcompiler.execute.simulate` adds a group whose
ranks are threads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.runtime import private_apis
from tpcompiler.runtime.mesh import Mesh, part
from tpcompiler.runtime.runs import Run

FORWARD = "forward"
BACKWARD = "backward"


class Group:
    """The ranks that differ from this rank only on the mesh dimensions `over`. This rank is the `index`-th of `size`.

    Every method is collective: all ranks of the group must call it in the same order with the same arguments. Results
    are new tensors, or the argument itself in a group of one. `direction` says whether forward or backward calls; only
    a group that records uses it. The methods cannot be differentiated, those in `tpcompiler.runtime.operators` can.
    """

    def __init__(self, size: int = 1, index: int = 0, over: tuple[str, ...] = ()) -> None:
        assert 0 <= index < size, f"index {index} in a group of {size}"
        self.size = size
        self.index = index
        self.over = over

    def part(self, n: int) -> Run:
        """This rank's part [start, stop) of `range(n)`."""
        return part(n, self.size, self.index)

    def local(self, n: int) -> int:
        """How many of `n` elements this rank holds."""
        start, stop = part(n, self.size, self.index)
        return stop - start

    def sizes(self, n: int) -> tuple[int, ...]:
        """How many of `n` elements each rank of the group holds."""
        return tuple(stop - start for start, stop in (part(n, self.size, i) for i in range(self.size)))

    def labelled(self, label: str) -> Group:
        """The same group, whose collectives a recording group records with this label."""
        return self

    def all_reduce(self, x: Tensor, op: str = "sum", direction: str = FORWARD) -> Tensor:
        """The elementwise sum of all ranks' `x`, or their maximum with "max". All have the same shape."""
        return x

    def begin_all_reduce(self, x: Tensor, direction: str = FORWARD) -> Tensor:
        """Starts an all-reduce. The result must not be read, and `x` not written to, before `finish`."""
        return self.all_reduce(x, direction=direction)

    def begin_all_gather(self, x: Tensor, direction: str = FORWARD) -> Tensor:
        """All ranks' `x`, of one shape, along dimension 0 in an order that all share; under way like the sum."""
        return self.all_gather(x, 0, direction=direction)

    def finish(self, x: Tensor) -> Tensor:
        """What was begun, once it is there. Not collective."""
        return x

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD) -> Tensor:
        """The concatenation of all ranks' `x` along `dim`. `sizes` are their lengths, if these differ."""
        return x

    def reduce_scatter(
        self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD
    ) -> Tensor:
        """This rank's chunk along `dim` of the sum of all `x`. `sizes` are the chunks' lengths, if these differ."""
        return x

    def __repr__(self) -> str:
        return f"Group({' × '.join(self.over) or 'alone'}: {self.index} of {self.size})"


class ProcessGroup(Group):
    """A group whose ranks are processes. `name` is the name of its process group in `torch.distributed`.

    The collectives return new tensors and take the name of the group, so that torch.compile can trace them. `slots[i]`
    is the rank, within the process group, of the i-th rank of this group.
    """

    def __init__(self, name: str, size: int, index: int, over: tuple[str, ...], slots: tuple[int, ...]) -> None:
        super().__init__(size, index, over)
        self.name = name
        self.slots = slots
        self.in_order = slots == tuple(range(size))

    def all_reduce(self, x: Tensor, op: str = "sum", direction: str = FORWARD) -> Tensor:
        return private_apis.all_reduce(x, op, self.name)

    def begin_all_reduce(self, x: Tensor, direction: str = FORWARD) -> Tensor:
        return private_apis.begin_all_reduce(x, self.name)

    def begin_all_gather(self, x: Tensor, direction: str = FORWARD) -> Tensor:
        return private_apis.begin_all_gather(x, self.size, self.name)

    def finish(self, x: Tensor) -> Tensor:
        return private_apis.finish(x)

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD) -> Tensor:
        dim %= x.dim()
        longest = x.shape[dim] if sizes is None else max(sizes)
        even = sizes is None or min(sizes) == longest
        mine = _pad(x, dim, longest)
        whole = private_apis.all_gather(mine, self.size, self.name)
        if dim == 0 and even and self.in_order:
            return whole
        chunks = torch.split(whole, mine.shape[0], 0) if mine.shape[0] else [whole] * self.size
        chunks = [chunks[slot] for slot in self.slots]
        if not even:
            assert sizes is not None
            chunks = [c.narrow(dim, 0, n) for c, n in zip(chunks, sizes, strict=True)]
        return torch.cat(chunks, dim)

    def reduce_scatter(
        self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD
    ) -> Tensor:
        dim %= x.dim()
        if sizes is None:
            sizes = [x.shape[dim] // self.size] * self.size
        longest = max(sizes)
        whole = x
        if dim or not self.in_order or min(sizes) != longest:
            chunks = [_pad(c, dim, longest) for c in torch.split(x, list(sizes), dim)]
            whole = torch.cat([chunks[self.slots.index(i)] for i in range(self.size)], 0)
        mine = private_apis.reduce_scatter(whole, self.size, self.name)
        return mine if sizes[self.index] == longest else mine.narrow(dim, 0, sizes[self.index])


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    return x if missing == 0 else F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing])


class Ranks:
    """One rank's place on the mesh, and its communication groups.

    `connect(over)` makes the group over mesh dimensions. It is called once for each `over` whose degree exceeds 1. For
    process groups it is collective: every rank must ask for its groups in the same order, as SPMD programs do.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        connect: Callable[[tuple[str, ...]], Group] | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        assert 0 <= rank < mesh.size, f"rank {rank} on a mesh of {mesh.size}"
        assert connect is not None or mesh.size == 1
        self.mesh = mesh
        self.rank = rank
        self.coords = mesh.coords(rank)
        self.timeout = timeout
        self._connect = connect
        self._groups: dict[tuple[str, ...], Group] = {}

    def group(self, *over: str | tuple[str, ...]) -> Group:
        """The group over one mesh dimension or several: `group("tensor")`, `group("kv", "heads")`, `group(("kv",))`.

        Raises `TpcError` for a dimension that the mesh does not have. Without dimensions, or over dimensions of degree
        1, the group is this rank alone.
        """
        names = tuple(n for o in over for n in ((o,) if isinstance(o, str) else o))
        if names not in self._groups:
            unknown = [n for n in names if n not in self.mesh]
            if unknown:
                raise TpcError(f"no mesh dimension {unknown[0]!r}: the mesh is {self.mesh}")
            if self.mesh.degree(names) == 1 or self._connect is None:
                self._groups[names] = Group(over=names)
            else:
                self._groups[names] = self._connect(names)
        return self._groups[names]

    def beside(self) -> Ranks:
        """The same place with other groups. Collectives in these do not wait for collectives in the present ones."""
        return Ranks(self.mesh, self.rank, self._connect, self.timeout)

    @classmethod
    def single(cls) -> Ranks:
        """The place of the only rank of a mesh without dimensions."""
        return cls(Mesh(()), 0)

    @classmethod
    def from_env(cls, mesh: Mesh, backend: str | None = None, timeout: timedelta | None = None) -> Ranks:
        """This process's place by `torchrun`'s environment. Joins the other processes, if that has not been done yet.

        `backend` is by default NCCL with CUDA, else gloo. `timeout` is that of every group. A mesh of one rank needs no
        other processes. Raises `TpcError` when the number of processes is not that of the mesh.
        """
        if not dist.is_initialized():
            if mesh.size == 1:
                return cls(mesh, 0)
            _init_from_env(mesh, backend, timeout)
        if dist.get_world_size() != mesh.size:
            raise TpcError(
                f"the mesh {mesh} has {mesh.size} ranks but {dist.get_world_size()} processes run; "
                f"start it with --nproc-per-node so that they agree"
            )
        return cls(mesh, dist.get_rank(), _connector(mesh, dist.get_rank(), range(mesh.size), timeout), timeout)

    @classmethod
    def from_device_mesh(cls, device_mesh: Any, mesh: Mesh | None = None) -> Ranks:
        """This process's place on a `torch.distributed.DeviceMesh` whose dimensions have names.

        `mesh` is that of a program. It may have a dimension of the device mesh in factors, such as tensor 8 as
        tensor0 2 × tensor1 4. Other dimensions of the device mesh, such as pipeline stages, have no influence. Raises
        `TpcError` when a dimension has no name, is missing or has another degree.
        """
        names, coordinate = device_mesh.mesh_dim_names, device_mesh.get_coordinate()
        if names is None:
            raise TpcError("the device mesh has no mesh_dim_names; give it some, e.g. ('data', 'tensor')")
        if coordinate is None:
            raise TpcError("this process has no place on the device mesh")
        coarse = Mesh(tuple(zip(names, device_mesh.mesh.shape, strict=True)))
        factors = _factors(coarse, coarse if mesh is None else mesh)
        fine = Mesh(tuple(dim for parts in factors.values() for dim in parts))
        whole = {tuple(n for n, _ in parts): name for name, parts in factors.items()}
        rank = coarse.rank(dict(zip(names, coordinate, strict=True)))
        world = device_mesh.mesh.flatten().tolist()
        general = _connector(fine, rank, world)
        asked: set[tuple[str, ...]] = set()

        def connect(over: tuple[str, ...]) -> Group:
            if over not in whole or over in asked:  # `Ranks.beside` asks again
                return general(over)
            asked.add(over)
            return _wrap(device_mesh.get_group(whole[over]), fine, rank, over, world)

        return cls(fine, rank, connect)

    def __repr__(self) -> str:
        return f"Ranks({self.mesh}: rank {self.rank})"


def _init_from_env(mesh: Mesh, backend: str | None, timeout: timedelta | None) -> None:
    if "RANK" not in os.environ:
        raise TpcError(f"the mesh {mesh} needs {mesh.size} processes: start it with torchrun --nproc-per-node")
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(backend, timeout=timeout)


def _connector(
    mesh: Mesh, rank: int, world: Sequence[int], timeout: timedelta | None = None
) -> Callable[[tuple[str, ...]], Group]:
    """A function that makes process groups. `world[r]` is the process that is rank r of the mesh."""

    def connect(over: tuple[str, ...]) -> Group:
        mine = None
        # All processes must make a process group together and in the same order, even those that are not in it. If the
        # mesh has only some of the processes, the others do not take part, and its members alone make the group.
        everybody = len(world) == dist.get_world_size()
        for first in range(mesh.size):
            members = mesh.group(over, first)
            if first != min(members) or not (everybody or rank in members):
                continue
            pg = dist.new_group(
                sorted(world[r] for r in members), timeout=timeout, use_local_synchronization=not everybody
            )
            if rank in members:
                mine = pg
        assert mine is not None
        return _wrap(mine, mesh, rank, over, world)

    return connect


def _factors(coarse: Mesh, fine: Mesh) -> dict[str, tuple[tuple[str, int], ...]]:
    """The dimensions of `fine` that each dimension of `coarse` consists of: the same one, or numbered factors of it."""
    out: dict[str, tuple[tuple[str, int], ...]] = {}
    for name, degree in coarse.dims:
        parts = tuple(d for d in fine.dims if d[0] == name or re.fullmatch(rf"{re.escape(name)}\d+", d[0]))
        if parts and Mesh(parts).size != degree:
            wanted = Mesh(((name, Mesh(parts).size),))
            raise TpcError(f"the program is for {wanted}, the device mesh is {coarse}: make them agree")
        out[name] = parts or ((name, degree),)
    found = {name for parts in out.values() for name, _ in parts}
    for name, degree in fine.dims:
        if degree > 1 and name not in found:
            known = name.rstrip("0123456789")
            raise TpcError(f"the device mesh {coarse} has no dimension {known!r}; name one so in its mesh_dim_names")
    return out


def _wrap(pg: Any, mesh: Mesh, rank: int, over: tuple[str, ...], world: Sequence[int]) -> ProcessGroup:
    members = [world[r] for r in mesh.group(over, rank)]
    order = dist.get_process_group_ranks(pg)
    slots = tuple(order.index(m) for m in members)
    return ProcessGroup(pg.group_name, len(members), mesh.index(over, mesh.coords(rank)), over, slots)
