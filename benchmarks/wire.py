"""A wire on one GPU: a process group in which one process plays one rank of several.

Every collective takes α + bytes / β on a stream of its own, and is recorded in CUDA graphs like any other, so that one
device shows what overlap with computation hides. Values are not exchanged: a rank's results mean nothing.

    wire = Wire.install(size=2)
    wire.set(alpha_us=50, beta_gbs=300, multiprocessors=16)  # or wire.set() for one that takes no time

With `multiprocessors`, so many blocks of 512 threads spin meanwhile, as NCCL's do; without, a single warp does. Groups
made by `another` share the wire: what one of them sends, the others wait for, in the order in which it is started.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future, _register_process_group
from torch.futures import Future


class Wire(dist.ProcessGroup):
    """One rank, the first, of `size`. `calls` and `seconds` add up what was issued, replays of recordings left out."""

    def __init__(self, rank: int, size: int, like: Wire | None = None) -> None:
        super().__init__(rank, size)
        self._all: list[Wire] = [] if like is None else like._all
        self._all.append(self)
        self.calls, self.seconds = 0, 0.0
        self._alpha, self._beta, self._multiprocessors = 0.0, float("inf"), 0
        self._name = ""
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            self._device = torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(priority=-1)
            self._until = torch.zeros(1, dtype=torch.int64, device=self._device)
            self._free = torch.zeros_like(self._until) if like is None else like._free

    @staticmethod
    def install(size: int) -> Wire:
        """Makes it the default process group."""
        made: list[Wire] = []

        def make(store: Any, rank: int, world: int, timeout: Any) -> Wire:
            made.append(Wire(rank, world))
            return made[-1]

        dist.Backend.register_backend("wire", make, devices=["cuda", "cpu"])
        dist.init_process_group("wire", store=dist.HashStore(), rank=0, world_size=size)
        return made[0]

    def another(self, name: str) -> Wire:
        """A second group of the same ranks on the same wire, whose collectives have a stream of their own."""
        made = Wire(0, self.size(), self)
        made._name = name
        made._alpha, made._beta, made._multiprocessors = self._alpha, self._beta, self._multiprocessors
        _register_process_group(name, made)
        return made

    def set(self, alpha_us: float = 0.0, beta_gbs: float = float("inf"), multiprocessors: int = 0) -> None:
        """What a collective takes from now on: α in microseconds, β in 10⁹ bytes a second."""
        for wire in self._all:
            wire._alpha, wire._beta, wire._multiprocessors = alpha_us * 1e-6, beta_gbs * 1e9, multiprocessors
            wire.calls, wire.seconds = 0, 0.0

    @property
    def total(self) -> float:
        """Seconds of all groups on this wire."""
        return sum(wire.seconds for wire in self._all)

    def _carry(self, result: Any, size: int) -> Any:
        """A work that gives `result` once `size` bytes would have crossed."""
        seconds = self._alpha + size / self._beta
        self.calls += 1
        self.seconds += seconds
        future: Future[Any] = Future(devices=[self._device]) if self._cuda else Future()
        if not self._cuda or seconds == 0:
            future.set_result(result)
            return _create_work_from_future(future)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            from benchmarks.spin import reserve, spin

            reserve[(1,)](int(seconds * 1e9), self._free, self._until, num_warps=1)
            spin[(max(1, self._multiprocessors),)](self._until, num_warps=16 if self._multiprocessors else 1)
            future.set_result(result)
        return _create_work_from_future(future)

    # -- what torch.distributed calls -------------------------------------------------------------------------------

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._carry(tensors, sum(t.nbytes for t in tensors))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors)

    def _allgather_base(self, out: Tensor, mine: Tensor, opts: Any = None) -> Any:
        out.view(self.size(), -1).copy_(mine.reshape(1, -1).expand(self.size(), -1))
        return self._carry(out, out.nbytes)

    def allgather_into_tensor_coalesced(self, outs: list[Tensor], mine: list[Tensor], opts: Any = None) -> Any:
        for out, x in zip(outs, mine, strict=True):
            out.view(self.size(), -1).copy_(x.reshape(1, -1).expand(self.size(), -1))
        return self._carry(outs, sum(out.nbytes for out in outs))

    def reduce_scatter_tensor_coalesced(self, outs: list[Tensor], wholes: list[Tensor], opts: Any = None) -> Any:
        for out, whole in zip(outs, wholes, strict=True):
            out.copy_(whole.reshape(self.size(), -1)[0].view(out.shape))
        return self._carry(outs, sum(whole.nbytes for whole in wholes))

    def _reduce_scatter_base(self, out: Tensor, whole: Tensor, opts: Any = None) -> Any:
        out.copy_(whole.reshape(self.size(), -1)[0].view(out.shape))
        return self._carry(out, whole.nbytes)

    def barrier(self, opts: Any = None) -> Any:
        return self._carry([], 0)

    def getBackendName(self) -> str:
        return "wire"

    @property
    def pg_name(self) -> str:
        return self._name or str(dist.distributed_c10d._world.pg_names[self])

    @property
    def group_name(self) -> str:
        return self.pg_name
