"""Measures the machine that it runs on, for the description of hardware that `tpc calibrate` writes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
import torch.nn.functional as F

ASSUMED_SHARE = 0.79  # of an unknown peak rate: the share that a large product reached on an H200


@dataclass(frozen=True)
class Workload:
    """The sizes of the kernels and collectives that are measured."""

    product: int
    narrow: int
    attention: tuple[int, int, int, int]  # batch, heads, sequence, head size
    moved: int  # numbers that an elementwise kernel reads
    all_reduced: tuple[int, ...]  # bytes of all-reduces


LARGE = Workload(8192, 1024, (8, 16, 1024, 96), 2**28, (2**14, 2**18, 2**22, 2**25, 2**27))
SMALL = Workload(512, 64, (2, 4, 256, 64), 2**22, (2**10, 2**14, 2**18, 2**20))


def measure(device: torch.device, peak: float | None, bandwidth: float | None) -> dict[str, float]:
    """Measures keys of `Hardware`: the rates of products, attention and memory, and those of all-reduces if
    `torch.distributed` has several ranks. `peak` (TFLOP/s) and `bandwidth` (GB/s) are the maker's, if known.

    It takes a few seconds, and the device should be idle. Every rank calls it.
    """
    sizes, dtype = (LARGE, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    large = _product(device, dtype, sizes.product, sizes.product)
    thin = _product(device, dtype, sizes.product, sizes.narrow)
    peak = peak or large / 1e12 / ASSUMED_SHARE
    found = {"peak_tflops": peak, "efficiency": min(1.0, large / 1e12 / peak)}
    found["narrow"] = max(0.0, sizes.narrow * (large / thin - 1))
    found["attention_efficiency"] = min(1.0, _attention(device, dtype, sizes.attention) / 1e12 / peak)
    moved = _moved(device, dtype, sizes.moved) / 1e9
    bandwidth = bandwidth or moved
    found |= {"bandwidth_gbps": bandwidth, "bandwidth_efficiency": min(1.0, moved / bandwidth)}
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    if dist.is_initialized() and dist.get_world_size() > 1:
        alpha, beta = _all_reduces(device, sizes.all_reduced)
        found |= {"alpha_us": alpha * 1e6, "beta_gbps": beta / 1e9}
    return {key: round(value, 3) for key, value in found.items()}


def _product(device: torch.device, dtype: torch.dtype, n: int, shortest: int) -> float:
    """FLOP/s of the product [n, shortest] · [shortest, n]."""
    a, b = torch.randn(n, shortest, device=device, dtype=dtype), torch.randn(shortest, n, device=device, dtype=dtype)
    return 2 * n * n * shortest / _seconds(device, lambda: a @ b)


def _attention(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> float:
    """FLOP/s of causal attention, forward. Only the half of the products that the mask needs is counted."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    flops = 4 * prod(shape) * shape[2] / 2
    return flops / _seconds(device, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _moved(device: torch.device, dtype: torch.dtype, numbers: int) -> float:
    """Bytes a second that an elementwise kernel reads and writes."""
    x = torch.randn(numbers, device=device, dtype=dtype)
    out = torch.empty_like(x)
    return 2 * x.nbytes / _seconds(device, lambda: torch.mul(x, 2.0, out=out))


def _all_reduces(device: torch.device, sizes: Sequence[int]) -> tuple[float, float]:
    """α in seconds and β in bytes a second, where an all-reduce of n bytes takes α + 2 (k − 1) / k · n / β seconds."""
    world = dist.get_world_size()
    points = []
    for size in sizes:
        x = torch.zeros(size, dtype=torch.uint8, device=device)
        dist.barrier()
        points.append((2 * (world - 1) / world * size, _seconds(device, lambda x=x: dist.all_reduce(x))))  # type: ignore[misc]
    return fit(points)


def fit(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fits (α, β) of seconds = α + bytes / β to points (bytes, seconds), each weighted by 1 / seconds."""
    rows = torch.tensor([[1 / s, n / s] for n, s in points], dtype=torch.float64)
    alpha, inverse = (
        torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution.flatten().tolist()
    )
    return max(alpha, 0.0), 1 / max(inverse, 1e-15)


def _seconds(device: torch.device, work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds per call of `work`: the median of several runs of ten calls, after one run to warm up."""
    times = []
    for i in range(repeats + 1):
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            work()
        _wait(device)
        if i:
            times.append((time.perf_counter() - start) / 10)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
