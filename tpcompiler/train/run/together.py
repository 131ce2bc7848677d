"""A run's ranks end together: the first error on any of them ends all, and one line says it.

There is one way to end: the main thread leaves the block, every `finally` on its way is run, and `tpc` ends the
process (`RankEnded`). A rank that hears of another's error is made to leave likewise; only one that is stuck in a
collective, where no thread of Python can reach it, is ended from outside after a few seconds.

A thread of every rank posts a sign of life and watches the next rank's, so that a rank that is stopped or cut off is
named, with its host and what it was doing, before any collective times out.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from tpcompiler.errors import RankEnded, TpcError
from tpcompiler.train.run.board import Board
from tpcompiler.train.run.launch import Place

Say = Callable[[str], None]

_WATCH = 0.3  # seconds between two looks for an alarm
_GRACE = 10.0  # seconds that a failed rank gives rank 0 to say so
_LEAVE = 5.0  # seconds that the main thread has to leave the block once the run has failed
_FAILED = "failed"


@contextmanager
def together(place: Place, say: Say) -> Iterator[None]:
    """A block that all ranks run: an error on one of them ends them all, and rank 0 says it, once, by `say(line)`.

    The first error wins. Raises `RankEnded` with exit code 2 for a `TpcError`, 143 and 130 for SIGTERM and Ctrl-C, and
    70 for a bug; a single process raises as usual.
    """
    if place.world == 1:
        yield
        return
    done, main = threading.Event(), threading.get_ident()
    alarm = Alarm(place.board.clone(), say)  # connected while whoever serves the store still lives
    watcher = threading.Thread(target=_watch, args=(place, done, alarm, main), name="alarm", daemon=True)
    watcher.start()
    try:
        yield
        place.board.post(f"finished/{place.rank}", "")
        if place.rank == 0:  # it may serve the store, and ends last
            place.board.gather("finished")
    except BaseException as e:
        done.set()
        if not isinstance(e, RankEnded):
            _tell(place, alarm, e)
        raise RankEnded(alarm.heard()) from None
    finally:
        done.set()
    watcher.join()
    dist.destroy_process_group()


class Alarm:
    """What the first rank that failed has told the others; from any thread."""

    def __init__(self, board: Board, say: Say) -> None:
        self.board, self._say = board, say
        self._lock = threading.Lock()
        self._own = ""  # what this rank told
        self._code: int | None = None

    def ring(self, message: str) -> None:
        """Tells all ranks `CODE TEXT`, unless another has told them something before."""
        with self._lock, suppress(RuntimeError):  # the store may be gone
            self._own = message
            self.board.post_first(_FAILED, message)

    def heard(self) -> int:
        """The exit code. Lets rank 0 say what was told; should it not, the rank that told it does."""
        with self._lock:
            if self._code is None:
                self._code = self._listen()
            return self._code

    def _listen(self) -> int:
        code, own, board = 1, self._own, self.board
        try:
            first = board.read(_FAILED) or own or "1 "
            number, text = first.split(" ", 1)
            code = int(number)
            if board.rank == 0:
                self._say(text)
                board.post(f"{_FAILED}/said", "")
                time.sleep(2 * _WATCH)  # the others read the store that this process may serve
            elif board.wait(f"{_FAILED}/said", _GRACE / 2) is None and first == own:
                self._say(text)
        except RuntimeError:  # the store is gone
            number, _, text = own.partition(" ")
            code = int(number or code)
            if board.rank == 0 and own:
                self._say(text)
        return code


def _tell(place: Place, alarm: Alarm, e: BaseException) -> None:
    """Tells the others what has gone wrong here."""
    if isinstance(e, TpcError):
        alarm.ring(f"2 {e}")
    elif isinstance(e, SystemExit | KeyboardInterrupt):
        code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 130
        alarm.ring(f"{code} stopped by {'SIGTERM' if code == 143 else 'Ctrl-C'} without a checkpoint")
    elif isinstance(e, Exception) and _lost_contact(e):
        time.sleep(_GRACE / 5)  # the launcher is ending us, or the rank that failed is speaking
        alarm.ring(f"2 {_who_is_missing(place, alarm.board, e)}")
    else:
        if os.environ.get("TPC_TRACEBACK"):
            traceback.print_exc()
        alarm.ring(f"70 {_bug(e)}")


def _watch(place: Place, done: threading.Event, alarm: Alarm, main: int) -> None:
    """Looks for an alarm, posts this rank's signs of life, and watches those of the next rank."""
    board, host = place.board.clone(), socket.gethostname()
    beat = min(5.0, place.board.timeout / 10)
    watched = (place.rank + 1) % place.world
    count, seen, posted = 0, "", 0.0
    heard = time.monotonic()
    while not done.wait(min(_WATCH, beat)):
        now = time.monotonic()
        try:
            failed = board.read(_FAILED) is not None
            if now - posted > beat:
                count, posted = count + 1, now
                board.post(f"alive/{place.rank}", f"{count}\t{host}\t{place.activity.now}")
                there = board.read(f"alive/{watched}") or ""
                if there != seen:
                    seen, heard = there, now
            silent = bool(seen) and now - heard > place.board.timeout and board.read(f"finished/{watched}") is None
        except Exception:  # whoever served the store is gone, and with it the run
            if not done.wait(1.0):
                _leave(alarm, done, main)
            return
        if failed:
            _leave(alarm, done, main)
            return
        if silent:
            _, where, doing = seen.split("\t", 2)
            silence = f"has not answered for {now - heard:.0f} s; the last it did was {doing}"
            alarm.ring(f"2 rank {watched} (host {where}) {silence}")
            _leave(alarm, done, main)
            return


def _who_is_missing(place: Place, board: Board, e: Exception) -> str:
    """Which ranks are not where this one is, in a line."""
    reason = str(e).splitlines()[0][:120]
    behind = []
    with suppress(RuntimeError):  # whoever served the store is gone
        for rank in range(place.world):
            text = board.read(f"alive/{rank}")
            if rank != place.rank and text is not None and text.split("\t", 2)[2] != place.activity.now:
                _, host, doing = text.split("\t", 2)
                behind.append(f"rank {rank} (host {host}) was at {doing}")
    where = f"; {', '.join(behind[:4])}" if behind else ""
    return f"rank {place.rank} lost the other ranks in {place.activity.now}: {reason}{where}"


def _leave(alarm: Alarm, done: threading.Event, main: int) -> None:
    """Makes the main thread leave the block; ends the process where it cannot, in a collective."""
    code = alarm.heard()
    if not done.is_set():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(RankEnded))
    if not done.wait(_LEAVE):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lost_contact(e: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    if isinstance(e, dist.DistError):
        return True
    return isinstance(e, RuntimeError) and any(word in str(e) for word in ("gloo", "NCCL", "Connection closed by peer"))


def _bug(e: BaseException) -> str:
    frame = traceback.extract_tb(e.__traceback__)[-1]
    what = f"{type(e).__name__}: {e}".removesuffix(": ")
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"a bug of tpcompiler: {what} (at {place}); please report it with the output of TPC_TRACEBACK=1"
