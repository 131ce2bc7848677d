"""This program beside the plain model and the split that one writes by hand, in turns, on one GPU.

    python benchmarks/peers.py --spec specs/gpt2-1.2b.yaml ours:true plain
    python benchmarks/peers.py --spec specs/gpt2-2.5b.yaml --alone 2 --wire 50,300 ours:true ours:halves:wire hand

Contestants: `ours:OVERLAP`; `plain` (models/gpt2.py, blocks compiled, fused AdamW); `transformers` (the same for
--model hf:TYPE, whose settings are the spec's); `hand` (a Megatron split written by hand, blocks compiled). After it,
separated by colons: `wire` (collectives take the wire's time; else none), `graphs` (`hand`'s step is one CUDA graph;
ours always is), `unfused` (ours with output layer and loss apart), `trace` (how much of the communication is hidden,
by the profiler). All are set up first, then each takes a few steps in turn, for several rounds. Printed: one JSON
object a contestant with the median, and with the ratio to the first one's in each round.
With --alone N all are the first of N ranks; see wire.py. `plain` is always the whole model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import train_gpu
from benchmarks.wire import Wire
from models import gpt2
from tpcompiler import passes
from tpcompiler.passes.fuse_losses import fuse_losses
from tpcompiler.spec.schema import Spec
from tpcompiler.train.run.launch import Place
from tpcompiler.train.step.traced import traced

Step = Callable[[], object]


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_reduce(x.contiguous(), op, dist.group.WORLD.group_name))


class Enter(torch.autograd.Function):
    """f of arXiv 1909.08053"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce(grad)


