"""Steps whose loss or gradient norm stands out from those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import isfinite
from statistics import fmean, pstdev

WINDOW, LEAST = 100, 20  # steps that are compared with, and how many there must be
_SMALLEST = 1e-3  # of the mean: a deviation is taken to be at least this, so that a flat curve has no spikes


class Spikes:
    """The losses and gradient norms of the last good steps. The same on all ranks, who come to the same answers."""

    def __init__(self, limit: float | None, known: Iterable[Iterable[float]] = ()) -> None:
        self.limit = limit
        self._known: deque[tuple[float, float]] = deque(((a, b) for a, b in known), maxlen=WINDOW)

    def fault(self, loss: float, norm: float) -> str:
        """What is wrong with a step; empty, and the step remembered, when nothing is."""
        for name, value in (("loss", loss), ("gradient's norm", norm)):
            if not isfinite(value):
                return f"{name} is {value}"
        if self.limit is None:
            return ""
        if len(self._known) >= LEAST:
            for i, name in enumerate(("loss", "gradient's norm")):
                before = [pair[i] for pair in self._known]
                mean = fmean(before)
                deviation = max(pstdev(before), _SMALLEST * abs(mean))
                z = ((loss, norm)[i] - mean) / deviation if deviation else 0.0
                if z > self.limit:
                    found = f"{(loss, norm)[i]:.4g}, {z:.1f} standard deviations above its mean {mean:.4g}"
                    return f"{name} is {found} (train.spike: {self.limit:g})"
        self._known.append((loss, norm))
        return ""

    def state(self) -> list[list[float]]:
        return [list(pair) for pair in self._known]
