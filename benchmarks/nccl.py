"""Time of NCCL's collectives by bytes, and the α and β that fit them (`hardware:` in a spec).

    torchrun --nproc-per-node 2 benchmarks/nccl.py

Prints one JSON object: per collective, [bytes, microseconds] of the whole value (median of 20), then `alpha_us` and
`beta_gbps` of time = α + bytes / β, least squares in relative error.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist

SIZES = [2**k for k in (12, 15, 18, 20, 22, 24, 25, 26, 27, 28, 29)]


def median_us(call: Callable[[], object]) -> float:
    for _ in range(5):
        call()
    times = []
    for _ in range(20):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def fit(points: list[tuple[int, float]]) -> tuple[float, float]:
    """α in microseconds and β in gigabytes a second, each point weighed by 1/time²."""
    rows = torch.tensor([[1 / t, n / t] for n, t in points], dtype=torch.float64)
    alpha, slope = torch.linalg.lstsq(rows, torch.ones(len(points), 1, dtype=torch.float64)).solution[:, 0].tolist()
    return alpha, 1e-3 / slope


def main() -> None:
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    world = dist.get_world_size()
    result: dict[str, object] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ranks": world}
    for name in ("all_reduce", "all_gather", "reduce_scatter"):
        points = []
        for size in SIZES:
            whole = torch.zeros(size // 2 // world * world, dtype=torch.bfloat16, device=device)
            part = torch.zeros(whole.numel() // world, dtype=torch.bfloat16, device=device)
            call = {
                "all_reduce": lambda w=whole: dist.all_reduce(w),
                "all_gather": lambda w=whole, p=part: dist.all_gather_into_tensor(w, p),
                "reduce_scatter": lambda w=whole, p=part: dist.reduce_scatter_tensor(p, w),
            }[name]
            points.append((size, median_us(call)))
        alpha, beta = fit(points)
        shown = [[n, round(t, 1)] for n, t in points]
        result[name] = {"points": shown, "alpha_us": round(alpha, 1), "beta_gbps": round(beta, 1)}
    if dist.get_rank() == 0:
        print(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