class Reduce(torch.autograd.Function):
    """g of arXiv 1909.08053"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class HandBlock(nn.Module):
    def __init__(self, hidden: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.width = heads // size, hidden // heads
        self.ln_1, self.ln_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden // size), nn.Linear(hidden // size, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden // size), nn.Linear(4 * hidden // size, hidden, bias=False)
        self.out_bias, self.down_bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(Enter.apply(self.ln_1(x)))
        q, k, v = (t.unflatten(-1, (self.heads, self.width)).transpose(1, 2) for t in y.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + Reduce.apply(self.out(y)) + self.out_bias
        y = F.gelu(self.up(Enter.apply(self.ln_2(x))), approximate="tanh")
        return x + Reduce.apply(self.down(y)) + self.down_bias


class HandGPT2(nn.Module):
    """The first of `size` ranks of a GPT-2 whose vocabulary divides by it."""

    def __init__(self, vocab: int, positions: int, hidden: int, heads: int, layers: int, size: int) -> None:
        super().__init__()
        self.rows = vocab // size
        self.wte, self.wpe = nn.Embedding(self.rows, hidden), nn.Embedding(positions, hidden)
        self.h = nn.ModuleList(HandBlock(hidden, heads, size) for _ in range(layers))
        self.ln_f = nn.LayerNorm(hidden)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        outside = input_ids >= self.rows
        x = Reduce.apply(self.wte(input_ids.masked_fill(outside, 0)).masked_fill(outside.unsqueeze(-1), 0))
        x = x + self.wpe(torch.arange(labels.shape[1], device=labels.device))
        for block in self.h:
            x = block(x)
        logits = F.linear(Enter.apply(self.ln_f(x)), self.wte.weight).float()
        top = all_reduce(logits.detach().amax(-1), "max")
        log_sum = Reduce.apply((logits - top.unsqueeze(-1)).exp().sum(-1)).log() + top
        outside = labels >= self.rows
        picked = logits.gather(-1, labels.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
        return (log_sum - Reduce.apply(picked.masked_fill(outside, 0))).mean()


def torch_step(model: nn.Module, a: argparse.Namespace, vocab: int, graphs: bool, layers: str = "h") -> Step:
    """Forward, backward and fused AdamW of a model in bf16, its layers compiled."""
    for layer in model.get_submodule(layers).children():
        layer.compile()
    cuda = a.device == "cuda"
    how: dict[str, Any] = {"fused": True, "capturable": True} if cuda else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **how)
    ids, labels = (torch.randint(vocab, (a.batch, a.sequence), device=a.device) for _ in range(2))

    def step() -> Tensor:
        found = model(input_ids=ids, labels=labels)
        loss: Tensor = found if isinstance(found, Tensor) else found.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    if not (graphs and cuda):
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay


@contextmanager
def passes_of(words: list[str]) -> Any:
    kept = passes.PASSES
    if "unfused" in words:
        passes.PASSES = tuple(p for p in kept if p is not fuse_losses)
    try:
        yield
    finally:
        passes.PASSES = kept


def ours(a: argparse.Namespace, place: Place, words: list[str]) -> tuple[Step, float]:
    overlap = next((train_gpu.OVERLAP[w] for w in words if w in train_gpu.OVERLAP), False)
    with passes_of(words):
        run = train_gpu.build(a, place, None if a.model.startswith("hf:") else 0.0, "layers", overlap)
    batches = [[run.batches.batch_at(s, 0).to(place.device)] for s in range(4)]
    done = [0]

    def step() -> object:
        done[0] += 1
        return run.engine.step(done[0] - 1, batches[done[0] % 4])

    return step, train_gpu.flops_of(run, batches[0][0]) / place.world


def build(a: argparse.Namespace, place: Place, wire: Wire | None, name: str) -> tuple[Step, float | None]:
    kind, *words = name.split(":")
    if wire is not None:
        wire.set(*(a.wire if "wire" in words else ()), multiprocessors=a.occupy if "wire" in words else 0)
    if kind == "ours":
        return ours(a, place, words)
    if kind == "transformers":
        return torch_step(transformers_model(a), a, 256, False, "model.layers"), None
    sizes = {k: v for k, v in {**Spec.load(a.spec).model, **train_gpu.parse_settings(a.set)}.items() if k != "dropout"}
    vocab = sizes["vocab"] if kind == "plain" else sizes["vocab"] // place.world
    with torch.device(a.device):
        model = gpt2.Model(**sizes, dropout=0.0) if kind == "plain" else HandGPT2(**sizes, size=place.world)
    return torch_step(model.bfloat16().train(), a, vocab, "graphs" in words), None


def transformers_model(a: argparse.Namespace) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(a.model.removeprefix("hf:"), **Spec.load(a.spec).model, use_cache=False)
    with torch.device(a.device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.train()


def main() -> None:
    a = arguments()
    a.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    a.tensor = a.alone
    place, wire = train_gpu.alone(a.alone, a.device, a.wire is not None)
    started = time.perf_counter()
    contestants: dict[str, tuple[Step, float | None]] = {}
    for name in a.contestants:
        step, flops = build(a, place, wire, name)
        for _ in range(5):  # compiled, and recorded with this wire's times
            step()
        wait()
        contestants[name] = step, flops
        print(f"{time.perf_counter() - started:5.0f} s  {name} is set up", file=sys.stderr, flush=True)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(a.rounds):
        for name, (step, _) in contestants.items():
            step()
            wait()
            begin = time.perf_counter()
            for _ in range(a.steps):
                step()
            wait()
            times[name].append((time.perf_counter() - begin) / a.steps * 1e3)
    report(a, place, contestants, times)
    dist.destroy_process_group()


def report(
    a: argparse.Namespace,
    place: Place,
    contestants: dict[str, tuple[Step, float | None]],
    times: dict[str, list[float]],
) -> None:
    flops = next((f for _, f in contestants.values() if f is not None), None)
    first = next(iter(times.values()))
    for name, mine in times.items():
        ms = statistics.median(mine)
        found: dict[str, Any] = {"contestant": name, "spec": a.spec, "one_of": place.world, "wire": a.wire}
        found |= {"ms_step": round(ms, 2), "ms_rounds": [round(t, 2) for t in mine]}
        found["of_first"] = round(statistics.median(b / t for b, t in zip(first, mine, strict=True)), 4)
        if flops is not None:
            found["tflops"] = round(flops / ms / 1e9, 1)
        if "trace" in name.split(":") and a.device == "cuda":
            found["hidden"] = traced(contestants[name][0], 2)[0].as_dict()
            print(f"{name}: milliseconds of a step by kernel", *top(traced(contestants[name][0], 2)[1]), sep="\n")
        found |= {"torch": torch.__version__, "device": torch.cuda.get_device_name() if a.device == "cuda" else "cpu"}
        print(json.dumps(found), flush=True)


def top(kernels: list[tuple[str, float, float]], steps: int = 2, most: int = 22) -> list[str]:
    """The kernels that take longest: milliseconds and launches a step, and the name."""
    found: dict[str, list[float]] = {}
    for name, start, end in kernels:
        found.setdefault(name, []).append((end - start) / 1000)
    ordered = sorted(found.items(), key=lambda p: -sum(p[1]))[:most]
    return [f"{sum(t) / steps:8.2f} {len(t) // steps:5d}  {name[:110]}" for name, t in ordered]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("contestants", nargs="+")
    p.add_argument("--model", default="models/gpt2.py")
    p.add_argument("--spec", default="specs/gpt2-1.2b.yaml")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    p.add_argument("--alone", type=int, default=1, metavar="N")
    p.add_argument("--wire", type=train_gpu.wire_times, default=None, metavar="ALPHA,BETA")
    p.add_argument("--occupy", type=int, default=0)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--sequence", type=int, default=1024)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=4)
    found = p.parse_args()
    settings = {"warm_up": 1000, "micro_batch": None, "precision": "bf16", "graphs": True, "recompute": "none"}
    for name, value in {**settings, "initial": "device"}.items():
        setattr(found, name, value)
    return found


if __name__ == "__main__":
    main()
