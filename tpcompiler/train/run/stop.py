"""A run that is asked to stop writes a checkpoint first: SIGTERM, Ctrl-C, SIGUSR1 and `--stop-after`."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from tpcompiler.errors import TpcError
from tpcompiler.train.run.launch import Place

# What asked for the end, by urgency, and the exit code of `tpc train` then. Batch systems send SIGUSR1 ahead of time.
REASONS = {1: ("the time limit", 0), 2: ("Ctrl-C", 130), 3: ("SIGTERM", 143)}
_SIGNALS = {signal.SIGUSR1: 1, signal.SIGINT: 2, signal.SIGTERM: 3}
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of `3h50m`, `90s`, `1d` or a plain number of seconds. Raises `TpcError`."""
    parts = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    if not text.strip() or parts is None:
        raise TpcError(f"--stop-after {text}: not a duration; 3h50m, 90s or 5400 would work")
    return float(sum(int(n or 0) * size for n, size in zip(parts.groups(), _UNITS.values(), strict=True)))


class StopRequest:
    """Whether the run is to stop, agreed on by all ranks: they leave the loop after the same step."""

    def __init__(self, place: Place, after: float | None = None) -> None:
        """`after`: seconds from now."""
        self._place = place
        self._end = None if after is None else time.monotonic() + after
        self._wanted = 0
        self._said = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals become wishes for the length of the block. A second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._hear) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: FrameType | None) -> None:
        wish = _SIGNALS[signal.Signals(number)]
        if self._wanted >= wish > 1:
            raise SystemExit(REASONS[wish][1])
        self._wanted = max(self._wanted, wish)

    def agreed(self) -> int:
        """The key in `REASONS` of why to stop now; 0 to continue. Collective, once a step.

        What the ranks say is exchanged while the next step runs, so that none waits for it: a wish is heard one step
        later.
        """
        if self._end is not None and time.monotonic() > self._end:
            self._wanted = max(self._wanted, 1)
        if self._place.world == 1:
            return self._wanted
        heard = self.settle()
        self._said.fill_(self._wanted)
        self._work = dist.all_reduce(self._said, dist.ReduceOp.MAX, async_op=True)
        return heard

    def settle(self) -> int:
        """Ends the exchange that is under way. Collective."""
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        return int(self._said)
