"""Runs all ranks in one process: each is a thread, and collectives meet at a barrier.

The runtime is the same as on GPUs; only the groups differ. Sums are taken in the order of the ranks, so that results
are equal bit for bit on all ranks and in every run. Collectives that do not match, and ranks that wait for each other
for ever, are errors, which name both sides. Every collective is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tpcompiler.errors import TpcError
from tpcompiler.execute.interpret import bind_inputs, interpret, interpret_capture
from tpcompiler.runtime.groups import FORWARD, Group, Ranks
from tpcompiler.runtime.mesh import Mesh

__all__ = ["CollectiveError", "Executed", "bind_inputs", "executed", "interpret", "interpret_capture", "run_ranks"]

T = TypeVar("T")


class CollectiveError(TpcError):
    """Ranks called collectives that do not match, or wait for each other for ever."""


@dataclass(frozen=True)
class Executed:
    """The record of a collective that was done: one for the whole group."""

    kind: str  # all_reduce | all_gather | reduce_scatter
    direction: str  # forward | backward
    over: tuple[str, ...]  # mesh dimensions
    ranks: tuple[int, ...]  # the group's, in its order
    shape: tuple[int, ...]  # of the whole value: the result of an all-gather, the argument of other collectives
    dtype: torch.dtype
    op: str = ""  # of the reducing ones: sum | max
    label: str = ""

    @property
    def bytes(self) -> int:
        """The bytes of the whole value."""
        n = self.dtype.itemsize
        for d in self.shape:
            n *= d
        return n


def executed(log: Sequence[Executed], rank: int = 0) -> list[Executed]:
    """The records of the collectives that `rank` took part in."""
    return [r for r in log if rank in r.ranks]


def run_ranks(mesh: Mesh, fn: Callable[[Ranks], T], log: list[Executed] | None = None) -> list[T]:
    """Runs `fn(ranks)` for every rank of a mesh at the same time, each in a thread. Returns the results by rank.

    Collectives are appended to `log`. The first exception on any rank ends all ranks and is raised here.
    Threads take over the caller's gradient mode and default device. A rank's backward runs in its own thread, even on
    GPUs.
    """
    hall = _Hall(mesh.size, [] if log is None else log)
    results: dict[int, T] = {}
    grad, device = torch.is_grad_enabled(), torch.get_default_device()

    def body(rank: int) -> None:
        def connect(over: tuple[str, ...]) -> Group:
            return ThreadGroup(hall, rank, mesh.group(over, rank), over)

        try:
            # Otherwise one thread of the engine runs all backwards on a device, and ranks would wait for each other.
            with torch.autograd.set_multithreading_enabled(False), torch.set_grad_enabled(grad), device:
                results[rank] = fn(Ranks(mesh, rank, connect))
            hall.leave(rank)
        except _Aborted:
            pass
        except BaseException as e:
            hall.abort(e, f"on rank {rank} of the simulated mesh {mesh}")

    threads = [threading.Thread(target=body, args=(r,), name=f"rank-{r}", daemon=True) for r in range(mesh.size)]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    except BaseException as e:
        hall.abort(e, "")
        raise
    if hall.error is not None:
        raise hall.error
    return [results[r] for r in range(mesh.size)]


class ThreadGroup(Group):
    """A group whose ranks are threads of `run_ranks`."""

    def __init__(
        self, hall: _Hall, rank: int, members: tuple[int, ...], over: tuple[str, ...], label: str = ""
    ) -> None:
        super().__init__(len(members), members.index(rank), over)
        self._hall = hall
        self._rank = rank
        self._members = members
        self._label = label

    def labelled(self, label: str) -> Group:
        return ThreadGroup(self._hall, self._rank, self._members, self.over, label)

    def __deepcopy__(self, memo: Any) -> ThreadGroup:
        return self

    def all_reduce(self, x: Tensor, op: str = "sum", direction: str = FORWARD) -> Tensor:
        assert op in ("sum", "max"), op
        combine = torch.add if op == "sum" else torch.maximum
        call = _Offer("all_reduce", op, direction, self._label, tuple(x.shape), x.dtype)

        def work(xs: list[Tensor]) -> list[Tensor]:
            return [_fold(combine, xs)] * self.size

        return self._meet(call, x, work).clone()

    def all_gather(self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD) -> Tensor:
        dim %= x.dim()
        expected = x.shape[dim] if sizes is None else sizes[self.index]
        if x.shape[dim] != expected:
            raise CollectiveError(
                f"rank {self._rank} brings {x.shape[dim]} to an all_gather along dimension {dim}, not {expected}"
            )
        total = x.shape[dim] * self.size if sizes is None else sum(sizes)
        lengths = None if sizes is None else tuple(sizes)
        call = _Offer("all_gather", "", direction, self._label, _with(x, dim, total), x.dtype, dim, lengths)

        def work(xs: list[Tensor]) -> list[Tensor]:
            return [torch.cat(xs, dim)] * self.size

        return self._meet(call, x, work).clone()

    def reduce_scatter(
        self, x: Tensor, dim: int, sizes: Sequence[int] | None = None, direction: str = FORWARD
    ) -> Tensor:
        dim %= x.dim()
        lengths = [x.shape[dim] // self.size] * self.size if sizes is None else list(sizes)
        if sum(lengths) != x.shape[dim]:
            raise CollectiveError(f"reduce_scatter of {x.shape[dim]} elements in {self.size} parts {lengths}")
        call = _Offer("reduce_scatter", "sum", direction, self._label, tuple(x.shape), x.dtype, dim, tuple(lengths))

        def work(xs: list[Tensor]) -> list[Tensor]:
            return list(torch.split(_fold(torch.add, xs), lengths, dim))

        return self._meet(call, x, work).clone(memory_format=torch.contiguous_format)

    def _meet(self, call: _Offer, x: Tensor, work: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        return self._hall.meet(self, call, x.detach(), work)


def _fold(combine: Callable[[Tensor, Tensor], Tensor], xs: list[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = combine(total, x)
    return total


def _with(x: Tensor, dim: int, size: int) -> tuple[int, ...]:
    return (*x.shape[:dim], size, *x.shape[dim + 1 :])


@dataclass(frozen=True)
class _Offer:
    """The collective that one rank calls. All ranks of the group must call the same."""

    kind: str
    op: str
    direction: str
    label: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None = None
    sizes: tuple[int, ...] | None = None

    def __str__(self) -> str:
        what = f"{self.direction} {self.kind}" + (f"({self.op})" if self.op else "")
        what += f" of {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"
        if self.dim is not None:
            what += f" along dimension {self.dim}"
        if self.sizes is not None:
            what += f" in parts {list(self.sizes)}"
        return what + (f" for {self.label!r}" if self.label else "")


class _Aborted(BaseException):
    """Ends a rank because another one failed. It is not an `Exception`, so that the rank's handlers do not catch it."""


