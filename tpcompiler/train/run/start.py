"""The processes of a run: started by torchrun's launcher, joined by its environment, ended together.

Ranks tell each other what is no tensor over torchrun's own key-value store (`Board`): who has arrived, which files of
a checkpoint are on the disk, and that one of them has failed. A store needs no matching calls, so that a rank in
trouble can speak while the others wait in a collective.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from signal import Signals
from typing import TypeVar

import torch
import torch.distributed as dist

from tpcompiler.errors import TpcError

Returned = TypeVar("Returned")

_POLL = 0.05  # seconds between two looks at the store
_WATCH = 0.3  # seconds between two looks for an alarm
_GRACE = 10.0  # seconds that a failed rank gives rank 0 to say so, or the launcher to end it
_CONNECT = timedelta(seconds=60)  # until a store that served a moment ago is given up
_FAILED = "failed"
TIMEOUT = 600.0  # seconds until a rank that does not arrive, or does not come to a collective, is given up


def launched() -> bool:
    """Whether torchrun, or something with its environment, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(arguments: Sequence[str], ranks: int) -> int:
    """Runs `tpc ARGUMENTS` as so many processes on this host and gives their exit code.

    This is torchrun's launcher, called as a function: its port is free, its store on 127.0.0.1, it ends all processes
    when one has failed, and never starts them again. Errors: `TpcError` when a process is killed by a signal.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the launcher's own report of a failure: ours is one line
    try:
        elastic_launch(config, sys.executable)("-m", "tpcompiler.cli.main", *arguments)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        if failure.exitcode < 0:
            signal = Signals(-failure.exitcode).name
            raise TpcError(
                f"rank {rank} was killed by {signal}; the same command goes on from the last checkpoint"
            ) from None
        return failure.exitcode
    finally:
        logging.disable(before)
    return 0


class Board:
    """Texts by key, seen by all ranks. One process alone needs no store."""

    def __init__(
        self, rank: int = 0, world: int = 1, store: dist.TCPStore | None = None, timeout: float = TIMEOUT
    ) -> None:
        assert world == 1 or store is not None
        self.rank, self.world, self.timeout = rank, world, timeout
        self._store = store
        self._local: dict[str, str] = {}

    def clone(self) -> Board:
        """For another thread: a store's connection serves one call at a time."""
        if self._store is None:
            return self
        return Board(self.rank, self.world, _connect(self._store.host, self._store.port), self.timeout)

    def post(self, key: str, text: str) -> None:
        if self._store is None:
            self._local[key] = text
        else:
            self._store.set(key, text)

    def post_first(self, key: str, text: str) -> str:
        """Posts unless somebody has done so before; what stands there then."""
        if self._store is None:
            return self._local.setdefault(key, text)
        return self._store.compare_set(key, "", text).decode()

    def read(self, key: str) -> str | None:
        if self._store is None:
            return self._local.get(key)
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, key: str, timeout: float | None = None) -> str | None:
        """The text under a key, as soon as it is there; None after `timeout` seconds."""
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (text := self.read(key)) is None:
            if time.monotonic() > end:
                return None
            time.sleep(_POLL)
        return text

    def gather(self, key: str, text: str = "") -> list[str]:
        """Every rank's text, in order. Collective; a `key` serves once. Raises `TpcError` when a rank does not come."""
        self.post(f"{key}/{self.rank}", text)
        texts = [self.wait(f"{key}/{r}") for r in range(self.world)]
        missing = [str(r) for r, t in enumerate(texts) if t is None]
        if missing:
            names = "rank " + missing[0] if len(missing) == 1 else "ranks " + ", ".join(missing[:8])
            raise TpcError(f"{names} of {self.world} did not arrive within {self.timeout:g} s")
        return [t for t in texts if t is not None]

    def delete(self, key: str) -> None:
        if self._store is None:
            self._local.pop(key, None)
        else:
            self._store.delete_key(key)


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    board: Board

    @property
    def first_here(self) -> bool:
        """Whether this is the first rank of its host."""
        return self.local_rank == 0

    def in_turn(self, key: str, fn: Callable[[], Returned]) -> Returned:
        """`fn()` on the first rank of every host, then on the others, which find done what it did. Collective."""
        if self.world == 1:
            return fn()
        if self.first_here:
            out = fn()
            self.board.gather(key)
            return out
        self.board.gather(key)
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
    if not dist.is_initialized():
        store = _store(rank, timeout)
        board = Board(rank, world, store, timeout).clone()
        board.gather("arrived")
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        groups, limit = dist.PrefixStore("groups", store), timedelta(seconds=timeout)
        dist.init_process_group(backend, store=groups, rank=rank, world_size=world, timeout=limit)
        return Place(rank, world, local_rank, where, board)
    raise AssertionError("this process has joined a run before")


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


