"""A run's ranks end together: the first error on any of them ends all, and one line says it.

A thread of every rank posts a sign of life and watches the next rank's, so that a rank that is stopped or cut off is
named, with its host and what it was doing, before any collective times out.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from tpcompiler.errors import TpcError
from tpcompiler.train.run.board import Board
from tpcompiler.train.run.launch import Place

Say = Callable[[str], None]

_WATCH = 0.3  # seconds between two looks for an alarm
_GRACE = 10.0  # seconds that a failed rank gives rank 0 to say so
_FAILED = "failed"


@contextmanager
def together(place: Place, say: Say) -> Iterator[None]:
    """A block that all ranks run: an error on one of them ends them all, and rank 0 says it, once, by `say(line)`.

    The first error wins. Ends the process with exit code 2 for a `TpcError`, 143 and 130 for SIGTERM and Ctrl-C, and 70
    for a bug; a single process raises as usual. A rank that waits in a collective is ended by a thread of its own.
    """
    if place.world == 1:
        yield
        return
    done = threading.Event()
    board = place.board.clone()  # connected while whoever serves the store still lives
    watcher = threading.Thread(target=_watch, args=(place, done, say), name="alarm", daemon=True)
    watcher.start()
    try:
        yield
        place.board.post(f"finished/{place.rank}", "")
        if place.rank == 0:  # it may serve the store, and ends last
            place.board.gather("finished")
    except TpcError as e:
        done.set()
        _ring(board, f"2 {e}", say)
    except (SystemExit, KeyboardInterrupt) as e:
        done.set()
        code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 130
        _ring(board, f"{code} stopped by {'SIGTERM' if code == 143 else 'Ctrl-C'} without a checkpoint", say)
    except Exception as e:
        done.set()
        if _lost_contact(e):
            time.sleep(_GRACE / 5)  # the launcher is ending us, or the rank that failed is speaking
            _ring(board, f"2 {_who_is_missing(place, board, e)}", say)
        if os.environ.get("TPC_TRACEBACK"):
            traceback.print_exc()
        _ring(board, f"70 {_bug(e)}", say)
    finally:
        done.set()
    watcher.join()
    dist.destroy_process_group()


def _watch(place: Place, done: threading.Event, say: Say) -> None:
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
        except Exception:  # whoever served the store is gone, and with it the run
            if not done.wait(1.0):
                os._exit(1)
            return
        if failed:
            _ring(board, "", say)
        if now - heard > place.board.timeout and seen and board.read(f"finished/{watched}") is None:
            _, where, doing = seen.split("\t", 2)
            silence = f"has not answered for {now - heard:.0f} s; the last it did was {doing}"
            _ring(board, f"2 rank {watched} (host {where}) {silence}", say)


def _who_is_missing(place: Place, board: Board, e: Exception) -> str:
    """Which ranks are not where this one is, in a line."""
    reason = str(e).splitlines()[0][:120]
    behind = []
    for rank in range(place.world):
        text = board.read(f"alive/{rank}")
        if rank != place.rank and text is not None and text.split("\t", 2)[2] != place.activity.now:
            _, host, doing = text.split("\t", 2)
            behind.append(f"rank {rank} (host {host}) was at {doing}")
    where = f"; {', '.join(behind[:4])}" if behind else ""
    return f"rank {place.rank} lost the other ranks in {place.activity.now}: {reason}{where}"


def _ring(board: Board, message: str, say: Say) -> None:
    """Tells all ranks, lets rank 0 say what the first of them told, and ends the process.

    Should rank 0 not speak, the rank that rang first does.
    """
    code, text = 1, ""
    try:
        first = board.post_first(_FAILED, message)
        number, text = first.split(" ", 1)
        code = int(number)
        if board.rank == 0:
            say(text)
            board.post(f"{_FAILED}/said", "")
            time.sleep(2 * _WATCH)  # the others read the store that this process may serve
        elif board.wait(f"{_FAILED}/said", _GRACE / 2) is None and first == message:
            say(text)
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