@dataclass
class _Meeting:
    """One collective of a group: what each rank called it with, and the results once all have come."""

    offers: dict[int, tuple[_Offer, Tensor]] = field(default_factory=dict)
    results: list[Tensor] | None = None
    taken: int = 0


class _Hall:
    """The barrier at which the ranks of one run meet for their collectives."""

    def __init__(self, size: int, log: list[Executed]) -> None:
        self.size = size
        self.log = log
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._meetings: dict[tuple[tuple[int, ...], int], _Meeting] = {}
        self._count: dict[tuple[tuple[int, ...], int], int] = {}  # (group, rank) → calls so far
        self._waiting: dict[int, str] = {}
        self._left: set[int] = set()

    def meet(self, group: ThreadGroup, call: _Offer, x: Tensor, work: Callable[[list[Tensor]], list[Tensor]]) -> Tensor:
        rank, members = group._rank, group._members
        with self._changed:
            if self.error is not None:
                raise _Aborted
            number = self._count.get((members, rank), 0)
            self._count[members, rank] = number + 1
            meeting = self._meetings.setdefault((members, number), _Meeting())
            meeting.offers[rank] = call, x
            if len(meeting.offers) == len(members):
                self._exchange(group, number, meeting, work)
            else:
                self._waiting[rank] = f"a {call} over {'·'.join(group.over)}, ranks {list(members)}"
                self._check_progress()
                self._changed.wait_for(lambda: meeting.results is not None or self.error is not None)
            if meeting.results is None:
                raise _Aborted
            meeting.taken += 1
            if meeting.taken == len(members):
                del self._meetings[members, number]
            return meeting.results[group.index]

    def _exchange(
        self, group: ThreadGroup, number: int, meeting: _Meeting, work: Callable[[list[Tensor]], list[Tensor]]
    ) -> None:
        members = group._members
        first = meeting.offers[members[0]][0]
        for r in members[1:]:
            other = meeting.offers[r][0]
            if other != first:
                raise CollectiveError(
                    f"collective {number} over {'·'.join(group.over)} does not match: "
                    f"rank {members[0]} does a {first}, rank {r} a {other}"
                )
        self.log.append(
            Executed(first.kind, first.direction, group.over, members, first.shape, first.dtype, first.op, first.label)
        )
        with torch.no_grad():
            meeting.results = work([meeting.offers[r][1] for r in members])
        for r in members:
            self._waiting.pop(r, None)
        self._changed.notify_all()

    def _check_progress(self) -> None:
        if self._waiting and len(self._waiting) + len(self._left) == self.size:
            waits = [f"rank {r} waits in {what}" for r, what in sorted(self._waiting.items())]
            ended = [f"rank {r} has ended" for r in sorted(self._left)]
            raise CollectiveError("the ranks wait for each other for ever: " + "; ".join(waits + ended))

    def leave(self, rank: int) -> None:
        with self._changed:
            self._left.add(rank)
            if self.error is None:
                self._check_progress()

    def abort(self, error: BaseException, where: str) -> None:
        with self._changed:
            if self.error is None:
                if where and not isinstance(error, CollectiveError):
                    error.add_note(where)
                self.error = error
            self._changed.notify_all()