def _connect(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, timeout=_CONNECT, wait_for_workers=False)


@contextmanager
def together(place: Place, say: Callable[[str], None]) -> Iterator[None]:
    """A block that all ranks run: an error on one of them ends them all, and rank 0 says it, once, by `say(line)`.

    The first error wins. Ends the process with exit code 2 for a `TpcError` and 70 for a bug; a single process raises
    as usual. A rank that waits in a collective is ended by a thread of its own.
    """
    if place.world == 1:
        yield
        return
    done = threading.Event()
    board = place.board.clone()  # connected while whoever serves the store still lives
    watcher = threading.Thread(target=_watch, args=(place.board.clone(), done, say), name="alarm", daemon=True)
    watcher.start()
    try:
        yield
        place.board.post(f"finished/{place.rank}", "")
        if place.rank == 0:  # it may serve the store, and ends last
            place.board.gather("finished")
    except TpcError as e:
        done.set()
        _ring(board, f"2 {e}", say)
    except Exception as e:
        done.set()
        if _lost_contact(e):
            time.sleep(_GRACE / 5)  # the launcher is ending us, or the rank that failed is speaking
            _ring(board, f"2 rank {place.rank} lost the other ranks: {str(e).splitlines()[0][:200]}", say)
        if os.environ.get("TPC_TRACEBACK"):
            traceback.print_exc()
        _ring(board, f"70 {_bug(e)}", say)
    finally:
        done.set()
    watcher.join()
    dist.destroy_process_group()


def _watch(board: Board, done: threading.Event, say: Callable[[str], None]) -> None:
    while not done.wait(_WATCH):
        try:
            failed = board.read(_FAILED) is not None
        except Exception:  # whoever served the store is gone, and with it the run
            if not done.wait(1.0):
                os._exit(1)
            return
        if failed:
            _ring(board, "", say)


def _ring(board: Board, message: str, say: Callable[[str], None]) -> None:
    """Tells all ranks, lets rank 0 say what the first of them told, and ends the process."""
    code, text = 1, ""
    try:
        first, text = board.post_first(_FAILED, message).split(" ", 1)
        code = int(first)
        if board.rank == 0:
            say(text)
            board.post(f"{_FAILED}/said", "")
            time.sleep(2 * _WATCH)  # the others read the store that this process may serve
        else:
            board.wait(f"{_FAILED}/said", _GRACE)
    except Exception:  # the store is gone
        if board.rank == 0 and message:
            say(message.split(" ", 1)[1])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lost_contact(e: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(e, dist.DistError):
        return True
    return isinstance(e, RuntimeError) and any(word in str(e) for word in ("gloo", "NCCL", "Connection closed by peer"))


def _bug(e: Exception) -> str:
    frame = traceback.extract_tb(e.__traceback__)[-1]
    what = f"{type(e).__name__}: {e}".removesuffix(": ")
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"a bug of tpcompiler: {what} (at {place}); please report it with the output of TPC_TRACEBACK=1"
