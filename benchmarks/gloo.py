"""This program beside DTensor on processes without a GPU: forward and backward of a small GPT-2, in turns.

    python benchmarks/gloo.py --ranks 2

Both split the same plain model, over gloo, without torch.compile: DTensor by `parallelize_module` with its parallel
loss, with (`dtensor_sp`) and without sequence parallelism. One JSON object: median milliseconds, and the median over
rounds of DTensor's time over this program's. Losses must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tpcompiler as tpc

HEAD = 32  # width of a head


class Attention(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = (
            nn.LayerNorm(hidden),
            Attention(hidden),
            nn.LayerNorm(hidden),
            MLP(hidden),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, vocab: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, hidden)
        self.h = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.ln_f, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocab, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.wte(ids)
        for block in self.h:
            x = block(x)
        return F.cross_entropy(self.head(self.ln_f(x)).flatten(0, 1), labels.flatten())


def by_dtensor(model: GPT2, mesh: DeviceMesh, sequence: bool) -> nn.Module:
    rows = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "wte": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        "head": ColwiseParallel(input_layouts=rows, output_layouts=Shard(-1), use_local_output=False),
    }
    if sequence:
        plan["ln_f"] = SequenceParallel()
    parallelize_module(model, mesh, plan)
    for block in model.h:
        own: dict[str, Any] = {f"attn.{n}": ColwiseParallel() for n in "qkv"} | {"mlp.up": ColwiseParallel()}
        own |= {n: RowwiseParallel(output_layouts=rows) for n in ("attn.o", "mlp.down")}
        if sequence:
            whole = PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(Replicate(),))
            own |= {"ln_1": SequenceParallel(), "ln_2": SequenceParallel(), "attn": whole, "mlp": whole}
        parallelize_module(block, mesh, own)
    return model


def rank(index: int, a: argparse.Namespace, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(index)}
    os.environ |= {"WORLD_SIZE": str(a.ranks), "LOCAL_RANK": str(index)}
    torch.set_num_threads(a.threads)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (a.ranks,), mesh_dim_names=("tensor",))

    def plain() -> GPT2:
        torch.manual_seed(0)
        return GPT2(a.vocab, a.hidden, a.layers)

    ids, labels = torch.randint(a.vocab, (2, a.batch, a.sequence), generator=torch.Generator().manual_seed(1))
    inputs = {"ids": ids, "labels": labels}
    models: dict[str, nn.Module] = {"ours": tpc.parallelize(plain(), inputs, {"mesh": {"tensor": a.ranks}}, mesh=mesh)}
    models |= {"dtensor": by_dtensor(plain(), mesh, False), "dtensor_sp": by_dtensor(plain(), mesh, True)}
    times: dict[str, list[float]] = {name: [] for name in models}
    losses = {}
    for turn in range(a.rounds + 1):
        for name, model in models.items():
            step = stepping(model, name, inputs)
            losses[name] = step()
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(a.steps):
                step()
            dist.barrier()
            if turn:
                times[name].append((time.perf_counter() - begin) / a.steps * 1e3)
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    if index == 0:
        found: dict[str, Any] = {"ranks": a.ranks, "threads": a.threads, "torch": torch.__version__}
        found |= {"ms": {n: round(statistics.median(t), 2) for n, t in times.items()}}
        ratios = {n: [b / o for b, o in zip(t, times["ours"], strict=True)] for n, t in times.items()}
        found |= {"of_ours": {n: round(statistics.median(r), 3) for n, r in ratios.items()}}
        print(json.dumps(found | {"sizes": [a.batch, a.sequence, a.hidden, a.layers, a.vocab]}), flush=True)
    dist.destroy_process_group()


def stepping(model: nn.Module, name: str, inputs: dict[str, Tensor]) -> Callable[[], float]:
    def step() -> float:
        model.zero_grad(set_to_none=True)
        if name == "ours":
            loss = model(**inputs)
            loss.backward()
            return float(loss.detach())
        with loss_parallel():
            loss = model(**inputs)
            loss.backward()
        return float(loss.detach().full_tensor())

    return step


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"ranks": 2, "threads": 1, "batch": 4, "sequence": 64, "hidden": 128, "layers": 4}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"vocab": 512, "rounds": 9, "steps": 5}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank, (a, port), a.ranks)


if __name__ == "__main__":
    main()
