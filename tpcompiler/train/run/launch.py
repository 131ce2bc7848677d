"""Starts the ranks of a run on this host, and finds a process's place among the ranks that run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import IO, TypeVar

import torch
import torch.distributed as dist

from tpcompiler.errors import TpcError
from tpcompiler.train.run.board import TIMEOUT, Board, restarts

Returned = TypeVar("Returned")

_PATIENCE = 15.0  # seconds that the other ranks have to end once one has failed
_LAST = 5.0  # seconds between SIGTERM and SIGKILL then
_POLL = 0.1
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launched() -> bool:
    """Whether torchrun, or something with its environment, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Runs `tpc ARGUMENTS` as `ranks` processes on this host and returns their exit code.

    This process serves their store on a free port of 127.0.0.1. It passes SIGTERM, Ctrl-C and SIGUSR1 on to all ranks
    and waits for as long as they take to write a checkpoint. It is no agent of torchrun's, because that one takes a
    signal for a failure: it exits with 1 and a traceback, whatever code the ranks end with, and kills ranks that take
    more than 30 seconds, as it does with the others at once when one has failed, before they have said why.
    Errors: `TpcError` when a signal has killed a rank.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(ranks),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if sys.platform == "linux":
        shared.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, "-m", "tpcompiler.cli.main", *arguments]
    started: list[subprocess.Popen[bytes]] = []
    with _forwarding(started), tempfile.TemporaryFile() as said:
        # One JSON object on stdout: what the others say when a rank was killed gives way to the cause.
        stdout = said if "--json" in arguments else None
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
                # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
                started.append(_start(command, {**shared, **own}, stdout))
            code = _outcome(started)
        finally:
            _end(started)
        said.seek(0)
        sys.stdout.write(said.read().decode())
        return code


def _start(command: Sequence[str], environment: Mapping[str, str], stdout: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=stdout)


def _outcome(started: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits for all ranks, or for the others a little longer once one has failed."""
    while all(p.poll() is None or p.returncode == 0 for p in started):
        if all(p.returncode == 0 for p in started):
            return 0
        time.sleep(_POLL)
    rank, code = next((r, p.returncode) for r, p in enumerate(started) if p.returncode not in (None, 0))
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and any(p.poll() is None for p in started):
        time.sleep(_POLL)
    if code < 0:
        name = signal.Signals(-code).name
        raise TpcError(f"rank {rank} was killed by {name}; the same command continues from the last checkpoint")
    return code


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends whatever is left: asks first, also those that are stopped, then kills."""
    for wish, patience in ((signal.SIGTERM, _LAST), (signal.SIGKILL, None)):
        left = [p for p in started if p.poll() is None]
        for p in left:
            p.send_signal(wish)
        end = time.monotonic() + (patience or 60.0)
        while any(p.poll() is None for p in left) and time.monotonic() < end:
            time.sleep(_POLL)


@contextmanager
def _forwarding(started: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        for p in started:
            if p.poll() is None:
                p.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Activity:
    """What a rank is doing, for the others to read when it does not answer."""

    now: str = "starting"


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    board: Board
    activity: Activity = field(default_factory=Activity)

    @property
    def first_here(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.local_rank == 0

    @property
    def timeout(self) -> timedelta:
        """The limit of this run's collectives. The watchdog (together.py) is quicker, and can name a rank."""
        return timedelta(seconds=1.2 * self.board.timeout + 5)

    def in_turn(self, key: str, fn: Callable[[], Returned]) -> Returned:
        """`fn()` on the first rank of every host, then on the others, which find done what it did. Collective.

        The others wait for as long as it takes: tokenising a large corpus is no time-out, and the watchdog ends the
        run when the rank that they wait for does not answer.
        """
        if self.world == 1:
            return fn()
        if self.first_here:
            out = fn()
            self.board.gather(key, patience=float("inf"))
            return out
        self.board.gather(key, patience=float("inf"))
        return fn()


def join(world: int, device: str | None = None, timeout: float = TIMEOUT) -> Place:
    """This process's place in a run of `world` ranks; waits for the others.

    `device` is cuda or cpu; left out, cuda where there is one. GPUs talk through NCCL, CPUs through gloo. Raises
    `TpcError` when the number of processes is another, or when a rank does not arrive in `timeout` seconds.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if kind == "cuda":
        _take_gpu(local_rank)
    where = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if world == 1 and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Place(0, 1, 0, where, Board())
    rank, started = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if started != world:
        raise TpcError(f"the spec's mesh has {world} ranks, but {started} processes were started; make them equal")
    assert not dist.is_initialized(), "this process has joined a run before"
    store = _store(rank, timeout)
    place = Place(rank, world, local_rank, where, Board(rank, world, store, timeout).clone())
    place.board.gather("arrived")
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    groups = dist.PrefixStore(f"groups-{restarts()}", store)
    dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=place.timeout)
    return place


def _take_gpu(local_rank: int) -> None:
    if not torch.cuda.is_available():
        raise TpcError("--device cuda: torch finds no GPU here; --device cpu would work")
    if local_rank >= torch.cuda.device_count():
        raise TpcError(
            f"{local_rank + 1} ranks on this host need as many GPUs, torch finds {torch.cuda.device_count()}; "
            f"fewer ranks or --device cpu would work"
        )
    torch.cuda.set_device(local_rank)


def _store(rank: int, timeout: float) -> dist.TCPStore:
    """The store at MASTER_ADDR:MASTER_PORT, which torchrun serves; without torchrun, rank 0 does."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise TpcError("RANK is set but MASTER_ADDR and MASTER_PORT are not: start the ranks with torchrun")
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=timeout)
    try:
        return dist.TCPStore(address, int(port), is_master=serves, timeout=limit, wait_for_workers=False)
    except (RuntimeError, ValueError) as e:
        raise TpcError(f"rank {rank} cannot reach the others at {address}:{port}: {str(e).splitlines()[0]}") from None
