"""How much of a step's communication runs beside computation, as the device's own clock tells it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

COLLECTIVES = ("nccl", "spin", "reduce_scatter", "all_gather", "multimem", "one_shot", "two_shot")  # in kernels' names
PRODUCTS = ("gemm", "nvjet", "cutlass", "flash", "fmha", "wgmma", "cublas", "triton_tem")

Span = tuple[float, float]


@dataclass(frozen=True)
class Hidden:
    """Milliseconds of traced steps."""

    steps: int
    communicating: float  # some collective runs
    beside: float  # of these, something else runs as well
    beside_products: float  # of these, a matrix product or an attention
    computing: float  # something else than a collective runs

    @property
    def share(self) -> float | None:
        """The hidden share of communication; None without any."""
        return self.beside / self.communicating if self.communicating else None

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "share": None if self.share is None else round(self.share, 3)}

    def __str__(self) -> str:
        if self.share is None:
            return "no communication"
        took = self.communicating / self.steps
        return f"communication {took:.1f} ms a step, {self.share:.0%} of it beside computation"


def hidden(kernels: Iterable[tuple[str, float, float]], steps: int = 1) -> Hidden:
    """The share from a device's kernels, each with its name, start and end in microseconds."""
    sent: list[Span] = []
    others: list[Span] = []
    products: list[Span] = []
    for name, start, end in kernels:
        plain = name.lower()
        if any(word in plain for word in COLLECTIVES):
            sent.append((start, end))
            continue
        others.append((start, end))
        if any(word in plain for word in PRODUCTS):
            products.append((start, end))
    sent, others, products = union(sent), union(others), union(products)
    times = (length(sent), common(sent, others), common(sent, products), length(others))
    return Hidden(steps, *(t / 1000 for t in times))


def union(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans that do not overlap, in order."""
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((start, end))
    return out


def length(spans: Sequence[Span]) -> float:
    return sum(end - start for start, end in spans)


def common(a: Sequence[Span], b: Sequence[Span]) -> float:
    """How long two unions last at the same time."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total


def traced(step: Callable[[], object], steps: int = 1) -> tuple[Hidden, list[tuple[str, float, float]]]:
    """Runs `step` so many times under torch's profiler. What of its communication was hidden, and all kernels."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    found = [
        (e.name, float(e.time_range.start), float(e.time_range.end))
        for e in p.events() or ()
        if e.device_type == on_device and not e.name.startswith(("Memcpy", "Memset", "ProfilerStep"))
    ]
    return hidden(found, steps), found
