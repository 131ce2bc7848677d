"""What the ranks of a run tell each other besides tensors, over torchrun's key-value store.

Ranks say who has arrived, which files of a checkpoint are on the disk, and that one of them has failed. A store needs
no matching calls, so a rank in trouble can speak while the others wait in a collective.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from tpcompiler.errors import TpcError

TIMEOUT = 600.0  # seconds until a rank that does not arrive, or does not come to a collective, is given up
_POLL = (0.002, 0.2)  # seconds between two looks at the store: at first, and in the end
_LATE = 5.0  # seconds that rank 0, which names those that are missing, has for saying so
_CONNECT = timedelta(seconds=60)  # until a store that served a moment ago is given up


class Board:
    """Texts by key, seen by all ranks. One process alone needs no store.

    Keys begin with torchrun's count of restarts: what an earlier start of the same ranks has posted is not read again.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, store: dist.TCPStore | None = None, timeout: float = TIMEOUT
    ) -> None:
        assert world == 1 or store is not None
        self.rank, self.world, self.timeout = rank, world, timeout
        self._store = store
        self._local: dict[str, str] = {}
        self._prefix = f"{restarts()}/"

    def clone(self) -> Board:
        """For another thread: a store's connection serves one call at a time."""
        if self._store is None:
            return self
        return Board(self.rank, self.world, connect(self._store.host, self._store.port), self.timeout)

    def post(self, key: str, text: str) -> None:
        if self._store is None:
            self._local[key] = text
        else:
            self._store.set(self._prefix + key, text)

    def post_first(self, key: str, text: str) -> str:
        """Posts the text unless the key has one already. Returns the text that the key has now."""
        if self._store is None:
            return self._local.setdefault(key, text)
        return self._store.compare_set(self._prefix + key, "", text).decode()

    def read(self, key: str) -> str | None:
        if self._store is None:
            return self._local.get(key)
        key = self._prefix + key
        return self._store.get(key).decode() if self._store.check([key]) else None

    def wait(self, key: str, timeout: float | None = None) -> str | None:
        """The text under a key, as soon as it is there; None after `timeout` seconds."""
        if self._store is None:
            return self._local.get(key)
        if not self._wait([key], self.timeout if timeout is None else timeout):
            return None
        return self._store.get(self._prefix + key).decode()

    def _wait(self, keys: Sequence[str], timeout: float) -> bool:
        """Whether all keys are there within `timeout` seconds. Looks ever more rarely: all ranks share the store.

        The store could tell by itself, but a wait that it gives up is a warning of torch on the screen.
        """
        assert self._store is not None
        end = time.monotonic() + timeout
        names, pause = [self._prefix + key for key in keys], _POLL[0]
        while not self._store.check(names):
            if time.monotonic() > end:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL[1])
        return True

    def gather(self, key: str, text: str = "", patience: float | None = None) -> list[str]:
        """Every rank's text, in order. Collective; each `key` is used once.

        Rank 0 collects and hands out, so that the store serves a number of calls that grows with the ranks, not with
        their square. Raises `TpcError` on all when a rank does not come within `patience` seconds (default: the run's
        time-out).
        """
        if self._store is None:
            return [text]
        limit = self.timeout if patience is None else patience
        self.post(f"{key}/{self.rank}", text)
        if self.rank == 0:
            own = [f"{key}/{r}" for r in range(self.world)]
            there = self._wait(own, limit)
            missing = [] if there else [r for r, k in enumerate(own) if self.read(k) is None]
            texts = [] if missing else self._store.multi_get([self._prefix + k for k in own])
            self.post(f"{key}/all", json.dumps([missing, [t.decode() for t in texts]]))
        collected = self.wait(f"{key}/all", limit + _LATE)
        missing, found = ([0], []) if collected is None else json.loads(collected)
        if missing:
            names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing[:8]))}"
            raise TpcError(f"{names} of {self.world} did not arrive within {limit:g} s")
        return list(found)

    def delete(self, key: str) -> None:
        if self._store is None:
            self._local.pop(key, None)
        else:
            self._store.delete_key(self._prefix + key)


def connect(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, is_master=False, timeout=_CONNECT, wait_for_workers=False)


def restarts() -> int:
    """How often torchrun has started these ranks again (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
