"""What the ranks of a run tell each other besides tensors, over torchrun's key-value store.

Ranks say who has arrived, which files of a checkpoint are on the disk, and that one of them has failed. A store needs
no matching calls, so a rank in trouble can speak while the others wait in a collective.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch.distributed as dist

from tpcompiler.errors import TpcError

TIMEOUT = 600.0  # seconds until a rank that does not arrive, or does not come to a collective, is given up
_POLL = 0.05  # seconds between two looks at the store
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
        end = time.monotonic() + (self.timeout if timeout is None else timeout)
        while (text := self.read(key)) is None:
            if time.monotonic() > end:
                return None
            time.sleep(_POLL)
        return text

    def gather(self, key: str, text: str = "", patience: float | None = None) -> list[str]:
        """Every rank's text, in order. Collective; each `key` is used once.

        Raises `TpcError` when a rank does not come within `patience` seconds (default: the run's time-out).
        """
        self.post(f"{key}/{self.rank}", text)
        texts = [self.wait(f"{key}/{r}", patience) for r in range(self.world)]
        missing = [str(r) for r, t in enumerate(texts) if t is None]
        if missing:
            names = "rank " + missing[0] if len(missing) == 1 else "ranks " + ", ".join(missing[:8])
            raise TpcError(
                f"{names} of {self.world} did not arrive within {self.timeout if patience is None else patience:g} s"
            )
        return [t for t in texts if t is not None]

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
